import copy

import pytest
import torch
from torch import nn

from sela_ext.training.averaging import WeightAverage


def network_at(value):
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    for tensor in [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]:
        tensor.data.fill_(value)
    return network


def test_the_average_is_the_plain_mean_at_first_and_then_forgets():
    network = network_at(100.0)
    average = WeightAverage(network, 0.75)
    values = [1.0, 2.0, 6.0, 3.0, 8.0, -1.0]
    expected = None
    for t, value in enumerate(values):
        network.load_state_dict(network_at(value).state_dict())
        average.update(network)
        decay = min(0.75, 1 - 1 / (t + 1))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert float(average.network[0].weight.mean()) == pytest.approx(expected, rel=1e-5)
        assert float(average.network[1].running_var.mean()) == pytest.approx(expected, rel=1e-5)
        if t < 4:
            assert expected == pytest.approx(sum(values[: t + 1]) / (t + 1))
    assert average.updates == len(values)


def test_batch_norm_counts_are_copied_and_the_network_stays_as_it_is():
    network = network_at(1.0)
    average = WeightAverage(network, 0.9)
    network(torch.randn(4, 1, 5, 5))
    before = copy.deepcopy(network.state_dict())
    average.update(network)
    assert int(average.network[1].num_batches_tracked) == 1
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert not average.network.training
    assert not any(p.requires_grad for p in average.network.parameters())
    assert all(p.requires_grad for p in network.parameters())


def test_an_average_comes_back_from_its_state():
    network = network_at(1.0)
    average = WeightAverage(network, 0.9)
    for value in (2.0, 5.0):
        network.load_state_dict(network_at(value).state_dict())
        average.update(network)
    other = WeightAverage(network_at(-1.0), 0.9)
    other.load(copy.deepcopy(average.state()))
    assert other.updates == 2
    for one in (average, other):
        one.update(network)
    assert all(
        torch.equal(value, other.network.state_dict()[name]) for name, value in average.network.state_dict().items()
    )
