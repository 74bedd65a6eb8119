"""Batches of images that are kept on the device, in which images come again: drawn by numbers of their own."""

import numpy as np
import pytest

pytestmark = pytest.mark.plain_only

KEY = {"seed": 3, "epoch": 4, "view": 5}


@pytest.mark.parametrize(
    ("height", "width", "channels", "preset", "size"),
    [
        (33, 31, 3, "cifar", 17),  # the kernel that draws, and the one for small images
        (66, 31, 3, "sela", 17),
        (31, 33, 1, "sela", 66),
        (33, 31, 3, "aug_plus_more", 31),
        (33, 31, 3, "deepcluster", 17),
    ],
)
def test_an_image_that_comes_again_is_drawn_by_its_key_as_on_the_cpu(
    simt, as_cuda, host_card, monkeypatch, height, width, channels, preset, size
):
    torch = pytest.importorskip("torch")
    from sela_ext import kernels
    from sela_ext.kernels.resident import augment_kept

    augment = getattr(kernels.Augment, preset)(size)
    images = np.random.default_rng(0).integers(0, 256, (5, height, width, channels), dtype=np.uint8)
    index, keys = np.array([4, 0, 4, 4]), np.array([4, 5, 9, (1 << 40) - 1])
    drawn = kernels.sample_parameters(augment, height, width, keys, **KEY)
    effects = kernels.sample_effects(augment, keys, **KEY) if augment.draws_effects else None
    expected = kernels.augment(images, drawn, augment, effects=effects, rows=index)
    host_card.core = simt
    as_cuda(host_card)
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    arguments = torch.from_numpy(images), torch.from_numpy(index), torch.from_numpy(keys), augment
    found = augment_kept(*arguments, **KEY, dtype=torch.float32, channels_last=False)
    limit = 0.01 / 255 / min(augment.std)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=limit)
    assert not torch.equal(found[2], found[3])
