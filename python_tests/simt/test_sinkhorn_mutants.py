"""More of what the CUDA Sinkhorn pass guarantees; each test here is the one that notices some planted fault."""

import numpy as np
import pytest

PERMITTED = 48 * 1024  # bytes of shared memory that a block has on every card without asking


@pytest.mark.plain_only
@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("cols", [8, 256, 264, 1024, 1032, 4096, 5632, 5640, 6144, 8192])
def test_rows_on_their_way_fit_the_shared_memory_of_every_card(simt, kind, cols):
    rows = 3
    size = np.dtype(kind).itemsize
    memory = np.zeros(rows * cols * size + 16, np.uint8)
    logits = memory.ctypes.data + -memory.ctypes.data % 16
    potential, reference = np.zeros(cols), np.full(rows, np.log(cols), np.float32)
    sums, labels = np.zeros(cols, np.int64), np.zeros(rows, np.int32)
    totals, scratch = simt.sinkhorn_workspace_cuda(rows, cols, kind)
    assert scratch == 0
    total, masked = np.zeros(totals), np.zeros(1, np.int64)
    simt.sinkhorn_pass_cuda(
        *(logits, kind, rows, cols, cols, 1.0, potential.ctypes.data, 0, 1.0, reference.ctypes.data),
        *(sums.ctypes.data, 0, labels.ctypes.data, total.ctypes.data, masked.ctypes.data, 0, 0),
    )
    assert 0 < simt.statistics()["dynamic_shared"] <= PERMITTED
    assert total[1] == rows
