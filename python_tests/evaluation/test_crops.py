import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sela_ext.data import Augment, open_source
from sela_ext.errors import DataError
from sela_ext.evaluation import ten_crops
from sela_ext.evaluation.crops import crop_records


def photos(tmp_path, sizes):
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        small = rng.integers(0, 256, size=(9, 9, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    return open_source(tmp_path)


def torchvision_crops(pixels, size, resize):
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    image = v2.Resize(resize, antialias=True)(image)
    normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return torch.stack([normalise(view) for view in v2.TenCrop(size)(image)])


@pytest.mark.parametrize("size", [32, 33])
def test_ten_crops_equal_torchvisions(tmp_path, size):
    source = photos(tmp_path, [(60, 90), (91, 61), (47, 47), (200, 53), (36, 36)])
    augment = Augment.eval(size)
    images, index = zip(*ten_crops(source, augment, batch_size=2), strict=True)
    assert torch.equal(torch.cat(index), torch.arange(5))
    views = torch.cat(images).view(5, 10, 3, size, size)
    for number in range(5):
        expected = torchvision_crops(source.read(number), size, augment.resize_side)
        assert float((views[number] - expected).abs().max()) < 0.01


@pytest.mark.parametrize(("height", "width"), [(31, 33), (64, 31), (33, 1001)])
def test_windows_lie_inside_the_image(height, width):
    augment = Augment.eval(24, resize=31)
    records = crop_records([height], [width], augment)
    assert len(records) == 10
    assert (records["top"] >= 0).all()
    assert (records["left"] >= 0).all()
    assert (records["top"] + 24 <= records["height"]).all()
    assert (records["left"] + 24 <= records["width"]).all()
    assert records["flip"].tolist() == [0] * 5 + [1] * 5
    assert min(records["height"][0], records["width"][0]) == 31


def test_threads_and_batches_change_nothing(tmp_path):
    source = photos(tmp_path, [(40 + n, 70 - n) for n in range(7)])
    one, other = (
        torch.cat([images for images, _ in ten_crops(source, Augment.eval(24), batch_size=b, threads=t)])
        for b, t in ((3, 1), (7, 2))
    )
    assert torch.equal(one, other)


def test_an_unreadable_image_is_skipped_or_named(tmp_path):
    source = photos(tmp_path, [(40, 40)] * 3)
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DataError, match=r"1\.png"):
        list(ten_crops(source, Augment.eval(24)))
    (images, index), *_ = list(ten_crops(source, Augment.eval(24), skip_bad=True))
    assert index.tolist() == [0, 2]
    assert images.shape == (20, 3, 24, 24)


def test_leaving_early_ends_the_threads(tmp_path):
    import threading

    source = photos(tmp_path, [(40, 40)] * 9)
    views = ten_crops(source, Augment.eval(24), batch_size=1, threads=2)
    next(views)
    views.close()
    assert not [thread for thread in threading.enumerate() if "sela-crops" in thread.name]
