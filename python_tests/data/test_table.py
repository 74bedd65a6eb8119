import numpy as np
import pytest

from sela_ext.data import find_eval_source, open_source
from sela_ext.errors import DataError


@pytest.fixture
def folder(tmp_path, files):
    files.write_images(tmp_path, 4)
    return tmp_path


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "text", "labels", "classes"),
    [
        ("a.csv", "path,label\n000.png,3\n001.png,0\n", [3, 0], None),
        ("a.csv", "Label, Filename ,x\ndog,000.png,1\ncat,001.png,2\n", [1, 0], ["cat", "dog"]),
        ("a.csv", "image;class\n000.png;b\n001.png;a\n", [1, 0], ["a", "b"]),
        ("a.csv", 'file,target\n"000.png",1\n\n"001.png",\n', [1, -1], None),
        ("a.csv", "file,target\r\n000.png,-1\r\n001.png,2\r\n", [-1, 2], None),
        ("a.csv", "file,y\n000.png,12\n001.png,cat\n", [0, 1], ["12", "cat"]),
        ("a.csv", "\ufefffile_name\n000.png\n001.png\n", None, None),
        ("a.tsv", "img_path\tcategory\n000.png\ta, b\n001.png\ta\n", [1, 0], ["a", "a, b"]),
        ("A.CSV", "path\n000.png\n001.png", None, None),
        ("a.txt", "000.png\n\n001.png\n", None, None),
        ("a.txt", "000.png\tb\r\n001.png\ta\r\n", [1, 0], ["a", "b"]),
    ],
)
def test_columns_are_found_by_their_names(folder, files, name, text, labels, classes):
    source = open_source(write(folder / name, text))
    assert source.names == ["000.png", "001.png"]
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.class_names == classes
    np.testing.assert_array_equal(source.read(1), files.pictures(4)[0][1])
    assert source.encoded


def test_paths_are_relative_to_the_table_or_absolute(folder, files, tmp_path):
    (folder / "deep").mkdir()
    path = write(folder / "deep" / "a.csv", f"path\n../000.png\n{folder / '001.png'}\n")
    source = open_source(path)
    for i in range(2):
        np.testing.assert_array_equal(source.read(i), files.pictures(4)[0][i])


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.csv", "name,size\nx,1\n", r"expected a header with a path column \(path, file.*found: name, size"),
        ("a.csv", "path,image\na,b\n", "expected one path column, found path and image; rename the others"),
        ("a.csv", "path,label,class\na,1,2\n", "expected one label column, found label and class"),
        ("a.csv", "path,label\n000.png,1\n001.png\n", "line 3: expected 2 fields as in the first line, found 1"),
        ("a.csv", "path,label\n000.png,1\n ,1\n", "line 3: expected a path, found nothing"),
        ("a.csv", "path,label\n", "expected at least one image, found only a header"),
        ("a.csv", "", "expected a header with a path column"),
        ("a.csv", 'path\n"000.png\n', "line 2: expected a row of a table"),
        (
            "a.csv",
            "path\nnone.png\nnot.png\n",
            "expected paths relative to .*, found no file .*none.png, nor any of the next 1",
        ),
        ("a.csv", "path,label\n000.png,-2\n", "expected labels in .*, found -2"),
        ("a.csv", "path\n000.png\0\n", "found null characters"),
        ("a.txt", "", "found an empty file"),
        ("a.txt", "000.png\t1\n001.png\n", "a tab and a label in all lines or in none"),
        ("a.txt", "000.png 1\n", "found no file .*000.png 1; put a tab, not a space, between path and label"),
    ],
)
def test_tables_that_do_not_fit_are_refused_with_the_line(folder, name, text, match):
    with pytest.raises(DataError, match=match):
        open_source(write(folder / name, text))


def test_another_encoding_is_refused(folder):
    with pytest.raises(DataError, match=r"expected a table in UTF-8, found other bytes at 5"):
        open_source(write(folder / "a.csv", "path\né.png\n", "latin1"))


def test_test_tables_belong_to_train_tables(folder):
    write(folder / "train.csv", "path,label\n000.png,dog\n001.png,cat\n")
    assert find_eval_source(folder / "train.csv") is None
    write(folder / "val.csv", "path,label\n002.png,dog\n003.png,ant\n")
    judged = find_eval_source(folder / "train.csv")
    assert judged.class_names == ["cat", "dog", "ant"]
    assert judged.labels.tolist() == [1, 2]
    write(folder / "test.csv", "path,label\n003.png,dog\n")
    assert find_eval_source(folder / "train.csv").names == ["003.png"]


def test_missing_files_are_left_to_the_policy_for_bad_images(folder):
    source = open_source(write(folder / "a.csv", "path\nnone.png\n000.png\n"))
    with pytest.raises(DataError, match=r"none\.png: cannot be read: No such file"):
        source.read(0)


@pytest.mark.parametrize(
    "text",
    [
        "path,label\n000.png,5\n001.png,6\n002.png,7\n003.png,8\n",
        "path,label\n./003.png,8\n./002.png,7\n./001.png,6\n./000.png,5\nother.png,9\n",
        "path,label\nelsewhere/000.png,5\nelsewhere/001.png,6\nelsewhere/002.png,7\nelsewhere/003.png,8\n",
        "id,label\n000,5\n001,6\n002,7\n003,8\n",
        "label\n5\n6\n7\n8\n",
    ],
)
def test_a_table_of_labels_names_the_images_or_follows_their_order(folder, text):
    source = open_source(folder, labels=write(folder.parent / "known.csv", text))
    assert source.labels.tolist() == [5, 6, 7, 8]
    assert source.encoded


def test_a_list_of_numbers_labels_in_order(folder):
    assert open_source(folder, labels=str(write(folder / "l.txt", "1\n2\n-1\n0\n"))).labels.tolist() == [1, 2, -1, 0]


def test_images_without_a_row_are_unknown(folder):
    source = open_source(folder, labels=write(folder / "known.csv", "path,label\n002.png,dog\n000.png,cat\n"))
    assert source.labels.tolist() == [0, -1, 1, -1]
    assert source.class_names == ["cat", "dog"]
    part = source.subset([2, 1])
    assert part.labels.tolist() == [1, -1]
    assert part.class_names == ["cat", "dog"]


def test_labels_beside_the_images_replace_class_folders(tmp_path, files):
    files.write_images(tmp_path / "x", 4, nested=True)
    assert open_source(tmp_path / "x").class_names == list("abcd")
    write(tmp_path / "x" / "labels.csv", "file,label\na/000.png,z\nb/001.png,y\nc/002.png,y\nd/003.png,z\n")
    source = open_source(tmp_path / "x")
    assert source.class_names == ["y", "z"]
    assert source.labels.tolist() == [1, 0, 0, 1]
    assert source.kind == "folder"
    assert open_source(tmp_path / "x", labels=[3, 2, 1, 0]).labels.tolist() == [3, 2, 1, 0]
    write(tmp_path / "x" / "labels.csv", "nothing")
    assert open_source(tmp_path / "x", labels=[3, 2, 1, 0]).labels.tolist() == [3, 2, 1, 0]  # not even looked at
    with pytest.raises(DataError, match=r"labels\.csv: expected a header with a label column"):
        open_source(tmp_path / "x")


def test_one_table_may_label_train_and_test_images(tmp_path, files):
    files.write_images(tmp_path / "train", 3)
    files.write_images(tmp_path / "test", 4)
    write(tmp_path / "labels.tsv", "path\tlabel\n" + "".join(f"{i:03d}.png\t{'ba'[i % 2]}\n" for i in range(4)))
    assert open_source(tmp_path).labels.tolist() == [1, 0, 1]
    assert find_eval_source(tmp_path).labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("path,size\n000.png,1\n", r"expected a header with a label column \(label, .*found: path, size"),
        ("path,label\nx.png,1\n", "expected names of images such as 000.png, found x.png and no row that names one"),
        ("path,label\n000.png,1\n000.png,2\n", "expected one label for 000.png, found 1 and 2"),
        ("label\n1\n2\n", "expected one label per image, 4, found 2"),
        ("path,id,label\na,b,1\n", "expected one path column, found path and id"),
    ],
)
def test_tables_of_labels_that_do_not_fit_are_refused(folder, text, match):
    with pytest.raises(DataError, match=match):
        open_source(folder, labels=write(folder / "known.csv", text))


def test_a_list_without_labels_is_no_table_of_labels(folder):
    with pytest.raises(DataError, match="expected a label on each line, behind a tab, found only names"):
        open_source(folder, labels=write(folder / "known.txt", "000.png\n001.png\n"))


def test_names_that_two_images_share_label_neither(tmp_path, files):
    files.write_images(tmp_path / "x" / "one", 2)
    files.write_images(tmp_path / "x" / "two", 3)
    table = write(tmp_path / "known.csv", "id,label\n000,4\n002,6\n")
    source = open_source(tmp_path / "x", labels=table)
    assert source.labels.tolist() == [-1, -1, -1, -1, 6]


def test_labels_from_a_table_fit_arrays_too(tmp_path, files):
    table = write(tmp_path / "known.csv", "label\n" + "\n".join("dcba"[i % 4] for i in range(24)))
    source = open_source(files.pictures()[0], labels=table)
    assert source.class_names == list("abcd")
    assert source.labels.tolist() == [3, 2, 1, 0] * 6
    assert source.array.shape == (24, 32, 32, 3)
