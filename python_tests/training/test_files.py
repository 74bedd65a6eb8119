"""Runs on folders of photographs: the index beside the run, bad images, changed data."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import sela_ext
from sela_ext.errors import CheckpointError, DataError, OptionError

SMALL = {
    "model": "small-resnet", "image_size": 32, "epochs": 2, "batch_size": 12, "clusters": 2, "heads": 2,
    "label_source": "eval", "label_passes": 2, "precision": "float32", "threads": 1, "holdout": 6, "progress": False,
}  # fmt: skip


def fill_folder(root, count=40):
    """Photographs of two kinds, most of them JPEG, larger than what a reader keeps decoded."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for i in range(count):
        small = rng.integers(0, 128, (9, 9, 3), dtype=np.uint8) + np.uint8(127 * (i % 2))
        image = Image.fromarray(small).resize((120 + i, 150 - i), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        image.save(root / f"{i:02d}.{'png' if i % 9 == 8 else 'jpg'}", exif=exif)
    return root


def deterministic(out):
    clock = ("seconds", "per_second", "wait")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(w in k for w in clock) and k != "heads"} for row in rows]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """40 photographs, of which 5 is cut short in its last bytes and 20 a text."""
    root = fill_folder(tmp_path_factory.mktemp("data") / "images")
    data = (root / "05.jpg").read_bytes()
    (root / "05.jpg").write_bytes(data[: int(len(data) * 0.97)])
    (root / "20.jpg").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def first(damaged, tmp_path_factory):
    options = {**SMALL, "on_bad_image": "skip", "max_bad_fraction": 0.2}
    return sela_ext.train(damaged, out=tmp_path_factory.mktemp("run") / "run", **options)


# D6
def test_bad_images_are_listed_in_a_table_and_not_labelled(first):
    with open(first.out / "bad_images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["index"], row["name"]) for row in rows] == [("5", "05.jpg"), ("20", "20.jpg")]
    assert "truncated" in rows[0]["reason"]
    assert "not an image" in rows[1]["reason"]
    assert (first.labels[:, [5, 20]] == -1).all()
    assert (np.delete(first.labels, [5, 20], axis=1) >= 0).all()


# D6
def test_too_many_bad_images_end_the_run(damaged, tmp_path):
    with pytest.raises(DataError, match=r"max_bad_fraction=0\.01"):
        sela_ext.train(damaged, out=tmp_path / "run", on_bad_image="skip", **{**SMALL, "holdout": 0})


def test_the_index_lies_beside_the_run_and_changes_no_bit(damaged, first, tmp_path):
    files = sorted(path.relative_to(first.out) for path in (first.out / "index").rglob("*.bin"))
    assert [str(path) for path in files] == ["index/held/jpeg_index-0.bin", "index/train/jpeg_index-0.bin"]
    assert all((first.out / path).stat().st_size > 1000 for path in files)
    out = tmp_path / "run"
    shutil.copytree(first.out / "index", out / "index")
    before = {path: (out / path).read_bytes() for path in files}
    again = sela_ext.train(damaged, out=out, resume=True, on_bad_image="skip", max_bad_fraction=0.2, **SMALL)
    assert np.array_equal(again.labels, first.labels)
    assert np.array_equal(again.confidence, first.confidence)
    assert deterministic(out) == deterministic(first.out)
    assert (out / "bad_images.csv").read_text() == (first.out / "bad_images.csv").read_text()
    assert {path: (out / path).read_bytes() for path in files} == before


def test_overwrite_removes_the_index(tmp_path):
    data = fill_folder(tmp_path / "images", 20)
    options = {**SMALL, "holdout": 0, "epochs": 1}
    out = sela_ext.train(data, out=tmp_path / "run", **options).out
    stale = out / "index" / "train" / "jpeg_index-7.bin"
    stale.write_bytes(b"of a rank that is not there any more")
    sela_ext.train(data, out=out, overwrite=True, **options)
    assert not stale.exists()
    assert (out / "index" / "train" / "jpeg_index-0.bin").exists()


def test_waiting_for_images_is_in_the_metrics_and_in_the_log(first):
    rows = [json.loads(line) for line in (first.out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    assert steps
    assert all(0 <= row["data_wait_share"] <= 1 for row in steps)
    passes = [row for row in rows if row["event"] == "label_pass"]
    assert passes
    assert all(row["wait_seconds"] > 0 for row in passes)
    log = (first.out / "train.log").read_text()
    assert log.count("waited for images") == 2


# D11
def test_how_images_are_read_is_an_option_that_a_resume_may_not_change(tmp_path):
    data = fill_folder(tmp_path / "images", 20)
    result = sela_ext.train(data, out=tmp_path / "run", exif=True, exact=True, **{**SMALL, "holdout": 0, "epochs": 1})
    options = json.loads((result.out / "options.json").read_text())["options"]
    assert (options["exif"], options["exact"]) == (True, True)
    with pytest.raises(CheckpointError, match="exif: was True, now False"):
        sela_ext.train(data, out=tmp_path / "run", resume=True, exact=True, **{**SMALL, "holdout": 0, "epochs": 1})
    with pytest.raises(OptionError, match="exact: expected True or False, found 'yes'"):
        sela_ext.train(data, out=tmp_path / "other", exact="yes", **SMALL)


# D17
def test_d17_data_that_changed_before_a_resume_are_an_error_with_counts_and_names(tmp_path):
    data = fill_folder(tmp_path / "images", 20)
    options = {**SMALL, "holdout": 0, "epochs": 1}
    sela_ext.train(data, out=tmp_path / "run", **options)
    shutil.copy(data / "03.jpg", data / "00a.jpg")
    with pytest.raises(CheckpointError, match=r"count: was 20, now 21; .*first_names: was \['00.jpg', '01.jpg'.*00a"):
        sela_ext.train(data, out=tmp_path / "run", resume=True, **options)
    (data / "00a.jpg").unlink()
    shutil.copy(data / "03.jpg", data / "04.jpg")
    with pytest.raises(CheckpointError, match="file_sizes: was"):
        sela_ext.train(data, out=tmp_path / "run", resume=True, **options)


def test_the_index_may_be_left_out_or_shared_by_runs_and_changes_no_bit(damaged, first, tmp_path):
    options = {**SMALL, "on_bad_image": "skip", "max_bad_fraction": 0.2}
    without = sela_ext.train(damaged, out=tmp_path / "without", index="off", **options)
    assert not (tmp_path / "without" / "index").exists()
    np.testing.assert_array_equal(without.labels, first.labels)
    shared = tmp_path / "shared"
    sela_ext.train(damaged, out=tmp_path / "one", index=shared, **options)
    kept = {path: path.stat().st_size for path in shared.rglob("*.bin")}
    assert {path.parent.name.split("-")[0] for path in kept} == {"train", "held"}
    again = sela_ext.train(damaged, out=tmp_path / "two", index=str(shared), **options)
    assert {path: path.stat().st_size for path in shared.rglob("*.bin")} == kept
    np.testing.assert_array_equal(again.labels, first.labels)


@pytest.mark.parametrize("index", [None, "", 3])
def test_another_index_is_an_error_before_anything_is_made(damaged, tmp_path, index):
    with pytest.raises(OptionError, match='index: expected "run", "off" or a folder'):
        sela_ext.train(damaged, out=tmp_path / "run", index=index, **SMALL)
    assert not (tmp_path / "run").exists()
