"""JPEG files for a CUDA device, as far as the host can tell: what is uploaded, and devices that are not used."""

import numpy as np
import pytest
import torch

from sela_ext import _core
from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels import decode_planes, decode_planes_cuda, jpeg_cuda, jpeg_index
from sela_ext.kernels.check_jpeg import encoded, planes_difference


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.normal(128, 60, (-(-height // 16), -(-width // 16), 3)).repeat(16, 0).repeat(16, 1)[:height, :width]
    return np.clip(coarse + rng.normal(0, 10, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def refused(monkeypatch):
    """A device whose kernels are not used."""
    monkeypatch.setattr(jpeg_cuda, "place_of", lambda device: torch.device("cpu"))
    monkeypatch.setattr(jpeg_cuda, "usable", lambda place: None)


def test_a_device_that_is_refused_gets_the_cpus_planes(refused):
    files = [encoded(picture(40, 50, i), 2) for i in range(3)]
    boxes = [None, (3, 4, 20, 30), (0, 0, 1, 1)]
    found = decode_planes_cuda(files, [None, jpeg_index(files[1]), None], boxes)
    for planes, file, box in zip(found, files, boxes, strict=True):
        assert planes.reason == "the device's kernels are not used"
        expected = decode_planes(file, box)
        assert (planes.colour, planes.box) == (expected.colour, expected.box)
        for mine, theirs in zip(planes.planes, expected.planes, strict=True):
            np.testing.assert_array_equal(mine.samples.numpy(), theirs.samples)
            assert (mine.top, mine.left, mine.step_y, mine.smooth_x) == (
                theirs.top,
                theirs.left,
                theirs.step_y,
                theirs.smooth_x,
            )
    with pytest.raises(OptionError, match=r"files\[1\]: box: expected one within 40 x 50"):
        decode_planes_cuda(files[:2], [None, None], [None, (0, 0, 41, 1)])


def test_only_a_cuda_device_is_taken():
    with pytest.raises(OptionError, match='device: expected "cuda" or "cuda:N", found \'cpu\''):
        decode_planes_cuda([], [], device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="cuda is not there"):
            decode_planes_cuda([], [])


def test_a_box_uploads_less_than_the_whole_image():
    data = encoded(picture(400, 500), 2, quality=90)
    index = jpeg_index(data)
    sizes = []
    for box in [(0, 0, 0, 0), (100, 100, 150, 200)]:
        batch = _core.JpegBatch([data], [index], [box], 1 << 40, 1 << 40)
        (image,) = batch.images()
        sizes.append((image["scan_bytes"], image["entries"], batch.coefficient_bytes, batch.plane_bytes))
    assert 0.9 * len(data) < sizes[0][0] < 1.1 * len(data)
    assert all(2 * part < whole for whole, part in zip(*sizes, strict=True))


def test_a_build_without_cuda_says_so():
    if _core.build_info()["cuda"]:
        pytest.skip("this build has CUDA kernels")
    data = encoded(picture(9, 9), 2)
    batch = _core.JpegBatch([data], [jpeg_index(data)], [(0, 0, 0, 0)], 1 << 40, 1 << 40)
    with pytest.raises(RuntimeError, match="decode_jpeg: this build has no CUDA kernels"):
        _core.decode_jpeg_cuda(batch, 0, 0, 0, 0, 0)


def test_a_difference_is_told_by_its_place():
    data = encoded(picture(20, 30), 2)
    expected = decode_planes(data)
    found = jpeg_cuda.uploaded(expected, torch.device("cpu"))
    assert planes_difference(found, expected) is None
    found.planes[1].samples[2, 3] += 1
    assert "sample (2, 3) of plane 1: expected" in planes_difference(found, expected)
    assert "found the status" in planes_difference(jpeg_cuda.uploaded(expected, torch.device("cpu"), "x"), expected)
    other = decode_planes(data, (0, 0, 5, 5))
    assert planes_difference(jpeg_cuda.uploaded(other, torch.device("cpu")), expected) is not None
