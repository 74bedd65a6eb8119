"""Samples in an arena: those of the decoder, placed in the order of the images whatever threads do."""

import contextlib
import ctypes
import io

import numpy as np
import pytest
from PIL import Image

from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels import (
    READ_NO_ROOM,
    READ_NOT_REGULAR,
    READ_OK,
    READ_OTHER,
    READ_UNREADABLE,
    Augment,
    IndexStore,
    Reader,
    decode_jpeg,
    decode_planes,
    jpeg_index,
    needed_boxes,
)
from sela_ext.kernels.reference.reader import reduction_for

KEY = {"seed": 3, "epoch": 4}


def picture(seed, height, width, mode="RGB"):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


SIZES = [(130, 171), (301, 105), (105, 104), (104, 104), (31, 1), (1, 33), (211, 403), (160, 240)]


@pytest.fixture(scope="module")
def files():
    """JPEG files of many sizes and samplings, large and small, grey among them."""
    made = []
    for i, (height, width) in enumerate(SIZES):
        made += [encoded(picture(i, height, width), subsampling=s, quality=70 + 9 * s) for s in range(3)]
        made.append(encoded(picture(i, height, width, "L")))
    return made


def planes_of(record):
    """[(array, top, left)] of a record, copied."""
    found = []
    for plane in record["plane"][: record["count"]]:
        size = int((plane["height"] - 1) * plane["stride"] + plane["width"])
        memory = np.frombuffer((ctypes.c_char * size).from_address(int(plane["data"])), np.uint8)
        shape, strides = (plane["height"], plane["width"]), (plane["stride"], 1)
        array = np.lib.stride_tricks.as_strided(memory, shape, strides).copy()
        found.append((array, int(plane["top"]), int(plane["left"])))
    return found


def read(files, augments, nbytes=1 << 22, **options):
    store = options.pop("store", None)
    indexes = options.pop("indexes", None)
    arena = np.full(nbytes, 7, np.uint8)
    with Reader(augments, index=store, **({"threads": 1} | options)) as reader:
        ticket = reader.submit_planes(
            files, np.arange(len(files)), arena, views=range(len(augments)), indexes=indexes, **KEY
        )
        return arena, ticket.wait()


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("augment", [Augment.sela(33), Augment.eval(24), Augment.none(20), Augment.deepcluster(9)])
def test_samples_are_those_of_the_decoder(files, augment, indexed):
    arena, found = read(files, [augment], indexes=[jpeg_index(f) for f in files] if indexed else None)
    assert (found.status == READ_OK).all()
    reduced = 0
    for i, file in enumerate(files):
        record, params = found.images[0, i], found.params[0][i : i + 1]
        height, width = int(found.height[i]), int(found.width[i])
        assert (record["height"], record["width"]) == (height, width) == SIZES[i // 4]
        small = max(height, width) <= 104
        scale = 1 if small else reduction_for(augment, params[0], height, width)
        reduced += scale > 1
        if small:
            assert record["rgb"]
            whole = decode_jpeg(file)
            pixels = np.broadcast_to(whole, (height, width, 3)) if whole.shape[2] == 1 else whole
            planes = planes_of(record)
            assert all((array == pixels[:, :, c]).all() for c, (array, _, _) in enumerate(planes))
            assert [place[1:] for place in planes] == [(0, 0)] * 3
            continue
        assert record["count"] == (1 if i % 4 == 3 else 3)
        whole = decode_planes(file, (0, 0, -(-height // scale), -(-width // scale)), scale=scale)
        for plane, (array, top, left) in zip(whole.planes, planes_of(record), strict=True):
            wanted = plane.samples[top : top + array.shape[0], left : left + array.shape[1]]
            assert array.shape == wanted.shape
            assert (array == wanted).all()
        if scale == 1:
            luma = record["plane"][0]
            box = needed_boxes(params, augment, height, width, subsampling="4:4:4")[0]
            assert (luma["top"], luma["left"]) == (box[0], box[1])
            assert (luma["height"], luma["width"]) == (box[2] - box[0], box[3] - box[1])
    if augment.size == 9:
        assert reduced > 4
    assert found.used == int(found.wanted.sum()) <= len(arena)
    assert (found.offset == np.cumsum(found.wanted) - found.wanted).all()
    assert (found.wanted % 16 == 0).all()
    assert (arena[found.used :] == 7).all()


@pytest.mark.parametrize("nbytes", [1 << 22, 150_000, 20_000, 0])
def test_arenas_are_equal_for_any_number_of_threads_and_whatever_is_known(files, nbytes):
    many = [files[i] for i in np.random.default_rng(0).integers(0, len(files), 101)]
    many[7], many[50], many[77] = b"no image", files[0][:-40], files[24][:-40]  # two with headers and damaged data
    augments = Augment.multi_crop((40, 12), (2, 3))
    arena, found = read(many, augments, nbytes)
    again = [read(many, augments, nbytes, threads=threads) for threads in (2, 4)]
    store = IndexStore()
    again += [read(many, augments, nbytes, store=store, threads=2) for _ in range(2)]
    again.append(read(many, augments, nbytes, cache_bytes=0))
    for other_arena, other in again:
        assert (other.status == found.status).all()
        assert (other.offset == found.offset).all()
        assert (other.wanted == found.wanted).all()
        for a, b in zip(other.params, found.params, strict=True):
            assert a[found.status == READ_OK].tobytes() == b[found.status == READ_OK].tobytes()
        for i in np.flatnonzero(found.status == READ_OK):
            part = slice(found.offset[i], found.offset[i] + found.wanted[i])
            assert (arena[part] == other_arena[part]).all()
        moved = arena.ctypes.data - other_arena.ctypes.data
        here = found.status == READ_OK
        mine, theirs = found.images["plane"]["data"][:, here].copy(), other.images["plane"]["data"][:, here].copy()
        there = theirs != 0
        assert (mine[there].astype(np.int64) - theirs[there].astype(np.int64) == moved).all()
    # In the order of the images, each that still fits.
    used = 0
    for i, wanted in enumerate(found.wanted.tolist()):
        fits = 0 < wanted <= nbytes - used
        assert found.offset[i] == (used if fits else -1)
        used += wanted if fits else 0
    assert found.status[7] == READ_OTHER
    assert found.wanted[7] == 0
    assert found.wanted[50] > 0
    expected = np.where(found.offset >= 0, READ_OK, READ_NO_ROOM)
    expected[[7, 50, 77]] = found.status[[7, 50, 77]]
    assert (found.status == expected).all()
    if nbytes == 1 << 22:
        assert (found.status[[50, 77]] == READ_OTHER).all()
    if nbytes == 20_000:
        assert set(found.status.tolist()) >= {READ_OK, READ_NO_ROOM}
    if not nbytes:
        assert found.used == 0


def test_views_share_a_box_unless_it_has_more_pixels_than_theirs():
    file = encoded(picture(1, 300, 400), subsampling=0)
    near = [Augment.resized_crop(64, scale=(0.6, 0.9))] * 3
    _, found = read([file], near, exact=True)  # without reduced transforms
    assert len(set(found.images["plane"]["data"][:, 0, 0].tolist())) == 1
    boxes = [p[0] for p in found.params]
    luma = found.images[0, 0]["plane"][0]
    assert luma["top"] == min(p["top"] for p in boxes)
    assert luma["height"] == max(p["top"] + p["height"] for p in boxes) - luma["top"]
    assert luma["width"] == max(p["left"] + p["width"] for p in boxes) - luma["left"]
    assert found.wanted[0] == 3 * luma["height"] * luma["width"] + -3 * luma["height"] * luma["width"] % 16
    far = [Augment.resized_crop(64, scale=(0.01, 0.02))] * 2
    shared = []
    for epoch in range(20):
        arena = np.zeros(1 << 20, np.uint8)
        with Reader(far, threads=1, exact=True) as reader:
            found = reader.submit_planes([file], [0], arena, seed=0, epoch=epoch, views=(0, 1)).wait()
        shared.append(len(set(found.images["plane"]["data"][:, 0, 0].tolist())) == 1)
    assert not all(shared)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_files_are_planes_of_turned_pixels(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(picture(orientation, 121, 150), exif=exif, subsampling=2)
    _, found = read([file], [Augment.none(16)], exif=True)
    assert found.status[0] == READ_OK
    if orientation == 1:
        assert not found.images[0, 0]["rgb"]
        return
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))))
    assert (found.height[0], found.width[0]) == expected.shape[:2]
    assert all((array == expected[:, :, c]).all() for c, (array, _, _) in enumerate(planes_of(found.images[0, 0])))


def test_unusual_samplings_are_planes_of_pixels(writer):
    for factors in ([(3, 1), (1, 1), (1, 1)], [(1, 1), (2, 2), (1, 1)]):
        file = writer.picture(np.random.default_rng(0), 131, 120, factors)
        _, found = read([file], [Augment.none(16)])
        assert found.status[0] == READ_OK
        assert found.images[0, 0]["rgb"]
        pixels = decode_jpeg(file)
        assert all((array == pixels[:, :, c]).all() for c, (array, _, _) in enumerate(planes_of(found.images[0, 0])))


def test_what_is_no_jpeg_file_takes_no_place(tmp_path, files):
    (tmp_path / "a.jpg").write_bytes(files[0])
    picture(0, 120, 120).save(tmp_path / "b.png")
    (tmp_path / "c").mkdir()
    paths = [str(tmp_path / name) for name in ("b.png", "a.jpg", "c", "none", "a.jpg")]
    _, found = read(paths, [Augment.none(16)], threads=2)
    assert found.status.tolist() == [READ_OTHER, READ_OK, READ_NOT_REGULAR, READ_UNREADABLE, READ_OK]
    assert found.offset.tolist() == [-1, 0, -1, -1, found.wanted[1]]


def test_a_ticket_that_is_dropped_cancels_its_batch_and_leaves_no_thread_waiting(files):
    for threads in (1, 2, 4):
        arena = np.zeros(1 << 22, np.uint8)
        with Reader([Augment.none(16)], threads=threads) as reader:
            for _ in range(5):
                ticket = reader.submit_planes(files * 20, np.arange(20 * len(files)), arena, **KEY)
                del ticket
            found = reader.submit_planes(files, np.arange(len(files)), arena, **KEY).wait()
            assert (found.status == READ_OK).all()
            last = reader.submit_planes(files * 20, np.arange(20 * len(files)), arena, **KEY)
        with contextlib.suppress(ResourceError):  # it may have been done before the reader was closed
            last.wait()
        assert last.done()


def test_arguments_are_checked(files):
    arena = np.zeros(100, np.uint8)
    with Reader([Augment.none(16)] * 2, threads=1) as reader:
        with pytest.raises(DataError, match="views: expected 2, one per augmentation, found 1"):
            reader.submit_planes(files[:1], [0], arena, **KEY)
        with pytest.raises(DataError, match=r"arena: expected contiguous memory uint8 \[bytes\], found float32"):
            reader.submit_planes(files[:1], [0], np.zeros(3, np.float32), views=(0, 1), **KEY)
        with pytest.raises(DataError, match=r"arena: expected contiguous"):
            reader.submit_planes(files[:1], [0], arena[::2], views=(0, 1), **KEY)
        with pytest.raises(DataError, match="index: expected 1 numbers"):
            reader.submit_planes(files[:1], [0, 1], arena, views=(0, 1), **KEY)
        with pytest.raises(OptionError, match="seed"):
            reader.submit_planes(files[:1], [0], arena, views=(0, 1), seed=-1, epoch=0)
    with (
        Reader([Augment.none(16)], threads=1, channels=1) as reader,
        pytest.raises(OptionError, match="channels: expected 3 for planes in an arena, found 1"),
    ):
        reader.submit_planes(files[:1], [0], arena, **KEY)
