import csv

import numpy as np
import pytest

import sela_ext
from sela_ext.data import digits_split
from sela_ext.errors import DataError, OptionError
from sela_ext.export.labels import Labels, choose_heads, write_csv


def stored(run):
    with np.load(run / "labels.npz") as saved:
        return saved["labels"], saved["confidence"], [str(name) for name in saved["names"]]


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_holds_the_labels_of_all_heads(digits_run, tmp_path):
    labels, confidence, names = stored(digits_run)
    written = sela_ext.export(digits_run, tmp_path / "labels.csv", "csv")
    rows = rows_of(written.path)
    assert [row["name"] for row in rows] == names
    assert [int(row["index"]) for row in rows] == list(range(1797))
    for head in range(3):
        assert np.array_equal([int(row[f"label_{head}"]) for row in rows], labels[head])
        assert np.allclose([float(row[f"confidence_{head}"]) for row in rows], confidence[head], atol=5.1e-5)
    assert written.facts["heads"] == [0, 1, 2]


def test_cluster_sizes_stand_in_a_second_file(digits_run, tmp_path):
    labels, confidence, _ = stored(digits_run)
    written = sela_ext.export(digits_run, tmp_path / "labels.csv", "csv", head=1)
    rows = rows_of(tmp_path / "labels.sizes.csv")
    assert written.facts["sizes"] == tmp_path / "labels.sizes.csv"
    assert [int(row["size"]) for row in rows] == np.bincount(labels[1], minlength=7).tolist()
    first = confidence[1][labels[1] == 0].mean()
    assert float(rows[0]["confidence"]) == pytest.approx(first, abs=1e-4)


def test_one_head_has_plain_columns(digits_run, tmp_path):
    labels, _, _ = stored(digits_run)
    for head, number in (("best", None), (2, 2), ("2", 2)):
        path = tmp_path / f"{head}-{type(head).__name__}.csv"
        written = sela_ext.export(digits_run, path, "csv", head=head)
        rows = rows_of(path)
        assert list(rows[0]) == ["index", "name", "label", "confidence"]
        if number is not None:
            assert written.facts["heads"] == [number]
            assert np.array_equal([int(row["label"]) for row in rows], labels[number])


def test_names_of_files_come_back_as_they_are(files_run, tmp_path):
    _, _, names = stored(files_run)
    sela_ext.export(files_run, tmp_path / "labels.csv", "csv")
    assert [row["name"] for row in rows_of(tmp_path / "labels.csv")] == names
    assert any("\r" in name for name in names)
    assert any("\n" in name for name in names)


def test_unknown_confidence_is_an_empty_field_and_a_name_is_no_number(tmp_path):
    labels = Labels(
        np.array([[0, -1, 2]], np.int32),
        np.array([[0.5, np.nan, np.nan]], np.float32),
        ["nan", "b", "c"],
        [4],
        [3],
        "x",
    )
    write_csv(tmp_path / "few.csv", labels, overwrite=False)
    assert (tmp_path / "few.csv").read_text() == "index,name,label,confidence\n0,nan,0,0.5000\n1,b,-1,\n2,c,2,\n"
    sizes = "head,cluster,size,confidence\n4,0,1,0.5000\n4,1,0,\n4,2,1,\n"
    assert (tmp_path / "few.sizes.csv").read_text() == sizes


def test_other_images_are_labelled_by_the_network(digits_run, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (31, 20, 20), dtype=np.uint8)
    written = sela_ext.export(digits_run, tmp_path / "new.csv", "csv", data=images, threads=1)
    rows = rows_of(written.path)
    expected = sela_ext.predict(digits_run, images, threads=1)
    assert np.array_equal([[int(row[f"label_{head}"]) for row in rows] for head in range(3)], expected)
    assert "by the network" in written.lines[0]


def test_the_runs_own_files_at_another_place_keep_their_labels(files_run, odd_files, tmp_path):
    (tmp_path / "moved").symlink_to(odd_files)
    written = sela_ext.export(files_run, tmp_path / "labels.csv", "csv", data=str(tmp_path / "moved"))
    assert "of the run" in written.lines[0]
    assert len(rows_of(written.path)) == 20


def test_a_label_file_and_a_backbone_train_another_network(digits_run, tmp_path):
    sela_ext.export(digits_run, tmp_path / "labels.csv", "csv")
    sela_ext.export(digits_run, tmp_path / "backbone.pth")
    labels, _, _ = stored(digits_run)
    result = sela_ext.train(
        "digits",
        out=tmp_path / "second",
        fixed_labels=tmp_path / "labels.csv",
        model=f"small-resnet:{tmp_path / 'backbone.pth'}",
        epochs=1,
        threads=1,
        precision="float32",
        progress=False,
        lr=1e-12,
    )
    trained, _ = digits_split()
    assert np.array_equal(result.labels[:, trained], labels[:, trained])
    # With next to no learning rate the weights are still those that it began with.
    before, after = (
        sela_ext.load_released(run)[0].backbone.stem[0].weight for run in (digits_run, tmp_path / "second")
    )
    assert np.allclose(before.detach(), after.detach(), atol=1e-6)


def test_heads_are_chosen_by_number_or_word():
    assert choose_heads(None, 3, 1, "all") == [0, 1, 2]
    assert choose_heads(None, 3, 1, "best") == [1]
    assert choose_heads("best", 1, None, "all") == [0]
    assert choose_heads("0", 1, None, "all") == [0]
    assert choose_heads(None, 0, None, "none") == []
    for wrong in (3, -1, "x", True, 1.0, "٣"):
        with pytest.raises(OptionError, match=r"head: expected best, all, none or a number in 0 \.\. 2, found"):
            choose_heads(wrong, 3, 1, "all")
    with pytest.raises(OptionError, match="does not say yet which is best"):
        choose_heads("best", 3, None, "all")
    with pytest.raises(OptionError, match="as there are no heads"):
        choose_heads("all", 0, None, "none")


def test_labels_of_what_has_none_are_refused(digits_run, tmp_path):
    with pytest.raises(OptionError, match="expected a head whose labels"):
        sela_ext.export(digits_run, tmp_path / "a.csv", "csv", head="none")
    with pytest.raises(OptionError, match="name the images as data"):
        sela_ext.export("random:small-resnet", tmp_path / "a.csv", "csv")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "options.json").write_text((digits_run / "options.json").read_text())
    with pytest.raises(DataError, match="written when training has ended"):
        sela_ext.export(unfinished, tmp_path / "a.csv", "csv")
    assert not list(tmp_path.glob("*.csv"))
