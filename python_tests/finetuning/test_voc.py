import os

import numpy as np
import pytest
from PIL import Image

from sela_ext.errors import DataError
from sela_ext.finetuning.voc import VocTree, read_annotation


def test_a_folder_is_read_as_it_was_written(make_voc):
    path, things = make_voc()
    tree = VocTree(path)
    names = tree.split("Main", "trainval")
    assert names == [f"trainval_{i:06d}" for i in range(12)]
    for name in names:
        objects = tree.objects(name)
        assert [("aeroplane", "bird", "cat").index(label) for label in objects.names] == [t.label for t in things[name]]
        assert objects.boxes.tolist() == [list(map(float, t.box)) for t in things[name]]
        height, width = tree.image(name).shape[:2]
        mask = tree.mask(name, (height, width), 21)
        present = {int(value) for value in np.unique(mask)} - {0, 255}
        assert present == {t.label + 1 for t in things[name]}


@pytest.mark.parametrize("class_files", [True, False])
def test_presence_comes_from_the_class_files_or_else_from_the_objects(make_voc, class_files):
    path, things = make_voc(class_files=class_files)
    names, classes, table = VocTree(path).presence("test")
    assert classes == ["aeroplane", "bird", "cat"]
    for i, name in enumerate(names):
        assert {c for c in range(3) if table[i, c] == 1} == {t.label for t in things[name]}
    assert set(np.unique(table)) <= {-1, 1}


def test_images_with_difficult_objects_alone_are_hard_to_tell(make_voc):
    path, things = make_voc(class_files=False)
    name = "test_000000"
    file = path / "Annotations" / f"{name}.xml"
    file.write_text(file.read_text().replace("<difficult>0", "<difficult>1"))
    names, _, table = VocTree(path).presence("test")
    row = table[names.index(name)]
    assert {c for c in range(3) if row[c] == 0} == {t.label for t in things[name]}
    assert VocTree(path).objects(name).difficult.all()


def test_a_devkit_with_one_year_is_found(make_voc, tmp_path):
    make_voc("VOCdevkit/VOC2007")
    assert VocTree(tmp_path).path.name == "VOC2007"
    assert VocTree(tmp_path / "VOCdevkit").path.name == "VOC2007"
    make_voc("VOCdevkit/VOC2012")
    with pytest.raises(DataError, match=r"found 2: VOC2007, VOC2012; name one"):
        VocTree(tmp_path)
    with pytest.raises(DataError, match="with JPEGImages in it, found none"):
        VocTree(tmp_path / "nowhere")


def test_splits_are_trainval_and_test_or_else_train_and_val(make_voc):
    path, _ = make_voc()
    assert VocTree(path).choose_splits("Main", "auto", "auto") == ("trainval", "test")
    assert VocTree(path).choose_splits("Main", "test", "trainval") == ("test", "trainval")
    path, _ = make_voc("VOC2012", splits=("train", "val"))
    assert VocTree(path).choose_splits("Segmentation", "auto", "auto") == ("train", "val")
    with pytest.raises(DataError, match="found neither pair"):
        VocTree(path).choose_splits("Main", "auto", "test")


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
LAUGHS = (
    '<!DOCTYPE a [<!ENTITY x "ha">'
    + "".join(f'<!ENTITY x{i} "{f"&x{i - 1};" * 10 if i else "&x;" * 10}">' for i in range(9))
    + f"]><annotation><object><name>&x8;</name>{BOX}</object></annotation>"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "document type or entities; it is not read"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "document type or entities"),
        ("<annotation>", "found no XML"),
        ("hello", "found no XML"),
        (f"<annotation><object>{BOX}</object></annotation>", "objects with name and bndbox"),
        ("<annotation><object><name>cat</name></object></annotation>", "objects with name and bndbox"),
        (f"<annotation><object><name>cat</name>{BOX.replace('>1<', '>one<')}</object></annotation>", "found 'one'"),
        (f"<annotation><object><name>cat</name>{BOX.replace('>1<', '>nan<')}</object></annotation>", "found 'nan'"),
        (f"<annotation><object><name>cat</name>{BOX.replace('>1<', '>9<')}</object></annotation>", "expected a box"),
        (
            f"<annotation><object><name>cat</name>{BOX.replace('>5<', '>1e99<')}</object></annotation>",
            "a number for xmax",
        ),
    ],
)
def test_annotations_that_are_none_are_refused(tmp_path, text, message):
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_annotation(path)
    assert "\n" not in str(caught.value)


def test_other_encodings_and_sizes_are_refused(tmp_path):
    path = tmp_path / "a.xml"
    path.write_bytes(LAUGHS.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-8"):
        read_annotation(path)
    path.write_bytes(b"<annotation>" + b" " * (1 << 20) + b"</annotation>")
    with pytest.raises(DataError, match="at most 1,048,576 bytes"):
        read_annotation(path)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_annotation(path)
    os.mkfifo(path)
    with pytest.raises(DataError, match="found something else"):
        read_annotation(path)


def test_an_annotation_with_nested_parts_counts_its_objects_only(tmp_path):
    path = tmp_path / "a.xml"
    part = f"<part><name>head</name>{BOX}</part>"
    path.write_text(f"<annotation><object><name>cat</name>{BOX}{part}</object></annotation>")
    assert read_annotation(path).names == ["cat"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", ".hidden", "a/b"])
def test_names_that_lead_elsewhere_are_refused(make_voc, name):
    path, _ = make_voc()
    (path / "ImageSets" / "Main" / "test.txt").write_text(f"{name}\n")
    with pytest.raises(DataError, match="expected names of images"):
        VocTree(path).split("Main", "test")


@pytest.mark.parametrize("line", ["test_000000 2", "test_000000", "stranger 1", "test_000000 1 1"])
def test_class_files_that_do_not_fit_are_refused(make_voc, line):
    path, _ = make_voc()
    (path / "ImageSets" / "Main" / "cat_test.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=r"cat_test\.txt: expected a name of test\.txt and 1, 0 or -1"):
        VocTree(path).presence("test")


def test_masks_that_do_not_fit_are_refused(make_voc):
    path, _ = make_voc()
    tree, name = VocTree(path), "test_000000"
    file = path / "SegmentationClass" / f"{name}.png"
    shape = tree.image(name).shape[:2]
    with pytest.raises(DataError, match="expected the size of the image"):
        tree.mask(name, (shape[0] + 1, shape[1]), 21)
    with pytest.raises(DataError, match=r"expected classes 0 \.\. 0 and 255"):
        tree.mask(name, shape, 1)
    Image.new("RGB", shape[::-1]).save(file)
    with pytest.raises(DataError, match="expected a palette image, found mode RGB"):
        tree.mask(name, shape, 21)
    Image.effect_noise(shape[::-1], 9).save(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as a mask"):
        tree.mask(name, shape, 21)
    file.unlink()
    with pytest.raises(DataError, match="No such file"):
        tree.mask(name, shape, 21)
