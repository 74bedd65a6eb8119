import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import sela_ext
from sela_ext.data import open_source
from sela_ext.errors import DataError, OptionError
from sela_ext.training.fixed_labels import read_fixed_labels

TINY = {"epochs": 2, "batch_size": 64, "threads": 1, "progress": False, "model": "small-resnet"}


def blobs(count=192, size=16, classes=4, seed=0):
    """Images that are easy to tell apart: a bright quadrant, by class, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 80, (count, size, size, 3), dtype=np.uint8)
    half = size // 2
    for i, label in enumerate(labels):
        y, x = divmod(int(label), 2)
        images[i, y * half : (y + 1) * half, x * half : (x + 1) * half] += 150
    return images, labels


def array_source(count):
    return open_source(np.zeros((count, 8, 8), np.uint8))


@pytest.fixture
def folder(tmp_path):
    """A folder of six images, and their names."""
    path = tmp_path / "photos"
    path.mkdir()
    for name in "fabdce":
        Image.new("RGB", (16, 16), (10 * ord(name) % 256, 0, 0)).save(path / f"{name}.png")
    return path


def write_csv(path, rows, header="index,name,label_0,label_1"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


# --- Reading


@pytest.mark.parametrize(
    "value", [[0, 1, 2, 1, -1], np.array([0, 1, 2, 1, -1], np.int16), torch.tensor([0, 1, 2, 1, -1])]
)
def test_an_array_is_one_label_per_image_in_order(value):
    fixed = read_fixed_labels(value, array_source(5))
    assert fixed.labels.tolist() == [[0, 1, 2, 1, -1]]
    assert fixed.labels.dtype == np.int32
    assert fixed.clusters == [3]
    assert fixed.trained.tolist() == [True] * 4 + [False]


def test_every_head_has_as_many_clusters_as_its_labels_say(tmp_path):
    labels = np.stack([np.arange(31) % 7, np.arange(31) % 2, np.arange(31) % 3])
    np.save(tmp_path / "labels.npy", labels)
    assert read_fixed_labels(tmp_path / "labels.npy", array_source(31)).clusters == [7, 2, 3]
    assert read_fixed_labels(labels, array_source(31), clusters=10).clusters == [10, 10, 10]
    assert read_fixed_labels(labels, array_source(31), clusters=[7, 5, 9]).clusters == [7, 5, 9]
    some = read_fixed_labels(f"{tmp_path / 'labels.npy'}:2,0", array_source(31))
    assert some.clusters == [3, 7]
    assert np.array_equal(some.labels, labels[[2, 0]])


def test_labels_are_found_by_name_in_any_order(folder, tmp_path):
    order = "cafbed"
    table = write_csv(tmp_path / "labels.csv", [f"{i},{name}.png,{i},{i % 2}" for i, name in enumerate(order)])
    np.savez(
        tmp_path / "labels.npz",
        labels=np.stack([np.arange(6), np.arange(6) % 2]),
        names=np.array([f"{name}.png" for name in order]),
    )
    source = open_source(folder)
    expected = [order.index(name[0]) for name in source.names]
    for path in (table, tmp_path / "labels.npz"):
        fixed = read_fixed_labels(path, source)
        assert fixed.labels[0].tolist() == expected
        assert "by name: 6 of 6" in fixed.where


def test_images_may_be_some_of_those_that_were_labelled(folder, tmp_path):
    rows = [f"{i},{name}.png,{i},{i % 3}" for i, name in enumerate("fabdcexyz")]
    fixed = read_fixed_labels(write_csv(tmp_path / "labels.csv", rows), open_source(folder))
    assert fixed.labels.shape == (2, 6)
    assert fixed.clusters == [9, 3]
    assert "by name: 6 of 9" in fixed.where


def test_names_are_file_names_where_folders_differ(folder, tmp_path):
    rows = [f"other/place/{name}.png,{i % 3}" for i, name in enumerate("fabdce")]
    fixed = read_fixed_labels(write_csv(tmp_path / "labels.csv", rows, "path,class"), open_source(folder))
    assert fixed.labels[0].tolist() == ["fabdce".index(name[0]) % 3 for name in open_source(folder).names]


def test_images_without_a_label_are_counted_and_named(folder, tmp_path):
    table = write_csv(tmp_path / "labels.csv", [f"0,{name}.png,{i},0" for i, name in enumerate("fabd")])
    with pytest.raises(DataError, match=r"each of the 6 images, found none for 2, such as c\.png") as caught:
        read_fixed_labels(table, open_source(folder))
    assert "-1 leaves an image out" in str(caught.value)


def test_an_image_with_two_labels_is_refused(folder, tmp_path):
    rows = [f"{i},{name}.png,{i},0" for i, name in enumerate("fabdcea")]
    with pytest.raises(DataError, match=r"different labels for a\.png"):
        read_fixed_labels(write_csv(tmp_path / "labels.csv", rows), open_source(folder))


def test_numbered_images_have_no_names_and_need_as_many_labels(tmp_path):
    names = np.array([f"array/{i:05d}" for i in range(31)])
    np.savez(tmp_path / "labels.npz", labels=np.arange(31) % 5, names=names)
    assert read_fixed_labels(tmp_path / "labels.npz", array_source(31)).labels[0].tolist() == [i % 5 for i in range(31)]
    with pytest.raises(DataError, match="one label per image, 20, found 31"):
        read_fixed_labels(tmp_path / "labels.npz", array_source(20))


def test_a_table_without_names_goes_by_its_index(tmp_path):
    table = write_csv(tmp_path / "labels.csv", ["2,1", "0,4", "1,0"], "index,label")
    assert read_fixed_labels(table, array_source(3), clusters=5).labels.tolist() == [[4, 0, 1]]
    with pytest.raises(DataError, match=r"every index of 0 \.\. 1 once"):
        read_fixed_labels(write_csv(tmp_path / "twice.csv", ["0,1", "0,0"], "index,label"), array_source(2))


def test_the_labels_of_a_released_checkpoint_are_taken(tmp_path):
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    labels = torch.arange(33) % 7
    torch.save({"state_dict": state, "L": labels}, tmp_path / "model.pth")
    fixed = read_fixed_labels(tmp_path / "model.pth", array_source(33))
    assert fixed.labels.tolist() == [labels.tolist()]
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    with pytest.raises(DataError, match="checkpoint with labels, found weights alone"):
        read_fixed_labels(tmp_path / "model.pth", array_source(33))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0, 1, 2], "one label per image, 5, found 3"),
        (np.zeros((5, 2), np.int64), r"found 2; turn the array round: \[heads, N\]"),
        ([0.0, 1.0, 0.0, 1.0, 0.0], "integers .* found float64"),
        ([True, False, True, False, True], "integers .* found bool"),
        (np.zeros((1, 1, 5), np.int64), "integers .* found int64"),
        ([[0, 1], [0]], "ragged"),
        ([0, 1, -2, 0, 1], r"found -2 \.\. 1"),
        ([0, 1, 2**31, 0, 1], "labels >= 0, or -1 for none"),
        ([0, 0, 0, 0, 0], "at least 2 different labels in head 0, found 1"),
        ([-1] * 5, "at least 2 different labels in head 0, found 0"),
        ([0, 1, 900, 0, 1], "found 900 among 5; number them from 0 on"),
        ("absent/run", "found no file or folder absent/run"),
        ("absent/run:3", "found no file or folder absent/run"),
        ({"labels": 3}, "found object"),
    ],
)
def test_what_are_no_labels_of_these_images_is_refused(value, message):
    with pytest.raises(DataError, match=message):
        read_fixed_labels(value, array_source(5))


def test_clusters_and_heads_that_do_not_fit_are_refused():
    labels = np.stack([np.arange(31) % 7, np.arange(31) % 5])
    with pytest.raises(DataError, match=r"labels of head 0 in -1 \.\. 5, as clusters says, found 6"):
        read_fixed_labels(labels, array_source(31), clusters=6)
    with pytest.raises(OptionError, match="clusters: expected one number per head .* 2, found 3"):
        read_fixed_labels(labels, array_source(31), clusters=[7, 5, 3])
    with pytest.raises(OptionError, match="heads: expected 2"):
        read_fixed_labels(labels, array_source(31), heads=10)


@pytest.mark.parametrize("selection", ["3", "-1", "0,0", "first", "best"])
def test_heads_that_there_are_not_are_refused(tmp_path, selection):
    np.save(tmp_path / "labels.npy", np.stack([np.arange(31) % 7] * 3))
    with pytest.raises(OptionError, match="fixed_labels: .*best"):
        read_fixed_labels(f"{tmp_path / 'labels.npy'}:{selection}", array_source(31))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,label_0\na.png,x\n", "line 2: expected whole numbers"),
        ("name,label_0\na.png,1,2\n", "line 2: expected 2 fields"),
        ("name,label_1\na.png,1\n", "label_0, label_1, ... without a gap"),
        ("name,size\na.png,1\n", "or one column label"),
        ("name,label_0\n", "a line per image, found none"),
        ("", "or one column label"),
    ],
)
def test_tables_that_hold_no_labels_are_refused_with_the_line(folder, tmp_path, content, message):
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_fixed_labels(tmp_path / "labels.csv", open_source(folder))


@pytest.mark.parametrize("name", ["labels.npy", "labels.npz", "labels.csv"])
def test_damaged_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04\xff\xfe nothing of the kind")
    with pytest.raises(DataError, match=name):
        read_fixed_labels(tmp_path / name, array_source(5))


def test_an_archive_without_labels_is_refused(tmp_path):
    np.savez(tmp_path / "labels.npz", potential=np.zeros(3))
    with pytest.raises(DataError, match=r"expected an array \"labels\", found \['potential'\]"):
        read_fixed_labels(tmp_path / "labels.npz", array_source(5))
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match=r"without labels\.npz; has this run ended\?"):
        read_fixed_labels(tmp_path / "run", array_source(5))
