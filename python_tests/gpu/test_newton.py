"""Newton's method on a device: the CPU's rows, sums, products and solves, on the device's own streams."""

import numpy as np
import pytest
import torch

from sela_ext import kernels
from sela_ext.errors import OptionError
from sela_ext.kernels import check_cases, check_newton, self_check
from sela_ext.kernels.device import usable
from sela_ext.kernels.device_candidates import DeviceCandidates


def candidates(card, rows=3001, cols=97, *, many=8, weights=True, seed=0):
    """Candidates on the device, and the same arrays."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, many + 1, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    row = np.repeat(np.arange(rows), lengths)
    values = -9 * rng.random(len(row)) ** 2
    top = np.zeros(rows)
    np.add.at(top, row, np.exp(values))
    arrays = {
        "offsets": offsets,
        "columns": ((row + np.arange(len(row)) - offsets[row]) % cols).astype(np.int32),
        "values": (values - np.log(top[row])).astype(np.float32),
        "weights": (2 * rng.random(rows)).astype(np.float32) if weights else np.zeros(0, np.float32),
        "cols": cols,
    }
    there = {name: torch.from_numpy(arrays[name]).to(card.place) for name in arrays if name != "cols"}
    given = there.pop("weights")
    return DeviceCandidates(16.0, 2**40, False, rows, cols, **there, weights=given if weights else None), arrays


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("many", [3, 12, 60])
def test_rows_sums_products_and_solves_are_those_of_the_cpu(card, many, weights):
    found, arrays = candidates(card, many=many, weights=weights)
    expected = check_newton.on_the_cpu(arrays)
    rows = kernels.newton_rows(found)
    assert check_newton.rows_difference(rows, expected) is None
    d = np.random.default_rng(1).normal(0, 1, 97)
    assert check_newton.sums_difference(rows, expected, 1.4, d) is None
    target = expected.sums(1.0, 0.3 * d, 1, "")[0]
    options = {"ratio": 1.1, "tolerance": 1e-10, "prune": 6.0}
    mine, theirs = (kernels.newton_solve(r, target, np.zeros(97), np.zeros(97), **options) for r in (rows, expected))
    assert (mine.stalled, theirs.stalled) == (False, False)
    np.testing.assert_allclose(mine.d, theirs.d, atol=1e-4)  # hardly anything ties some columns to others
    assert check_newton.rows_difference(rows, expected) is None


def test_bits_are_the_same_every_time(card):
    results = []
    for _ in range(3):
        rows = kernels.newton_rows(candidates(card)[0])
        sums = kernels.newton_sums(rows, np.sin(np.arange(97.0)))
        target = sums.columns
        solution = kernels.newton_solve(rows, target, np.zeros(97), np.zeros(97), tolerance=1e-9)
        results.append((sums.columns.tobytes(), sums.plan.cpu().numpy().tobytes(), solution.d.tobytes()))
    assert results[0] == results[1] == results[2]


def test_every_case_of_the_self_check_passes(card):
    runs = self_check.OnCard(usable(card.place))
    for what, differs in check_newton.newton_cases(runs, check_cases.uniform, check_cases.MANY_ROWS):
        assert differs() is None, what


def test_a_plan_of_other_rows_is_refused(card):
    rows, others = (kernels.newton_rows(candidates(card, seed=seed)[0]) for seed in (0, 1))
    plan = kernels.newton_sums(others, np.zeros(97)).plan
    assert plan.device.type == torch.device(card.place).type
    for call in (lambda: kernels.newton_product(rows, plan, np.zeros(97) + 1), lambda: rows.prune(plan, 1.0)):
        with pytest.raises(OptionError, match="plan: expected shape"):
            call()


@pytest.mark.gpu
def test_a_solve_follows_the_current_stream(cuda):
    expected = kernels.newton_rows(candidates(cuda)[0])
    target = kernels.newton_sums(expected, np.sin(np.arange(97.0))).columns
    wanted = kernels.newton_solve(expected, target, np.zeros(97), np.zeros(97)).d
    stream = torch.cuda.Stream(cuda.place)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        rows = kernels.newton_rows(candidates(cuda)[0])
        found = kernels.newton_solve(rows, target, np.zeros(97), np.zeros(97)).d
    assert found.tobytes() == wanted.tobytes()
