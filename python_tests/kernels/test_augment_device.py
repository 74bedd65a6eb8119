"""Images of any size on a device: what is uploaded, which kernel does it, what is refused. The host plays the card."""

import numpy as np
import pytest
import torch

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels import Augment, DeviceImages, Planes
from sela_ext.kernels.augment_device import drawn_needs, given_needs, put_images, put_planes, run_uploaded

KEY = {"seed": 5, "epoch": 6, "view": 7}
SIDES = ((97, 65), (33, 140), (5, 3), (120, 70))


def crops_of(channels=3, sides=SIDES):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*side, channels), dtype=np.uint8) for side in sides]


def planes_of(step=(2, 2), sides=SIDES):
    rng = np.random.default_rng(1)
    found = []
    for height, width in sides:
        shapes = [(-(-height // row), -(-width // column)) for row, column in ((1, 1), step, step)]
        planes = tuple(rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes)
        found.append(Planes(planes, height, width, subsampling=step))
    return found


def drawn(augment, batch):
    index = np.arange(len(batch))
    params = kernels.sample_parameters(augment, batch.heights, batch.widths, index, **KEY)
    return params, kernels.sample_effects(augment, index, **KEY) if augment.draws_effects else None


@pytest.mark.parametrize("channels", [1, 3])
def test_uploaded_images_are_those_of_the_host(host_card, channels):
    images, place = crops_of(channels), torch.device("cpu")
    batch = put_images(host_card, place, images, channels)
    augment = Augment.aug_plus(40)
    params, effects = drawn(augment, batch)
    expected = kernels.augment(images, params, augment, effects=effects, dtype=torch.float16, channels_last=True)
    found = run_uploaded(host_card, batch, params, augment, effects, False, None, torch.float16, True)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    strided = [np.repeat(image, 2, axis=1)[:, ::2] for image in images]
    again = put_images(host_card, place, strided, channels)
    assert torch.equal(
        run_uploaded(host_card, again, params, augment, effects, False, None, torch.float16, True), found
    )


@pytest.mark.parametrize("exact", [False, True])
def test_uploaded_planes_are_those_of_the_host(host_card, exact):
    planes = [*planes_of(), *planes_of((1, 2)), Planes((np.full((9, 70), 7, np.uint8),), 9, 70)]
    batch = put_planes(host_card, torch.device("cpu"), planes)
    augment = Augment.sela(40)
    params, _ = drawn(augment, batch)
    expected = kernels.augment_planes(planes, params, augment, exact=exact)
    assert torch.equal(run_uploaded(host_card, batch, params, augment, None, exact, None, None, False), expected)


def test_on_the_cpu_an_upload_is_the_images_themselves():
    images, planes = crops_of(), planes_of()
    batch, planar = kernels.upload_images(images, "cpu"), kernels.upload_planes(planes, "cpu")
    assert (batch.memory, planar.memory) == (None, None)
    assert (len(batch), batch.planar, planar.planar) == (4, False, True)
    assert [tuple(side) for side in zip(batch.heights, batch.widths, strict=True)] == list(SIDES)
    augment = Augment.sela(33)
    params, _ = drawn(augment, batch)
    out = torch.empty(4, 3, 33, 33)
    assert kernels.augment(batch, params, augment, out=out) is out
    assert torch.equal(out, kernels.augment(images, params, augment))
    assert torch.equal(kernels.augment_planes(planar, params, augment), kernels.augment_planes(planes, params, augment))


def test_several_views_are_taken_of_one_upload(host_card, monkeypatch):
    images, views = crops_of(), Augment.multi_crop((40, 20), (2, 3))
    expected = kernels.augment_views(images, views, [3, 1, 2, 0], seed=1, epoch=2)
    batch = put_images(host_card, torch.device("cpu"), images, 3)
    monkeypatch.setattr("sela_ext.kernels.augment_device.usable", lambda place: host_card)
    calls = host_card.core.calls
    found = kernels.augment_views(batch, views, [3, 1, 2, 0], seed=1, epoch=2)
    assert host_card.core.calls == calls + 5
    assert [tuple(view.shape) for view in found] == [(4, 3, 40, 40)] * 2 + [(4, 3, 20, 20)] * 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_upload_of_a_refused_device_is_done_by_the_cpu(host_card, monkeypatch):
    images = crops_of()
    batch = put_images(host_card, torch.device("cpu"), images, 3)
    monkeypatch.setattr("sela_ext.kernels.augment_device.usable", lambda place: None)
    augment = Augment.aug_plus(20)
    params, effects = drawn(augment, batch)
    calls = host_card.core.calls
    found = kernels.augment(batch, params, augment, effects=effects)
    assert host_card.core.calls == calls
    assert torch.equal(found, kernels.augment(images, params, augment, effects=effects))


@pytest.mark.parametrize("preset", ["sela", "aug_plus_more", "deepcluster", "eval", "cifar"])
def test_resident_images_of_any_size_take_the_kernels_of_the_device(as_cuda, host_card, host_core, monkeypatch, preset):
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    images = np.random.default_rng(0).integers(0, 256, (9, 90, 70, 3), dtype=np.uint8)
    augment, index = getattr(Augment, preset)(66), np.array([8, 0, 3])
    expected, params = kernels.augment_resident(images, index, augment, **KEY, return_parameters=True)
    effects = kernels.sample_effects(augment, index, **KEY) if augment.draws_effects else None
    as_cuda(host_card)
    resident = torch.from_numpy(images)
    found, records = kernels.augment_resident(resident, index, augment, **KEY, return_parameters=True)
    assert torch.equal(found, expected)
    assert records.tobytes() == params.tobytes()
    assert torch.equal(kernels.augment(resident, params, augment, effects=effects, rows=index), expected)
    assert host_core.calls == 2


def test_steps_that_no_image_takes_are_known_before_the_launch():
    assert drawn_needs(Augment.eval(32)) == (False, False, False, 0.0)
    assert drawn_needs(Augment.sela(32)) == (True, False, False, 0.0)
    assert drawn_needs(Augment.sela(32, contrast=0.0)) == (False, False, False, 0.0)
    assert drawn_needs(Augment.aug_plus_more(32, blur_sigma=(1.0, 3.0))) == (True, True, True, 3.0)
    augment = Augment.aug_plus_more(32, noise_probability=1.0)
    index = np.arange(5)
    params = kernels.sample_parameters(augment, 9, 9, index, seed=0, epoch=0)
    effects = kernels.sample_effects(augment, index, seed=0, epoch=0)
    assert given_needs(params, None) == (True, False, False, 0.0)
    assert given_needs(params, effects) == (True, True, True, float(effects["blur"].max()))
    params["jitter"] = 0
    effects["tone"], effects["blur"] = 0, 0
    assert given_needs(params, effects) == (False, False, True, 0.0)
    params["jitter"], params["contrast"], effects["noise"] = 1, 1.0, 0.0
    assert given_needs(params, effects) == (False, False, False, 0.0)
    assert given_needs(params[:0], effects[:0]) == (False, False, False, 0.0)


def test_empty_uploads_give_empty_batches(host_card):
    batch = put_images(host_card, torch.device("cpu"), [], 3)
    augment = Augment.sela(8)
    params, _ = drawn(augment, batch)
    assert run_uploaded(host_card, batch, params, augment, None, False, None, None, False).shape == (0, 3, 8, 8)


def test_refusals_name_what_was_expected_and_found(host_card):
    images = crops_of()
    batch = put_images(host_card, torch.device("cpu"), images, 3)
    planar = put_planes(host_card, torch.device("cpu"), planes_of())
    augment = Augment.sela(20)
    params, _ = drawn(augment, batch)
    with pytest.raises(DataError, match="rows: expected None with uploaded images"):
        kernels.augment(batch, params, augment, rows=[0])
    with pytest.raises(DataError, match="found planes; augment_planes"):
        kernels.augment(planar, params, augment)
    with pytest.raises(DataError, match="found images of upload_images"):
        kernels.augment_planes(batch, params, augment)
    with pytest.raises(OptionError, match="channels: expected 3 for planes on a device, found 1"):
        kernels.augment_planes(planar, params, augment, channels=1)
    with pytest.raises(DataError, match="expected uint8 images, found float32"):
        kernels.upload_images([images[0].astype(np.float32)], "cpu")
    with pytest.raises(DataError, match="expected a list of Planes, found ndarray"):
        kernels.upload_planes(images, "cpu")
    with pytest.raises(OptionError, match='device: expected "cuda" or "cuda:N", found \'meta\''):
        kernels.upload_images(images, "meta")
    with pytest.raises(ResourceError, match="is not there"):
        kernels.upload_images(images, "cuda:1000")

    def run(batch=batch, params=params, augment=augment, effects=None, out=None, dtype=None):
        return run_uploaded(host_card, batch, params, augment, effects, False, out, dtype, False)

    with pytest.raises(DataError, match="params: expected 4 records"):
        run(params=params[:3])
    with pytest.raises(DataError, match="effects: expected records"):
        run(augment=Augment.aug_plus(20))
    with pytest.raises(DataError, match="out: expected"):
        run(out=torch.empty(4, 3, 20, 21))
    with pytest.raises(OptionError, match="dtype"):
        run(dtype=torch.float64)
    params["width"][2] = 1000
    with pytest.raises(DataError, match=r"expected a box inside the image.* of 5 x 3"):
        run()
    with pytest.raises(DataError, match=r"params\[2\]: expected a box inside the image"):
        run(batch=planar)


def test_errors_of_launches_and_of_the_kernels_limits_are_of_the_packages_kind(host_card, host_core):
    batch = put_images(host_card, torch.device("cpu"), crops_of(), 3)
    augment = Augment.sela(20)
    params, _ = drawn(augment, batch)

    def fails(error):
        def spoil(outputs):
            raise error

        return spoil

    for error, kind in (
        (RuntimeError("tile_kernel: launch failed\nmore"), ResourceError),
        (ValueError("augment: a limit"), OptionError),
    ):
        host_core.spoil = fails(error)
        with pytest.raises(kind, match=str(error).splitlines()[0]):
            run_uploaded(host_card, batch, params, augment, None, False, None, None, False)


def test_what_was_uploaded_may_be_told_from_other_sources():
    batch = kernels.upload_images(crops_of(), "cpu")
    assert isinstance(batch, DeviceImages)
    assert (batch.channels, batch.place) == (3, torch.device("cpu"))
