import numpy as np
import pytest
import torch

import sela_ext
from sela_ext.assign import FeatureLogits
from sela_ext.errors import OptionError
from sela_ext.models import Heads
from sela_ext.training.labelling import label_pass
from sela_ext.training.marginals import check_labelling, check_marginals, estimated_shares, size_options


def uneven_heads(clusters=(5, 8), images=1001, width=6):
    """Heads whose first cluster draws most images, and embeddings."""
    torch.manual_seed(0)
    heads = Heads(width, clusters)
    with torch.no_grad():
        heads.weight.mul_(20)
        for head in range(len(clusters)):
            heads.bias[sum(clusters[:head])] = 1.0
    return heads, torch.randn(images, width)


def solve(heads, embeddings, **options):
    images = len(embeddings)
    previous = np.zeros((len(heads.clusters), images), np.int32)
    valid = torch.ones(images, dtype=torch.bool)
    result = label_pass(heads, embeddings, valid, previous, lam=25.0, tol=1e-4, threads=1, **options)
    return [np.bincount(labels, minlength=k) for labels, k in zip(result.labels, heads.clusters, strict=True)], result


def test_estimated_shares_are_the_mean_prediction_and_a_tenth_of_an_equal_share():
    logits = torch.randn(1001, 7, generator=torch.Generator().manual_seed(0)) * 3
    expected = 0.9 * logits.double().softmax(1).mean(0) + 0.1 / 7
    torch.testing.assert_close(estimated_shares(logits), expected)
    logits[3, 2], logits[5, 1] = torch.nan, torch.inf
    rows = torch.isfinite(logits).all(1)
    torch.testing.assert_close(estimated_shares(logits), 0.9 * logits[rows].double().softmax(1).mean(0) + 0.1 / 7)
    never = torch.zeros(31, 3)
    never[:, 2] = -1000.0
    torch.testing.assert_close(
        estimated_shares(never), torch.tensor([0.9 / 2 + 0.1 / 3, 0.9 / 2 + 0.1 / 3, 0.1 / 3]).double()
    )


def test_estimated_shares_of_logits_that_are_not_stored_are_the_same():
    features, weight = torch.randn(501, 5), torch.randn(9, 5)
    torch.testing.assert_close(
        estimated_shares(FeatureLogits(features, weight)), estimated_shares(features @ weight.T), rtol=1e-5, atol=1e-8
    )


def test_estimated_marginals_give_each_head_the_sizes_that_it_predicts():
    heads, embeddings = uneven_heads()
    sizes, result = solve(heads, embeddings, marginals="estimated")
    for head, counted in enumerate(sizes):
        shares = estimated_shares(heads.logits_of(head, embeddings).detach()).numpy()
        np.testing.assert_allclose(counted, shares * 1001, atol=12)
        assert counted.max() > 1.4 * 1001 / len(counted)
        assert result.heads[head]["converged"]


def test_bounds_are_multiples_of_an_equal_share_of_each_head():
    heads, embeddings = uneven_heads()
    equal, _ = solve(heads, embeddings)
    bounded, _ = solve(heads, embeddings, size_bounds=[0.5, 1.5])
    for even, sizes in zip(equal, bounded, strict=True):
        share = 1001 / len(sizes)
        assert np.abs(even - share).max() <= 12  # the argmax of a plan that is balanced
        assert sizes.min() >= 0.5 * share - 12
        assert sizes.max() <= 1.5 * share + 12
        assert sizes.max() > 1.2 * share


def test_relaxed_sizes_lie_between_equal_ones_and_those_of_the_network():
    heads, embeddings = uneven_heads()
    spread = [np.ptp(solve(heads, embeddings, relax=relax)[0][0]) for relax in (100.0, 0.3, 0.01)]
    free = np.bincount(heads.logits_of(0, embeddings).argmax(1).numpy(), minlength=5)
    assert spread[0] < 25 < spread[1] < spread[2] <= np.ptp(free) + 12


def test_the_solver_is_given_what_it_gives_for_the_same_problem():
    heads, embeddings = uneven_heads((5,))
    logits = heads.logits_of(0, embeddings).detach()
    for ours, theirs in [
        ({"relax": 0.3}, {"relax": 0.3}),
        ({"size_bounds": [0.5, 2]}, {"size_bounds": (100.1, 400.4)}),
    ]:
        _, result = solve(heads, embeddings, **ours)
        np.testing.assert_array_equal(
            result.labels[0], np.asarray(sela_ext.assign(logits, tol=1e-4, threads=1, **theirs).labels)
        )
    assert size_options(None, None, None, logits) == {"marginals": None, "relax": None, "size_bounds": None}


DEFAULTS = {
    "method": "sela",
    "clusters": [4, 4],
    "marginals": None,
    "relax": None,
    "size_bounds": None,
    "balance": "argmax",
    "label_source": "bank",
    "ema": 0.0,
}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"marginals": "guessed"}, "expected estimated, or a list of shares, found 'guessed'"),
        ({"marginals": 3}, "expected estimated, or a list"),
        ({"marginals": [1, 1]}, r"one share per cluster \(4\), found 2"),
        ({"marginals": [1, 1, 1, -1]}, "marginals: expected numbers > 0"),
        ({"relax": 0}, "relax: expected a number > 0, found 0"),
        ({"relax": True}, "relax: expected a number > 0"),
        ({"relax": "much"}, "relax: expected a number > 0"),
        ({"size_bounds": [0.5]}, "size_bounds: expected two multiples"),
        ({"size_bounds": [1.5, 2]}, r"0 <= low <= 1 <= high, .* found \[1.5, 2\]"),
        ({"size_bounds": [0.5, float("nan")]}, "size_bounds: expected two multiples"),
        ({"relax": 1.0, "size_bounds": [0.5, 2]}, "relax and size_bounds: expected at most one"),
        ({"relax": 1.0, "balance": "exact"}, 'relax: expected balance "argmax"'),
        ({"size_bounds": [0.5, 2], "balance": "exact"}, 'size_bounds: expected balance "argmax"'),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(given, match):
    with pytest.raises(OptionError, match=match):
        check_marginals({**DEFAULTS, **given})


@pytest.mark.parametrize("method", ["kmeans", "deepcluster"])
@pytest.mark.parametrize(
    "given", [{"marginals": "estimated"}, {"relax": 1.0}, {"size_bounds": [0.5, 2]}, {"balance": "exact"}]
)
def test_methods_that_cluster_balance_nothing(method, given):
    fitting = {**DEFAULTS, "method": method, "label_source": "eval"}
    check_labelling(fitting)
    with pytest.raises(OptionError, match=f"{next(iter(given))}: expected none with method {method}"):
        check_labelling({**fitting, **given})


def test_deepcluster_takes_labels_from_a_pass_over_the_images():
    with pytest.raises(OptionError, match="label_source: expected eval with method deepcluster, found bank"):
        check_labelling({**DEFAULTS, "method": "deepcluster"})
    with pytest.raises(OptionError, match="ema: expected 0 with method deepcluster"):
        check_labelling({**DEFAULTS, "method": "deepcluster", "label_source": "eval", "ema": 0.9})
