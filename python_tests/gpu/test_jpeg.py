"""JPEG files to planes on a device: every sample is the CPU's, and what the device cannot do the CPU does."""

import numpy as np
import pytest
import torch

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import check_jpeg
from sela_ext.kernels.check_jpeg import encoded, planes_difference


def picture(height, width, seed=0):
    """Waves and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    shade = 127 + 100 * np.sin(x[..., None] * rng.uniform(0.01, 0.2, 3) + y[..., None] * rng.uniform(0.01, 0.2, 3))
    return np.clip(shade + rng.normal(0, 15, (height, width, 3)), 0, 255).astype(np.uint8)


def some_files(count, height=90, width=130):
    """Files of every sampling, with codes of their own or the standard ones, with restart markers or without."""
    return [
        encoded(
            picture(height + 3 * i, width - 7 * i, i),
            (0, 1, 2, None)[i % 4],
            quality=40 + 5 * i % 60,
            optimize=i % 3 == 0,
            restart_marker_blocks=(0, 0, 4)[i % 3],
        )
        for i in range(count)
    ]


def assert_as_on_the_cpu(found, files, boxes, place):
    for planes, file, box in zip(found, files, boxes, strict=True):
        assert all(plane.samples.device == place for plane in planes.planes)
        assert planes_difference(planes, kernels.decode_planes(file, box)) is None


def test_every_sampling_is_as_on_the_cpu_whole_and_in_part(card):
    files = some_files(8)
    indexes = [kernels.jpeg_index(file) for file in files]
    boxes = [None, (0, 0, 1, 1), (20, 30, 50, 40), (60, 50, 30, 31), None, (5, 0, 80, 90), (33, 17, 9, 70), None]
    found = kernels.decode_planes_cuda(files, indexes, boxes, device=card.place)
    assert_as_on_the_cpu(found, files, boxes, card.place)
    whole = kernels.decode_planes_cuda(files, indexes, device=card.place)
    assert_as_on_the_cpu(whole, files, [None] * 8, card.place)


def test_a_small_workspace_makes_groups_and_no_difference(card):
    files = some_files(6)
    indexes = [kernels.jpeg_index(file) for file in files]
    for workspace in (0, 300_000):
        found = kernels.decode_planes_cuda(files, indexes, device=card.place, workspace=workspace)
        assert_as_on_the_cpu(found, files, [None] * 6, card.place)
    assert kernels.decode_planes_cuda([], [], device=card.place) == []


def test_what_the_device_cannot_do_the_cpu_does(card):
    good = some_files(3)
    indexes = [kernels.jpeg_index(file) for file in good]
    progressive = encoded(picture(50, 60), 2, progressive=True)
    damaged = bytearray(good[2])
    damaged[-60:-50] = b"\xff\xd9" * 5  # the digest does not see it
    files = [good[0], good[1], progressive, good[1], bytes(damaged), good[2]]
    given = [indexes[0], None, None, indexes[0], indexes[2], indexes[2]]
    found = kernels.decode_planes_cuda(files, given, device=card.place)
    reasons = [planes.reason for planes in found]
    assert reasons[:4] == ["", "foreign index", "unsupported", "foreign index"]
    assert reasons[4] in ("damaged", "foreign index")
    assert reasons[5] == ""
    for planes, file in zip(found, files, strict=True):
        expected = kernels.decode_planes(file)
        assert planes.colour == expected.colour
        for mine, theirs in zip(planes.planes, expected.planes, strict=True):
            assert mine.samples.device == card.place
            np.testing.assert_array_equal(mine.samples.cpu().numpy(), theirs.samples)


def test_what_does_not_fit_is_refused_in_one_line(card):
    file = some_files(1)[0]
    index = kernels.jpeg_index(file)

    def run(files=(file,), indexes=(index,), boxes=None):
        return kernels.decode_planes_cuda(files, indexes, boxes, device=card.place)

    for match, boxes in [
        (r"boxes\[1\]: expected one within 90 x 130, found 91 x 5 at 0, 0", [(0, 0, 5, 5), (0, 0, 91, 5)]),
        (r"boxes\[0\]: expected \(top >= 0", [(0, 0, 0, 5), (0, 0, 5, 5)]),
        ("boxes: expected one per file, found 1 for 2", [(0, 0, 5, 5)]),
    ]:
        with pytest.raises(OptionError, match=match):
            run([file] * 2, [index] * 2, boxes)
    boxes = [(0, 0, 5, 5), (0, 0, 5, 5), (0, 0, 5, 131)]
    with pytest.raises(OptionError, match=r"boxes\[2\]: expected one within 90 x 130"):  # counted over all groups
        kernels.decode_planes_cuda([file] * 3, [index] * 3, boxes, device=card.place, workspace=0)
    with pytest.raises(OptionError, match="indexes: expected one per file, or None in its place, found 1 for 2"):
        run([file] * 2)
    with pytest.raises(OptionError, match=r"files\[0\]: expected bytes, found str"):
        run(["x"])
    with pytest.raises(OptionError, match=r"indexes\[0\]: expected bytes, found int"):
        run(indexes=[5])
    with pytest.raises(DataError, match=r"files\[1\]: cannot be decoded as JPEG"):
        run([file, b"nothing"], [index, None])


def test_more_files_than_blocks_are_all_done(card, monkeypatch):
    monkeypatch.setattr(check_jpeg, "MANY_FILES", 301 if card.played else 30_001)

    class Runs:
        def decode_planes(self, files, indexes, boxes):
            return kernels.decode_planes_cuda(files, indexes, device=card.place)

    (differs,) = [
        differs
        for what, differs in check_jpeg.jpeg_cases(Runs(), lambda count, _: np.random.default_rng(1).random(count))
        if "images" in what and "whole" not in what
    ]
    assert differs() is None


@pytest.mark.gpu
def test_a_stream_that_is_being_captured_is_refused(cuda):
    from sela_ext.errors import ResourceError

    file = some_files(1)[0]
    index = kernels.jpeg_index(file)
    kernels.decode_planes_cuda([file], [index], device=cuda.place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(ResourceError, match="being captured"):
        kernels.decode_planes_cuda([file], [index], device=cuda.place)


@pytest.mark.gpu
def test_planes_are_made_on_the_current_stream(cuda):
    files = some_files(4)
    indexes = [kernels.jpeg_index(file) for file in files]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = kernels.decode_planes_cuda(files, indexes, device=cuda.place)
    stream.synchronize()
    assert_as_on_the_cpu(found, files, [None] * 4, cuda.place)
