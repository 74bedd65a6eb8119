"""What the self-check of a CUDA device runs of candidates, parts of the rows and stored logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.kernels import check_cases
from sela_ext.kernels.logits import store_logits
from sela_ext.kernels.sinkhorn import pass_on_cpu

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from sela_ext.kernels.check_cases import Case, Runs
    from sela_ext.kernels.sinkhorn_sums import SinkhornSums

COLUMNS = (31, 1000, 1025, 8193)  # one of every mapping; 1000: rows of 16-bit types are aligned
LEVEL = 9.0  # nats
KINDS = ("fixed16", "float16", "bfloat16")


def candidate_cases(runs: Runs) -> Iterator[Case]:
    """Every case, as `check_cases.cases` gives them."""
    import torch

    for cols in COLUMNS:
        rows = 131 if cols <= 256 else 67
        plain = check_cases._plain_logits(rows, cols)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            for aligned in (True, False):
                logits = check_cases._placed(plain.to(dtype), aligned)
                for every in (1, 3):
                    what = (
                        f"candidates of {str(dtype).removeprefix('torch.')} [{rows}, {cols}], "
                        f"{'aligned' if aligned else 'unaligned'} rows, 1 in {every} groups"
                    )
                    yield what, partial(_candidates_differ, runs, logits, every, "")
        for kind in KINDS:
            what = f"float32 [{rows}, {cols}] stored in {kind}"
            yield what, partial(_stored_differs, runs, plain.float(), kind)
            yield f"candidates of {what}", partial(_candidates_differ, runs, plain.float(), 1, kind)


def _candidates_differ(runs: Runs, logits: torch.Tensor, every: int, kind: str) -> str | None:
    from torch import as_tensor

    rows, cols = logits.shape
    potential = 6 * check_cases.uniform(cols, 2) - 3
    weights = np.floor(4 * check_cases.uniform(rows, 3)).astype(np.float32)
    host: Any = store_logits(logits.numpy(), kind, lam=check_cases.SCALE, threads=1) if kind else logits
    before = None
    for _ in range(2):
        options: dict[str, Any] = {
            "scale": check_cases.SCALE,
            "row_weights": weights,
            "every": every,
            "keep": LEVEL,
            "reference": before,
        }
        expected = pass_on_cpu(host, potential, threads=1, **options)
        expected = replace(expected, column_sums=as_tensor(expected.column_sums), lse=as_tensor(expected.lse))
        found = runs.candidates(logits, potential, kind=kind, **options)
        differs = check_cases.sinkhorn_difference(logits, potential, found, expected)
        differs = differs or candidate_difference(found, expected)
        if differs is not None:
            return ("with a reference: " if before is not None else "") + differs
        before = expected.lse.numpy().copy()
        before[2] += 60.0
        before[4] = np.nan
    return None


def candidate_difference(found: SinkhornSums, expected: SinkhornSums) -> str | None:
    """What of the candidates is not as expected, in words; None when all are, but for those at the very level."""
    mine: Any = found.candidates
    theirs: Any = expected.candidates
    if mine.rows != theirs.rows or len(mine.offsets) != theirs.rows + 1:
        return f"rows of candidates: expected {theirs.rows}, found {mine.rows}"
    keys, values = _keyed(mine.offsets.numpy(), mine.columns.numpy(), mine.values.numpy(), mine.cols)
    wanted, their_values = _keyed(theirs.offsets(), theirs.columns(), theirs.values(), theirs.cols)
    if (np.diff(keys) <= 0).any():
        return "candidates: expected rows and columns in ascending order, found others"
    tie = check_cases.FLOAT.tie
    for own, other, level, name in ((keys, wanted, values, "found one"), (wanted, keys, their_values, "found none")):
        lonely = ~np.isin(own, other) & (np.abs(level + LEVEL) > tie)
        if lonely.any():
            row, column = divmod(int(own[lonely][0]), mine.cols)
            return f"candidate in row {row} of those read, column {column}: expected the other way, {name}"
    both, at, there = np.intersect1d(keys, wanted, return_indices=True)
    wrong = ~(np.abs(values[at] - their_values[there]) <= tie)
    if wrong.any():
        row, column = divmod(int(both[wrong][0]), mine.cols)
        pair = float(their_values[there][wrong][0]), float(values[at][wrong][0])
        return f"log p of the candidate in row {row}, column {column}: expected {pair[0]:.6g}, found {pair[1]:.6g}"
    return None


def _keyed(
    offsets: npt.NDArray[Any], columns: npt.NDArray[Any], values: npt.NDArray[Any], cols: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return rows * cols + columns.astype(np.int64), values.astype(np.float64)


def _stored_differs(runs: Runs, logits: torch.Tensor, kind: str) -> str | None:
    expected = store_logits(logits.numpy(), kind, lam=check_cases.SCALE, threads=1)
    values, maxima, saturated = runs.store_logits(logits, kind)
    same = (maxima == expected.maxima) | (np.isnan(maxima) & np.isnan(expected.maxima))
    wrong = (values != expected.values.view(np.uint16)).any(1) | ~same
    if wrong.any():
        return f"row {int(wrong.argmax())}: expected the bits of the CPU, found others"
    if saturated != expected.saturated:
        return f"entries too far down: expected {expected.saturated}, found {saturated}"
    return None
