"""The kernel that stores logits in 16 bits, executed by the SIMT runner: the CPU's bits in any order of threads."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("logit_rows", Path(__file__).with_name("logit_rows.py"))
logit_rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(logit_rows)
address, laid_out, stored = logit_rows.address, logit_rows.laid_out, logit_rows.stored

TYPES = ("float32", "float16", "bfloat16", "float64")


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", [1, 7, 8, 31, 257, 1024, 1025, 2100])
@pytest.mark.parametrize("kind", TYPES)
def test_stored_logits_have_the_bits_of_the_cpu(simt, kind, cols):
    rng = np.random.default_rng(cols)
    n = 41
    values = rng.standard_normal((n, cols)) * 10.0 ** rng.integers(-6, 4, (n, 1))
    values[1, 0], values[2, cols - 1], values[3] = np.nan, np.inf, -np.inf
    values[4, cols // 2] = -np.inf
    values[5] = 6e4
    values[6, 0], values[6, cols - 1] = -6e4, 6e4
    values[7, ::2] = 0.0
    values[8] -= 1e-7 * np.arange(cols)  # differences that only halves below the normal ones tell apart
    if kind in ("float32", "bfloat16", "float64"):
        values[9, 0], values[9, cols - 1] = 3e38, -3e38
        values[10] = 3e38
    if kind in ("float32", "float64"):  # the largest that there is
        values[13], values[14] = np.finfo(np.float32).max, -np.finfo(np.float32).max
    if kind == "float64":
        values[11], values[12, 0] = 1e39, -1e300
    for aligned in (True, False):
        rows = laid_out(values, kind, aligned)
        for out_kind in ("fixed16", "float16", "bfloat16"):
            for lam, out_stride in ((25.0, -(-cols // 8) * 8), (1.0, cols + 1)):
                found = stored(simt, rows, out_kind, lam, out_stride)
                expected, maxima = np.zeros((n, cols), np.uint16), np.zeros(n, np.float32)
                lost = simt.store_logits_cpu(*(*rows.where, out_kind, lam, address(expected), address(maxima), 1, ""))
                np.testing.assert_array_equal(found[0], expected)
                np.testing.assert_array_equal(found[1], maxima)
                assert found[2] == lost
                assert np.isnan(maxima[1:4]).all()


@pytest.mark.parametrize("cols", [40, 1032])
def test_rows_of_a_warp_and_of_a_block_are_stored_in_any_order(simt, schedule, cols):
    """Runs under the sanitizers: warps of a block count what is too far down at the same time."""
    values = np.random.default_rng(cols).standard_normal((35, cols))
    values[3, cols // 2], values[7], values[9, cols - 1] = np.nan, -np.inf, -np.inf
    values[10:26, ::5] -= 2e3
    rows = laid_out(values, "float32")
    found = stored(simt, rows, "fixed16", 25.0, cols)
    expected, maxima = np.zeros((35, cols), np.uint16), np.zeros(35, np.float32)
    lost = simt.store_logits_cpu(*(*rows.where, "fixed16", 25.0, address(expected), address(maxima), 1, ""))
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(found[1], maxima)
    assert found[2] == lost == 16 * len(values[0, ::5])


@pytest.mark.plain_only
@pytest.mark.parametrize(("n", "cols", "blocks"), [(8, 40, 1), (9, 40, 2), (300, 40, 6), (3, 1032, 3), (40, 1032, 6)])
def test_logits_are_stored_by_as_many_blocks_as_there_is_work_for(simt, n, cols, blocks):
    """Eight rows of few columns for each block, one of many; no more blocks than are resident."""
    rows = laid_out(np.zeros((n, cols)), "float32")
    simt.set_device(3, 2)
    before = simt.statistics()["blocks"]
    stored(simt, rows, "fixed16", 25.0, cols)
    found = simt.statistics()["blocks"] - before
    simt.set_device(2, 2)
    assert found == blocks
