import csv
import os
import shutil

import numpy as np
import pytest

import sela_ext
from sela_ext.data import open_source
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.export import folders
from sela_ext.export.folders import safe_name


def labels_of(run, head):
    with np.load(run / "labels.npz") as saved:
        return saved["labels"][head]


def sorted_files(out):
    return sorted(os.path.relpath(os.path.join(place, name), out) for place, _, names in os.walk(out) for name in names)


@pytest.mark.parametrize("link", ["symbolic", "hard", "copy"])
def test_every_image_lies_in_the_folder_of_its_cluster(files_run, odd_files, tmp_path, link):
    written = sela_ext.export(files_run, tmp_path / "sorted", "folders", head=0, link=link)
    own, labels = open_source(str(odd_files)), labels_of(files_run, 0)
    with open(written.path / "index.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == own.names
    assert sorted_files(written.path) == sorted(["index.csv", *(row["file"] for row in rows)])
    for index, row in enumerate(rows):
        path = written.path / row["file"]
        assert path.parent.name == f"cluster_{labels[index]:02d}"
        assert path.read_bytes() == own.encoded_bytes(index)
        assert path.is_symlink() == (link == "symbolic")
        same = os.path.samefile(path, own.locate(index).path)
        assert same == (link != "copy")
    assert written.facts["images"] == 20


def test_what_is_sorted_is_again_a_folder_with_classes(files_run, tmp_path):
    sela_ext.export(files_run, tmp_path / "sorted", "folders", head=1)
    again = open_source(str(tmp_path / "sorted"))
    assert len(again) == 20
    used = np.unique(labels_of(files_run, 1))
    assert again.class_names == [f"cluster_{cluster:02d}" for cluster in used]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a/../b.png", "b.png"),
        ("new\nline\x1b[31m.png", "new_line_[31m.png"),
        ("\u202ereversed.png", "_reversed.png"),
        ('q"<b>|?*.png', "q__b____.png"),
        ("back\\slash.png", "back_slash.png"),
        ("no utf-8 \udcff.png", "no utf-8 _.png"),
        ("..", ""),
        ("dots . ", "dots"),
        ("é.png", "é.png"),
    ],
)
def test_names_become_harmless(name, safe):
    assert safe_name(name) == safe


def test_long_names_are_cut_at_a_whole_letter():
    found = safe_name("é" * 200 + ".jpeg")
    assert len(found.encode()) <= 160
    assert found.endswith("é.jpeg")
    assert len(safe_name("a." + "b" * 300).encode()) <= 160


def test_nothing_is_overwritten_and_nothing_half_done_is_left(files_run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with pytest.raises(OptionError, match="out: expected a"):
            sela_ext.export(files_run, tmp_path / name, "folders", overwrite=True)
    real, calls = os.symlink, []

    def failing(*given):
        calls.append(given)
        if len(calls) == 7:
            raise OSError(28, "No space left on device")
        real(*given)

    monkeypatch.setattr(folders.os, "symlink", failing)
    with pytest.raises(ResourceError, match="make room; nothing was changed"):
        sela_ext.export(files_run, tmp_path / "new", "folders")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "full"]
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["kept.txt"]


def test_hard_links_across_file_systems_name_the_way_out(files_run, tmp_path, monkeypatch):
    def other_device(*given):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(folders.os, "link", other_device)
    with pytest.raises(ResourceError, match="use symbolic links or copies"):
        sela_ext.export(files_run, tmp_path / "sorted", "folders", link="hard")
    assert not list(tmp_path.iterdir())


def test_images_that_are_gone_or_no_files_are_refused(digits_run, files_run, odd_files, tmp_path):
    with pytest.raises(DataError, match="expected images that are files of their own, found digits"):
        sela_ext.export(digits_run, tmp_path / "sorted", "folders")
    shutil.copytree(odd_files, tmp_path / "copy")
    os.remove(tmp_path / "copy" / "nan.png")
    images = np.zeros((3, 16, 16, 3), np.uint8)
    with pytest.raises(DataError, match="expected images that are files"):
        sela_ext.export(files_run, tmp_path / "sorted", "folders", data=images)
    with pytest.raises(OptionError, match="link: expected symbolic, hard, copy"):
        sela_ext.export(files_run, tmp_path / "sorted", "folders", link="soft")
    with pytest.raises(OptionError, match="expected one head to sort by, found 2"):
        sela_ext.export(files_run, tmp_path / "sorted", "folders", head="all")
    assert not (tmp_path / "sorted").exists()
    written = sela_ext.export(files_run, tmp_path / "sorted", "folders", data=str(tmp_path / "copy"), threads=1)
    assert written.facts["images"] == 19
    assert "by the network" in written.lines[0]
