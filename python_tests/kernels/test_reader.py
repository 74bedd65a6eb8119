import errno
import gc
import io
import itertools
import os
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sela_ext import _core
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels import (
    READ_NOT_REGULAR,
    READ_OK,
    READ_OTHER,
    READ_TOO_LARGE,
    READ_UNREADABLE,
    Augment,
    IndexStore,
    JoinedPaths,
    Reader,
    jpeg_index,
    reference,
)

PRESETS = {
    "none": Augment.none(33),
    "flip": Augment.flip(31),
    "resized_crop": Augment.resized_crop(40),
    "sela": Augment.sela(33),
    "cifar": Augment.cifar(32),
    "aug_plus": Augment.aug_plus(31),
    "aug_plus_more": Augment.aug_plus_more(33),
    "eval": Augment.eval(33),
    "deepcluster": Augment.deepcluster(31),
    "deepcluster_eval": Augment.deepcluster_eval(33),
    "noise": Augment.sela(33, noise_probability=0.7),
}
FACTORS = {
    "4:4:4": [(1, 1), (1, 1), (1, 1)],
    "4:2:2": [(2, 1), (1, 1), (1, 1)],
    "4:4:0": [(1, 2), (1, 1), (1, 1)],
    "4:2:0": [(2, 2), (1, 1), (1, 1)],
    "4:1:1": [(4, 1), (1, 1), (1, 1)],
    "4:1:0": [(4, 2), (1, 1), (1, 1)],
    "three": [(3, 1), (1, 1), (1, 1)],
    "mixed": [(2, 2), (1, 2), (2, 1)],
    "light below colour": [(1, 1), (2, 2), (1, 1)],
    "grey": [(1, 1)],
}
FOLDER = Path(os.environ.get("SELA_DATA_DIR") or Path(__file__).resolve().parents[3] / "shared" / "data")


def picture(seed, height, width, mode="RGB"):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    """Files of many sizes, samplings and qualities, large and small, grey among them."""
    sizes = [(130, 171), (301, 105), (105, 104), (104, 104), (31, 1), (1, 33), (211, 403), (160, 240)]
    made = []
    for i, (height, width) in enumerate(sizes):
        mode = "L" if i % 4 == 3 else "RGB"
        extra = {"restart_marker_rows": 2} if i == 6 else {}
        made.append(encoded(picture(i, height, width, mode), quality=60 + 5 * i, subsampling=i % 3, **extra))
    return made


def outputs(augments, count, channels=3, dtype=torch.float32, channels_last=False):
    order = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.zeros(count, a.output_channels(channels), a.size, a.size, dtype=dtype).contiguous(memory_format=order)
        for a in augments
    ]


def read(
    items, augments, *, twin=False, index=None, number=None, epoch=3, indexes=None, keys=None, reader=None, **options
):
    """(batch, outputs) of one batch."""
    kind = reference.Reader if twin else Reader
    owner = reader or kind(augments, **({"threads": 1} | options), index=index)
    out = outputs(
        augments,
        len(items),
        options.get("channels", 3),
        options.get("dtype", torch.float32),
        options.get("channels_last", False),
    )
    numbers = np.arange(len(items)) + 5 if number is None else number
    views = list(range(2, 2 + len(augments)))
    batch = owner.submit(items, numbers, out, seed=11, epoch=epoch, views=views, indexes=indexes, keys=keys).wait()
    if reader is None:
        owner.close()
    return batch, out


def assert_same(found, expected):
    """Statuses, parameters and pixels; pixels only of what was read."""
    (batch, out), (wanted, other) = found, expected
    np.testing.assert_array_equal(batch.status, wanted.status)
    good = batch.status == READ_OK
    np.testing.assert_array_equal(batch.height[good], wanted.height[good])
    np.testing.assert_array_equal(batch.width[good], wanted.width[good])
    for a, b in zip([*batch.params, *batch.effects], [*wanted.params, *wanted.effects], strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert a[good].tobytes() == b[good].tobytes()
    for a, b in zip(out, other, strict=True):
        assert torch.equal(a[torch.from_numpy(good)], b[torch.from_numpy(good)])


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("exact", [False, True])
def test_every_preset_gives_the_bits_of_the_twin(files, preset, exact):
    augments = [PRESETS[preset]]
    expected = read(files, augments, twin=True, exact=exact)
    assert (expected[0].status == READ_OK).all()
    assert_same(read(files, augments, exact=exact), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_dtype_and_memory_format_gives_the_bits_of_the_twin(files, dtype, channels_last):
    augments = [PRESETS["aug_plus"]]
    options = {"dtype": dtype, "channels_last": channels_last}
    assert_same(read(files, augments, **options), read(files, augments, twin=True, **options))


@pytest.mark.parametrize("sampling", FACTORS)
def test_every_sampling_gives_the_bits_of_the_twin(writer, sampling):
    rng = np.random.default_rng(4)
    made = [
        writer.picture(rng, width, height, FACTORS[sampling]) for height, width in [(120, 131), (37, 210), (64, 64)]
    ]
    augments = [PRESETS["sela"], PRESETS["eval"]]
    expected = read(made, augments, twin=True)
    assert (expected[0].status == READ_OK).all()
    assert_same(read(made, augments), expected)
    assert_same(read(made, augments, exact=True), read(made, augments, twin=True, exact=True))


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (3000, 1), (2, 501), (105, 3), (7, 1001)])
def test_thin_images_give_the_bits_of_the_twin(height, width):
    made = [encoded(picture(k, height, width), subsampling=k) for k in range(3)]
    augments = [PRESETS["aug_plus_more"], PRESETS["eval"], Augment.resized_crop(5)]
    for options in ({}, {"exact": True}):
        expected = read(made, augments, twin=True, **options)
        assert (expected[0].status == READ_OK).all()
        assert all(torch.isfinite(out).all() for out in expected[1])
        assert_same(read(made, augments, **options), expected)


def test_several_views_are_those_of_one_view_each(files):
    augments = list(Augment.multi_crop((48, 24), (2, 3)))
    batch, out = read(files, augments)
    assert_same((batch, out), read(files, augments, twin=True))
    for v in (0, 3):
        with Reader([augments[v]], threads=1) as reader:
            single = outputs([augments[v]], len(files))
            reader.submit(files, np.arange(len(files)) + 5, single, seed=11, epoch=3, views=[2 + v]).wait()
        assert torch.equal(single[0], out[v])


def test_what_is_drawn_goes_by_the_keys_and_what_is_kept_by_the_numbers(files, tmp_path):
    augments = [PRESETS["aug_plus"]]
    numbers, keys = np.arange(len(files)), np.arange(len(files))[::-1] + 2**39
    with IndexStore(tmp_path) as store:
        first = read(files, augments, number=numbers, index=store, keys=keys)
        kept = len(store)
        assert_same(first, read(files, augments, twin=True, number=numbers, keys=keys))
        assert_same(first, read(files, augments, number=keys))
        assert kept > 0
        assert_same(read(files, augments, number=numbers, index=store), read(files, augments, number=numbers))
        assert len(store) == kept
    with Reader(augments, threads=1) as reader:
        for wrong, match in [(keys[:-1], "one per item"), (keys + 2**40, "keys: expected numbers in")]:
            with pytest.raises(DataError, match=match):
                reader.submit(files, numbers, outputs(augments, len(files)), seed=0, epoch=0, keys=wrong)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bits_depend_neither_on_threads_nor_on_an_index_nor_on_the_epoch_of_the_first_touch(files, tmp_path, threads):
    augments = [PRESETS["sela"], PRESETS["eval"]]
    items = files * 6
    expected = read(items, augments, epoch=8)
    with IndexStore(tmp_path) as store:
        assert_same(read(items, augments, epoch=8, threads=threads, index=store), expected)
        large = sum(max(Image.open(io.BytesIO(data)).size) > 104 for data in items)
        assert len(store) == large
        assert_same(read(items, augments, epoch=8, threads=threads, index=store), expected)
    with IndexStore(tmp_path) as store:
        assert len(store) == large
        assert_same(read(items, augments, epoch=8, threads=threads, index=store), expected)
    known = [jpeg_index(data) for data in items]
    assert_same(read(items, augments, epoch=8, threads=threads, indexes=known), expected)


def test_batches_that_are_submitted_ahead_come_out_like_single_ones(files):
    augments = [PRESETS["sela"]]
    expected = {epoch: read(files, augments, epoch=epoch) for epoch in range(9)}
    with Reader(augments, threads=3) as reader:
        made = {}
        for epoch in expected:
            out = outputs(augments, len(files))
            numbers = np.arange(len(files)) + 5
            made[epoch] = reader.submit(files, numbers, out, seed=11, epoch=epoch, views=[2]), out
        for epoch in reversed(expected):
            ticket, out = made[epoch]
            assert_same((ticket.wait(), out), expected[epoch])
            assert ticket.done()


def test_paths_bytes_and_views_of_memory_are_the_same(files, tmp_path):
    paths = []
    for i, data in enumerate(files):
        name = tmp_path / ("große Bilder" if i % 2 else "b") / f"{i}.jpg"
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(data)
        paths.append(str(name))
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")
    Path(odd).write_bytes(files[0])
    paths[0] = odd
    augments = [PRESETS["sela"]]
    expected = read(files, augments)
    assert_same(read(paths, augments), expected)
    joined = JoinedPaths(b"".join(os.fsencode(path) + b"\0" for path in paths))
    known = [None if i % 3 else jpeg_index(data) for i, data in enumerate(files)]
    assert_same(read(joined, augments), expected)
    assert_same(read(joined, augments, indexes=known), expected)
    whole = b"".join(files)
    starts = np.cumsum([0, *map(len, files)])
    views = [memoryview(whole)[a:b] for a, b in itertools.pairwise(starts)]
    assert_same(read(views, augments), expected)
    assert_same(read([bytearray(data) if i % 2 else paths[i] for i, data in enumerate(files)], augments), expected)


def test_one_channel_takes_grey_files_and_leaves_the_others(files):
    augments = [Augment.sela(31, mean=(0.4,), std=(0.2,))]
    expected = read(files, augments, twin=True, channels=1)
    assert set(expected[0].status) == {READ_OK, READ_OTHER}
    assert_same(read(files, augments, channels=1), expected)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_sets_agree(files, isa):
    if (
        isa
        not in ["generic", "avx2", "avx512"][: ["generic", "avx2", "avx512"].index(_core.build_info()["cpu_isa"]) + 1]
    ):
        pytest.skip(f"this processor has no {isa}")
    augments = [PRESETS["sela"]]
    _, out = read(files, augments, isa=isa)
    _, expected = read(files, augments)
    torch.testing.assert_close(out[0], expected[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- reduced decoding


@pytest.mark.parametrize("subsampling", [0, 1, 2, "grey"])
@pytest.mark.parametrize(("height", "width"), [(1001, 1303), (520, 2100), (333, 402)])
def test_large_boxes_are_decoded_at_lower_resolution_like_the_twin(subsampling, height, width):
    grey = subsampling == "grey"
    data = encoded(picture(3, height, width, "L" if grey else "RGB"), subsampling=0 if grey else subsampling)
    augments = [Augment.sela(33), Augment.eval(31), Augment.resized_crop(17), Augment.none(32)]
    expected = read([data] * 4, augments, twin=True)
    assert_same(read([data] * 4, augments), expected)
    assert_same(read([data] * 4, augments, indexes=[jpeg_index(data)] * 4), expected)
    full = read([data] * 4, augments, reduce=False)
    assert_same(full, read([data] * 4, augments, twin=True, reduce=False))
    assert any(not torch.equal(a, b) for a, b in zip(full[1], expected[1], strict=True))
    for a, b, what in zip(full[1], expected[1], augments, strict=True):
        if what.jitters:
            continue  # amplifies what the resampling leaves
        difference = (a - b).abs().mean() * 255 * 0.226
        assert difference < 2.0  # noise of 9 levels in every pixel, which a photograph has not


def test_reduced_decoding_of_photographs_is_within_a_level_in_the_mean():
    photographs = sorted(path for path in FOLDER.glob("*") if path.suffix.lower() in (".jpeg", ".jpg"))[:40]
    if not photographs:
        pytest.skip(f"no photographs in {FOLDER}; set SELA_DATA_DIR")
    items = [str(path) for path in photographs]
    augments = [Augment.resized_crop(48), Augment.eval(40)]
    near, full = (read(items, augments, reduce=reduce)[1] for reduce in (True, False))
    std = 255 * torch.tensor(augments[0].std).view(1, 3, 1, 1)
    for a, b in zip(near, full, strict=True):
        difference = ((a - b) * std).abs().flatten(1)
        changed = difference[difference.amax(1) > 0]
        assert len(changed) > 10
        assert changed.mean() < 0.8


def test_no_resolution_is_given_up_where_exactness_is_asked_for():
    data = encoded(picture(3, 900, 1200))
    augments = [Augment.resized_crop(32)]
    assert_same(read([data], augments, exact=True), read([data], augments, exact=True, reduce=False))


# ---------------------------------------------------------------- orientation


def with_orientation(image, value, **options):
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(image, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("height", "width"), [(133, 210), (41, 60)])
def test_orientations_give_the_pictures_that_pillow_shows(orientation, height, width):
    data = with_orientation(picture(orientation, height, width), orientation, quality=90)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    for augment in (Augment.sela(33), Augment.eval(31)):
        batch, out = read([data], [augment], exif=True, exact=True)
        assert (batch.height[0], batch.width[0]) == shown.shape[:2]
        from sela_ext.kernels import augment as augmented

        expected = augmented([np.ascontiguousarray(shown)], batch.params[0], augment)
        torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-5)
        assert_same(read([data], [augment], exif=True), read([data], [augment], exif=True, twin=True))
        plain = read([data], [augment])
        assert (plain[0].height[0], plain[0].width[0]) == (height, width)


def test_a_turned_file_has_its_index_used(tmp_path):
    data = with_orientation(picture(1, 300, 200), 6)
    expected = read([data] * 3, [Augment.sela(32)], exif=True)
    with IndexStore(tmp_path) as store:
        for _ in range(2):
            assert_same(read([data] * 3, [Augment.sela(32)], exif=True, index=store), expected)
        assert len(store) == 3


def segment(marker, body):
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def tiff(entries, order="little", table=8, magic=None):
    mark = {"little": b"II*\0", "big": b"MM\0*"}[order] if magic is None else magic
    body = mark + table.to_bytes(4, order) + len(entries).to_bytes(2, order)
    for tag, kind, count, value in entries:
        body += tag.to_bytes(2, order) + kind.to_bytes(2, order) + count.to_bytes(4, order) + value.ljust(4, b"\0")
    return b"Exif\0\0" + body + b"\0\0\0\0"


def exif_cases():
    six = {order: (6).to_bytes(2, order) for order in ("little", "big")}
    good = tiff([(0x0112, 3, 1, six["little"])])
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    return {
        "little": ([good], 6),
        "big": ([tiff([(0x0100, 3, 1, b"\0\1"), (0x0112, 3, 1, six["big"])], "big")], 6),
        "no tag": ([tiff([(0x0100, 3, 1, b"\1\0")])], 1),
        "no exif": ([], 1),
        "zero": ([tiff([(0x0112, 3, 1, b"\0\0")])], 1),
        "nine": ([tiff([(0x0112, 3, 1, b"\x09\0")])], 1),
        "twice": ([good, good], 0),
        "tag twice": ([tiff([(0x0112, 3, 1, six["little"])] * 2)], 0),
        "long": ([tiff([(0x0112, 4, 1, six["little"])])], 0),
        "two values": ([tiff([(0x0112, 3, 2, six["little"])])], 0),
        "table outside": ([tiff([(0x0112, 3, 1, six["little"])], table=5000)], 0),
        "table in the head": ([tiff([(0x0112, 3, 1, six["little"])], table=3)], 0),
        "more entries than bytes": ([good[:14] + b"\xff\xff" + good[16:]], 0),
        "no byte order": ([tiff([], magic=b"XX*\0")], 0),
        "cut": ([good[:12]], 0),
        "empty": ([b"Exif\0\0"], 0),
        "xmp alone": ([xmp], 0),
        "xmp beside exif": ([xmp, good], 6),
    }


@pytest.mark.parametrize("case", exif_cases())
def test_exif_data_that_leave_a_doubt_are_left_to_pillow(case):
    bodies, expected = exif_cases()[case]
    data = encoded(picture(1, 120, 140))
    data = data[:2] + b"".join(segment(0xE1, body) for body in bodies) + data[2:]
    assert _core.jpeg_orientation(data) == expected
    batch, _ = read([data], [Augment.sela(32)], exif=True)
    assert batch.status[0] == (READ_OTHER if expected == 0 else READ_OK)
    assert read([data], [Augment.sela(32)])[0].status[0] == READ_OK
    if expected:
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert (batch.height[0], batch.width[0]) == (shown.height, shown.width)


def test_hostile_exif_data_are_only_read_within_their_bounds():
    rng = np.random.default_rng(0)
    data = encoded(picture(1, 110, 120))
    good = tiff([(0x0112, 3, 1, b"\6\0"), (0x0100, 3, 1, b"\1\0")])
    for _ in range(3000):
        body = bytearray(good)
        for _ in range(rng.integers(1, 5)):
            body[rng.integers(6, len(body))] = rng.choice([0, 1, 2, 3, 8, 18, 0x12, 127, 128, 255])
        body = body[: rng.integers(6, len(body) + 1)]
        assert 0 <= _core.jpeg_orientation(data[:2] + segment(0xE1, bytes(body)) + data[2:]) <= 8


# ---------------------------------------------------------------- what is not read


def test_what_is_not_a_baseline_jpeg_is_left_to_others(files):
    good = files[0]
    png = io.BytesIO()
    picture(1, 120, 130).save(png, "PNG")
    cmyk = encoded(picture(1, 120, 130).convert("CMYK"))
    middle = len(good) // 2
    huge = bytearray(good)
    at = huge.index(b"\xff\xc0")
    huge[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    items = [
        png.getvalue(),
        b"",
        b"\xff",
        b"not an image at all",
        encoded(picture(1, 120, 130), progressive=True),
        cmyk,
        good[:middle],
        good[: middle // 8],
        good[:-2],
        bytes(huge),
        good,
    ]
    batch, _ = read(items, [Augment.sela(32)])
    assert batch.status.tolist() == [READ_OTHER] * 10 + [READ_OK]
    assert_same(read(items, [Augment.sela(32)]), read(items, [Augment.sela(32)], twin=True))


def test_a_file_that_is_damaged_behind_the_box_is_never_taken(tmp_path):
    data = bytearray(encoded(picture(1, 400, 300)))
    data[-60:-2] = b"\xff\xd8" * 29
    with IndexStore(tmp_path) as store:
        for epoch in range(40):  # boxes that do not reach the damage are among them
            for index in (None, store):
                batch, _ = read([bytes(data)], [Augment.resized_crop(32, scale=(0.05, 0.1))], index=index, epoch=epoch)
                assert batch.status[0] == READ_OTHER
        assert len(store) == 1
        assert store.get(5, len(data)) is None


def test_headers_that_claim_too_much_are_refused_before_anything_is_allocated(files):
    batch, _ = read(files, [Augment.sela(32)], max_pixels=130 * 171)
    expected = [
        READ_OK if s <= 130 * 171 else READ_TOO_LARGE
        for s in (Image.open(io.BytesIO(d)).size[0] * Image.open(io.BytesIO(d)).size[1] for d in files)
    ]
    assert batch.status.tolist() == expected
    assert READ_TOO_LARGE in expected


def test_pipes_folders_devices_and_vanished_files_do_not_hang(files, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "good.jpg").write_bytes(files[0])
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "closed.jpg").write_bytes(files[0])
    (tmp_path / "closed.jpg").chmod(0)
    items = [
        str(tmp_path / name) for name in ("pipe.jpg", "folder.jpg", "empty.jpg", "good.jpg", "loop.jpg", "gone.jpg")
    ]
    items += ["/dev/zero", "/dev/tty", "/proc/self/status", ""]
    batch, _ = read(items, [Augment.sela(32)], threads=2)
    assert batch.status[:6].tolist() == [
        READ_NOT_REGULAR,
        READ_NOT_REGULAR,
        READ_OTHER,
        READ_OK,
        READ_UNREADABLE,
        READ_UNREADABLE,
    ]
    assert batch.error[4:6].tolist() == [errno.ELOOP, errno.ENOENT]
    assert READ_OK not in batch.status[6:]
    if os.geteuid() != 0:
        batch, _ = read([str(tmp_path / "closed.jpg")], [Augment.sela(32)])
        assert (batch.status[0], batch.error[0]) == (READ_UNREADABLE, errno.EACCES)


def test_mutated_files_get_the_status_of_the_twin(files):
    rng = np.random.default_rng(7)
    items = []
    for _ in range(60):
        data = bytearray(files[rng.integers(len(files))])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(2, len(data))] = rng.integers(256)
        items.append(bytes(data))
    augments = [Augment.none(32)]  # all of the image is shown, so the twin, which decodes all, sees the same
    expected = read(items, augments, twin=True)
    assert_same(read(items, augments), expected)
    with IndexStore() as store:
        for _ in range(2):
            assert_same(read(items, augments, index=store), expected)


# ---------------------------------------------------------------- small images


def test_small_images_are_decoded_once_and_the_bits_do_not_depend_on_it():
    items = [encoded(picture(i, 32 + i % 3, 30)) for i in range(50)]
    augments = [Augment.cifar(32)]
    expected = read(items, augments, twin=True)
    with Reader(augments, threads=2) as reader:
        for _ in range(3):
            assert_same(read(items, augments, reader=reader), expected)
        assert reader.cached_nbytes == sum(Image.open(io.BytesIO(d)).size[1] * 30 * 3 for d in items)
    with Reader(augments, threads=1, cache_bytes=10 * 35 * 30 * 3) as reader:
        for _ in range(2):
            assert_same(read(items, augments, reader=reader), expected)
        assert 0 < reader.cached_nbytes <= 10 * 35 * 30 * 3


def test_a_kept_small_image_is_not_mistaken_for_another_one():
    first, second = encoded(picture(1, 32, 32)), encoded(picture(2, 32, 32))
    augments = [Augment.none(32)]
    with Reader(augments, threads=1) as reader:
        for data in (first, second, first):
            assert_same(read([data], augments, reader=reader), read([data], augments, twin=True))


# ---------------------------------------------------------------- threads and memory


def test_arguments_are_checked(files):
    augment = Augment.sela(32)
    with pytest.raises(OptionError, match="augments"):
        Reader([])
    with pytest.raises(OptionError, match="channels"):
        Reader([augment], channels=4)
    with pytest.raises(OptionError, match="threads"):
        Reader([augment], threads=-1)
    with pytest.raises(OptionError, match="dtype"):
        Reader([augment], dtype=torch.float64)
    with pytest.raises(OptionError, match="sobel"):
        Reader([Augment.deepcluster(32)], dtype=torch.uint8)
    with pytest.raises(OptionError, match="max_pixels"):
        Reader([augment], max_pixels=-1)
    with Reader([augment], threads=1) as reader:

        def submit(items=files[:1], index=(0,), out=None, views=(0,), **more):
            return reader.submit(
                items, index, out or outputs([augment], 1), **({"seed": 0, "epoch": 0, "views": views} | more)
            )

        with pytest.raises(DataError, match="index"):
            submit(index=[0, 1])
        with pytest.raises(DataError, match="index"):
            submit(index=[1 << 40])
        with pytest.raises(DataError, match="out"):
            submit(out=outputs([augment], 2))
        with pytest.raises(DataError, match="views"):
            submit(views=(0, 1))
        with pytest.raises(OptionError, match="view"):
            submit(views=(256,))
        with pytest.raises(OptionError, match="seed"):
            submit(seed=-1)
        with pytest.raises(OptionError, match="items"):
            submit(items=[17])
        with pytest.raises(OptionError, match="items"):
            submit(items=["a\0b"])
        with pytest.raises(OptionError, match=r"items: .* 1 paths, each followed by a null byte"):
            submit(items=JoinedPaths(b"a\0b"))
        with pytest.raises(DataError, match="index: expected 0 numbers"):
            submit(items=JoinedPaths(b"a"))
        with pytest.raises(DataError, match="indexes"):
            submit(indexes=[])
        assert submit().wait().status[0] == READ_OK
        assert len(reader.submit([], [], outputs([augment], 0), seed=0, epoch=0).wait().status) == 0
    with pytest.raises(ResourceError, match=r"closed; make another one$"):
        submit()


def test_closing_cancels_what_waits(files):
    augments = [Augment.sela(64)]
    reader = Reader(augments, threads=1)
    tickets = []
    for epoch in range(30):
        out = outputs(augments, len(files))
        tickets.append(reader.submit(files, np.arange(len(files)), out, seed=0, epoch=epoch))
    reader.close()
    reader.close()
    assert all(ticket.done() for ticket in tickets)
    with pytest.raises(ResourceError, match="closed"):
        tickets[-1].wait()


def test_a_dropped_ticket_cancels_its_batch_and_lets_go_of_its_memory(files):
    augments = [Augment.sela(64)]
    held = bytearray(files[6])
    with Reader(augments, threads=1) as reader:
        for _ in range(20):
            ticket = reader.submit([held] * 9, np.arange(9), outputs(augments, 9), seed=0, epoch=0)
            with pytest.raises(BufferError):
                held.append(0)
            del ticket
        gc.collect()
        held.append(0)
        assert read(files, augments, reader=reader)[0].status[0] == READ_OK


def test_readers_come_and_go_without_leaving_threads_or_files(files, tmp_path):
    (tmp_path / "a.jpg").write_bytes(files[0])
    before = (threads_of_process(), len(os.listdir("/proc/self/fd")))
    for i in range(60):
        reader = Reader([Augment.sela(32)], threads=1 + i % 3, index=IndexStore() if i % 2 else None)
        if i % 3:
            read([str(tmp_path / "a.jpg")], [Augment.sela(32)], reader=reader)
        if i % 2:
            reader.close()
        del reader
    gc.collect()
    assert (threads_of_process(), len(os.listdir("/proc/self/fd"))) == before


def threads_of_process():
    return len(os.listdir("/proc/self/task"))


def test_many_threads_may_submit_to_one_reader(files):
    augments = [Augment.sela(32)]
    expected = read(files, augments)
    failures = []
    with Reader(augments, threads=2) as reader:

        def work():
            try:
                for _ in range(5):
                    assert_same(read(files, augments, reader=reader), expected)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures


def run_script(code, *arguments, timeout=60):
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


SCRIPT = """
    import io, os, sys, time, warnings
    import numpy as np, torch
    from PIL import Image
    from sela_ext.errors import ResourceError
    from sela_ext.kernels import Augment, IndexStore, Reader
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(file, "JPEG")
    data = file.getvalue()
    store = IndexStore()
    reader = Reader([Augment.sela(64)], threads=2, index=store)
    def submit(count=50):
        out = torch.empty(count, 3, 64, 64)
        return reader.submit([data] * count, np.arange(count), [out], seed=0, epoch=0)
"""


def test_a_forked_child_is_told_and_neither_hangs_nor_aborts():
    done = run_script(
        SCRIPT
        + """
    warnings.simplefilter("ignore")
    pending = submit()
    child = os.fork()
    if child == 0:
        try:
            submit()
            os._exit(3)
        except ResourceError as error:
            assert "another process" in str(error), error
        try:
            pending.wait()
            os._exit(4)
        except ResourceError as error:
            assert "another process" in str(error), error
        assert len(store) == 0 and store.get(0, len(data)) is None
        del pending
        own = Reader([Augment.sela(64)], threads=1)
        out = torch.empty(1, 3, 64, 64)
        assert own.submit([data], [0], [out], seed=0, epoch=0).wait().status[0] == 0
        sys.exit(0)  # the ordinary way, through atexit
    assert os.waitpid(child, 0)[1] == 0
    assert (pending.wait().status == 0).all()
    assert len(store) == 50
    """
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("end", ["", "del submit; del reader", "os._exit(0)"])
def test_an_interpreter_ends_in_the_middle_of_a_batch(end):
    done = run_script(SCRIPT + f"\n    tickets = [submit(400) for _ in range(3)]\n    {end}\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_waiting_can_be_interrupted():
    done = run_script(
        SCRIPT
        + """
    import signal
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    tickets = [submit(400) for _ in range(30)]
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        tickets[-1].wait()
        print("not interrupted")
    except KeyboardInterrupt:
        print("interrupted")
    """
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what is freed for a while"
)
def test_memory_is_flat_over_thousands_of_images(files, tmp_path):
    paths = []
    for i, data in enumerate(files):
        paths.append(str(tmp_path / f"{i}.jpg"))
        Path(paths[-1]).write_bytes(data)
    augments = [Augment.sela(48)]
    items = paths * 8
    out = outputs(augments, len(items))

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    with IndexStore() as store, Reader(augments, threads=2, index=store) as reader:

        def run(epochs):
            for epoch in epochs:
                reader.submit(items, np.arange(len(items)), out, seed=0, epoch=epoch).wait()

        run(range(20))
        before = resident()
        run(range(20, 100))
        assert resident() - before < 1 << 20
