import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext.data import Source
from sela_ext.data.decode import decode_image
from sela_ext.doctor.findings import ADVICE
from sela_ext.errors import DataError, OptionError, ResourceError


def codes(result):
    return {finding["code"] for finding in result["findings"]}


def names(result, code):
    (finding,) = [finding for finding in result["findings"] if finding["code"] == code]
    return finding["names"]


def check(data, **options):
    result = sela_ext.doctor(data, threads=2, **options)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


@pytest.fixture
def one_class(fill):
    """A folder of 104 good images, without labels."""
    return fill("photos", 104)


def test_nothing_is_found_in_a_clean_folder(one_class):
    result = check(one_class)
    assert result["findings"] == []
    assert result["usable"]
    assert result["data"]["images"] == result["data"]["readable"] == 104
    assert result["files"]["formats"] == {"JPEG": 104}
    assert result["files"]["by_pillow"]["count"] == 0
    assert result["bad"] == {"count": 0, "fraction": 0.0, "images": []}
    assert result["duplicates"]["near"]["groups"] == 0


def test_nothing_is_found_in_clean_classes_with_a_clean_split(fill, tmp_path):
    fill("data/train/a", 52)
    fill("data/train/b", 52, first=52)
    fill("data/test/a", 20, first=200)
    fill("data/test/b", 20, first=220)
    result = check(tmp_path / "data")
    assert result["findings"] == []
    assert result["data"]["held_out"] == {"kind": "folder", "images": 40, "looked_at": 40}
    assert [one["images"] for one in result["classes"]["classes"]] == [52, 52]
    assert result["classes"]["imbalance"] == 1.0


def test_bad_files_are_listed_with_reasons(one_class):
    (one_class / "empty.jpg").write_bytes(b"")
    (one_class / "text.png").write_text("no picture")
    whole = (one_class / "0003.jpg").read_bytes()
    (one_class / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    result = check(one_class)
    reasons = {bad["name"]: bad["reason"] for bad in result["bad"]["images"]}
    assert set(reasons) == {"empty.jpg", "text.png", "torn.jpg"}
    assert reasons["empty.jpg"].startswith("empty file")
    assert reasons["text.png"].startswith("not an image")
    assert "JPEG" in reasons["torn.jpg"]
    assert set(names(result, "unreadable")) == set(reasons)
    (on_bad,) = [one for one in result["suggestions"] if one["option"] == "on_bad_image"]
    assert on_bad["value"] == "raise"
    assert "more than max_bad_fraction=0.01" in on_bad["reason"]
    assert codes(result) == {"unreadable"}


FAULTS = {7: ValueError("not\nhere"), 9: np.zeros((0, 5, 3), np.uint8), 11: "text", 13: np.zeros((5, 5, 3))}


class Faulty(torch.utils.data.Dataset):
    """Some items cannot be had, each in another way."""

    def __len__(self):
        return 120

    def __getitem__(self, index):
        found = FAULTS.get(index)
        if isinstance(found, Exception):
            raise found
        return (np.full((8, 8, 3), 2 * index, np.uint8) if found is None else found), index % 3


@pytest.mark.parametrize("sample", [None, 60])
def test_bad_items_of_a_dataset_are_listed_like_bad_files(sample):
    result = check(Faulty(), sample=sample)
    bad = {one["index"]: one["reason"] for one in result["bad"]["images"]}
    assert set(bad) <= set(FAULTS)
    assert sample is not None or set(bad) == set(FAULTS)
    assert 7 not in bad or bad[7] == "dataset item 7: ValueError: not here"
    assert [one["label"] for one in result["classes"]["classes"]] == [0, 1, 2]


def test_a_finding_lists_twenty_names_and_the_result_all(fill):
    folder = fill("photos", 4)
    for i in range(31):
        (folder / f"bad{i:02d}.jpg").write_bytes(b"")
    result = check(folder)
    assert names(result, "unreadable") == [f"bad{i:02d}.jpg" for i in range(20)]
    assert len(result["bad"]["images"]) == 31


@pytest.mark.parametrize("small", [False, True])
def test_the_size_of_a_pack_is_foretold(fill, tmp_path, small):
    folder = fill("photos", 31)
    if small:  # files of one small size are packed as pixels
        for path in folder.iterdir():
            Image.open(path).resize((32, 32)).save(path)
    foretold = check(folder)["disk"]["pack_bytes"]
    assert sela_ext.pack(folder, tmp_path / "pack").bytes == pytest.approx(foretold, rel=0.15)


def test_few_bad_files_are_to_be_skipped(fill):
    folder = fill("photos", 110)
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    result = check(folder)
    assert {one["option"]: one["value"] for one in result["suggestions"]}["on_bad_image"] == "skip"
    assert result["command"].endswith("--on-bad-image skip")


def test_kinds_of_files_are_told_by_their_content(one_class):
    first = Image.open(one_class / "0000.jpg")
    first.transpose(Image.Transpose.ROTATE_90).save(one_class / "wrong.jpg", format="PNG")
    Image.open(one_class / "0001.jpg").transpose(Image.Transpose.ROTATE_90).convert("CMYK").save(one_class / "c.jpg")
    deep = np.random.default_rng(0).integers(0, 65536, (50, 60), dtype=np.uint16)
    Image.fromarray(deep).save(one_class / "deep.png")
    frames = [Image.open(one_class / f"{i:04d}.jpg").transpose(Image.Transpose.ROTATE_180) for i in (2, 3, 4)]
    frames[0].save(one_class / "film.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[274] = 6
    Image.open(one_class / "0005.jpg").transpose(Image.Transpose.ROTATE_90).save(one_class / "turned.jpg", exif=exif)
    Image.open(one_class / "0006.jpg").transpose(Image.Transpose.ROTATE_90).save(
        one_class / "slow.jpg", progressive=True
    )
    result = check(one_class)
    assert names(result, "wrong_suffix") == ["wrong.jpg (PNG)"]
    assert names(result, "cmyk") == ["c.jpg"]
    assert names(result, "sixteen_bit") == ["deep.png"]
    assert names(result, "animated") == ["film.gif"]
    assert result["files"]["orientations"] == {"6": 1}
    assert set(names(result, "by_pillow")) == {"c.jpg", "slow.jpg"}
    assert result["files"]["formats"] == {"JPEG": 107, "PNG": 2, "GIF": 1}
    assert codes(result) == {"wrong_suffix", "cmyk", "sixteen_bit", "animated", "orientation", "by_pillow"}


def test_odd_images_are_named(one_class):
    Image.new("RGB", (60, 50), (10, 200, 30)).save(one_class / "plain.jpg")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).save(one_class / "tiny.png")
    Image.fromarray(rng.integers(0, 256, (40, 400, 3), dtype=np.uint8)).save(one_class / "long.png")
    result = check(one_class)
    assert names(result, "one_colour") == ["plain.jpg"]
    assert names(result, "tiny") == ["tiny.png"]
    assert names(result, "extreme_aspect") == ["long.png"]
    assert codes(result) == {"one_colour", "tiny", "extreme_aspect"}


def test_other_files_are_counted_and_never_opened(one_class):
    (one_class / "notes.txt").write_text("hello")
    (one_class / "deeper").mkdir()
    (one_class / "deeper" / "list.csv").write_text("a,b")
    (one_class / ".hidden.jpg").write_bytes(b"x")
    os.mkfifo(one_class / "pipe.jpg")
    os.symlink("nowhere", one_class / "link.jpg")
    result = check(one_class)
    assert sorted(names(result, "other_files")) == ["deeper/list.csv", "notes.txt"]
    other = result["files"]["other"]
    assert (other["count"], other["hidden"], other["special"], other["images_not_used"]) == (2, 1, 2, 0)
    assert codes(result) == {"other_files", "special_files"}


def test_exact_duplicates_count_in_other_containers_too(one_class):
    shutil.copy(one_class / "0007.jpg", one_class / "same.jpg")
    Image.open(one_class / "0008.jpg").save(one_class / "other.png")
    result = check(one_class)
    found = result["duplicates"]["exact"]
    groups = [([one["name"] for one in group["images"]], group["same_bytes"]) for group in found["listed"]]
    assert groups == [(["0007.jpg", "same.jpg"], True), (["0008.jpg", "other.png"], False)]
    assert (found["groups"], found["images"], found["spare"], found["same_bytes"]) == (2, 4, 2, 1)
    assert codes(result) == {"exact_duplicates"}


def test_near_duplicates_are_found_and_exact_ones_not_twice(one_class):
    Image.open(one_class / "0009.jpg").resize((96, 80)).save(one_class / "larger.jpg", quality=50)
    shutil.copy(one_class / "0009.jpg", one_class / "same.jpg")
    result = check(one_class)
    (group,) = result["duplicates"]["near"]["listed"]
    assert [one["name"] for one in group["images"]] == ["0009.jpg", "larger.jpg"]
    assert codes(result) == {"exact_duplicates", "near_duplicates"}


def test_leakage_and_contradictions_between_train_and_test(fill, tmp_path):
    fill("data/train/a", 52)
    fill("data/train/b", 52, first=52)
    fill("data/test/a", 8, first=200)
    fill("data/test/b", 8, first=220)
    train, test = tmp_path / "data/train", tmp_path / "data/test"
    shutil.copy(train / "a/0001.jpg", test / "a/copy.jpg")
    Image.open(train / "b/0055.jpg").resize((90, 70)).save(test / "b/scaled.jpg")
    shutil.copy(train / "a/0002.jpg", train / "b/twice.jpg")
    result = check(tmp_path / "data")
    assert result["duplicates"]["leakage"] == {"held_out_images": 2, "exact": 1, "near": 1}
    assert set(names(result, "leakage")) == {"a/copy.jpg", "b/scaled.jpg"}
    assert names(result, "contradicting_labels") == ["a/0002.jpg", "b/twice.jpg"]
    assert result["duplicates"]["contradictions"] == {"groups": 1}
    assert codes(result) == {"leakage", "contradicting_labels", "exact_duplicates", "near_duplicates"}


def test_images_outside_the_split_are_noticed(fill, tmp_path):
    fill("data/train", 104)
    fill("data/test", 5, first=200)
    fill("data/extra", 3, first=300)
    result = check(tmp_path / "data")
    assert codes(result) == {"outside_split"}
    assert result["files"]["other"]["images_not_used"] == 3


def test_unbalanced_and_unknown_labels(one_class):
    labels = np.r_[np.zeros(80, int), np.ones(20, int), np.full(4, -1)]
    result = check(one_class, labels=labels)
    assert codes(result) == {"imbalance", "unknown_labels"}
    assert result["classes"]["imbalance"] == 4.0
    assert result["classes"]["unknown"] == 4


def test_two_images_are_few(fill):
    assert codes(check(fill("few", 2))) == {"few_images"}


def test_nothing_readable_is_an_error_in_the_result(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no")
    (tmp_path / "b.jpg").write_bytes(b"")
    result = check(tmp_path)
    assert not result["usable"]
    assert {"nothing_readable", "unreadable"} <= codes(result)
    assert result["sizes"] is None
    assert result["throughput"] is None
    assert result["suggestions"][0]["value"] is None


def test_a_sample_is_always_the_same_one(one_class):
    first, second = (check(one_class, sample=31) for _ in range(2))
    assert first["data"]["sampled"]
    assert first["data"]["looked_at"] == 31
    assert first["sizes"] == second["sizes"]
    assert check(one_class, quick=True)["data"]["looked_at"] == 104


def test_the_result_does_not_depend_on_threads(one_class):
    (one_class / "bad.jpg").write_bytes(b"bad")
    shutil.copy(one_class / "0001.jpg", one_class / "same.jpg")
    one, two = (sela_ext.doctor(one_class, threads=threads) for threads in (1, 3))
    for key in ("files", "bad", "odd", "sizes", "duplicates", "findings", "classes"):
        assert one[key] == two[key]


class Items(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(self.images[index]).permute(2, 0, 1), index % 2


def arrays():
    images = np.random.default_rng(0).integers(0, 256, (120, 24, 20, 3), dtype=np.uint8)
    images[50] = images[10]
    return images


def listed(folder):
    return sorted(str(path) for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["array", "npy", "dataset", "paths", "digits"])
def test_every_kind_of_data_is_taken(kind, tmp_path, fill):
    if kind == "paths":
        folder = fill("photos", 104)
        shutil.copy(folder / "0010.jpg", folder / "zzz.jpg")
        result = check(listed(folder))
    elif kind == "digits":
        result = check("digits")
        assert result["classes"]["count"] == 10
        assert result["data"]["images"] == 1797
        assert {one["option"]: one["value"] for one in result["suggestions"]}["model"] == "small-resnet"
        return
    elif kind == "npy":
        np.save(tmp_path / "images.npy", arrays())
        result = check(tmp_path / "images.npy")
    else:
        result = check(arrays() if kind == "array" else Items(arrays()))
    assert result["duplicates"]["exact"]["groups"] == 1
    assert codes(result) <= {"exact_duplicates", "contradicting_labels"}
    assert result["throughput"]["load_images_per_second"] > 0


def test_suggestions_are_what_training_takes(one_class):
    from sela_ext.data import open_source
    from sela_ext.training.options import make_options
    from sela_ext.training.resolve import resolve

    plan = resolve(make_options({}), (), open_source(one_class))
    told = {one["option"]: one["value"] for one in check(one_class)["suggestions"]}
    for name in ("clusters", "heads", "model", "image_size", "augment", "batch_size", "epochs"):
        assert told[name] == getattr(plan.options, name)


def test_every_advice_is_that_of_a_finding_and_documented():
    from pathlib import Path

    text = (Path(__file__).resolve().parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    for code in ADVICE:
        assert f"`{code}`" in text


@pytest.mark.parametrize(("options", "what"), [({"threads": -1}, "threads"), ({"sample": 0}, "sample")])
def test_numbers_out_of_range_are_refused(options, what):
    with pytest.raises(OptionError, match=f"{what}: expected a whole number"):
        sela_ext.doctor("digits", **options)


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    with pytest.raises(OptionError, match="expected a file in a folder that exists"):
        sela_ext.doctor(tmp_path / "absent", json=tmp_path / "no" / "x.json")
    for target in ("json", "out"):
        with pytest.raises(OptionError, match="expected a file, found a folder"):
            sela_ext.doctor(tmp_path / "absent", **{target: tmp_path})
    with pytest.raises(ResourceError, match="cannot be written: No space left"):
        sela_ext.doctor(arrays()[:4], json="/dev/full")


def test_absent_data_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        sela_ext.doctor(tmp_path / "absent")


class Archive(Source):
    """Encoded images that are parts of one piece of memory."""

    kind = "archive"

    def __init__(self, files):
        self.whole = memoryview(b"".join(data for _, data in files))
        self.ends = np.cumsum([0, *(len(data) for _, data in files)]).tolist()
        self.own_names = [name for name, _ in files]

    def __len__(self):
        return len(self.own_names)

    @property
    def names(self):
        return self.own_names

    encoded = True

    def locate(self, index):
        return SimpleNamespace(path=None, data=self.whole[self.ends[index] : self.ends[index + 1]], index=None)

    def read(self, index):
        return decode_image(bytes(self.locate(index).data), self.own_names[index])


def test_members_of_an_archive_are_looked_at_like_files(one_class):
    shutil.copy(one_class / "0010.jpg", one_class / "zzz.png")
    (one_class / "bad.jpg").write_bytes(b"bad")
    files = [(path.name, path.read_bytes()) for path in sorted(one_class.iterdir())]
    result = check(Archive(files))
    assert result["encoded"]
    assert names(result, "wrong_suffix") == ["zzz.png (JPEG)"]
    assert names(result, "exact_duplicates") == ["0010.jpg", "zzz.png"]
    assert names(result, "unreadable") == ["bad.jpg"]
    assert result["files"]["bytes"] == sum(len(data) for _, data in files)
    assert result["throughput"]["index_share_of_bytes"] > 0
    assert {one["option"]: one["value"] for one in result["suggestions"]}["pack"] is False
