"""Images of which a device makes the views: the CPU's batches within the kernels' tolerance, whatever has no room."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sela_ext import Augment, Loader
from sela_ext.data import loader as loader_module
from sela_ext.data import open_source, planes_upload
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels.check_cases import augment_difference


@pytest.fixture
def play(as_cuda, host_card, monkeypatch):
    """Makes the processor a card from then on; what was made before was made without one."""
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    return lambda: as_cuda(host_card)


def picture(seed, height, width):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 9, (height, width, 3)), 0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


SIZES = [(130, 171), (301, 105), (105, 104), (104, 104), (31, 1), (1, 33), (211, 403), (160, 240), (33, 107)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 images: JPEG files of many sizes and samplings, grey, turned and progressive ones, and PNG files."""
    root = tmp_path_factory.mktemp("images")
    for i in range(29):
        image = picture(i, *SIZES[i % len(SIZES)])
        if i % 7 == 3:
            image.save(root / f"{i:02d}.png")
            continue
        options = {"subsampling": i % 3, "quality": 80 + i % 3}
        if i % 11 == 5:
            options["progressive"] = True
        if i % 5 == 1:
            image = image.convert("L")
        if i % 5 == 2:
            exif = Image.Exif()
            exif[0x0112] = 1 + i % 8
            options["exif"] = exif
        image.save(root / f"{i:02d}.jpg", **options)
    return root


def assert_close(found, expected, augments):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) >= 1
    for one, other in zip(found, expected, strict=True):
        assert one.images is one.views[0]
        for view, wanted, augment in zip(one.views, other.views, augments, strict=True):
            assert view.stride() == wanted.stride()
            assert augment_difference(augment, view, wanted) is None
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.placed, one.index)
        assert one.position == other.position
        assert repr(one.params) == repr(other.params)
        assert repr(one.effects) == repr(other.effects)


def assert_equal(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) >= 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.index, other.index)
        assert all(torch.equal(view, wanted) for view, wanted in zip(one.views, other.views, strict=True))


CASES = [
    (Augment.sela(48), {}),
    (Augment.sela(31), {"exact": True}),
    (Augment.sela(33), {"exif": True, "view": 3}),
    (Augment.aug_plus(40), {"dtype": torch.bfloat16}),
    (Augment.deepcluster_eval(33), {"channels_last": True, "dtype": torch.float16}),
    (Augment.eval(24), {"shuffle": False, "whole_batches": True, "rank": 1, "world_size": 2}),
    (Augment.none(20), {"channels_last": True}),
    (Augment.deepcluster(12), {}),  # reduced transforms
    (Augment.multi_crop((40, 12), (2, 3)), {"exif": True}),
]


@pytest.mark.parametrize(("augment", "options"), CASES)
def test_batches_are_those_of_the_cpu_from_every_position(play, host_core, folder, augment, options):
    options = {"batch_size": 8, "augment": augment, "seed": 5, "threads": 2, **options}
    here = Loader(folder, **options)
    expected = list(here.epoch(3))
    assert not here.sending.planes
    play()
    there = Loader(folder, **options)
    assert there.sending.planes
    assert_close(there.epoch(3), expected, there.views)
    assert host_core.calls == len(expected) * len(there.views)
    for number, batch in enumerate(expected[:-1]):
        assert_close(there.epoch(3, start=batch.position), expected[number + 1 :], there.views)
