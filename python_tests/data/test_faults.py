"""What must happen when data are not as one would wish: the cases D1 to D7, D17, D22, D24 and D25 of the fault list."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext import Augment, Loader, kernels
from sela_ext.data import open_source
from sela_ext.errors import DataError, OptionError


def picture(height, width, seed=0):
    """A smooth picture with some texture, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin((x * a + y * b) / 7 + c) for a, b, c in rng.uniform(0.2, 1.5, (3, 3))]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def put(path, pixels, kind="JPEG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, kind, **options)
    return path


def stored(data, size, **options):
    """The pixels of images of size x size pixels, as they reach the network without any augmentation."""
    loader = Loader(data, augment=Augment.none(size), dtype=torch.uint8, shuffle=False, threads=2, **options)
    return torch.cat([batch.images for batch in loader.epoch(0)]).permute(0, 2, 3, 1).numpy()


def reader_status(path, epoch):
    """What the compiled reader makes of an image for `Augment.sela(48)`."""
    with kernels.Reader([Augment.sela(48)], threads=1) as reader:
        return reader.submit([str(path)], [0], [torch.empty(1, 3, 48, 48)], seed=0, epoch=epoch).wait().status.tolist()


def by_index(batches):
    return {int(i): image for batch in batches for i, image in zip(batch.index, batch.images, strict=True)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """31 pictures of different sizes: JPEG of several kinds, and every fifth a PNG."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(31):
        pixels = picture(60 + 5 * i, 200 - 4 * i, seed=i)
        if i % 5 == 4:
            put(root / f"{i:02d}.png", pixels, "PNG")
        else:
            put(root / f"{i:02d}.jpg", pixels, quality=60 + i, subsampling=i % 3, progressive=i % 7 == 6)
    return root


@pytest.fixture
def spoiled(tmp_path):
    """60 pictures, of which 7 is empty, 21 a text, 33 cut short and 58 cut short in its last bytes."""
    for i in range(60):
        put(tmp_path / f"{i:02d}.jpg", picture(120, 90 + i, seed=i))
    (tmp_path / "07.jpg").write_bytes(b"")
    (tmp_path / "21.jpg").write_text("This is not a picture.")
    for i, kept in ((33, 0.6), (58, 0.97)):
        data = (tmp_path / f"{i}.jpg").read_bytes()
        (tmp_path / f"{i}.jpg").write_bytes(data[: int(len(data) * kept)])
    return tmp_path


BAD = {7: "empty file", 21: "not an image", 33: "truncated", 58: "truncated"}


# D1
@pytest.mark.parametrize("index", list(BAD))
@pytest.mark.parametrize("threads", [1, 2])
def test_d1_a_damaged_image_is_an_error_that_names_it(spoiled, index, threads):
    good = [i for i in range(60) if i not in BAD]
    paths = [spoiled / f"{i:02d}.jpg" for i in (*good[:20], index, *good[20:])]
    loader = Loader(paths, batch_size=8, augment=Augment.sela(32), threads=threads)
    with pytest.raises(DataError, match=rf'{index:02d}\.jpg: .*{BAD[index]}.*on_bad_image="skip"') as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


# D1
@pytest.mark.parametrize("augment", [Augment.sela(32), Augment.none(32)])
def test_d1_damaged_images_are_left_out_and_listed_at_their_first_touch(spoiled, augment):
    # The first crop of 58 need not touch the missing end: it is noticed all the same.
    for epoch in range(3):
        loader = Loader(spoiled, batch_size=7, augment=augment, threads=2, on_bad_image="skip", max_bad_fraction=0.1)
        found = by_index(loader.epoch(epoch))
        assert sorted(found) == [i for i in range(60) if i not in BAD]
        listed = {index: (name, reason) for index, name, reason in loader.bad_images}
        assert {index: name for index, (name, _) in listed.items()} == {i: f"{i:02d}.jpg" for i in BAD}
        assert all(BAD[index] in reason for index, (_, reason) in listed.items())
        assert len(loader.bad_images) == len(BAD)


# D2


def formats():
    pixels = picture(40, 40)
    cmyk = Image.fromarray(pixels).convert("CMYK")
    buffer = io.BytesIO()
    cmyk.save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    place = data.index(b"Adobe") + 11
    grey = io.BytesIO()
    Image.fromarray(pixels).convert("L").save(grey, "JPEG")
    png, progressive, plain = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    Image.fromarray(pixels).save(progressive, "JPEG", progressive=True)
    Image.fromarray(pixels).save(plain, "JPEG", quality=85)
    return {
        "png": png.getvalue(),
        "cmyk": data[:place] + b"\0" + data[place + 1 :],
        "ycck": data[:place] + b"\2" + data[place + 1 :],
        "grey": grey.getvalue(),
        "progressive": progressive.getvalue(),
        "baseline": plain.getvalue(),
    }


# D2
@pytest.mark.parametrize("exact", [False, True])
def test_d2_content_decides_and_pixels_are_those_of_pillow(tmp_path, exact):
    files = formats()
    for name, data in files.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)  # the PNG too
    source = open_source(tmp_path)
    pixels = dict(zip(source.names, stored(source, 40, exact=exact), strict=True))
    assert len({p.tobytes() for p in pixels.values()}) == len(files)
    for name, data in files.items():
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(pixels[f"{name}.jpg"], expected, err_msg=name)


# D3
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 97, "subsampling": 0}),
     ("JPEG", {"quality": 97, "subsampling": 0, "progressive": True})],
)  # fmt: skip
@pytest.mark.parametrize("side", [48, 160])
def test_d3_all_eight_orientations_are_the_same_picture(tmp_path, kind, options, side):
    upright = picture(side, side)
    turned = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = upright
        # What a camera held that way would have stored: the inverse of what orientation asks for.
        if orientation in (2, 3, 6, 7):
            pixels = pixels[:, ::-1]
        if orientation in (3, 4, 7, 8):
            pixels = pixels[::-1]
        if orientation in (5, 6, 7, 8):
            pixels = pixels.transpose(1, 0, 2)
        turned[orientation] = pixels
        put(tmp_path / f"{orientation}.img", np.ascontiguousarray(pixels), kind, exif=exif, **options)
    tolerance = 0 if kind != "JPEG" else 20
    seen = stored(tmp_path, side, exif=True, exact=True)
    for orientation in range(1, 9):
        difference = np.abs(seen[orientation - 1].astype(int) - upright.astype(int))
        assert difference.max() <= tolerance, orientation
        if kind == "JPEG":
            assert difference.mean() < 3  # another orientation: 40
    raw = stored(tmp_path, side, exact=True)
    for orientation in range(1, 9):
        assert np.abs(raw[orientation - 1].astype(int) - turned[orientation].astype(int)).max() <= tolerance


# D3
@pytest.mark.parametrize("side", [(30, 50), (130, 190)])
def test_d3_an_oriented_picture_is_augmented_as_the_upright_one(tmp_path, side):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(*side)
    stored_sideways = np.ascontiguousarray(np.rot90(upright))
    put(tmp_path / "a.png", stored_sideways, "PNG", exif=exif)
    put(tmp_path / "b.jpg", stored_sideways, quality=98, subsampling=0, exif=exif)
    options = {"augment": Augment.sela(32), "shuffle": False, "batch_size": 1}
    (png, jpeg) = Loader(tmp_path, exif=True, **options).epoch(5)
    (expected,) = Loader(upright[None], **options).epoch(5)
    assert torch.equal(png.images, expected.images)
    other = next(Loader([tmp_path / "b.jpg"], exif=True, exact=True, **options).epoch(5))
    assert other.params.tobytes() == expected.params.tobytes()
    assert (other.images - expected.images).abs().mean() < 0.1
    assert not torch.equal(png.images, jpeg.images)


# D4
def test_d4_pngs_of_every_mode_are_converted_alike_on_every_path(tmp_path):
    pixels = picture(24, 24)
    rgba = np.dstack([pixels, np.linspace(0, 255, 576).reshape(24, 24).astype(np.uint8)])
    grey = Image.fromarray(pixels).convert("L")
    images = {
        "1.png": grey.convert("1"),
        "L.png": grey,
        "LA.png": Image.fromarray(rgba).convert("LA"),
        "P.png": Image.fromarray(pixels).quantize(31),
        "RGBA.png": Image.fromarray(rgba),
        "I16.png": Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 99),
    }
    for name, image in images.items():
        put(tmp_path / name, image, "PNG")
    put(tmp_path / "Pt.png", images["P.png"], "PNG", transparency=5)
    source = open_source(tmp_path)
    expected = {name: source.read(i) for i, name in enumerate(source.names)}
    one = open_source([tmp_path / name for name in source.names])
    part = one.subset(range(len(one))[::-1])
    for found in (stored(source, 24), stored(one, 24), stored(part, 24)[::-1], stored(source, 24, exif=True)):
        for name, image in zip(source.names, found, strict=True):
            np.testing.assert_array_equal(image, expected[name], err_msg=name)
    high = np.asarray(grey)
    np.testing.assert_array_equal(expected["I16.png"], np.dstack([high] * 3))
    white = np.asarray(Image.alpha_composite(Image.new("RGBA", (24, 24), "white"), images["RGBA.png"]).convert("RGB"))
    np.testing.assert_array_equal(expected["RGBA.png"], white)


# D5
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("exact", [False, True])
def test_d5_thin_and_tiny_images_have_the_right_shape_and_no_nan(tmp_path, kind, exact):
    for i, (height, width) in enumerate([(1, 1), (1, 3000), (3000, 1), (2, 2), (3, 1), (17, 2500)]):
        put(tmp_path / f"{i}.img", picture(height, width, seed=i), kind)
    presets = (Augment.sela(16), Augment.eval(16), Augment.none(16), Augment.aug_plus_more(33), Augment.deepcluster(16))
    for augment in presets:
        for epoch in range(3):
            (batch,) = Loader(tmp_path, augment=augment, shuffle=False, exact=exact).epoch(epoch)
            assert tuple(batch.images.shape) == (6, 2 if augment.sobel else 3, augment.size, augment.size)
            assert torch.isfinite(batch.images).all()
    (batch,) = Loader(tmp_path, augment=Augment.multi_crop((16, 7), (1, 2)), exact=exact).epoch(0)
    assert [view.shape[2] for view in batch.views] == [16, 7, 7]
    assert all(torch.isfinite(view).all() for view in batch.views)


# D6: the list itself is written by `train`, see python_tests/training.


# D6
def test_d6_bad_images_are_not_tried_again_and_keep_their_numbers(spoiled):
    loader = Loader(spoiled, batch_size=7, augment=Augment.sela(16), on_bad_image="skip", max_bad_fraction=0.1)
    list(loader.epoch(0))
    (spoiled / "07.jpg").write_bytes((spoiled / "08.jpg").read_bytes())  # mended meanwhile: the verdict stays
    batches = list(loader.epoch(1))
    assert sorted(by_index(batches)) == [i for i in range(60) if i not in BAD]
    assert batches[-1].position == 60
    assert len(loader.bad_images) == len(BAD)


# D6
def test_d6_more_bad_images_than_allowed_are_an_error_with_the_first_reasons(spoiled):
    loader = Loader(
        spoiled, batch_size=7, shuffle=False, augment=Augment.sela(16), on_bad_image="skip", max_bad_fraction=0.04
    )
    with pytest.raises(DataError, match=r"3 of 60 .* max_bad_fraction=0\.04: .*07\.jpg.*21\.jpg.*33\.jpg"):
        list(loader.epoch(0))


# D7
def test_d7_too_few_images_are_an_error_or_work_as_documented(tmp_path):
    with pytest.raises(DataError, match="found none"):
        Loader(tmp_path)
    with pytest.raises(DataError, match="empty list"):
        Loader([])
    for i in range(3):
        put(tmp_path / f"{i}.jpg", picture(20, 20, seed=i))
    assert [len(batch.index) for batch in Loader(tmp_path, batch_size=256).epoch(0)] == [3]
    with pytest.raises(OptionError, match="found 3 images, batch_size 256, 4 ranks"):
        Loader(tmp_path, rank=3, world_size=4)
    with pytest.raises(OptionError, match="found 3 images, batch_size 4, 1 ranks"):
        Loader(tmp_path, batch_size=4, drop_last=True)


# D17
def test_d17_a_change_of_the_data_changes_the_fingerprint(photos, tmp_path):
    names = sorted(os.listdir(photos))
    for name in names:
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    before = open_source(tmp_path).fingerprint()
    assert before == open_source(photos).fingerprint()
    put(tmp_path / "0a.jpg", picture(20, 20))
    added = open_source(tmp_path).fingerprint()
    assert (before["count"], added["count"]) == (31, 32)
    assert added["first_names"] == ["00.jpg", "01.jpg", "02.jpg"]
    assert added["names"] != before["names"]
    (tmp_path / "0a.jpg").unlink()
    (tmp_path / "05.jpg").write_bytes((photos / "06.jpg").read_bytes())
    assert open_source(tmp_path).fingerprint()["file_sizes"] != before["file_sizes"]


# D22
@pytest.mark.parametrize("exact", [False, True])
def test_d22_order_and_pixels_are_the_same_for_any_threads_and_any_time(photos, exact):
    def run(epoch, threads):
        loader = Loader(photos, batch_size=8, augment=Augment.aug_plus(48), seed=9, threads=threads, exact=exact)
        return list(loader.epoch(epoch))

    for epoch in (0, 7):
        reference = run(epoch, 1)
        for threads in (1, 2, 4):
            for one, other in zip(reference, run(epoch, threads), strict=True):
                assert torch.equal(one.index, other.index)
                assert torch.equal(one.images, other.images)
                assert one.params.tobytes() == other.params.tobytes()
                assert one.effects.tobytes() == other.effects.tobytes()


# D22
def test_d22_the_first_epoch_and_later_ones_of_one_loader_give_the_bits_of_fresh_ones(photos, tmp_path):
    # The first epoch decodes whole files and finds the entry points; later ones use them.
    options = {"batch_size": 8, "augment": Augment.sela(48), "threads": 2}
    kept = Loader(photos, index=tmp_path / "index", **options)
    for epoch in (0, 1, 2, 1):
        fresh = by_index(Loader(photos, **options).epoch(epoch))
        found = by_index(kept.epoch(epoch))
        reopened = by_index(Loader(photos, index=tmp_path / "index", **options).epoch(epoch))
        assert found.keys() == fresh.keys() == reopened.keys()
        assert all(torch.equal(fresh[i], found[i]) for i in fresh)
        assert all(torch.equal(fresh[i], reopened[i]) for i in fresh)


# D22
def test_d22_an_image_that_only_some_boxes_leave_to_pillow_has_the_same_bits_after_a_resume(tmp_path):
    # Divisors ten times as large as those it was written with: levels beside the corner of noise stay in range.
    pixels = np.full((200, 200, 3), 128, np.uint8)
    pixels[:] += (picture(200, 200, seed=1) // 20).astype(np.uint8)
    pixels[:40, :40] = np.random.default_rng(2).choice([0, 255], (40, 40, 3))
    path = put(tmp_path / "images/0.jpg", pixels, qtables=[[4] * 64] * 2, subsampling=2)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xdb") + 5
    data[at : at + 64] = bytes([40] * 64)
    path.write_bytes(data)
    options = {"batch_size": 1, "augment": Augment.sela(48), "threads": 1}
    unbroken = Loader(tmp_path / "images", **options)
    statuses = set()
    for epoch in range(12):
        statuses.add(tuple(reader_status(path, epoch)))
        (found,), (fresh,) = unbroken.epoch(epoch), Loader(tmp_path / "images", **options).epoch(epoch)
        assert torch.equal(found.images, fresh.images)
    assert statuses == {(kernels.READ_OK,), (kernels.READ_OTHER,)}


# D22
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"exif": True}])
def test_d22_a_pack_gives_the_bits_of_the_folder_that_it_was_made_from(photos, tmp_path, options):
    sela_ext.pack(photos, tmp_path / "pack")
    plain = Loader(photos, batch_size=8, augment=Augment.aug_plus(48), threads=2, **options)
    packed = Loader(tmp_path / "pack", batch_size=5, augment=Augment.aug_plus(48), threads=1, **options)
    assert packed.source.encoded
    assert packed.source.names == plain.source.names
    for epoch in (0, 1):
        expected, found = by_index(plain.epoch(epoch)), by_index(packed.epoch(epoch))
        assert sorted(found) == list(range(31))
        assert all(torch.equal(found[i], expected[i]) for i in found)


# D22
def test_d22_an_epoch_resumes_bit_for_bit_from_every_position(photos, tmp_path):
    options = {"batch_size": 4, "augment": Augment.multi_crop((48, 24), (1, 2)), "threads": 2}
    whole = list(Loader(photos, **options).epoch(3))
    for done in range(len(whole) - 1):
        rest = list(Loader(photos, index=tmp_path, **options).epoch(3, start=whole[done].position))
        for one, other in zip(whole[done + 1 :], rest, strict=True):
            assert torch.equal(one.index, other.index)
            assert one.position == other.position
            assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
            assert all(a.tobytes() == b.tobytes() for a, b in zip(one.params, other.params, strict=True))


# D24
def test_d24_three_ranks_together_give_what_one_gives(photos):
    options = {"batch_size": 3, "augment": Augment.sela(48), "seed": 2, "threads": 2}
    alone = by_index(Loader(photos, **options).epoch(4))
    assert sorted(alone) == list(range(31))
    seen = []
    for rank in range(3):
        batches = list(Loader(photos, rank=rank, world_size=3, **options).epoch(4))
        found = by_index(batches)
        assert len(found) == (31 + 2 - rank) // 3
        assert len(batches[-1].index) == (2, 1, 1)[rank]
        assert all(torch.equal(alone[i], image) for i, image in found.items())
        seen += found
    assert sorted(seen) == list(range(31))


# D24
def test_d24_a_last_batch_of_one_works(photos):
    assert [len(batch.index) for batch in Loader(photos, batch_size=10, augment=Augment.sela(16)).epoch(0)][-1] == 1


# D25

ALONE = """
import os, sys
from pathlib import Path
from sela_ext import Augment, Loader, kernels
shared = Path("/dev/shm")
before = set(os.listdir(shared)) if shared.is_dir() else set()
loader = Loader(sys.argv[1], batch_size=4, augment=Augment.sela(48), threads=3)
for epoch in range(2):
    for batch in loader.epoch(epoch):
        assert "/dev/shm" not in Path("/proc/self/maps").read_text()
        assert not batch.images.is_shared()
        assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == ""
mine = {name for name in os.listdir(shared) if str(os.getpid()) in name} if shared.is_dir() else set()
assert mine <= before, mine
assert sys.stdout is None
"""


# D25
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_d25_no_shared_memory_no_other_process_and_no_output_are_needed(photos, tmp_path):
    # Closed output, no display, and no CUDA device that anybody could see.
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE, str(photos)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        env=environment,
        cwd=tmp_path,
        preexec_fn=lambda: os.close(1),
    )
    assert (done.returncode, done.stderr) == (0, "")
