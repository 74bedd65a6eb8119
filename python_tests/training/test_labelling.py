import subprocess
import sys

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import FeatureLogits
from sela_ext.errors import OptionError
from sela_ext.models import Heads
from sela_ext.training import labelling
from sela_ext.training.labelling import choose_head, label_pass, random_labels
from sela_ext.training.prototypes import place_prototypes
from sela_ext.training.ranks import Ranks


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


# D6
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


# D18
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
    solve = labelling.assign_silently
    monkeypatch.setattr(
        labelling, "assign_silently", lambda logits, **given: taken.append(logits) or solve(logits, **given)
    )
    options = {"lam": 25.0, "tol": 1e-5, "threads": 1}
    given = (heads, embeddings.to(dtype), valid, np.zeros((2, 401), np.int32))
    stored = label_pass(*given, **options)
    monkeypatch.setattr(labelling, "_free_memory", lambda *_: 0.0)
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
    """Neither on those of torch, nor on those of libraries beside it, which look at OMP_NUM_THREADS as they load."""
    code = """
import torch, hashlib
from sela_ext.models import Heads
from sela_ext.training.prototypes import place_prototypes
def digest():
    torch.manual_seed(0)
    heads = Heads(32, [50], "cosine")
    place_prototypes(heads, torch.randn(3000, 32), torch.ones(3000, dtype=torch.bool), seed=0)
    return hashlib.sha256(heads.weight.detach().numpy().tobytes()).hexdigest()
"""
    found = {}
    exec(code, found)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = found["digest"]()
    finally:
        torch.set_num_threads(before)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code + "print(digest(), digest())"],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "3", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [alone, alone]


def separate_labels(heads, head, embeddings, lam, tol):
    """Labels by one product and one solve for this head alone, and the margin of each row in nats."""
    logits = heads.logits_of(head, embeddings).detach()
    solved = sela_ext.assign(logits, lam=lam, tol=tol, threads=1)
    score = lam * logits.double() + solved.potential
    best = score.topk(2, dim=1).values
    return solved.labels.numpy(), (best[:, 0] - best[:, 1]).numpy()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_of_all_heads_at_once_are_those_of_each_alone_but_for_near_ties(kind, dtype):
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(1301, 9, dim=33)
    embeddings = embeddings.to(dtype)
    heads = Heads(33, [9, 31, 2], kind)
    if heads.bias is not None:
        torch.nn.init.normal_(heads.bias)
        torch.nn.init.normal_(heads.weight, 0, 0.1)
    valid = torch.ones(1301, dtype=torch.bool)
    found = label_pass(heads, embeddings, valid, np.zeros((3, 1301), np.int32), lam=25.0, tol=1e-6, threads=2)
    for head in range(3):
        expected, margin = separate_labels(heads, head, embeddings, 25.0, 1e-6)
        different = found.labels[head] != expected
        assert different.mean() < 0.01
        assert (margin[different] < 0.5).all()


# D22
def test_labels_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(1101, 5, dim=64)
    heads = Heads(64, [5, 3, 40], "cosine")
    valid = torch.ones(1101, dtype=torch.bool)
    valid[77] = False
    given = (heads, embeddings.bfloat16(), valid, np.zeros((3, 1101), np.int32))
    passes = [label_pass(*given, lam=25.0, tol=1e-2, threads=threads) for threads in (1, 2, 5)]
    for other in passes[1:]:
        assert np.array_equal(passes[0].labels, other.labels)
        assert np.array_equal(passes[0].confidence, other.confidence)
        for head, potential in passes[0].potentials.items():
            assert np.array_equal(potential, other.potentials[head])


def test_a_start_saves_reads_and_keeps_the_balance():
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(4001, 8)
    heads = Heads(16, [8, 16], "cosine")
    valid = torch.ones(4001, dtype=torch.bool)
    options = {"lam": 10.0, "tol": 1e-2, "threads": 1}
    first = label_pass(heads, embeddings, valid, np.zeros((2, 4001), np.int32), **options)
    heads.weight.data += 0.02 * torch.randn_like(heads.weight)
    cold = label_pass(heads, embeddings, valid, first.labels, **options)
    warm = label_pass(heads, embeddings, valid, first.labels, start=first.potentials, **options)
    for one, two in zip(cold.heads, warm.heads, strict=True):
        assert two["converged"]
        assert two["error"] <= 1e-2
        assert two["method"] == "anderson"
        assert two["cross_entropy"] == pytest.approx(one["cross_entropy"], abs=0.05)
    assert (cold.labels == warm.labels).mean() > 0.95
    far = {head: np.linspace(-3000.0, 3000.0, len(potential)) for head, potential in first.potentials.items()}
    lost = label_pass(heads, embeddings, valid, first.labels, start=far, **options)
    assert all(head["converged"] for head in lost.heads)


def test_a_tight_tolerance_is_solved_as_without_a_start():
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(301, 4)
    heads, valid = Heads(16, [4], "cosine"), torch.ones(301, dtype=torch.bool)
    given = (heads, embeddings, valid, np.zeros((1, 301), np.int32))
    cold = label_pass(*given, lam=25.0, tol=1e-4)
    warm = label_pass(*given, lam=25.0, tol=1e-4, start={0: np.array([3.0, 0.0, 0.0, -3.0])})
    assert np.array_equal(cold.labels, warm.labels)
    assert np.array_equal(cold.potentials[0], warm.potentials[0])


def test_heads_that_do_not_fit_together_are_solved_in_groups(monkeypatch):
    torch.manual_seed(0)
    embeddings, _ = points_in_clusters(301, 5)
    heads, valid = Heads(16, [5, 7, 3, 2], "cosine"), torch.ones(301, dtype=torch.bool)
    given = (heads, embeddings, valid, np.zeros((4, 301), np.int32))
    together = label_pass(*given, lam=25.0, tol=1e-2, threads=2)
    monkeypatch.setattr(labelling, "_TOGETHER", 4 * 301 * 8)
    assert list(labelling._groups(heads, [0, 1, 2, 3], 301, torch.device("cpu"), Ranks())) == [[0], [1], [2, 3]]
    apart = label_pass(*given, lam=25.0, tol=1e-2, threads=2)
    assert np.array_equal(together.labels, apart.labels)


# D19
@pytest.mark.parametrize("threads", [1, 3])
def test_warnings_of_the_solver_are_noted_by_head_and_shown_to_nobody(threads):
    embeddings = torch.ones(200, 4)
    embeddings[:3] += torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    heads = Heads(4, [10, 20, 30], "linear")
    heads.bias.data.copy_(torch.linspace(0, 300, 60))
    result = label_pass(
        heads,
        embeddings,
        torch.ones(200, dtype=torch.bool),
        np.zeros((3, 200), np.int32),
        lam=25.0,
        tol=1e-9,
        max_passes=2,
        threads=threads,
    )
    assert result.complaints
    assert [text.split(":")[0] for text in result.complaints] == sorted(
        text.split(":")[0] for text in result.complaints
    )
    assert all(text.startswith("head ") and "assign" in text for text in result.complaints)


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
