import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sela_ext.models import Heads
from sela_ext.training.prototypes import forget, turn_to_means


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return Heads(6, [3, 5], "cosine")


def test_prototypes_turn_to_the_means_of_their_clusters_and_keep_their_lengths(heads):
    embeddings = torch.randn(33, 6)
    valid = torch.arange(33) != 4
    embeddings[4] = torch.nan
    labels = np.stack([np.arange(33) % 3, np.arange(33) % 4]).astype(np.int32)  # the fifth of the second is empty
    before = heads.weight.detach().clone()
    turn_to_means(heads, embeddings, valid, labels, [1])
    assert torch.equal(heads.weight[:3], before[:3])
    assert torch.equal(heads.weight[7], before[7])
    for cluster in range(4):
        rows = torch.from_numpy(labels[1] == cluster) & valid
        mean = F.normalize(embeddings[rows], dim=1).mean(0)
        torch.testing.assert_close(F.normalize(heads.weight[3 + cluster], dim=0), F.normalize(mean, dim=0))
        torch.testing.assert_close(heads.weight[3 + cluster].norm(), before[3 + cluster].norm())


def test_labels_by_nearest_mean_direction_are_those_of_the_head(heads):
    embeddings = torch.randn(501, 6)
    labels = heads.split(heads(embeddings))[0].argmax(1).numpy().astype(np.int32)
    turn_to_means(heads, embeddings, torch.ones(501, dtype=torch.bool), np.stack([labels, labels]), [0])
    assert (heads.split(heads(embeddings))[0].argmax(1).numpy() == labels).mean() > 0.8


def test_gradients_that_wait_for_further_batches_are_forgotten_with_their_heads(heads):
    heads(torch.randn(4, 6)).square().sum().backward()
    forget(torch.optim.SGD(heads.parameters(), 0.1), heads, [1])
    assert (heads.weight.grad[:3] != 0).all()
    assert (heads.weight.grad[3:] == 0).all()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("which", [[0], [0, 1]])
def test_the_optimiser_forgets_the_rows_of_a_head_and_all_of_all_heads(kind, which):
    torch.manual_seed(0)
    heads = Heads(6, [3, 5])
    other = torch.nn.Parameter(torch.ones(2))
    parameters = [*heads.parameters(), other]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(parameters)
    (heads(torch.randn(4, 6)).square().sum() + other.sum()).backward()
    optimizer.step()
    forget(optimizer, heads, which)
    assert other in optimizer.state
    name = "momentum_buffer" if kind == "sgd" else "exp_avg"
    if len(which) == 2:
        assert heads.weight not in optimizer.state
        assert heads.bias not in optimizer.state
        return
    for parameter in heads.parameters():
        kept = optimizer.state[parameter][name]
        assert (kept[:3] == 0).all()
        assert (kept[3:] != 0).all()
