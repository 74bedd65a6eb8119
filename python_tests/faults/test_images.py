"""Images as nobody wishes for, from the file to the report: the cases D1 to D6 of the fault list.

What a `Loader` alone makes of them is in python_tests/data/test_faults.py, single formats in test_decode.py there.
"""

import base64
import csv
import io
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext import Augment, Loader
from sela_ext.data import open_source
from sela_ext.errors import DataError
from sela_ext.report.thumbnails import ACROSS, make_sheets

TINY = {
    "model": "small-convnet", "image_size": 16, "epochs": 1, "batch_size": 4, "clusters": [2, 2], "projection": 0,
    "label_source": "eval", "label_passes": 1, "precision": "float32", "threads": 1, "progress": False,
}  # fmt: skip
FLAGS = [
    *("--model", "small-convnet", "--image-size", "16", "--epochs", "1", "--batch-size", "8", "--clusters", "2,3"),
    *("--projection", "0", "--label-source", "eval", "--label-passes", "1", "--threads", "1", "--no-progress"),
]


def picture(height, width, seed=0):
    """A smooth picture with some texture, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def fill(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def into_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def every_path(tmp_path, files):
    """The same files in all the ways that lead to their bytes, each in the order of their names."""
    files = dict(sorted(files.items()))
    folder = fill(tmp_path / "folder", files)
    found = {
        "folder": folder,
        "list": [folder / name for name in files],
        "tar": into_tar(tmp_path / "images.tar", files),
        "pack": tmp_path / "pack",
    }
    sela_ext.pack(folder, tmp_path / "pack", raw=False, threads=1)
    (tmp_path / "table.txt").write_text("".join(f"folder/{name}\n" for name in files))
    found["table"] = tmp_path / "table.txt"
    return folder, found


def pixels_of(data, side, **options):
    """Images of side x side pixels as they reach a network, uint8 [N, side, side, 3]."""
    loader = Loader(data, augment=Augment.none(side), dtype=torch.uint8, shuffle=False, threads=1, **options)
    return torch.cat([batch.images for batch in loader.epoch(0)]).permute(0, 2, 3, 1).numpy()


def shown_in(report):
    """The pixels of all thumbnails of a report that are kept as they are: squares of its sheets that are not empty."""
    uris = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", report.read_text())
    sheets = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")) for uri in uris]
    squares = []
    for sheet in sheets:
        if sheet.shape[0] == sheet.shape[1] and sheet.shape[0] % ACROSS == 0:
            squares += [square for row in np.split(sheet, ACROSS) for square in np.split(row, ACROSS, axis=1)]
    return [np.ascontiguousarray(square) for square in squares if square.any()]


def events(out, kind):
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["event"] == kind]


# ---- D1: empty file, text, truncated JPEG.

DAMAGE = {
    "empty": (lambda data: b"", "empty file"),
    "text": (lambda data: b"This is no picture.", "not an image"),
    "truncated": (lambda data: data[: len(data) * 3 // 5], "[Tt]runcated"),
}


def with_damaged(kind, at=3, count=20):
    """Files 00.jpg, 01.jpg, ..., one of them damaged."""
    files = {f"{i:02d}.jpg": encoded(picture(40, 30 + i, seed=i), "JPEG") for i in range(count)}
    name = f"{at:02d}.jpg"
    files[name] = DAMAGE[kind][0](files[name])
    return files


# D1
@pytest.mark.parametrize("kind", list(DAMAGE))
def test_d1_a_damaged_image_ends_a_run_with_its_name_and_status_3(tmp_path, sela, kind):
    folder = fill(tmp_path / "images", with_damaged(kind))
    status, _, err = sela("train", "--data", folder, "--out", tmp_path / "run", *FLAGS)
    assert status == 3
    assert err.count("\n") == 1
    assert re.search(rf'03\.jpg: .*{DAMAGE[kind][1]}.*on_bad_image="skip"', err)
    assert not (tmp_path / "run" / "labels.csv").exists()


# D1
@pytest.mark.parametrize("kind", list(DAMAGE))
def test_d1_a_damaged_image_in_an_archive_or_a_pack_is_named_or_skipped_too(tmp_path, kind):
    files = with_damaged(kind)
    archive = into_tar(tmp_path / "images.tar", files)
    with pytest.raises(DataError, match=rf"03\.jpg: .*{DAMAGE[kind][1]}"):
        sela_ext.train(archive, out=tmp_path / "a", **TINY)
    with pytest.raises(DataError, match=rf"03\.jpg: .*{DAMAGE[kind][1]}"):
        sela_ext.pack(archive, tmp_path / "pack", raw=False, threads=1)
    sela_ext.pack(archive, tmp_path / "packed", raw=False, threads=1, on_bad_image="skip", max_bad_fraction=0.1)
    for data, out in ((archive, "b"), (tmp_path / "packed", "c")):
        result = sela_ext.train(data, out=tmp_path / out, on_bad_image="skip", max_bad_fraction=0.1, **TINY)
        assert (result.labels[:, 3] == -1).all()
        assert (np.delete(result.labels, 3, axis=1) >= 0).all()
        assert re.search(r"^3,03\.jpg,", (result.out / "bad_images.csv").read_text(), re.M)


# ---- D2 and D4: all kinds of files.


def every_kind(side=24):
    """Files of every kind that is read, by name: the bytes."""
    rgb = picture(side, side)
    image, grey = Image.fromarray(rgb), Image.fromarray(rgb).convert("L")
    alpha = Image.fromarray(np.linspace(0, 255, side * side).reshape(side, side).astype(np.uint8))
    rgba, la = image.copy(), grey.copy()
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    cmyk = encoded(image.convert("CMYK"), "JPEG", quality=95)
    transform = cmyk.index(b"Adobe") + 11
    return {
        "png-called.jpg": encoded(image, "PNG"),
        "jpeg-called.png": encoded(image, "JPEG"),
        "cmyk.jpg": cmyk[:transform] + b"\0" + cmyk[transform + 1 :],
        "ycck.jpg": cmyk[:transform] + b"\2" + cmyk[transform + 1 :],
        "grey.jpg": encoded(grey, "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True, quality=90),
        "1.png": encoded(grey.convert("1"), "PNG"),
        "L.png": encoded(grey, "PNG"),
        "LA.png": encoded(la, "PNG"),
        "P.png": encoded(image.quantize(31), "PNG"),
        "P-transparent.png": encoded(image.quantize(31), "PNG", transparency=5),
        "RGBA.png": encoded(rgba, "PNG"),
        "I16.png": encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 99), "PNG"),
    }


def as_documented(data):
    """What docs/data.md says of a file's pixels, by Pillow: uint8 [H, W, 3]."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I"):
        return np.dstack([(np.asarray(image) >> 8).astype(np.uint8)] * 3)  # the high byte
    if "A" in image.mode or "transparency" in image.info:
        upper = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper)
    return np.asarray(image.convert("RGB"))


# D2 D4
def test_d2_d4_every_kind_of_file_has_its_documented_pixels_on_every_path(tmp_path):
    files = every_kind()
    folder, paths = every_path(tmp_path, files)
    names = sorted(files)
    wanted = np.stack([as_documented(files[name]) for name in names])
    for path, data in paths.items():
        source = open_source(data)
        assert [name.rsplit("/", 1)[-1] for name in source.names] == names, path
        seen = pixels_of(data, 24)
        for i, name in enumerate(names):
            least = 1 if name in ("cmyk.jpg", "ycck.jpg") else 0
            assert np.abs(source.read(i).astype(int) - wanted[i]).max() <= least, (path, name)
            np.testing.assert_array_equal(seen[i], source.read(i), err_msg=f"{path} {name}")
    # A pack of pixels, and the pixels themselves.
    pixels = pixels_of(folder, 24)
    sela_ext.pack(folder, tmp_path / "raw", raw=True, threads=1)
    for data in (tmp_path / "raw", pixels):
        np.testing.assert_array_equal(pixels_of(data, 24), pixels)


# D2 D4
def test_d2_d4_labels_features_and_report_are_the_same_on_every_path(tmp_path, sela):
    folder, paths = every_path(tmp_path, every_kind())
    pixels = pixels_of(folder, 24)
    run = sela_ext.train(folder, out=tmp_path / "run", **TINY)
    labels = sela_ext.predict(run.out, pixels, threads=1)
    features = sela_ext.embed(run.out, pixels, threads=1)
    for path, data in paths.items():
        np.testing.assert_array_equal(sela_ext.predict(run.out, data, threads=1), labels, err_msg=path)
        np.testing.assert_array_equal(sela_ext.embed(run.out, data, threads=1), features, err_msg=path)
    # Training too, which augments what it decodes.
    again = sela_ext.train(paths["tar"], out=tmp_path / "tar", **TINY)
    np.testing.assert_array_equal(again.labels, run.labels)
    np.testing.assert_array_equal(again.confidence, run.confidence)
    # The report shows what was trained on, also when it is written again.
    expected = {image.tobytes() for image in pixels}
    assert {image.tobytes() for image in shown_in(run.report)} == expected
    run.report.unlink()
    assert sela("report", run.out)[0] == 0
    assert {image.tobytes() for image in shown_in(run.report)} == expected


# ---- D3: orientation.


def turned(upright, orientation):
    """What a camera held that way stores."""
    pixels = upright[:, ::-1] if orientation in (2, 3, 6, 7) else upright
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return np.ascontiguousarray(pixels.transpose(1, 0, 2) if orientation in (5, 6, 7, 8) else pixels)


def eight_ways():
    upright, files = picture(24, 24, seed=5), {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"{orientation}.png"] = encoded(turned(upright, orientation), "PNG", exif=exif)
    return upright, files


# D3
def test_d3_the_option_exif_reaches_labels_features_and_report(tmp_path):
    upright, files = eight_ways()
    _, paths = every_path(tmp_path, files)
    run = sela_ext.train(paths["folder"], out=tmp_path / "exif", exif=True, **TINY)
    raw = sela_ext.train(paths["folder"], out=tmp_path / "raw", **TINY)
    for path, data in paths.items():
        for image, orientation in zip(pixels_of(data, 24, exif=True), range(1, 9), strict=True):
            np.testing.assert_array_equal(image, upright, err_msg=f"{path} {orientation}")
        for image, orientation in zip(pixels_of(data, 24), range(1, 9), strict=True):
            np.testing.assert_array_equal(image, turned(upright, orientation), err_msg=f"{path} {orientation}")
        # What a run was trained with holds for new images, without being said again.
        features = sela_ext.embed(run.out, data, threads=1)
        assert (features == features[0]).all(), path
        assert len(np.unique(sela_ext.embed(raw.out, data, threads=1), axis=0)) == 8, path
    # Eight images that are one picture have the same two probabilities in every head, and one look in the report.
    assert all(len(np.unique(row)) <= 2 for row in run.confidence)
    assert {image.tobytes() for image in shown_in(run.report)} == {upright.tobytes()}
    assert len({image.tobytes() for image in shown_in(raw.report)}) == 8


# ---- D5: thin and tiny images.

ODD = [(1, 1), (1, 3000), (3000, 1), (2, 2), (3, 1), (17, 2500), (1, 2), (2500, 17)]


# D5
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("more", [{}, {"exact": True, "augment": "swav"}], ids=["default", "exact"])
def test_d5_thin_and_tiny_images_are_trained_on_labelled_and_shown(tmp_path, kind, more):
    suffix = {"JPEG": "jpg", "PNG": "png"}[kind]
    files = {f"{i}.{suffix}": encoded(picture(*size, seed=i), kind) for i, size in enumerate(ODD)}
    folder = fill(tmp_path / "images", files)
    result = sela_ext.train(folder, out=tmp_path / "run", log_every=1, evaluate_every=1, **TINY, **more)
    steps = events(result.out, "step")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(np.isfinite(step["loss"]) for step in steps)
    assert (result.labels >= 0).all()
    assert np.isfinite(result.confidence).all()
    assert all(torch.isfinite(value).all() for value in result.network.state_dict().values())
    assert np.isfinite(sela_ext.embed(result.out, folder, threads=1)).all()
    sheets = make_sheets(range(len(ODD)), open_source(folder).read)
    assert (len(sheets.places), sheets.unreadable, sheets.left) == (len(ODD), 0, 0)
    page = result.report.read_text()
    assert all(name in page for name in files)
    # A pack of them gives the same bits.
    sela_ext.pack(folder, tmp_path / "pack", threads=1)
    packed = sela_ext.train(tmp_path / "pack", out=tmp_path / "b", log_every=1, evaluate_every=1, **TINY, **more)
    np.testing.assert_array_equal(packed.labels, result.labels)
    np.testing.assert_array_equal(packed.confidence, result.confidence)


# D5
@pytest.mark.parametrize("shape", [(12, 1, 1, 3), (12, 1, 300), (12, 300, 1, 1), (12, 2, 3)], ids=str)
def test_d5_arrays_of_thin_and_tiny_images_are_trained_on(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    result = sela_ext.train(images, out=tmp_path / "run", log_every=1, **TINY)
    assert all(np.isfinite(step["loss"]) for step in events(result.out, "step"))
    assert (result.labels >= 0).all()
    assert np.isfinite(result.confidence).all()


# ---- D6: the list of bad images.


# D6
def test_d6_bad_images_are_listed_unlabelled_and_left_out_of_the_sizes(tmp_path, sela):
    files = {f"{i:02d}.jpg": encoded(picture(40, 30 + i, seed=i), "JPEG") for i in range(41)}
    for at, kind in ((4, "empty"), (17, "truncated"), (40, "text")):
        files[f"{at:02d}.jpg"] = DAMAGE[kind][0](files[f"{at:02d}.jpg"])
    folder, out = fill(tmp_path / "images", files), tmp_path / "run"
    skip = ["--on-bad-image", "skip", "--max-bad-fraction", "0.1"]
    status, _, err = sela("train", "--data", folder, "--out", out, *FLAGS, *skip, "--balance", "exact", "--progress")
    assert (status, err) == (0, "")
    with open(out / "bad_images.csv", newline="") as file:
        rows = [(int(row["index"]), row["name"], row["reason"]) for row in csv.DictReader(file)]
    assert [row[:2] for row in rows] == [(4, "04.jpg"), (17, "17.jpg"), (40, "40.jpg")]
    for (_, _, reason), kind in zip(rows, ("empty", "truncated", "text"), strict=True):
        assert re.search(DAMAGE[kind][1], reason)
    with np.load(out / "labels.npz") as saved:
        labels = saved["labels"]
        assert (saved["confidence"][:, [4, 17, 40]] == 0).all()
    assert (labels[:, [4, 17, 40]] == -1).all()
    # 38 images are left: 19 and 19 in two clusters, 13, 13 and 12 in three.
    for row, sizes in zip(labels, ([19, 19], [12, 13, 13]), strict=True):
        assert sorted(np.bincount(row[row >= 0]).tolist()) == sizes
    # New images likewise: an error that names the first, or no label.
    status, _, err = sela("predict", out, "--data", folder, "--out", tmp_path / "new.csv", "--threads", 1)
    assert (status, err.count("\n")) == (3, 1)
    assert "04.jpg" in err
    assert not (tmp_path / "new.csv").exists()
    flags = ["--threads", 1, "--on-bad-image", "skip"]
    status, said, _ = sela("predict", out, "--data", folder, "--out", tmp_path / "new.csv", *flags)
    assert status == 0
    assert "3 could not be read" in said
    with open(tmp_path / "new.csv", newline="") as file:
        unlabelled = [row["index"] for row in csv.DictReader(file) if row["label_0"] == "-1"]
    assert unlabelled == ["4", "17", "40"]
    features = sela_ext.embed(out, folder, on_bad_image="skip", threads=1)
    assert np.flatnonzero(np.isnan(features).any(1)).tolist() == [4, 17, 40]
