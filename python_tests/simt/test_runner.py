"""The SIMT runner itself: what it executes as a GPU would, and what it refuses."""

import numpy as np
import pytest


def address(array):
    return 0 if array is None else array.ctypes.data


@pytest.mark.parametrize("cols", [5, 300])
def test_a_kernel_that_the_runner_executes_gives_what_the_cpu_gives(simt, schedule, cols):
    rows = 67
    rng = np.random.default_rng(cols)
    logits = rng.normal(size=(rows, cols)).astype(np.float32)
    potential = rng.normal(size=cols)
    sums = {name: np.zeros(cols, np.int64) for name in ("cpu", "cuda")}
    labels = {name: np.zeros(rows, np.int32) for name in ("cpu", "cuda")}
    totals_count, scratch_bytes = simt.sinkhorn_workspace_cuda(rows, cols, "float32")
    totals, scratch, masked = np.zeros(totals_count), np.zeros(scratch_bytes, np.uint8), np.zeros(1, np.int64)
    inputs = (address(logits), "float32", rows, cols, cols, 1.0, address(potential), 0, 1.0, 0)
    simt.sinkhorn_pass_cuda(
        *inputs,
        address(sums["cuda"]),
        0,
        address(labels["cuda"]),
        address(totals),
        address(masked),
        address(scratch),
        0,
    )
    objective, weight, _ = simt.sinkhorn_pass_cpu(*inputs, address(sums["cpu"]), 0, address(labels["cpu"]), 1, "")
    resolution = simt.sinkhorn_resolution(rows, 1.0)
    np.testing.assert_allclose(sums["cuda"] * resolution, sums["cpu"] * resolution, rtol=2e-6)
    np.testing.assert_array_equal(labels["cuda"], labels["cpu"])
    assert totals[: totals_count // 2].sum() == pytest.approx(objective, rel=1e-6)
    assert totals[totals_count // 2 :].sum() == weight
