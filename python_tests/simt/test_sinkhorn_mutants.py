"""More of what the CUDA Sinkhorn pass guarantees; each test here is the one that notices some planted fault."""

import numpy as np
import pytest

PERMITTED = 48 * 1024  # bytes of shared memory that a block has on every card without asking


def run_pass(simt, logits, kind, reference=None):
    """(weights of the tiles, masked rows, labels) of one pass over logits [N, K] at a multiple of 16 bytes."""
    rows, cols = logits.shape
    potential, labels = np.zeros(cols), np.zeros(rows, np.int32)
    sums, masked = np.zeros(cols, np.int64), np.zeros(1, np.int64)
    totals = np.zeros(simt.sinkhorn_workspace_cuda(logits.ctypes.data, kind, rows, cols, cols)[0])
    simt.sinkhorn_pass_cuda(
        *(logits.ctypes.data, kind, rows, cols, cols, 1.0, potential.ctypes.data, 0, 1.0),
        *(0 if reference is None else reference.ctypes.data, sums.ctypes.data, 0, labels.ctypes.data),
        *(totals.ctypes.data, masked.ctypes.data, 0, 0),
    )
    return totals[len(totals) // 2 :], int(masked[0]), labels


def aligned(rows, cols, kind):
    size = np.dtype(kind).itemsize
    memory = np.zeros(rows * cols * size + 16, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start : start + rows * cols * size].view(kind).reshape(rows, cols)


@pytest.mark.plain_only
@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("cols", [8, 256, 264, 1024, 1032, 4096, 5632, 5640, 6144, 8192])
def test_rows_on_their_way_fit_the_shared_memory_of_every_card(simt, kind, cols):
    weights, _, _ = run_pass(simt, aligned(3, cols, kind), kind, np.full(3, np.log(cols), np.float32))
    assert 0 < simt.statistics()["dynamic_shared"] <= PERMITTED
    assert weights.sum() == 3


@pytest.mark.parametrize("cols", [33, 300])
def test_masked_rows_of_all_blocks_are_counted(simt, schedule, cols):
    """Runs under ThreadSanitizer too: tiles of 64 rows add to one number at the same time."""
    simt.set_device(2, 2)
    logits = aligned(193, cols, "float32")
    bad = np.array([0, 63, 64, 130, 192])
    logits[bad, bad % cols] = np.nan
    weights, masked, labels = run_pass(simt, logits, "float32")
    assert masked == len(bad)
    np.testing.assert_array_equal(np.flatnonzero(labels == -1), bad)
    np.testing.assert_array_equal(weights, [62, 63, 63, 0])


@pytest.mark.plain_only
def test_more_rows_than_32_bits_count_are_refused_before_any_is_read(simt):
    with pytest.raises(ValueError, match="2\\^31"):
        simt.sinkhorn_pass_cuda(0, "float16", 2**31, 8, 8, 1.0, 0, 0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.plain_only
@pytest.mark.parametrize(("kind", "cols", "words"), [("float16", 2048, 8), ("float16", 3000, 12), ("float32", 132, 2)])
def test_marks_of_a_row_take_a_bit_for_every_16_bytes(simt, kind, cols, words):
    records = 16 * 1000
    scratch = simt.sinkhorn_workspace_cuda(0, kind, 1000, cols, cols, candidates=True)[1]
    assert scratch == records + 1000 * words * 4
