"""Tone, blur, noise, gradients, bytes and several views: against torchvision v2 in float and against the twin."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import functional

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import EFFECTS, Augment, reference

SIZES = [(1, 1), (5, 3), (32, 32), (31, 33), (17, 400), (100, 75)]
LIMIT = 0.01 / 255


def smooth_images(count, size, channels, seed=0):
    """Soft structures, noise and flat colours."""
    rng = np.random.default_rng(seed)
    height, width = size
    coarse = torch.from_numpy(rng.random((count, channels, 4, 4), dtype=np.float32))
    soft = torch.nn.functional.interpolate(coarse, size, mode="bilinear").permute(0, 2, 3, 1).numpy()
    images = (soft * 200 + rng.integers(0, 50, (count, height, width, channels))).astype(np.uint8)
    images[2::3] = images[2::3, :1, :1]
    return list(images)


def draw(augment, images, seed=0):
    heights, widths = np.array([image.shape[:2] for image in images]).T
    index = np.arange(len(images))
    params = kernels.sample_parameters(augment, heights, widths, index, seed=seed, epoch=1)
    return params, kernels.sample_effects(augment, index, seed=seed, epoch=1)


def in_unit(batch, augment, channels):
    mean, std = (torch.tensor(values)[:, None, None] for values in augment.channel_values(channels))
    return batch * std + mean


def effects_of(count, **fields):
    """Records that do nothing but `fields`."""
    effects = np.zeros(count, EFFECTS)
    effects["sharpness"] = 1
    for name, value in fields.items():
        effects[name] = value
    return effects


def only(size, images, effects):
    """(found, torchvision's resized image) with nothing random but the effects."""
    augment = Augment.none(size, blur_probability=1.0)
    params = draw(augment, images)[0]
    plain = Augment.none(size)
    found = in_unit(kernels.augment(images, params, augment, effects=effects), augment, images[0].shape[2])
    return found, in_unit(kernels.augment(images, params, plain), plain, images[0].shape[2])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 20, 33, 96, 224])
def test_blur_equals_torchvision_with_simclrs_kernel(size, channels):
    images = [smooth_images(1, s, channels, k)[0] for k, s in enumerate(SIZES)]
    sigma = np.linspace(0.1, 2.0, len(images))
    found, plain = only(size, images, effects_of(len(images), blur=sigma))
    kernel = 2 * (size // 20) + 1
    expected = [functional.gaussian_blur(x, kernel, float(np.float32(s))) for x, s in zip(plain, sigma, strict=True)]
    assert (found - torch.stack(expected)).abs().max() < LIMIT


@pytest.mark.parametrize("kernel", [1, 3, 31, 63])
def test_the_blurs_kernel_may_be_as_wide_as_a_reflection_allows(kernel):
    augment = Augment.none(32, blur_probability=1.0, blur_kernel=kernel, blur_sigma=(5.0, 50.0))
    images = smooth_images(4, (40, 50), 3)
    params, effects = draw(augment, images)
    found = in_unit(kernels.augment(images, params, augment, effects=effects), augment, 3)
    plain = in_unit(kernels.augment(images, params, Augment.none(32)), augment, 3)
    expected = [functional.gaussian_blur(x, kernel, float(e["blur"])) for x, e in zip(plain, effects, strict=True)]
    assert (found - torch.stack(expected)).abs().max() < LIMIT


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 33, 64])
def test_autocontrast_and_sharpness_equal_torchvision(size, channels):
    images = [smooth_images(1, s, channels, k)[0] for k, s in enumerate(SIZES)]
    found, plain = only(size, images, effects_of(len(images), tone=2))
    # A flat image stays as it is, even where rounding has left a spread of 1e-7 that torchvision would stretch.
    flat = (plain.amax((2, 3)) - plain.amin((2, 3)) < 1e-4)[:, :, None, None]
    assert (found - torch.where(flat, plain, functional.autocontrast(plain))).abs().max() < LIMIT
    factors = np.array([0.0, 0.1, 0.7, 1.0, 1.9, 5.0], np.float32)
    found, plain = only(size, images, effects_of(len(images), tone=3, sharpness=factors))
    expected = [functional.adjust_sharpness(x, float(f)) for x, f in zip(plain, factors, strict=True)]
    assert (found - torch.stack(expected)).abs().max() < LIMIT


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 15, 33, 64])
def test_equalize_equals_torchvision_level_by_level(size, channels):
    images = smooth_images(6, (size, size), channels)  # not resampled: every pixel is a level, none between two
    found, _ = only(size, images, effects_of(6, tone=1))
    expected = functional.equalize(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert torch.equal((found * 255).round().byte(), expected)


def test_equalize_after_resampling_differs_at_few_pixels_that_lie_between_two_levels():
    images = smooth_images(6, (50, 70), 3)
    found, plain = only(33, images, effects_of(6, tone=1))
    textured = torch.tensor([k % 3 != 2 for k in range(6)])
    differs = (found - functional.equalize(plain)).abs()[textured] > LIMIT
    assert differs.float().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 33, 64])
@pytest.mark.parametrize("preset", ["aug_plus", "deepcluster", "deepcluster_eval"])
def test_presets_equal_their_twins(preset, size, channels):
    augment = getattr(Augment, preset)(size, noise_probability=0.5)
    images = [image for k, s in enumerate(SIZES) for image in smooth_images(4, s, channels, k)]
    params, effects = draw(augment, images)
    found = kernels.augment(images, params, augment, effects=effects)
    expected = reference.augment(images, params, augment, effects=effects)
    assert found.shape == expected.shape
    scale = 8 / min(augment.std) if augment.sobel else 1 / min(augment.std)  # a filter adds eight numbers up
    assert (found - expected).abs().max() < LIMIT * scale


def test_aug_plus_more_equals_its_twin_but_for_pixels_between_two_levels():
    augment = Augment.aug_plus_more(33)
    images = smooth_images(24, (50, 70), 3)
    params, effects = draw(augment, images)
    assert set(effects["tone"]) == {1, 2, 3}
    differs = (
        kernels.augment(images, params, augment, effects=effects)
        - reference.augment(images, params, augment, effects=effects)
    ).abs().amax((1, 2, 3)) * min(augment.std)
    assert (differs[effects["tone"] != 1] < LIMIT).all()
    assert (differs[effects["tone"] == 1] < 4 / 255).all()


def test_aug_plus_is_torchvisions_pipeline_in_mocos_order():
    augment = Augment.aug_plus(64)
    images = smooth_images(40, (90, 70), 3)
    params, effects = draw(augment, images)
    found = in_unit(kernels.augment(images, params, augment, effects=effects), augment, 3)
    steps = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    names = ("brightness", "contrast", "saturation", "hue")
    for image, record, effect, mine in zip(images, params, effects, found, strict=True):
        box = [int(record[name]) for name in ("top", "left", "height", "width")]
        x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        x = functional.resized_crop(x, *box, [64, 64], antialias=True)
        if record["jitter"]:
            for k in record["order"]:
                x = [*steps, functional.adjust_hue][k](x, float(record[names[k]]))
        if record["gray"]:
            x = functional.rgb_to_grayscale(x, 3)
        if effect["blur"] > 0:
            x = functional.gaussian_blur(x, 7, float(effect["blur"]))
        if record["flip"]:
            x = functional.horizontal_flip(x)
        assert (mine - x).abs().max() < LIMIT
    assert {int(j) for j in params["jitter"]} == {0, 1}
    assert 0 < (effects["blur"] > 0).sum() < 40


def test_gradients_are_deepclusters_filters():
    """Gray of 1/3 each, then two 3 x 3 filters with a border of zeros, on the normalised image."""
    augment = Augment.deepcluster_eval(31)
    images = smooth_images(5, (40, 60), 3)
    params = draw(augment, images)[0]
    plain = kernels.augment(images, params, Augment.eval(31))
    gray = torch.nn.Conv2d(3, 1, 1)
    sobel = torch.nn.Conv2d(1, 2, 3, padding=1)
    with torch.no_grad():
        gray.weight.fill_(1 / 3)
        gray.bias.zero_()
        sobel.weight[0, 0] = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        sobel.weight[1, 0] = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]])
        sobel.bias.zero_()
        expected = sobel(gray(plain))
    assert (kernels.augment(images, params, augment) - expected).abs().max() < 1e-4


def test_noise_is_standard_normal_and_different_for_every_pixel_channel_image_and_view():
    augment = Augment.none(64, noise_probability=1.0, noise_sigma=(0.02, 0.02))
    images = [np.full((64, 64, 3), 128, np.uint8)] * 8
    params, effects = draw(augment, images)
    noise = (in_unit(kernels.augment(images, params, augment, effects=effects), augment, 3) - 128 / 255) / 0.02
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5
    flat = noise.view(24, -1)
    correlation = np.corrcoef(flat.numpy()) - np.eye(24)
    assert np.abs(correlation).max() < 5 / 64
    assert abs((flat[:, 1:] * flat[:, :-1]).mean()) < 5 / noise.numel() ** 0.5
    assert abs((flat[:, 16:] * flat[:, :-16]).mean()) < 5 / noise.numel() ** 0.5
    other = kernels.sample_effects(augment, range(8), seed=0, epoch=1, view=1)
    assert not np.isin(other["noise_key"], effects["noise_key"]).any()


def test_noise_is_clamped_and_gray_images_get_it_in_every_channel():
    augment = Augment.sela(33, gray_probability=1.0, noise_probability=1.0, noise_sigma=(1.0, 1.0))
    images = smooth_images(4, (40, 40), 3)
    params, effects = draw(augment, images)
    found = in_unit(kernels.augment(images, params, augment, effects=effects), augment, 3)
    assert found.min() > -1e-6
    assert found.max() < 1 + 1e-6
    assert not torch.allclose(found[:, 0], found[:, 1])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 31, 32])
def test_bytes_are_the_rounded_floats_before_normalisation(size, channels, channels_last):
    augment = Augment.aug_plus(size)
    images = smooth_images(7, (20, 30), channels)
    params, effects = draw(augment, images)
    floats = in_unit(kernels.augment(images, params, augment, effects=effects), augment, channels) * 255
    found = kernels.augment(images, params, augment, effects=effects, dtype=torch.uint8, channels_last=channels_last)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert (found - floats).abs().max() < 0.501


def test_bytes_of_images_of_the_output_size_are_the_images():
    images = smooth_images(4, (33, 33), 3)
    augment = Augment.none(33)
    found = kernels.augment(images, draw(augment, images)[0], augment, dtype=torch.uint8)
    assert torch.equal(found, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["aug_plus", "deepcluster"])
def test_effects_do_not_depend_on_the_memory_order_and_halves_are_rounded(preset, dtype):
    augment = getattr(Augment, preset)(33)
    images = smooth_images(7, (50, 40), 3)
    params, effects = draw(augment, images)
    floats = kernels.augment(images, params, augment, effects=effects)
    for last in (False, True):
        found = kernels.augment(images, params, augment, effects=effects, dtype=dtype, channels_last=last)
        assert torch.equal(found, floats.to(dtype))


def test_effects_that_do_nothing_leave_no_trace():
    augment = Augment.sela(33)
    images = smooth_images(7, (50, 40), 3)
    params = draw(augment, images)[0]
    plain = kernels.augment(images, params, augment)
    assert torch.equal(kernels.augment(images, params, augment, effects=effects_of(7)), plain)


def test_bits_do_not_depend_on_threads_or_the_rest_of_the_batch():
    augment = Augment.aug_plus_more(48, noise_probability=0.5)
    images = smooth_images(80, (60, 70), 3)
    params, effects = draw(augment, images)
    one = kernels.augment(images, params, augment, effects=effects, threads=1)
    for threads in (2, 4):
        assert torch.equal(kernels.augment(images, params, augment, effects=effects, threads=threads), one)
    for i in (79, 3, 40):
        part = slice(i, i + 1)
        alone = kernels.augment(images[part], params[part], augment, effects=effects[part])
        assert torch.equal(alone[0], one[i])


def test_nothing_outside_the_output_is_written():
    images = smooth_images(4, (13, 7), 3)
    for size in (1, 3, 31, 33):
        for augment in (Augment.aug_plus_more(size, noise_probability=1.0), Augment.deepcluster(size)):
            params, effects = draw(augment, images)
            effects["blur"] = 1.0
            for dtype in (torch.float32, torch.bfloat16) if augment.sobel else (torch.float32, torch.uint8):
                values = augment.output_channels(3) * size * size
                room = torch.full((4 * values + 64,), 77, dtype=dtype)
                out = room[32:-32].view(4, -1, size, size)
                kernels.augment(images, params, augment, effects=effects, out=out)
                assert (room[:32] == 77).all()
                assert (room[-32:] == 77).all()


def test_drawn_effects_equal_their_twins_and_keep_their_shares():
    augment = Augment.aug_plus_more(32, tone_probability=0.6, noise_probability=0.3, noise_sigma=(0.01, 0.2))
    index = np.arange(20_000) * 54_321 + 7
    found = kernels.sample_effects(augment, index, seed=2**63 + 5, epoch=9, view=3)
    assert np.array_equal(found, reference.sample_effects(augment, index, seed=2**63 + 5, epoch=9, view=3))
    assert abs((found["blur"] > 0).mean() - 0.5) < 0.02
    assert abs((found["noise"] > 0).mean() - 0.3) < 0.02
    assert np.abs(np.bincount(found["tone"], minlength=4) / 20_000 - [0.4, 0.2, 0.2, 0.2]).max() < 0.02
    for name, low, high in (("blur", 0.1, 2.0), ("noise", 0.01, 0.2)):
        values = found[name][found[name] > 0]
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 0.01
    sharp = found["sharpness"][found["tone"] == 3]
    assert stats.kstest(sharp, "uniform", (0.1, 1.8)).pvalue > 0.01
    assert len(np.unique(found["noise_key"], axis=0)) == 20_000


def test_effects_leave_the_other_draws_alone():
    params, more = (
        kernels.sample_parameters(augment, 40, 50, range(99), seed=1, epoch=2)
        for augment in (Augment.aug_plus(32), Augment.aug_plus_more(32, noise_probability=1.0))
    )
    assert np.array_equal(params, more)


def test_views_of_several_sizes_are_those_of_single_calls():
    images = smooth_images(5, (60, 80), 3)
    views = Augment.multi_crop((32, 16), (2, 3))
    found = kernels.augment_views(images, views, range(5), seed=4, epoch=2, first_view=10)
    assert [tuple(batch.shape) for batch in found] == [(5, 3, 32, 32)] * 2 + [(5, 3, 16, 16)] * 3
    for number, (view, batch) in enumerate(zip(views, found, strict=True), 10):
        params = kernels.sample_parameters(view, 60, 80, range(5), seed=4, epoch=2, view=number)
        effects = kernels.sample_effects(view, range(5), seed=4, epoch=2, view=number)
        assert torch.equal(batch, kernels.augment(images, params, view, effects=effects))
    assert not torch.equal(found[0], found[1])
    twins = reference.augment_views(np.stack(images), views, range(5), seed=4, epoch=2, first_view=10)
    for batch, twin, view in zip(found, twins, views, strict=True):
        assert (batch - twin).abs().max() * min(view.std) < LIMIT


def test_multi_crop_gives_each_kind_its_size_scale_and_fields():
    views = Augment.multi_crop((160, 96), (2, 4), blur_probability=0.1)
    assert [(v.size, v.scale) for v in views] == [(160, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 4
    assert {v.blur_probability for v in views} == {0.1}
    assert len(Augment.multi_crop()) == 8
    with pytest.raises(OptionError, match="as many sizes as counts"):
        Augment.multi_crop((96,), (2, 4))
    with pytest.raises(OptionError, match="counts"):
        Augment.multi_crop((96, 32), (0, 4))


def test_resident_images_get_the_same_effects():
    images = np.stack(smooth_images(9, (32, 32), 3))
    augment = Augment.aug_plus(24)
    rows = np.array([8, 0, 3])
    params = kernels.sample_parameters(augment, 32, 32, rows, seed=3, epoch=5)
    effects = kernels.sample_effects(augment, rows, seed=3, epoch=5)
    expected = kernels.augment(images, params, augment, effects=effects, rows=rows)
    assert torch.equal(kernels.augment_resident(images, rows, augment, seed=3, epoch=5), expected)
    twin = reference.augment_resident(images, rows, augment, seed=3, epoch=5)
    assert (twin - expected).abs().max() * min(augment.std) < LIMIT


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_equals_the_twin_and_draws_the_same_noise(isa, tmp_path):
    code = """
import hashlib
import numpy as np, torch, sela_ext
from sela_ext import kernels
from sela_ext.kernels import Augment, reference
print(sela_ext.build_info()["cpu_isa"])
rng = np.random.default_rng(0)
for channels in (1, 3):
    images = [rng.integers(0, 256, (h, w, channels), dtype=np.uint8) for h, w in [(1, 1), (31, 33), (90, 200)] * 4]
    h, w = zip(*(image.shape[:2] for image in images))
    for size in (1, 21, 65):
        for preset in ("aug_plus", "aug_plus_more", "deepcluster"):
            augment = getattr(Augment, preset)(size, noise_probability=0.3)
            params = kernels.sample_parameters(augment, h, w, range(12), seed=3, epoch=1)
            effects = kernels.sample_effects(augment, range(12), seed=3, epoch=1)
            effects["tone"][effects["tone"] == 1] = 2
            a = kernels.augment(images, params, augment, effects=effects)
            b = reference.augment(images, params, augment, effects=effects)
            assert (a - b).abs().max() * min(augment.std) < 8 * 0.01 / 255, (channels, size, preset)
flat = [np.full((33, 33, 3), 100, np.uint8)]
augment = Augment.none(33, noise_probability=1.0)
params = kernels.sample_parameters(augment, 33, 33, [5], seed=3, epoch=1)
effects = kernels.sample_effects(augment, [5], seed=3, epoch=1)
bits = kernels.augment(flat, params, augment, effects=effects, dtype=torch.uint8).numpy().tobytes()
print(hashlib.sha256(bits).hexdigest()[:16])
"""
    environment = {**os.environ, "SELA_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    if "at best" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, run.stderr
    flat = [np.full((33, 33, 3), 100, np.uint8)]
    augment = Augment.none(33, noise_probability=1.0)
    params = kernels.sample_parameters(augment, 33, 33, [5], seed=3, epoch=1)
    effects = kernels.sample_effects(augment, [5], seed=3, epoch=1)
    twin = reference.augment(flat, params, augment, effects=effects, dtype=torch.uint8)
    here = kernels.augment(flat, params, augment, effects=effects, dtype=torch.uint8)
    assert (twin.int() - here.int()).abs().max() <= 1
    import hashlib

    assert run.stdout.split() == [isa, hashlib.sha256(here.numpy().tobytes()).hexdigest()[:16]]


def test_refusals_name_what_was_expected_and_found():
    images = smooth_images(3, (20, 20), 3)
    augment = Augment.aug_plus(16)
    params, effects = draw(augment, images)
    with pytest.raises(DataError, match="effects: expected records"):
        kernels.augment(images, params, augment)
    with pytest.raises(DataError, match="effects: expected 3 records"):
        kernels.augment(images, params, augment, effects=effects[:2])
    with pytest.raises(DataError, match="effects: expected 3 records"):
        kernels.augment(images, params, augment, effects=params)
    for name, value in (("blur", -1.0), ("blur", np.nan), ("tone", 4), ("sharpness", np.inf), ("noise", -0.1)):
        bad = effects.copy()
        bad[name][1] = value
        with pytest.raises(DataError, match=rf"effects\[1\]: expected .*{name}"):
            kernels.augment(images, params, augment, effects=bad)
    with pytest.raises(OptionError, match="floating-point type with sobel"):
        kernels.augment(images, params, Augment.deepcluster(16), dtype=torch.uint8)
    with pytest.raises(OptionError, match="view"):
        kernels.sample_effects(augment, [0], seed=0, epoch=0, view=256)
    for fields, reason in [
        ({"blur_probability": 1.5}, "blur_probability"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"blur_kernel": 4}, "blur_kernel"),
        ({"blur_kernel": 33}, "blur_kernel"),
        ({"tone_probability": -0.1}, "tone_probability"),
        ({"sharpness": (2.0, 1.0)}, "sharpness"),
        ({"noise_probability": 2}, "noise_probability"),
        ({"noise_sigma": (-0.1, 0.1)}, "noise_sigma"),
    ]:
        with pytest.raises(OptionError, match=reason):
            Augment(16, **fields)


def test_the_cuda_kernel_of_one_launch_is_for_small_images_without_effects():
    from sela_ext.kernels.augment_resident import takes_one_launch

    assert takes_one_launch(64, 64, Augment.sela(64), None)
    for height, width, augment in ((65, 64, Augment.sela(8)), (8, 65, Augment.sela(8)), (8, 8, Augment.sela(65))):
        assert not takes_one_launch(height, width, augment, None)
    for augment in (Augment.aug_plus(32), Augment.deepcluster(32), Augment.none(32, noise_probability=0.1)):
        assert not takes_one_launch(32, 32, augment, None)
    effects = kernels.sample_effects(Augment.none(32), [0], seed=0, epoch=0)
    assert not takes_one_launch(32, 32, Augment.none(32), effects)


def test_augment_with_effects_survives_json():
    import json

    augment = Augment.aug_plus_more(32, noise_sigma=(0.1, 0.2), sharpness=(0.5, 1.5))
    again = Augment(**json.loads(json.dumps(dataclasses.asdict(augment))))
    assert again == augment
    assert hash(again) == hash(augment)
