import numpy as np
import pytest

from sela_ext.data import find_eval_source, open_source
from sela_ext.data.classes import ClassList, number_classes, parse_value, read_classes
from sela_ext.errors import DataError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("3", 3), (" -1 ", -1), ("+2", 2), ("007", 7), ("", None), ("  ", None)),
        *(("cat", "cat"), ("1.5", "1.5"), ("٣", "٣"), ("1" * 12, "1" * 12), ("--1", "--1")),
    ],
)
def test_labels_are_integers_or_names(text, value):
    assert parse_value(text) == value


def test_a_list_of_classes_fixes_the_numbers(tmp_path, files):
    files.write_images(tmp_path / "x", 8, nested=True)
    (tmp_path / "list.txt").write_text("d\n\nzebra\nc\nb \na\n")
    source = open_source(tmp_path / "x", classes=tmp_path / "list.txt")
    assert source.class_names == ["d", "zebra", "c", "b", "a"]
    assert source.labels.tolist() == [4, 4, 3, 3, 2, 2, 0, 0]
    assert open_source(tmp_path / "x", classes=["d", "zebra", "c", "b", "a"]).labels.tolist() == source.labels.tolist()


def test_evaluation_images_follow_the_list_too(tmp_path, files):
    files.write_images(tmp_path / "train", 8, nested=True)
    files.write_images(tmp_path / "test", 2, nested=True)
    assert find_eval_source(tmp_path).class_names == list("abcd")
    judged = find_eval_source(tmp_path, classes=list("dcba"))
    assert judged.labels.tolist() == [3, 2]
    assert judged.class_names == list("dcba")
    with pytest.raises(DataError, match="expected folders of the 2 classes"):
        find_eval_source(tmp_path, classes=["x", "a"])


@pytest.mark.parametrize("name", ["classes.txt", "class_names.txt"])
def test_a_list_in_the_folder_counts_if_it_names_all_classes(tmp_path, files, name):
    folder = tmp_path / "x"
    files.write_images(folder, 4, nested=True)
    (folder / name).write_text("d\nc\nb\na\n")
    assert open_source(folder).labels.tolist() == [3, 2, 1, 0]
    for other in ("1 a\n2 b\n", "a\nb\nc\n", "", "a\na\nb\nc\nd\n"):
        (folder / name).write_text(other)
        assert open_source(folder).labels.tolist() == [0, 1, 2, 3]


def test_a_single_class_folder_counts_where_the_classes_are_given(tmp_path, files):
    files.write_images(tmp_path / "x" / "b", 2)
    assert open_source(tmp_path / "x").labels is None
    assert open_source(tmp_path / "x", classes=["a", "b"]).labels.tolist() == [1, 1]


def test_classes_beyond_the_list_are_refused(tmp_path, files):
    files.write_images(tmp_path / "x", 8, nested=True)
    with pytest.raises(DataError, match="expected folders of the 3 classes of classes, found d"):
        open_source(tmp_path / "x", classes=["a", "b", "c"])
    table = files.write_table(tmp_path / "table.csv")
    assert open_source(table, classes=list("dcba")).labels.tolist() == [3, 2, 1, 0] * 6
    with pytest.raises(DataError, match=r"table\.csv: expected the 2 classes of classes, found 'c'"):
        open_source(table, classes=["a", "b"])


def test_names_can_be_given_to_numbers(files):
    images, labels = files.pictures()
    source = open_source(images, labels=labels, classes=list("wxyz"))
    assert source.class_names == list("wxyz")
    with pytest.raises(DataError, match="expected a name for each label, found 3 names and the label 3"):
        open_source(images, labels=labels, classes=list("wxy"))
    assert open_source(images, classes=["a"]).class_names is None


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        ([], "at least one name"),
        (["a", "a"], "'a' twice"),
        ([1, 2], "expected names"),
        (3, "expected names or the path of a text file, found int"),
        ("absent.txt", "classes file absent.txt: expected a text file"),
    ],
)
def test_lists_that_make_no_sense_are_refused(classes, match):
    with pytest.raises(DataError, match=match):
        read_classes(classes)


def test_known_classes_may_be_followed_by_others():
    known = ClassList(("b", "a"), fixed=False)
    numbers, names = number_classes(["c", "a", None, "b"], "x", known)
    assert numbers.tolist() == [2, 1, -1, 0]
    assert names == ["b", "a", "c"]
    numbers, names = number_classes([5, None], "x", known)
    assert numbers.tolist() == [5, -1]
    assert names == ["b", "a"]


def test_numbers_out_of_range_are_refused():
    for values in ([-2], [1 << 31]):
        with pytest.raises(DataError, match="expected labels in 0"):
            number_classes(values, "x")
    with pytest.raises(DataError, match=r"expected labels in 0\.\.1"):
        number_classes([2], "x", ClassList(("a", "b")))
    assert number_classes([], "x")[0].dtype == np.int64
