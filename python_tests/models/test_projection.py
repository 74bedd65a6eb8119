import pytest
import torch
from torch import nn

from sela_ext.models import Network, make_projection, projection_widths


def kinds(module):
    return [type(layer).__name__ for layer in module]


def test_zero_is_no_projection():
    module, length = make_projection(33, 0)
    assert isinstance(module, nn.Identity)
    assert length == 33
    assert projection_widths(module.state_dict()) == 0


def test_a_number_ends_in_a_relu_and_a_list_in_a_linear_layer():
    assert kinds(make_projection(33, 7)[0]) == ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds(make_projection(33, [7])[0]) == ["Linear"]
    assert kinds(make_projection(33, [9, 7])[0]) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert len(make_projection(33, [11, 9, 7])[0]) == 7


@pytest.mark.parametrize("widths", [7, [7], [9, 7], [11, 9, 7], [1, 1]])
def test_the_widths_are_found_in_the_weights(widths):
    module, length = make_projection(33, widths)
    assert projection_widths(module.state_dict()) == widths
    assert module(torch.randn(5, 33)).shape == (5, length)


@torch.no_grad()
def test_an_mlp_gives_negative_values_too():
    torch.manual_seed(0)
    network = Network(nn.Flatten(), 12, [4], projection=[16, 8], head_kind="cosine", temperature=0.1)
    embedding = network(torch.randn(31, 3, 2, 2))
    assert embedding.shape == (31, 8)
    assert network.embedding_dim == network.heads.weight.shape[1] == 8
    assert float(embedding.min()) < 0 < float(embedding.max())


def test_the_names_are_those_of_the_published_networks():
    assert set(make_projection(2048, [2048, 128])[0].state_dict()) == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
        "3.weight",
        "3.bias",
    }
