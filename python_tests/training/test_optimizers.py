import copy

import pytest
import torch
from torch import nn

from sela_ext.training.averaging import WeightAverage
from sela_ext.training.optimizers import Lars, build_optimizer
from sela_ext.training.options import Options
from sela_ext.training.update import Update


def chosen(**given):
    base = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.01, "decay_vectors": False}
    return Options(**{**base, **given})


def small_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("lars", Lars), ("adamw", torch.optim.AdamW)])
def test_every_optimiser_decays_matrices_alone(name, kind):
    network = small_network()
    network[3].bias.requires_grad_(False)
    optimizer = build_optimizer(chosen(optimizer=name), network)
    assert type(optimizer) is kind
    matrices, vectors = optimizer.param_groups
    assert [p.ndim for p in matrices["params"]] == [2, 2]
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0.0)


def test_the_paper_decays_vectors_too_but_lars_never_does():
    network = small_network()
    everything = build_optimizer(chosen(decay_vectors=True), network).param_groups
    assert [len(group["params"]) for group in everything] == [6, 0]
    lars = build_optimizer(chosen(decay_vectors=True, optimizer="lars"), network).param_groups
    assert [len(group["params"]) for group in lars] == [2, 4]
    assert [group["adapt"] for group in lars] == [True, False]


def restated_lars(weights, gradients, buffers, *, lr, momentum, decay, nesterov, adapt):
    """Algorithm 1 of the paper, a tensor and a number at a time, in float64."""
    for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        gradient = gradient.double()
        local = 1.0
        length, slope = float(weight.double().pow(2).sum() ** 0.5), float(gradient.pow(2).sum() ** 0.5)
        if adapt and length > 0 and slope + decay * length > 0:
            local = 0.001 * length / (slope + decay * length)
        step = lr * local * (gradient + decay * weight.double())
        buffers[i] = momentum * buffers[i] + step
        weight -= step + momentum * buffers[i] if nesterov else buffers[i]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adapt", [False, True])
def test_lars_is_the_algorithm_of_its_paper(nesterov, adapt):
    torch.manual_seed(0)
    shapes = [(31, 7), (1,), (3, 5, 2, 2), (1001,)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected = [w.detach().double().clone() for w in weights]
    buffers = [torch.zeros_like(w) for w in expected]
    options = {"lr": 2.0, "momentum": 0.9, "nesterov": nesterov}
    optimizer = Lars(weights, weight_decay=0.02, adapt=adapt, **options)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = options["lr"] = 2.0 / (step + 1)
        gradients = [torch.randn(shape) for shape in shapes]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        restated_lars(expected, gradients, buffers, decay=0.02, adapt=adapt, **options)
    for weight, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), right, atol=1e-5, rtol=1e-5)


def test_lars_moves_a_layer_by_its_trust_whatever_the_size_of_the_gradient():
    for size in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.full((4, 4), 2.0))
        weight.grad = torch.full((4, 4), size)
        Lars([weight], lr=1.0, momentum=0.0).step()
        assert float((weight.detach() - 2.0).norm()) == pytest.approx(0.001 * 8.0, rel=1e-3)


def test_lars_steps_from_zero_weights_and_stays_without_a_gradient():
    zero, idle = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.ones(2, 2))
    zero.grad, idle.grad = torch.ones(3, 3), torch.zeros(2, 2)
    Lars([zero, idle], lr=0.5, momentum=0.0).step()
    assert torch.equal(zero.detach(), torch.full((3, 3), -0.5))
    assert torch.equal(idle.detach(), torch.ones(2, 2))


def test_lars_takes_a_closure_and_leaves_out_parameters_without_gradients():
    weight, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lars([weight, unused], lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 4.0
    assert float(weight.detach().sum()) < 4.0
    assert torch.equal(unused.detach(), torch.ones(2, 2))


def loss_of(network, seed, rows=16):
    generator = torch.Generator().manual_seed(seed)
    return network(torch.randn(rows, 7, generator=generator)).square().mean()


def update_of(network, *, accumulate=1, ema=0.0, optimizer="sgd", scaler=False):
    return Update(
        network,
        build_optimizer(chosen(optimizer=optimizer), network),
        torch.amp.GradScaler("cpu", enabled=scaler, init_scale=1024.0),
        accumulate,
        WeightAverage(network, ema) if ema else None,
    )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_an_update_continues_with_the_same_bits_also_inside_a_group(optimizer, accumulate):
    whole = small_network()
    update = update_of(whole, accumulate=accumulate, ema=0.9, optimizer=optimizer, scaler=True)
    for step in range(4):
        update.take(loss_of(whole, step))
    assert update.waiting == (1 if accumulate == 3 else 0)
    kept = copy.deepcopy({"network": whole.state_dict(), "update": update.state()})
    other = small_network(seed=1)
    other.load_state_dict(kept["network"])
    resumed = update_of(other, accumulate=accumulate, ema=0.9, optimizer=optimizer, scaler=True)
    resumed.load(kept["update"])
    for step in range(4, 9):
        update.take(loss_of(whole, step))
        resumed.take(loss_of(other, step))
    update.finish()
    resumed.finish()
    pairs = [(whole, other), (update.average.network, resumed.average.network)]
    for one, two in pairs:
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name]), name


def test_two_batches_of_a_group_are_one_batch_twice_as_large():
    torch.manual_seed(0)
    data = torch.randn(32, 7)
    networks = [nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    split, whole = update_of(networks[0], accumulate=2), update_of(networks[1])
    for _ in range(5):
        for part in data.split(16):
            split.take(networks[0](part).square().mean())
        whole.take(networks[1](data).square().mean())
    for one, two in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_a_group_has_one_rate_and_what_is_left_of_one_still_counts():
    network = small_network()
    update = update_of(network, accumulate=2)
    update.set_rate(0.5)
    update.take(loss_of(network, 0))
    update.set_rate(0.25)
    assert [group["lr"] for group in update.optimizer.param_groups] == [0.5, 0.5]
    before = network[0].weight.detach().clone()
    update.finish()
    assert not torch.equal(network[0].weight, before)
    update.set_rate(0.25)
    assert [group["lr"] for group in update.optimizer.param_groups] == [0.25, 0.25]
    before = network[0].weight.detach().clone()
    update.finish()  # nothing is left
    assert torch.equal(network[0].weight, before)


def test_a_step_whose_gradients_overflow_is_left_out_and_the_scale_halved():
    network = small_network()
    update = update_of(network, scaler=True)
    update.take(loss_of(network, 0))
    before = copy.deepcopy(network.state_dict())
    update.take((network[0].weight * torch.inf).sum())
    assert torch.equal(network[0].weight, before["0.weight"])
    assert update.scaler.get_scale() == 512.0
    update.take(loss_of(network, 1))
    assert not torch.equal(network[0].weight, before["0.weight"])


def test_the_scaler_changes_no_step_that_does_not_overflow():
    plain, scaled = small_network(), small_network()
    with_scaler, without = update_of(scaled, scaler=True), update_of(plain)
    for step in range(3):
        without.take(loss_of(plain, step))
        with_scaler.take(loss_of(scaled, step))
    for one, two in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-6)
