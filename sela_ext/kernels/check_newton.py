"""What the self-check of a CUDA device runs of Newton's method: rows, sums, products, pruning and whole solves.

Fixed candidates, drawn from Philox4x32-10: for every number of lanes that share a row, with and without row weights,
every law of the columns, and one case of more rows than a card takes at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sela_ext import _core
from sela_ext.kernels.newton_device import SolveOptions, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from sela_ext.kernels.newton_device import DeviceRows

    Vector = npt.NDArray[np.float64]
    Case = tuple[str, Callable[[], "str | None"]]
    Uniform = Callable[[int, int], Vector]  # so many numbers in [0, 1) of a stream

# Rows, columns, and entries of a row, from and to: two, eight and 32 lanes per row. Columns beyond the threads of a
# block, too.
SHAPES = ((131, 31, 1, 4), (131, 33, 2, 12), (67, 1001, 24, 60))
RATIO, LEVEL, TOLERANCE = 1.3, 6.0, 1e-9
NEAR = 1e-10  # of sums, per unit of weight; float64, rounded to 2^-61 of it
SOLUTIONS = 1e-6  # nats, of solutions to a tolerance of 1e-9


class Runs(Protocol):
    """What the cases need of a device."""

    def newton_rows(self, arrays: dict[str, Any]) -> DeviceRows:
        """Rows on the device of candidates: offsets, columns, values, weights (or empty), cols."""


def newton_cases(runs: Runs, uniform: Uniform, many_rows: int) -> Iterator[Case]:
    """Every case: what it is, and a call that gives None, or what was expected and what was found."""
    for shape in SHAPES:
        for weighted in (False, True):
            for law in ("exact", "pulled", "bounded"):
                what = f"newton, {shape[0]} rows of {shape[2]} to {shape[3]} candidates in {shape[1]} columns, {law}"
                arrays = partial(_candidates, uniform, *shape, weighted)
                yield what + (", weights" if weighted else ""), partial(_differs, runs, arrays, law)
    few = partial(_candidates, uniform, 1001, 5, 1, 3, False)
    yield f"newton, {many_rows} rows of 1 to 3 candidates", partial(_many_differ, runs, few, many_rows)


def _candidates(uniform: Uniform, rows: int, cols: int, few: int, many: int, weighted: bool) -> dict[str, Any]:
    """Candidates as arrays; neighbours have neighbouring columns, some rows have one candidate, some none."""
    draw = uniform(rows * (many + 3), 6).reshape(rows, -1)
    lengths = (few + draw[:, 0] * (many + 1 - few)).astype(np.int64)
    lengths[draw[:, 1] < 0.1] = 1
    lengths[5::17] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    number = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    row = np.repeat(np.arange(rows), lengths)
    values = -12.0 * draw[row, 3 + number] ** 2
    top = np.zeros(rows)
    np.add.at(top, row, np.exp(values))
    return {
        "offsets": offsets,
        "columns": ((row // 3 + number) % cols).astype(np.int32),
        "values": (values - np.log(top[row])).astype(np.float32),
        "weights": (2 * draw[:, 2]).astype(np.float32) if weighted else np.zeros(0, np.float32),
        "cols": cols,
    }


def on_the_cpu(arrays: dict[str, Any]) -> _core.NewtonRows:
    """The same rows for the CPU kernels."""
    return _core.NewtonRows(_core.Candidates.of(**arrays, level=16.0, limit=2**40))


def _problem(rows: _core.NewtonRows, law: str) -> tuple[Wanted, float, Vector]:
    """What is wanted of the columns, near what they have; the strength of the pull; a start."""
    wave = np.sin(1.0 + 2.3 * np.arange(rows.cols))
    counts = rows.counts()
    several = rows.sums(1.0, np.zeros(rows.cols), 1, "")[0] - counts
    moved = several * (1 + 0.2 * wave) + 1e-3 * rows.weight / rows.cols
    target = counts + moved * several.sum() / moved.sum()
    defect = 1e-4 * rows.weight / rows.cols * wave[::-1]
    start = 0.5 * wave
    if law == "exact":
        return Wanted(target, defect), 0.0, start
    if law == "pulled":
        return Wanted(target, defect, 0.3 * wave), 3.0, start
    return Wanted(target, defect, 0.3 * wave, 0.5 * target, 2.0 * target), 0.0, start


def _differs(runs: Runs, arrays: Callable[[], dict[str, Any]], law: str) -> str | None:
    expected, found = on_the_cpu(arrays()), runs.newton_rows(arrays())
    wanted, strength, d = _problem(expected, law)
    difference = rows_difference(found, expected) or sums_difference(found, expected, RATIO, d)
    if difference is not None:
        return difference
    given = (wanted.target, wanted.defect, d, RATIO, TOLERANCE, 40, 400, 4.0, 1e300, LEVEL, 1, "")
    of_cpu = expected.solve(*given, wanted.offset, strength, wanted.low, wanted.high)
    options = SolveOptions(RATIO, TOLERANCE, 40, 400, 4.0, 1e300, LEVEL, strength)
    solution, error, _, _, _, stalled = found.solve(wanted, d, options)
    if stalled != of_cpu[5]:
        return f"solve: expected {'no end' if of_cpu[5] else 'an end'} within the tolerance, found an error of {error}"
    if stalled:
        return None
    if not error <= TOLERANCE:
        return f"error of the solution: expected at most {TOLERANCE}, found {error}"
    far = np.abs(solution - of_cpu[0])
    if not far.max() <= SOLUTIONS:
        worst = int(np.nan_to_num(far, nan=np.inf).argmax())
        return f"solution in column {worst}: expected {of_cpu[0][worst]:.9g}, found {solution[worst]:.9g}"
    difference = rows_difference(found, expected)
    return None if difference is None else f"after pruning, {difference}"


def _many_differ(runs: Runs, few: Callable[[], dict[str, Any]], count: int) -> str | None:
    arrays = few()
    rows = np.arange(count) % (len(arrays["offsets"]) - 1)
    lengths = np.diff(arrays["offsets"])[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    at = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) + np.repeat(arrays["offsets"][:-1][rows], lengths)
    arrays |= {"offsets": offsets, "columns": arrays["columns"][at], "values": arrays["values"][at]}
    expected, found = on_the_cpu(arrays), runs.newton_rows(arrays)
    return rows_difference(found, expected) or sums_difference(found, expected, RATIO, np.sin(np.arange(5.0)))


def rows_difference(found: DeviceRows, expected: _core.NewtonRows) -> str | None:
    """What of the rows is not as expected, in words; None when all is."""
    for name in ("rows", "entries"):
        if getattr(found, name) != getattr(expected, name):
            return f"{name}: expected {getattr(expected, name)}, found {getattr(found, name)}"
    if not abs(found.weight - expected.weight) <= 1e-12 * expected.weight:
        return f"weight: expected {expected.weight}, found {found.weight}"
    return _vector_difference("single rows", found.counts(), expected.counts(), NEAR * expected.weight)


def sums_difference(found: DeviceRows, expected: _core.NewtonRows, ratio: float, d: Vector) -> str | None:
    """What of the sums at d, or of a product at the plan there, is not as expected."""
    columns, diagonal, objective, plan = found.sums(ratio, d)
    of_cpu = expected.sums(ratio, d, 1, "")
    near = NEAR * expected.weight
    if not abs(objective - of_cpu[2]) <= near * (1 + float(np.abs(d).max())):
        return f"objective: expected {of_cpu[2]:.12g}, found {objective:.12g}"
    on_host = plan.cpu().numpy()
    products = found.product(plan, d), expected.product(on_host, d, 1, "")
    return (
        _vector_difference("column sum", columns, of_cpu[0], near)
        or _vector_difference("diagonal", diagonal, of_cpu[1], near)
        or _vector_difference("plan of entry", on_host, of_cpu[3], 1e-6)
        or _vector_difference("product in column", *products, near * float(np.abs(d).max()))
    )


def _vector_difference(what: str, found: Any, expected: Any, near: float) -> str | None:
    far = np.abs(np.asarray(found, np.float64) - expected)
    if not len(far) or far.max() <= near:
        return None
    worst = int(np.nan_to_num(far, nan=np.inf).argmax())
    return f"{what} {worst}: expected {expected[worst]:.9g}, found {found[worst]:.9g}"
