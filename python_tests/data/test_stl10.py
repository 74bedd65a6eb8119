import numpy as np
import pytest

from sela_ext.data import find_eval_source, open_source
from sela_ext.errors import DataError


def test_train_comes_before_the_unlabelled_images(tmp_path, files):
    folder = files.write_stl10(tmp_path / "stl10_binary")
    source = open_source(folder)
    images, labels = files.pictures(24, 96)
    others, _ = files.pictures(8, 96, seed=1)
    wanted = np.concatenate([images, others])
    for i in range(32):
        np.testing.assert_array_equal(source.read(i), wanted[i])
    assert source.labels.tolist() == labels.tolist() + [-1] * 8
    assert source.class_names == [f"class{i}" for i in range(10)]
    assert source.image_size == (96, 96)
    assert [source.name(i) for i in (0, 23, 24, 31)] == [
        "train/000000",
        "train/000023",
        "unlabeled/000000",
        "unlabeled/000007",
    ]
    assert source.read(3).flags.c_contiguous
    judged = find_eval_source(folder)
    np.testing.assert_array_equal(judged.read(5), files.pictures(6, 96, seed=2)[0][5])
    assert judged.labels.tolist() == [0, 1, 2, 3, 0, 1]


def test_parts_that_are_missing_are_left_out(tmp_path, files):
    folder = files.write_stl10(tmp_path / "stl10_binary")
    (folder / "train_X.bin").unlink()
    source = open_source(tmp_path)
    assert len(source) == 8
    assert source.labels is None
    (folder / "test_X.bin").unlink()
    assert find_eval_source(tmp_path) is None
    (folder / "class_names.txt").unlink()
    assert open_source(tmp_path).class_names is None


def test_a_single_file_finds_its_labels(tmp_path, files):
    folder = files.write_stl10(tmp_path)
    assert len(open_source(folder / "train_X.bin")) == 24
    assert open_source(folder / "unlabeled_X.bin").labels is None
    assert len(find_eval_source(folder / "train_X.bin")) == 6
    assert open_source(folder / "test_X.bin").labels.tolist() == [0, 1, 2, 3, 0, 1]


def test_a_subset_reads_through(tmp_path, files):
    source = open_source(files.write_stl10(tmp_path))
    part = source.subset([30, 2])
    np.testing.assert_array_equal(part.read(0), source.read(30))
    assert part.labels.tolist() == [-1, 2]


@pytest.mark.parametrize("size", [0, 1, 27647, 27649, 27648 * 3 - 1])
def test_a_file_of_another_length_is_refused(tmp_path, files, size):
    folder = files.write_stl10(tmp_path)
    (folder / "train_X.bin").write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"train_X\.bin: expected whole images of 27648 bytes, found {size} bytes"):
        open_source(folder)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([1] * 23, "expected 24 labels, one per image of train_X.bin, found 23"),
        ([1] * 25, "found 25"),
        ([0] + [1] * 23, r"expected labels in 1\.\.10, found 0\.\.1"),
        ([11] + [1] * 23, r"found 1\.\.11"),
        ([], "found 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, files, labels, match):
    folder = files.write_stl10(tmp_path)
    (folder / "train_y.bin").write_bytes(bytes(labels))
    with pytest.raises(DataError, match=rf"train_y\.bin: .*{match}"):
        open_source(folder)


def test_another_number_of_class_names_is_refused(tmp_path, files):
    folder = files.write_stl10(tmp_path)
    (folder / "class_names.txt").write_text("a b c")
    with pytest.raises(DataError, match="expected 10 names of classes, found 3"):
        open_source(folder)
