import contextlib
import fcntl
import gzip
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import sela_ext
from sela_ext import Augment, Loader
from sela_ext.data import PackSource, find_eval_source, open_source, pack, verify_pack
from sela_ext.data import pack as pack_function
from sela_ext.data.source import LabelledSource
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels import jpeg_index

PHOTOS = Path(os.environ.get("SELA_DATA_DIR", Path(__file__).parents[2].parent / "shared" / "data"))


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path, pixels, kind="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, kind, **options)


def fill(root, count=31):
    """Images of different sizes and kinds in two class folders."""
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "progressive")
    for i in range(count):
        kind = kinds[i % len(kinds)]
        pixels = random_images(9 + i, 140 - i, 3, seed=i)
        if kind == "progressive":
            put(root / f"{'ab'[i % 2]}/{i:02d}.jpg", pixels, "JPEG", progressive=True)
        else:
            put(root / f"{'ab'[i % 2]}/{i:02d}.{kind.lower()}", pixels, kind)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("images"))


@pytest.fixture
def spoiled(tmp_path):
    """30 images, of which 5 is empty, 11 a text and 20 truncated."""
    root = tmp_path / "spoiled"
    for i in range(30):
        put(root / f"{i:02d}.jpg", random_images(20 + i, 150, 3, seed=i), "JPEG")
    (root / "05.jpg").write_bytes(b"")
    (root / "11.jpg").write_bytes(b"no image at all")
    whole = (root / "20.jpg").read_bytes()
    (root / "20.jpg").write_bytes(whole[: len(whole) // 2])
    return root


class Items(Dataset):
    def __init__(self, items, targets=None):
        self.items = items
        if targets is not None:
            self.targets = targets

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Stopping(LabelledSource):
    """Another source, without labels, of which one image cannot be had this time."""

    def __init__(self, parent, at):
        super().__init__(parent, None)
        self.at = at

    def encoded_bytes(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return super().encoded_bytes(index)


def contents(folder):
    """Every file of a folder and its bytes."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def same_images(source, packed):
    assert len(packed) == len(source)
    assert list(packed.iter_names()) == source.names
    assert packed.names == source.names
    assert [packed.name(i) for i in range(len(packed))] == source.names
    assert packed.channels == source.channels
    for i in range(len(source)):
        np.testing.assert_array_equal(packed.read(i), source.read(i))
    if source.labels is None:
        assert packed.labels is None
    else:
        assert packed.labels.tolist() == source.labels.tolist()
        assert packed.class_names == source.class_names


# ---- every kind of source -------------------------------------------------------------------------------------------


def idx_files(tmp_path):
    images = random_images(33, 5, 7)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4BI", 0, 0, 8, 1, 33) + bytes(i % 10 for i in range(33)))
    return tmp_path


def npy_file(tmp_path):
    np.save(tmp_path / "images.npy", random_images(31, 6, 9, 3))
    return tmp_path / "images.npy"


def file_list(tmp_path):
    return sorted(str(path) for path in fill(tmp_path / "list").rglob("*.*"))


def labelled_items(count, *size):
    return Items([(Image.fromarray(random_images(*size, seed=i)), i % 4) for i in range(count)])


def mixed_items(tmp_path):
    return Items([random_images(90 + i, 110, 3, seed=i) for i in range(20)], targets=list(range(20)))


SOURCES = {
    "digits": (lambda tmp_path: "digits", {"raw"}),
    "folder": (lambda tmp_path: fill(tmp_path / "tree"), {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}),
    "paths": (file_list, {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}),
    "grey array": (lambda tmp_path: random_images(33, 11, 9), {"raw"}),
    "RGB array": (lambda tmp_path: random_images(33, 11, 9, 3), {"raw"}),
    "one large image": (lambda tmp_path: random_images(1, 200, 150, 3), {"raw"}),
    "npy": (npy_file, {"raw"}),
    "idx": (idx_files, {"raw"}),
    "small dataset": (lambda tmp_path: labelled_items(31, 8, 9, 3), {"raw"}),
    "grey dataset": (lambda tmp_path: labelled_items(31, 8, 9), {"raw"}),
    "large dataset": (lambda tmp_path: labelled_items(9, 120, 110, 3), {"PNG"}),
    "large grey dataset": (lambda tmp_path: labelled_items(9, 120, 110), {"PNG"}),
    "mixed dataset": (mixed_items, {"raw", "PNG"}),
    "subset of an array": (lambda tmp_path: open_source(npy_file(tmp_path)).subset([3, 1, 30, 3]), {"raw"}),
    "subset of a folder": (lambda tmp_path: open_source(fill(tmp_path / "tree")).subset([4, 0, 4]), {"JPEG", "PNG"}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_pack_gives_the_images_names_and_labels_of_its_source(tmp_path, kind):
    make, formats = SOURCES[kind]
    data = make(tmp_path)
    report = pack(data, tmp_path / "pack")
    source, packed = open_source(data), open_source(tmp_path / "pack")
    assert isinstance(packed, PackSource)
    same_images(source, packed)
    assert set(report.formats) == set(packed.formats) == formats
    assert report.images == len(source)
    assert report.skipped == 0
    assert f"{len(source):,} images" in str(report)
    assert verify_pack(tmp_path / "pack") == report
    assert not (tmp_path / "pack" / "packing.json").exists()
    assert not (tmp_path / "pack" / "bad_images.csv").exists()
    if source.array is not None:
        np.testing.assert_array_equal(packed.array, source.array)
    # A pack can be packed again.
    pack(tmp_path / "pack", tmp_path / "again")
    same_images(source, open_source(tmp_path / "again"))


@pytest.mark.parametrize(
    "name",
    ["folder", "class folders", "csv", "npz", "idx gz", "cifar-10 python", "stl-10", "svhn", "tar folder", "parquet"],
)
def test_every_kind_of_data_set_can_be_packed(tmp_path, files, name):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    data = str(files.WRITERS[name](tmp_path))
    source = open_source(data)
    assert pack(data, tmp_path / "auto").formats == {"raw": len(source)}  # all are small and of one size
    same_images(source, open_source(tmp_path / "auto"))
    formats = set(pack(data, tmp_path / "files", raw=False).formats)
    assert formats == ({"JPEG"} if name == "tar folder" else {"PNG"})
    same_images(source, open_source(tmp_path / "files"))


def test_a_folder_of_packs_is_divided_like_a_folder_of_images(tmp_path):
    for i, name in enumerate(("train/b/1", "train/d/1", "train/d/2", "test/a/7", "test/d/8", "test/b/9")):
        put(tmp_path / f"images/{name}.png", random_images(9, 8, 3, seed=i))
    pack(tmp_path / "images", tmp_path / "packs/train")
    assert open_source(tmp_path / "packs").names == ["b/1.png", "d/1.png", "d/2.png"]
    assert find_eval_source(tmp_path / "packs") is None
    pack(tmp_path / "images/test", tmp_path / "packs/test")
    found = find_eval_source(tmp_path / "packs")
    assert found.names == ["a/7.png", "b/9.png", "d/8.png"]
    assert found.class_names == ["b", "d", "a"]  # numbered as those of the training images
    assert found.labels.tolist() == [2, 0, 1]


def test_files_are_stored_as_they_are_and_baseline_jpegs_with_their_index(tmp_path, folder):
    pack(folder, tmp_path / "pack")
    source, packed = open_source(folder), open_source(tmp_path / "pack")
    assert packed.encoded
    assert packed.array is None
    assert packed.image_size is None
    indexed = 0
    for i, name in enumerate(source.names):
        place = packed.locate(i)
        data = (folder / name).read_bytes()
        assert place.path is None
        assert bytes(place.data) == data
        assert (None if place.index is None else bytes(place.index)) == jpeg_index(data)
        indexed += place.index is not None
    assert indexed == sum(name.endswith(".jpeg") for name in source.names) > 3


def test_small_files_of_one_size_become_pixels_unless_told_otherwise(tmp_path):
    for i in range(33):
        put(tmp_path / f"images/{i:02d}.jpg", random_images(32, 30, 3, seed=i), "JPEG")
    source = open_source(tmp_path / "images")
    assert pack(tmp_path / "images", tmp_path / "auto").formats == {"raw": 33}
    assert open_source(tmp_path / "auto").array.shape == (33, 32, 30, 3)
    assert open_source(tmp_path / "auto").image_size == (32, 30)
    assert not open_source(tmp_path / "auto").encoded
    assert pack(tmp_path / "images", tmp_path / "files", raw=False).formats == {"JPEG": 33}
    put(tmp_path / "images/other.png", random_images(32, 31, 3))
    assert pack(tmp_path / "images", tmp_path / "other").formats == {"JPEG": 33, "PNG": 1}
    for name in ("auto", "files"):
        same_images(source, open_source(tmp_path / name))
    with pytest.raises(DataError, match=r"pixels of image 3; use read\(\)"):
        open_source(tmp_path / "auto").locate(3)


def test_raw_pixels_of_large_files_are_one_array_and_of_unequal_ones_an_error(tmp_path, folder):
    for i in range(3):
        put(tmp_path / f"images/{i:02d}.png", random_images(150, 130, 3, seed=i))
    assert pack(tmp_path / "images", tmp_path / "raw", raw=True).formats == {"raw": 3}
    same_images(open_source(tmp_path / "images"), open_source(tmp_path / "raw"))
    with pytest.raises(OptionError, match=r"one size, 9 x 140, found 11 x 138 in a/02.webp; use raw=False"):
        pack(folder, tmp_path / "unequal", raw=True)


def test_arrays_can_be_stored_as_png(tmp_path):
    images = random_images(31, 12, 13, 3)
    assert pack(images, tmp_path / "png", raw=False).formats == {"PNG": 31}
    assert open_source(tmp_path / "png").encoded
    same_images(open_source(images), open_source(tmp_path / "png"))
    pack(images[..., 0], tmp_path / "grey", raw=False)
    assert not open_source(tmp_path / "grey").encoded  # the compiled reader gives three channels
    same_images(open_source(images[..., 0]), open_source(tmp_path / "grey"))


def test_labels_can_be_given_and_replaced(tmp_path, folder):
    labels = [i - 1 for i in range(31)]
    pack(folder, tmp_path / "pack", labels=labels)
    assert open_source(tmp_path / "pack").labels.tolist() == labels
    assert open_source(tmp_path / "pack").class_names is None
    assert open_source(tmp_path / "pack", labels=[7] * 31).labels.tolist() == [7] * 31
    with pytest.raises(DataError, match="one per image, 31, found 2"):
        open_source(tmp_path / "pack", labels=[1, 2])


def test_names_that_are_not_utf8_are_kept_in_printable_form(tmp_path):
    root = os.fsencode(tmp_path / "images")
    os.mkdir(root)
    for name in (b"caf\xe9.png", b"\xff\xfe.png", "ünïcode 日本 ✓.png".encode()):
        pixels = tmp_path / "pixels.png"
        put(pixels, random_images(4, 5, 3))
        os.rename(os.fsencode(pixels), os.path.join(root, name))
    source = open_source(tmp_path / "images")
    pack(tmp_path / "images", tmp_path / "pack")
    same_images(source, open_source(tmp_path / "pack"))
    assert "ünïcode 日本 ✓.png" in open_source(tmp_path / "pack").names
    assert len(set(open_source(tmp_path / "pack").names)) == 3


def test_empty_data_are_an_error_and_leave_nothing_behind(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found none"):
        pack(tmp_path / "empty", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


# ---- the bytes ------------------------------------------------------------------------------------------------------


def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path, folder):
    expected = None
    for threads in (1, 2, 4):
        pack(folder, tmp_path / str(threads), threads=threads, shard_bytes=20_000)
        found = contents(tmp_path / str(threads))
        expected = expected or found
        assert found == expected
    assert len(expected) > 5


def test_shards_end_where_they_are_full_and_all_are_read(tmp_path, folder):
    report = pack(folder, tmp_path / "pack", shard_bytes=20_000)
    assert report.shards > 4
    same_images(open_source(folder), open_source(tmp_path / "pack"))
    for shard in sorted((tmp_path / "pack").glob("shard-*.sela")):
        assert shard.stat().st_size < 30_000 or shard.stat().st_size < 3_000 + max(
            path.stat().st_size for path in folder.rglob("*.*")
        )
    one = pack(folder, tmp_path / "one", shard_bytes=1)
    assert one.shards == 31
    same_images(open_source(folder), open_source(tmp_path / "one"))


def test_raw_pixels_are_in_one_shard_unless_told_otherwise(tmp_path):
    images = random_images(101, 8, 8, 3)
    assert pack(images, tmp_path / "one").shards == 1
    assert pack(images, tmp_path / "many", shard_bytes=8 * 8 * 3 * 30).shards == 4
    many = open_source(tmp_path / "many")
    assert many.array is None
    assert many.image_size == (8, 8)
    same_images(open_source(images), many)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shard_bytes", [None, 15_000])
def test_the_loader_gives_the_same_batches_from_the_pack(tmp_path, folder, threads, shard_bytes):
    pack(folder, tmp_path / "pack", shard_bytes=shard_bytes)
    options = {"batch_size": 8, "augment": Augment.sela(24), "seed": 5, "threads": threads}
    plain, packed = Loader(folder, **options), Loader(tmp_path / "pack", **options)
    for a, b in zip(plain.epoch(3), packed.epoch(3), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("shard_bytes", [None, 7_000])
def test_the_loader_gives_the_same_batches_from_raw_pixels(tmp_path, shard_bytes):
    images = random_images(97, 16, 16, 3)
    pack(images, tmp_path / "pack", shard_bytes=shard_bytes)
    options = {"batch_size": 32, "augment": Augment.cifar(16), "seed": 1, "threads": 1}
    for a, b in zip(Loader(images, **options).epoch(0), Loader(tmp_path / "pack", **options).epoch(0), strict=True):
        assert torch.equal(a.images, b.images)


@pytest.mark.skipif(not list(PHOTOS.glob("*.JPEG")), reason="needs photographs: SELA_DATA_DIR")
def test_photographs_are_the_same_from_the_pack(tmp_path):
    photos = sorted(PHOTOS.glob("*.JPEG"))[:40]
    report = pack(photos, tmp_path / "pack")
    total = sum(path.stat().st_size for path in photos)
    assert total < report.bytes < 1.15 * total
    source, packed = open_source(photos), open_source(tmp_path / "pack")
    for i in range(0, 40, 7):
        np.testing.assert_array_equal(packed.read(i), source.read(i))


# ---- bad images -----------------------------------------------------------------------------------------------------


def test_a_bad_image_is_named_and_no_pack_is_made(tmp_path, spoiled):
    with pytest.raises(DataError, match=r"05\.jpg: empty file.*remove the file, or use on_bad_image"):
        pack(spoiled, tmp_path / "pack")
    with pytest.raises(DataError, match="was not finished"):
        open_source(tmp_path / "pack")
    (spoiled / "05.jpg").unlink()
    # As long as no shard is whole, the data may change.
    with pytest.raises(DataError, match=r"11\.jpg: not an image"):
        pack(spoiled, tmp_path / "pack")
    with pytest.raises(DataError, match=r"11\.jpg: not an image"):
        pack(spoiled, tmp_path / "pack", shard_bytes=20_000)
    (spoiled / "11.jpg").unlink()
    with pytest.raises(OptionError, match="count was 29, is 28"):
        pack(spoiled, tmp_path / "pack", shard_bytes=20_000)


def test_a_packing_stopped_by_a_bad_image_goes_on_without_it(tmp_path, spoiled):
    options = {"shard_bytes": 10_000, "max_bad_fraction": 0.1}
    (spoiled / "05.jpg").write_bytes((spoiled / "06.jpg").read_bytes())
    with pytest.raises(DataError, match=r"11\.jpg: not an image"):
        pack(spoiled, tmp_path / "pack", **options)
    first = tmp_path / "pack" / "shard-00000.sela"
    before = first.stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        pack(Stopping(open_source(spoiled), 25), tmp_path / "pack", on_bad_image="skip", **options)
    left = contents(tmp_path / "pack")
    with pytest.raises(DataError, match=r"11\.jpg: not an image.*skipped by an earlier call"):
        pack(spoiled, tmp_path / "pack", **options)
    assert contents(tmp_path / "pack") == left
    assert pack(spoiled, tmp_path / "pack", on_bad_image="skip", **options).skipped == 2
    assert first.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"11\.jpg: not an image.*2 images were skipped in .* by an earlier call"):
        pack(spoiled, tmp_path / "pack", **options)
    assert pack(spoiled, tmp_path / "pack", on_bad_image="skip", **options).skipped == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_bad_images_keep_their_numbers_and_are_listed(tmp_path, spoiled, threads):
    report = pack(spoiled, tmp_path / "pack", on_bad_image="skip", max_bad_fraction=0.1, threads=threads)
    assert report.skipped == 3
    assert report.formats == {"JPEG": 27}
    assert "3 skipped" in str(report)
    lines = (tmp_path / "pack" / "bad_images.csv").read_text().splitlines()
    assert lines[0] == "index,name,reason"
    assert [line.split(",")[:2] for line in lines[1:]] == [["5", "05.jpg"], ["11", "11.jpg"], ["20", "20.jpg"]]
    source, packed = open_source(spoiled), open_source(tmp_path / "pack")
    assert [(index, name) for index, name, _ in packed.skipped()] == [(5, "05.jpg"), (11, "11.jpg"), (20, "20.jpg")]
    assert packed.names == source.names
    for i in range(30):
        if i in (5, 11, 20):
            assert len(packed.locate(i).data) == 0
            with pytest.raises(DataError, match=rf"{i:02d}\.jpg: .*\(when it was packed\)"):
                packed.read(i)
        else:
            np.testing.assert_array_equal(packed.read(i), source.read(i))
    verify_pack(tmp_path / "pack")
    options = {"batch_size": 7, "augment": Augment.sela(16), "on_bad_image": "skip", "max_bad_fraction": 0.2}
    plain = list(Loader(spoiled, **options).epoch(0))
    found = list(Loader(tmp_path / "pack", **options).epoch(0))
    assert sum(len(batch.index) for batch in found) == 27
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.index, b.index)


def test_too_many_bad_images_are_an_error(tmp_path, spoiled):
    with pytest.raises(
        DataError, match=r"3 of 30 images cannot be read, more than max_bad_fraction=0.08: 05\.jpg.*raise max_"
    ):
        pack(spoiled, tmp_path / "pack", on_bad_image="skip", max_bad_fraction=0.08, threads=1)


def test_a_skipped_image_among_raw_pixels_is_no_black_image(tmp_path):
    for i in range(20):
        put(tmp_path / f"images/{i:02d}.png", random_images(10, 10, 3, seed=i))
    (tmp_path / "images/07.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    report = pack(tmp_path / "images", tmp_path / "pack", on_bad_image="skip", max_bad_fraction=0.1)
    assert report.formats == {"raw": 19}
    packed = open_source(tmp_path / "pack")
    assert packed.array is None
    with pytest.raises(DataError, match=r"07\.png"):
        packed.read(7)
    np.testing.assert_array_equal(packed.read(8), open_source(tmp_path / "images").read(8))


def test_bad_items_of_a_dataset_can_be_skipped(tmp_path):
    items = [(random_images(8, 8, 3, seed=i), i % 3) for i in range(40)]
    items[21] = ("no image", 1)
    report = pack(Items(items), tmp_path / "pack", on_bad_image="skip", max_bad_fraction=0.05)
    assert report.skipped == 1
    expected = [-1 if i == 21 else i % 3 for i in range(40)]
    assert open_source(tmp_path / "pack").labels.tolist() == expected


def test_pipes_and_vanished_files_are_bad_images_and_nothing_waits(tmp_path):
    for i in range(5):
        put(tmp_path / f"{i}.png", random_images(120, 130, 3, seed=i))
    os.mkfifo(tmp_path / "pipe.png")
    paths = [tmp_path / name for name in ("0.png", "pipe.png", "1.png", "absent.png", "2.png")]
    report = pack(paths, tmp_path / "pack", on_bad_image="skip", max_bad_fraction=0.5)
    assert report.skipped == 2
    reasons = [reason for _, _, reason in open_source(tmp_path / "pack").skipped()]
    assert "not a regular file" in reasons[0]
    assert "No such file" in reasons[1]


# ---- reduced images -------------------------------------------------------------------------------------------------


def test_an_image_that_a_record_cannot_describe_is_a_bad_image(tmp_path):
    root = tmp_path / "images"
    put(root / "a.jpg", random_images(120, 110, 3), "JPEG")
    Image.new("1", (1 << 24, 1)).save(root / "b.png")
    with pytest.raises(DataError, match=r"b\.png: expected sides below 16,777,216 pixels .* found 1 x 16,777,216"):
        pack(root, tmp_path / "pack")
    pack(root, tmp_path / "pack", on_bad_image="skip", max_bad_fraction=0.5)
    assert [index for index, _, _ in open_source(tmp_path / "pack").skipped()] == [1]


def test_max_side_reduces_large_images_and_leaves_the_others_as_they_are(tmp_path):
    smooth = np.asarray(Image.fromarray(random_images(8, 8, 3)).resize((400, 300), Image.Resampling.BICUBIC))
    put(tmp_path / "images/a.jpg", smooth, "JPEG", quality=95)
    put(tmp_path / "images/b.png", smooth)
    put(tmp_path / "images/c.jpg", smooth[..., 0], "JPEG")
    put(tmp_path / "images/d.jpg", smooth[:150, :200], "JPEG")
    put(tmp_path / "images/e.png", smooth[:3, :])
    report = pack(tmp_path / "images", tmp_path / "pack", max_side=200)
    assert report.formats == {"JPEG": 5}
    packed = open_source(tmp_path / "pack")
    assert [packed.read(i).shape for i in range(5)] == [(150, 200, 3)] * 4 + [(2, 200, 3)]
    assert all(packed.locate(i).index is not None for i in range(5))
    assert bytes(packed.locate(3).data) == (tmp_path / "images/d.jpg").read_bytes()
    exact = np.asarray(Image.fromarray(smooth).resize((200, 150), Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(packed.read(1) - exact).mean() < 3
    grey = Image.open(io.BytesIO(bytes(packed.locate(2).data)))
    assert grey.mode == "L"
    worse = pack(tmp_path / "images", tmp_path / "worse", max_side=200, quality=30)
    assert worse.bytes < report.bytes


def test_an_orientation_survives_the_reduction(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "images/a.jpg", random_images(300, 200, 3), "JPEG", exif=exif)
    put(tmp_path / "images/b.jpg", random_images(300, 200, 3), "JPEG")
    put(tmp_path / "images/c.tiff", random_images(300, 200, 3), "TIFF", exif=exif)  # turned while it is decoded
    pack(tmp_path / "images", tmp_path / "pack", max_side=150)
    packed = open_source(tmp_path / "pack")
    found = [Image.open(io.BytesIO(bytes(packed.locate(i).data))) for i in range(3)]
    assert [image.getexif().get(0x0112) for image in found] == [6, None, None]
    assert [image.size for image in found] == [(100, 150), (100, 150), (150, 100)]


@pytest.mark.parametrize("exif", [False, True])
def test_the_loader_turns_packed_images_like_files(tmp_path, exif):
    held = Image.Exif()
    for i in range(9):
        held[0x0112] = i or 1
        put(tmp_path / f"images/{i}.jpg", random_images(120 + i, 140, 3, seed=i), "JPEG", exif=held)
    pack(tmp_path / "images", tmp_path / "pack")
    options = {"batch_size": 9, "augment": Augment.sela(32), "exif": exif}
    (plain,) = Loader(tmp_path / "images", **options).epoch(0)
    (packed,) = Loader(tmp_path / "pack", **options).epoch(0)
    assert torch.equal(plain.images, packed.images)


def test_small_images_that_exif_data_turn_are_kept_as_files(tmp_path):
    exif = Image.Exif()
    for orientation, expected in ((1, {"raw": 3}), (6, {"JPEG": 1, "PNG": 1, "WEBP": 1})):
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP"):
            put(tmp_path / f"{orientation}/{kind}.{kind.lower()}", random_images(8, 8, 3), kind, exif=exif)
        assert pack(tmp_path / str(orientation), tmp_path / f"pack{orientation}").formats == expected


def test_arrays_are_reduced_as_pixels(tmp_path):
    images = random_images(5, 60, 80)
    pack(images, tmp_path / "pack", max_side=40)
    packed = open_source(tmp_path / "pack")
    assert packed.array.shape == (5, 30, 40, 1)
    expected = np.asarray(Image.fromarray(images[2]).resize((40, 30), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(packed.read(2)[..., 0], expected)


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_numbers_may_be_those_of_numpy(tmp_path):
    pack("digits", tmp_path / "pack", quality=50, max_side=5, shard_bytes=5000)
    options = {"quality": np.int32(50), "max_side": np.int64(5), "shard_bytes": np.uint16(5000)}
    before = contents(tmp_path / "pack")
    pack("digits", tmp_path / "pack", **options)  # the same pack
    assert contents(tmp_path / "pack") == before


def test_a_whole_pack_is_left_as_it_is(tmp_path, folder):
    first = pack(folder, tmp_path / "pack")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pack").iterdir()}
    assert pack(folder, tmp_path / "pack") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pack").iterdir()} == before
    with pytest.raises(OptionError, match="found a pack"):
        pack(folder, tmp_path / "pack", resume=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pack").iterdir()} == before


def test_a_pack_of_other_images_is_overwritten_only_on_demand(tmp_path, folder):
    pack("digits", tmp_path / "pack")
    before = contents(tmp_path / "pack")
    with pytest.raises(OptionError, match=r"channels was 1, is 3; count was 1797, is 31.*use overwrite"):
        pack(folder, tmp_path / "pack")
    with pytest.raises(OptionError, match="raw was True, is False"):
        pack("digits", tmp_path / "pack", raw=False)
    assert contents(tmp_path / "pack") == before
    pack(folder, tmp_path / "pack", overwrite=True)
    same_images(open_source(folder), open_source(tmp_path / "pack"))


def test_folders_of_others_are_not_touched(tmp_path, folder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(OptionError, match=r"found 1 other files in .*mine \('diary.txt'\)"):
            pack("digits", tmp_path / "mine", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]
    with pytest.raises(OptionError, match="another folder than that of the data"):
        pack(folder, folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match=r"out: expected a folder, .* found a file: .*file"):
        pack("digits", tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


def test_a_pack_is_not_packed_into_itself(tmp_path, folder):
    pack(folder, tmp_path / "pack")
    before = contents(tmp_path / "pack")
    source = open_source(tmp_path / "pack")
    labelled = open_source(source.subset([1, 2]), labels=[3, 4])
    for data in (tmp_path / "pack", tmp_path / "pack" / "pack.json", source, labelled):
        with pytest.raises(OptionError, match="another folder than that of the data"):
            pack(data, tmp_path / "pack", overwrite=True)
    assert contents(tmp_path / "pack") == before


def test_a_pack_called_digits_is_not_the_data_when_the_built_in_ones_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        pack("digits", "digits", overwrite=True)
    with pytest.raises(OptionError, match="another folder than that of the data"):
        pack("./digits", "digits", overwrite=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(path, flags, *more, **options):
        if str(path).endswith("packing.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *more, **options)

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceError, match=r"cannot write .*packing\.json: Permission denied; check that the folder"):
        pack("digits", tmp_path / "pack")


def test_two_processes_do_not_pack_into_one_folder(tmp_path):
    (tmp_path / "pack").mkdir()
    with open(tmp_path / "pack" / "packing.json", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OptionError, match="another process is packing"):
            pack("digits", tmp_path / "pack")
    pack("digits", tmp_path / "pack")
    assert verify_pack(tmp_path / "pack").images == 1797


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raw": "maybe"}, 'raw: expected "auto", True or False'),
        ({"raw": 0}, 'raw: expected "auto", True or False'),
        ({"raw": np.array([1, 2])}, 'raw: expected "auto", True or False'),
        ({"max_side": 0}, "max_side: expected a whole number 1"),
        ({"max_side": 2.5}, "max_side: expected a whole number"),
        ({"quality": 101}, "quality: expected a whole number 1..100"),
        ({"shard_bytes": 0}, "shard_bytes: expected a whole number"),
        ({"on_bad_image": "ignore"}, "on_bad_image: expected"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction: expected 0..1"),
        ({"max_bad_fraction": "x"}, "max_bad_fraction: expected a number"),
        ({"threads": 0}, "threads: expected a whole number"),
    ],
)
def test_options_out_of_range_are_errors_before_anything_is_done(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        pack(tmp_path / "absent", tmp_path / "pack", **options)
    assert not (tmp_path / "pack").exists()


# ---- interruptions --------------------------------------------------------------------------------------------------


class Interrupting(Dataset):
    """Images of which one cannot be had this time."""

    def __init__(self, at, error=KeyboardInterrupt):
        self.at, self.error = at, error
        self.read = []

    def __len__(self):
        return 60

    def __getitem__(self, index):
        if index == self.at and self.read.count(0) > 1:  # later than the fingerprint
            raise self.error
        self.read.append(index)
        return random_images(8, 8, 3, seed=index), index % 5


def test_an_interrupted_packing_goes_on_after_its_last_whole_shard(tmp_path):
    whole = Interrupting(-1)
    pack(whole, tmp_path / "unbroken", shard_bytes=192 * 10)
    stopped = Interrupting(37)
    with pytest.raises(KeyboardInterrupt):
        pack(stopped, tmp_path / "pack", shard_bytes=192 * 10)
    names = sorted(path.name for path in (tmp_path / "pack").iterdir())
    assert names == ["packing.json", "shard-00000.sela", "shard-00001.sela", "shard-00002.sela"]
    with pytest.raises(DataError, match="was not finished; run the same `sela pack` again"):
        open_source(tmp_path / "pack")
    with pytest.raises(OptionError, match="use resume or overwrite"):
        pack(whole, tmp_path / "pack", shard_bytes=192 * 10, resume=False)
    with pytest.raises(OptionError, match="shard_bytes was 1920, is 999"):
        pack(whole, tmp_path / "pack", shard_bytes=999)
    resumed = Interrupting(-1)
    pack(resumed, tmp_path / "pack", shard_bytes=192 * 10)
    assert min(resumed.read[-30:]) == 30  # the first thirty were not read again
    assert contents(tmp_path / "pack") == contents(tmp_path / "unbroken")


def test_a_shard_that_was_damaged_meanwhile_is_made_again(tmp_path):
    pack(Interrupting(-1), tmp_path / "unbroken", shard_bytes=192 * 10)
    with pytest.raises(KeyboardInterrupt):
        pack(Interrupting(57), tmp_path / "pack", shard_bytes=192 * 10)
    damaged = tmp_path / "pack" / "shard-00002.sela"
    data = bytearray(damaged.read_bytes())
    data[300] ^= 4
    damaged.write_bytes(data)
    pack(Interrupting(-1), tmp_path / "pack", shard_bytes=192 * 10)
    assert contents(tmp_path / "pack") == contents(tmp_path / "unbroken")


# Packs in a process of its own, which is killed somewhere after its k-th shard; six times two kills and an end.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
from sela_ext.data import pack

def child(out, threads):
    pid = os.fork()
    if pid == 0:
        try:
            pack(sys.argv[1], out, shard_bytes=200_000, on_bad_image="skip", max_bad_fraction=0.1, threads=threads)
        finally:
            os._exit(0)
    return pid

def shards(out):
    return len(list(out.glob("*.sela")))

root, draw = Path(sys.argv[2]), random.Random(7)
os.waitpid(child(root / "unbroken", 2), 0)
for number in range(6):
    out = root / f"killed-{number}"
    for _ in range(2):
        after = shards(out) + draw.randrange(6)
        pid, limit = child(out, 2), time.monotonic() + 60
        while shards(out) < after and not (out / "pack.json").exists() and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(shards(out), (out / "pack.json").exists())
    os.waitpid(child(out, 1), 0)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 photographs of noise, one of them truncated."""
    root = tmp_path_factory.mktemp("many")
    for i in range(300):
        put(root / f"{i:03d}.jpg", random_images(110, 120 + i % 7, 3, seed=i), "JPEG")
    whole = (root / "017.jpg").read_bytes()
    (root / "017.jpg").write_bytes(whole[:3000])
    return root


def test_a_packing_killed_at_any_moment_ends_as_an_unbroken_one(tmp_path, many):
    command = [sys.executable, "-P", "-c", DRIVER, str(many), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    moments = [line.split() for line in done.stdout.splitlines()]
    assert len(moments) == 12
    assert sum(whole == "False" for _, whole in moments) >= 6
    assert len({shards for shards, _ in moments}) > 3
    unbroken = contents(tmp_path / "unbroken")
    assert len(unbroken) > 12
    for number in range(6):
        assert contents(tmp_path / f"killed-{number}") == unbroken


# ---- disks ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_error_and_the_same_call_goes_on(tmp_path, many):
    unbroken = tmp_path / "unbroken"
    options = {"shard_bytes": 400_000, "on_bad_image": "skip", "max_bad_fraction": 0.1}
    pack(many, unbroken, **options)
    largest = max(path.stat().st_size for path in unbroken.iterdir())
    first = (unbroken / "shard-00000.sela").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = first - 1000 if first == largest else largest - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ResourceError, match=r"cannot write .*shard-.*File too large.*make room and run the same"):
            pack(many, tmp_path / "pack", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = contents(tmp_path / "pack")
    assert all(name == "packing.json" or left[name] == (unbroken / name).read_bytes() for name in left)
    assert not any(name.endswith(".partial") for name in left)
    pack(many, tmp_path / "pack", **options)
    assert contents(tmp_path / "pack") == contents(unbroken)


def test_a_disk_that_is_too_small_is_refused_at_the_start(tmp_path, many, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    size = sum(path.stat().st_size for path in many.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    with pytest.raises(ResourceError, match=r"expected room for about [\d,]+ bytes \(300 images\), found .* free"):
        pack(many, tmp_path / "pack", on_bad_image="skip")
    assert [path.name for path in (tmp_path / "pack").iterdir()] == ["packing.json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1.15 * size)))
    assert pack(many, tmp_path / "pack", on_bad_image="skip").bytes < 1.15 * size


def test_a_file_of_absurd_size_is_a_bad_image_and_needs_no_room(tmp_path):
    put(tmp_path / "images" / "a.jpg", random_images(120, 110, 3), "JPEG")
    with open(tmp_path / "images" / "b.jpg", "wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(DataError, match=r"b\.jpg: expected an image file of at most"):
        pack(tmp_path / "images", tmp_path / "pack")
    assert pack(tmp_path / "images", tmp_path / "pack", on_bad_image="skip", max_bad_fraction=0.5).skipped == 1


def test_the_room_foretold_is_close_to_the_truth(tmp_path, folder, many, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    for data in (random_images(40, 64, 64, 3), many):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        with pytest.raises(ResourceError) as caught:
            pack(data, tmp_path / "foretold", on_bad_image="skip", overwrite=True)
        foretold = int(str(caught.value).split("about ")[1].split(" bytes")[0].replace(",", ""))
        monkeypatch.undo()
        size = pack(data, tmp_path / "foretold", on_bad_image="skip", overwrite=True).bytes
        assert 0.9 * size < foretold < 1.25 * size


# ---- in company -----------------------------------------------------------------------------------------------------


def test_the_public_name_is_the_function():
    assert sela_ext.pack is pack_function
    assert sela_ext.verify_pack is verify_pack


def test_a_run_that_is_trained_on_a_pack_is_told_when_it_changes(tmp_path, folder):
    pack(folder, tmp_path / "pack")
    first = open_source(tmp_path / "pack").fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert open_source(tmp_path / "pack").fingerprint() == first
    shutil.copytree(tmp_path / "pack", tmp_path / "copy")
    assert open_source(tmp_path / "copy").fingerprint() == first
    pack(folder, tmp_path / "other", labels=[1] * 31)
    assert open_source(tmp_path / "other").fingerprint() != first


def test_progress_is_shown_on_a_terminal_only(tmp_path, capsys):
    pack("digits", tmp_path / "pack", progress=True)
    assert capsys.readouterr() == ("", "")


def test_several_threads_read_a_pack_at_once(tmp_path, folder):
    pack(folder, tmp_path / "pack", shard_bytes=10_000)
    source, packed = open_source(folder), open_source(tmp_path / "pack")
    expected = [source.read(i) for i in range(31)]
    wrong = []

    def work(seed):
        for i in np.random.default_rng(seed).permutation(31).tolist():
            with contextlib.suppress(AssertionError):
                np.testing.assert_array_equal(packed.read(i), expected[i])
                continue
            wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
