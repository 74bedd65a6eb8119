"""More of what the JPEG kernels guarantee; each test here is the one that notices some planted fault."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

PIXELS = 1 << 40


@pytest.fixture(scope="module")
def writer():
    path = Path(__file__).parents[1] / "kernels" / "jpeg_writer.py"
    spec = importlib.util.spec_from_file_location("simt_jpeg_writer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def batch_of(simt, files):
    indexes = [simt.jpeg_planes(data, 0, 0, 1, 1, 1, None, True, PIXELS, "")[2] for data in files]
    return simt.JpegBatch(files, indexes, [(0, 0, 0, 0)] * len(files), PIXELS, PIXELS)


def blocks_of(simt, batch):
    """Blocks of threads in all launches of a batch."""
    upload = np.empty(batch.upload_bytes, np.uint8)
    workspace, planes = np.empty(batch.workspace_bytes, np.uint8), np.empty(batch.plane_bytes, np.uint8)
    status = np.zeros(batch.image_count, np.uint32)
    batch.write(upload.ctypes.data)
    before = simt.statistics()["blocks"]
    simt.decode_jpeg_cuda(batch, *(array.ctypes.data for array in (upload, workspace, planes, status)), 0)
    assert not status.any()
    return simt.statistics()["blocks"] - before


def test_launches_have_a_block_per_piece_of_work_as_long_as_the_device_has_room(simt, writer):
    rng = np.random.default_rng(1)
    files = [writer.picture(rng, 40, 56, [(1, 1)], quality=5), writer.picture(rng, 130, 20, [(2, 1), (1, 1), (1, 1)])]
    batch = batch_of(simt, files)
    rows = 7 + 3 * 3  # of blocks, over all components
    assert (batch.tile_count, batch.work_count) == (rows, 2)
    try:
        simt.set_device(20, 1)
        assert blocks_of(simt, batch) == 2 * 4 + 2 + 4  # codes of two sets, pieces of work, warps by four
        simt.set_device(3, 1)
        assert blocks_of(simt, batch) == 3 + 2 + 3
    finally:
        simt.set_device(2, 2)
