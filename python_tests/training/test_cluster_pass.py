import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sela_ext.errors import DataError
from sela_ext.models import Heads
from sela_ext.training.cluster_pass import cluster_pass, points_of


@pytest.fixture
def case():
    """Heads, embeddings in five groups of which three rows are not valid, and labels that are those groups."""
    torch.manual_seed(0)
    groups = np.arange(333) % 5
    embeddings = torch.randn(5, 9)[groups] + 0.05 * torch.randn(333, 9)
    valid = torch.ones(333, dtype=torch.bool)
    valid[[0, 7, 332]] = False
    embeddings[7] = torch.nan
    return Heads(9, [5, 3]), embeddings, valid, np.stack([groups, groups % 3]).astype(np.int32)


def solve(case, pca=0, **options):
    heads, embeddings, valid, previous = case
    points = points_of(embeddings, valid, pca, 1)
    options = {"iterations": 20, "seed": 0, "stream": 0, "threads": 1, **options}
    return cluster_pass(heads, points, embeddings, valid, previous, **options)


def test_clusters_keep_their_numbers_and_images_that_are_not_valid_have_none(case):
    heads, embeddings, valid, previous = case
    result = min(
        (solve(case, stream=stream, which=[0]) for stream in range(8)), key=lambda one: one.heads[0]["changed"]
    )
    known = valid.numpy()
    np.testing.assert_array_equal(result.labels[0, known], previous[0, known])
    assert (result.labels[0, ~known] == -1).all()
    np.testing.assert_array_equal(result.labels[1], previous[1])  # not asked for
    record = result.heads[0]
    assert (record["head"], record["clusters"], record["used"], record["method"]) == (0, 5, 5, "kmeans")
    log_p = heads.logits_of(0, embeddings[valid]).detach().log_softmax(1)
    chosen = torch.from_numpy(result.labels[0, known]).long()
    assert record["cross_entropy"] == pytest.approx(float(F.nll_loss(log_p, chosen)), rel=1e-4)
    expected = log_p.gather(1, chosen[:, None])[:, 0].exp().numpy()
    np.testing.assert_allclose(result.confidence[0, known], expected, rtol=1e-4)
    assert (result.confidence[0, ~known] == 0).all()
    assert list(result.potentials) == [0]
    assert not result.complaints
    assert "changed" in result.describe()


def test_heads_and_passes_start_elsewhere(case):
    previous = case[3]
    same = Heads(9, [30, 30]), torch.randn(333, 9), torch.ones(333, dtype=torch.bool), previous
    one, two = solve(same), solve(same, stream=1)
    assert not np.array_equal(one.labels[0], one.labels[1])
    assert not np.array_equal(one.labels[0], two.labels[0])
    np.testing.assert_array_equal(one.labels, solve(same).labels)


def test_points_are_whitened_and_one_long(case):
    _, embeddings, valid, _ = case
    before = embeddings.clone()
    for pca, width in ((0, 9), (4, 4), (256, 9)):
        points = points_of(embeddings, valid, pca, 1)
        assert points.shape == (330, width)
        torch.testing.assert_close(points.norm(dim=1), torch.ones(330))
    torch.testing.assert_close(points_of(embeddings, valid, 0, 1), F.normalize(embeddings[valid], dim=1))
    assert torch.equal(embeddings.nan_to_num(), before.nan_to_num())


def test_empty_clusters_and_infinite_features_are_told(case):
    heads, embeddings, _, previous = case
    alike = heads, torch.ones(333, 9), torch.ones(333, dtype=torch.bool), previous
    result = solve(alike)
    assert result.heads[0]["used"] == 1
    assert "head 0: 4 of 5 clusters are empty" in result.complaints[0]
    embeddings[3, 2] = torch.inf
    with pytest.raises(DataError, match="the network's features have become infinite: lower lr"):
        solve(case)
