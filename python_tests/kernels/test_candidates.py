"""Candidates as arrays that travel: those of parts are those of the whole; searches of parts, too."""

import numpy as np
import pytest

from sela_ext.errors import OptionError
from sela_ext.kernels import find_candidates, newton_rows, sinkhorn_pass
from sela_ext.kernels.candidates import candidate_arrays, join_candidates, too_many_candidates
from sela_ext.kernels.reference.rounding import find_candidates as twin


def kept(logits, part, weights=None):
    return sinkhorn_pass(
        logits[part],
        np.zeros(logits.shape[1]),
        scale=25.0,
        keep=16.0,
        row_weights=None if weights is None else weights[part],
        first_row=part.start if part.stop > part.start else 0,
        rows_in_all=len(logits),
        largest_weight=4.0,
        threads=1,
    ).candidates


@pytest.mark.parametrize("cols", [31, 70_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_candidates_of_parts_join_to_those_of_the_whole(cols, weighted):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((300, cols)).astype(np.float32)
    weights = rng.integers(1, 4, 300).astype(np.float32) if weighted else None
    whole = kept(logits, slice(0, 300), weights)
    parts = [candidate_arrays(kept(logits, slice(*ends), weights)) for ends in ((0, 128), (128, 128), (128, 300))]
    joined = join_candidates(parts, cols, 16.0, 10**9)
    assert parts[0][1].dtype == (np.uint16 if cols < 65_536 else np.uint32)
    assert (joined.rows, joined.entries, joined.level, joined.overflow) == (300, whole.entries, 16.0, False)
    for name in ("offsets", "columns", "values", "weights"):
        np.testing.assert_array_equal(getattr(joined, name)(), getattr(whole, name)(), strict=True)


def test_more_candidates_than_the_limit_are_too_many():
    logits = np.random.default_rng(1).standard_normal((300, 31)).astype(np.float32)
    parts = [candidate_arrays(kept(logits, slice(*ends))) for ends in ((0, 128), (128, 300))]
    entries = sum(len(part[1]) for part in parts)
    assert not join_candidates(parts, 31, 16.0, entries).overflow
    assert join_candidates(parts, 31, 16.0, entries - 1).overflow
    none = too_many_candidates(31, 16.0)
    assert (none.overflow, none.cols, none.entries) == (True, 31, 0)
    with pytest.raises(OptionError, match="there were more than keep_at_most"):
        newton_rows(none)


@pytest.mark.parametrize("find", [find_candidates, twin])
def test_a_part_lists_the_columns_that_the_whole_lists_for_its_rows(find):
    logits = np.round(2 * np.random.default_rng(2).standard_normal((300, 200))).astype(np.float32)  # many equal scores
    labels = logits.argmax(1).astype(np.int32)
    whole = find(logits, np.zeros(200), labels, count=3)
    part = find(logits[128:], np.zeros(200), labels[128:], count=3, first_row=128)
    chosen = find(logits[128:], np.zeros(200), labels[128:], count=3, first_row=128, selected=np.array([5, 100]))
    for name in ("columns", "values", "found", "regret"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[128:])
        np.testing.assert_array_equal(getattr(chosen, name), getattr(whole, name)[[133, 228]])
    assert (find(logits[128:], np.zeros(200), labels[128:], count=3).columns != whole.columns[128:]).any()
