import subprocess
import sys

import numpy as np
import pytest
import torch

from sela_ext import FeatureLogits
from sela_ext.errors import OptionError
from sela_ext.models import Heads
from sela_ext.training import labelling
from sela_ext.training.labelling import choose_head, label_pass, random_labels
from sela_ext.training.prototypes import place_prototypes


def test_random_labels_are_balanced_and_differ_by_head_and_seed():
    labels = random_labels(103, [10, 10, 7], seed=0)
    assert labels.shape == (3, 103)
    for row, k in zip(labels, (10, 10, 7), strict=True):
        sizes = np.bincount(row, minlength=k)
        assert sizes.max() - sizes.min() <= 1
    assert not np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels, random_labels(103, [10, 10, 7], seed=1))
    assert np.array_equal(labels, random_labels(103, [10, 10, 7], seed=0))


def points_in_clusters(count, k, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, dim, generator=generator)
    truth = torch.arange(count) % k
    return centres[truth] + 0.1 * torch.randn(count, dim, generator=generator), truth.numpy().astype(np.int64)


def test_a_label_pass_balances_and_describes_every_head():
    torch.manual_seed(0)
    embeddings, truth = points_in_clusters(301, 5)
    heads = Heads(16, [5, 9], "cosine")
    place_prototypes(heads, embeddings, torch.ones(301, dtype=torch.bool), seed=0)
    previous = random_labels(301, [5, 9], seed=0)
    result = label_pass(
        heads, embeddings, torch.ones(301, dtype=torch.bool), previous, lam=25.0, tol=1e-3, threads=1, truth=truth
    )
    assert [record["head"] for record in result.heads] == [0, 1]
    for record in result.heads:
        row = result.labels[record["head"]]
        sizes = np.bincount(row, minlength=record["clusters"])
        assert (record["size_min"], record["size_max"]) == (sizes.min(), sizes.max())
        assert record["changed"] == pytest.approx((row != previous[record["head"]]).mean())
        log_p = torch.log_softmax(heads.logits_of(record["head"], embeddings), 1)
        chosen = log_p[torch.arange(301), torch.from_numpy(row).long()]
        assert record["cross_entropy"] == pytest.approx(-float(chosen.detach().mean()), abs=1e-4)
        np.testing.assert_allclose(result.confidence[record["head"]], chosen.exp().detach(), atol=1e-5)
    assert result.heads[0]["nmi"] > 0.9  # prototypes placed by k-means find well-separated clusters at once


def test_exact_balance_gives_every_cluster_its_share_of_the_valid_images():
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(302, 5)
    heads = Heads(16, [7], "cosine")
    valid = torch.ones(302, dtype=torch.bool)
    valid[5] = False
    result = label_pass(
        heads, embeddings, valid, np.zeros((1, 302), np.int32), lam=25.0, tol=1e-3, balance="exact", threads=1
    )
    assert result.labels[0, 5] == -1
    assert (result.heads[0]["size_min"], result.heads[0]["size_max"]) == (43, 43)


def test_images_that_are_not_valid_get_no_label_and_change_no_other():
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(100, 4)
    heads = Heads(16, [4], "cosine")
    valid = torch.ones(100, dtype=torch.bool)
    valid[[3, 50]] = False
    spoilt = embeddings.clone()
    spoilt[3] = float("nan")
    previous = np.zeros((1, 100), np.int32)
    options = {"lam": 25.0, "tol": 1e-3, "threads": 1}
    some = label_pass(heads, spoilt, valid, previous, **options)
    assert some.labels[0, 3] == some.labels[0, 50] == -1
    assert some.confidence[0, 3] == 0
    alone = label_pass(heads, embeddings[valid], torch.ones(98, dtype=torch.bool), previous[:, :98], **options)
    assert np.array_equal(some.labels[0, valid.numpy()], alone.labels[0])


def test_rows_of_nan_are_masked_and_counted():
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(100, 4)
    embeddings[7] = float("nan")
    result = label_pass(
        Heads(16, [4]), embeddings, torch.ones(100, dtype=torch.bool), np.zeros((1, 100), np.int32), lam=25.0, tol=1e-3
    )
    assert result.masked == 1
    assert result.labels[0, 7] == -1
    assert np.isfinite(result.heads[0]["cross_entropy"])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_logits_that_memory_cannot_hold_are_computed(kind, dtype, monkeypatch):
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(401, 6)
    heads = Heads(16, [6, 11], kind)
    torch.nn.init.normal_(heads.weight)
    valid = torch.ones(401, dtype=torch.bool)
    valid[[0, 130]] = False
    taken = []
    solve = labelling.assign
    monkeypatch.setattr(labelling, "assign", lambda logits, **given: taken.append(logits) or solve(logits, **given))
    options = {"lam": 25.0, "tol": 1e-5, "threads": 1}
    given = (heads, embeddings.to(dtype), valid, np.zeros((2, 401), np.int32))
    stored = label_pass(*given, **options)
    monkeypatch.setattr(labelling, "_free_memory", lambda device: 0.0)
    computed = label_pass(*given, **options)
    assert [isinstance(logits, FeatureLogits) for logits in taken] == [False, False, True, True]
    assert (computed.labels == stored.labels).mean() > 0.99
    assert (computed.labels[:, [0, 130]] == -1).all()
    same = computed.labels == stored.labels
    np.testing.assert_allclose(computed.confidence[same], stored.confidence[same], atol=1e-4)
    for a, b in zip(computed.heads, stored.heads, strict=True):
        assert a["cross_entropy"] == pytest.approx(b["cross_entropy"], abs=0.02)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_head_as_a_linear_map_gives_its_logits(kind):
    torch.manual_seed(0)
    heads = Heads(16, [6, 11], kind)
    if heads.bias is not None:
        torch.nn.init.normal_(heads.bias)
    embeddings = torch.randn(50, 16)
    for head in (0, 1):
        weight, bias, normalize = heads.as_linear(head)
        logits = FeatureLogits(embeddings, weight, bias, normalize=normalize)[:]
        torch.testing.assert_close(logits, heads.logits_of(head, embeddings).detach(), atol=1e-4, rtol=1e-4)


def test_heads_that_are_not_asked_for_keep_their_labels():
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(60, 3)
    previous = random_labels(60, [3, 4], seed=1)
    result = label_pass(
        Heads(16, [3, 4]), embeddings, torch.ones(60, dtype=torch.bool), previous, which=[1], lam=25.0, tol=1e-2
    )
    assert np.array_equal(result.labels[0], previous[0])
    assert [record["head"] for record in result.heads] == [1]


def test_the_chosen_head_ignores_true_labels():
    records = [
        {"head": 0, "cross_entropy": 0.3, "nmi": 0.9},
        {"head": 1, "cross_entropy": 0.2, "nmi": 0.1},
        {"head": 2, "cross_entropy": 0.2, "nmi": 0.99},
    ]
    assert choose_head(records) == 1


def test_prototypes_keep_their_length_and_heads_differ():
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(200, 5)
    heads = Heads(16, [5, 5], "cosine")
    before = heads.weight.detach().norm(dim=1)
    place_prototypes(heads, embeddings, torch.ones(200, dtype=torch.bool), seed=0)
    assert torch.allclose(heads.weight.norm(dim=1), before, atol=1e-5)
    assert not torch.allclose(heads.weight[:5], heads.weight[5:])
    with pytest.raises(OptionError, match="expected at most 3, the readable images, found 5"):
        place_prototypes(heads, embeddings, torch.arange(200) < 3, seed=0)


def test_prototypes_do_not_depend_on_threads():
    code = """
import torch, hashlib
from sela_ext.models import Heads
from sela_ext.training.prototypes import place_prototypes
torch.manual_seed(0)
heads = Heads(32, [50], "cosine")
place_prototypes(heads, torch.randn(3000, 32), torch.ones(3000, dtype=torch.bool), seed=0)
print(hashlib.sha256(heads.weight.detach().numpy().tobytes()).hexdigest())
"""
    digests = set()
    for threads in ("1", "8", "8"):
        environment = {"OMP_NUM_THREADS": threads, "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def test_heads_with_as_many_clusters_are_compared_with_the_one_before():
    embeddings, _ = points_in_clusters(301, 5)
    heads = Heads(16, [5, 9, 5, 5], "cosine")
    with torch.no_grad():
        heads.weight[14:19] = heads.weight[:5]  # head 2 is head 0 again
    labels = random_labels(301, [5, 9, 5, 5], seed=0)
    result = label_pass(heads, embeddings, torch.ones(301, dtype=torch.bool), labels, lam=25.0, tol=1e-3, threads=1)
    assert ["nmi_other" in record for record in result.heads] == [False, False, True, True]
    assert result.heads[2]["nmi_other"] == pytest.approx(1.0)
    assert result.heads[3]["nmi_other"] < 0.99


@pytest.mark.parametrize("count", [1, 31, 1001])
def test_the_spread_is_that_of_the_directions(count):
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(count, 64, generator=generator)
    unit = torch.nn.functional.normalize(cloud.double(), dim=1)
    cosines = unit @ unit.T
    assert labelling.spread_of(cloud * torch.rand(count, 1, generator=generator)) == pytest.approx(
        1 - float(cosines.mean()), abs=1e-6
    )
    assert labelling.spread_of(cloud[:1].expand(count, -1)) == pytest.approx(0.0, abs=1e-6)
    assert np.isnan(labelling.spread_of(cloud[:0]))
