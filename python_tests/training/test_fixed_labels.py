import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import sela_ext
from sela_ext.data import open_source
from sela_ext.errors import CheckpointError, DataError, OptionError
from sela_ext.training.fixed_labels import read_fixed_labels
from sela_ext.training.recipes.fixed import FixedLabelsRecipe

TINY = {"epochs": 2, "batch_size": 64, "threads": 1, "progress": False, "model": "small-resnet"}
# Steps enough to learn the labels of `blobs`, which crops and flips would change.
LEARNING = {**TINY, "epochs": 6, "batch_size": 16, "lr": 0.02, "augment": "none"}


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
    with pytest.raises(OptionError, match=r"clusters: expected one number per head .* 2, found 3"):
        read_fixed_labels(labels, array_source(31), clusters=[7, 5, 3])
    with pytest.raises(OptionError, match="heads: expected 2"):
        read_fixed_labels(labels, array_source(31), heads=10)


@pytest.mark.parametrize("selection", ["3", "-1", "0,0", "first", "best"])
def test_heads_that_there_are_not_are_refused(tmp_path, selection):
    np.save(tmp_path / "labels.npy", np.stack([np.arange(31) % 7] * 3))
    with pytest.raises(OptionError, match=r"fixed_labels: .*best"):
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


# --- Training on them


def events(out, kind):
    return [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of two heads on labelled images, and these."""
    images, labels = blobs()
    out = tmp_path_factory.mktemp("first") / "run"
    result = sela_ext.train(
        images, out=out, labels=labels, clusters=[4, 6], projection=0, holdout=32, **{**TINY, "epochs": 3}
    )
    return images, labels, result


def test_a_run_is_trained_on_the_labels_of_another(tmp_path, first):
    images, truth, before = first
    out = tmp_path / "run"
    result = sela_ext.train(images, out=out, fixed_labels=before.out, labels=truth, holdout=32, **TINY)
    options = json.loads((out / "options.json").read_text())
    assert options["options"]["clusters"] == [4, 6]
    assert options["options"]["label_passes"] == 0
    assert options["options"]["head_kind"] == "linear"
    assert options["reasons"]["clusters"] == f"the labels of the run {before.out}"
    assert options["resolved"]["fixed_labels"].startswith("labels of the run")
    assert options["resolved"]["training_images"] == 160
    assert events(out, "label_pass") == []
    # The images trained on keep their labels; the others get the network's.
    kept = np.ones(192, bool)
    kept[np.flatnonzero((result.labels != before.labels).any(0))] = False
    assert kept.sum() >= 160
    assert (result.labels >= 0).all()
    assert {"nmi", "accuracy", "knn", "linear", "agreement", "cross_entropy"} <= set(result.metrics)
    page = (out / "report.html").read_text()
    assert "by labels that were given" in page
    assert "without using any labels" not in page
    assert "Agreement" in page
    assert np.array_equal(sela_ext.predict(out, images)[:, ~kept], result.labels[:, ~kept])


def test_the_network_learns_the_labels(tmp_path):
    images, truth = blobs()
    result = sela_ext.train(images, out=tmp_path / "run", fixed_labels=truth, labels=truth, holdout=32, **LEARNING)
    assert result.metrics["agreement"] > 0.95
    assert result.metrics["nmi"] == pytest.approx(1.0)
    assert (result.labels[0] == truth).mean() > 0.95
    assert result.metrics["cross_entropy"] < 0.5 * np.log(4)


def test_one_head_of_a_run_can_be_taken(tmp_path, first):
    images, _, before = first
    for selection, head in (("1", 1), ("best", before.head)):
        result = sela_ext.train(
            images,
            out=tmp_path / selection,
            fixed_labels=f"{before.out}:{selection}",
            **{**TINY, "epochs": 1},
        )
        assert np.array_equal(result.labels, before.labels[[head]])
        assert result.network.heads.clusters == [int(before.labels[head].max()) + 1]


def test_images_without_a_label_are_not_trained_on_and_get_the_networks(tmp_path, monkeypatch):
    images, truth = blobs()
    given = truth.copy()
    given[::3] = -1
    seen = set()
    step = FixedLabelsRecipe.step
    monkeypatch.setattr(
        FixedLabelsRecipe,
        "step",
        lambda self, batch: (seen.update(self.run.images.kept[batch.index.numpy()].tolist()), step(self, batch))[1],
    )
    result = sela_ext.train(images, out=tmp_path / "run", fixed_labels=given, labels=truth, **LEARNING)
    assert seen == set(np.flatnonzero(given >= 0).tolist())
    assert np.array_equal(result.labels[0][given >= 0], given[given >= 0])
    assert (result.labels[0][::3] == truth[::3]).mean() > 0.9
    assert result.metrics["linear"] > 0.9  # judged on the images that were left out
    resolved = json.loads((tmp_path / "run" / "options.json").read_text())["resolved"]
    assert (resolved["training_images"], resolved["held_out_images"]) == (128, 64)


def test_an_image_may_have_labels_in_some_heads_only(tmp_path):
    images, truth = blobs()
    labels = np.stack([truth, truth % 2])
    labels[0, :96] = -1
    labels[1, 96:] = -1
    given = labels.copy()
    result = sela_ext.train(
        images,
        out=tmp_path / "run",
        fixed_labels=labels,
        **{**TINY, "batch_size": 2, "epochs": 1, "lr": 0.002, "log_every": 1},
    )
    assert np.array_equal(labels, given)  # what was given is not written to
    assert np.array_equal(result.labels[labels >= 0], labels[labels >= 0])
    assert (result.labels >= 0).all()
    assert all(np.isfinite(step["loss"]) for step in events(tmp_path / "run", "step"))
    assert len(events(tmp_path / "run", "step")) == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_passes": 5}, "label_passes: expected none with fixed_labels"),
        ({"init": "predictions"}, "init: expected none with fixed_labels"),
        ({"label_source": "bank"}, "label_source: expected none with fixed_labels"),
        ({"marginals": [0.25] * 4}, "marginals: expected none with fixed_labels"),
        ({"method": "kmeans"}, "fixed_labels: expected no other source of labels|method: .* not available"),
        ({"heads": 3}, "heads: expected 1"),
        ({"clusters": 3}, r"labels of head 0 in -1 \.\. 2"),
    ],
)
def test_options_that_contradict_fixed_labels_are_refused(tmp_path, options, message):
    images, truth = blobs()
    with pytest.raises((OptionError, DataError), match=message):
        sela_ext.train(images, out=tmp_path / "run", fixed_labels=truth, **{**TINY, **options})
    assert not (tmp_path / "run").exists()


def test_what_a_preset_says_of_labels_yields_to_fixed_labels(tmp_path):
    images, truth = blobs()
    result = sela_ext.train(
        images,
        out=tmp_path / "run",
        preset="cifar10",
        fixed_labels=truth,
        label_passes=0,
        image_size=32,
        **{**TINY, "epochs": 1},
    )
    assert result.labels.shape == (1, 192)
    options = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    assert (options["lr"], options["weight_decay"], options["label_passes"]) == (0.03, 5e-4, 0)


def test_other_labels_are_another_run(tmp_path, first):
    images, truth = blobs()
    np.save(tmp_path / "labels.npy", truth)
    options = {**TINY, "epochs": 1, "fixed_labels": tmp_path / "labels.npy"}
    once = sela_ext.train(images, out=tmp_path / "run", **options)
    again = sela_ext.train(images, out=tmp_path / "run", resume=True, **options)
    assert np.array_equal(once.confidence, again.confidence)
    np.save(tmp_path / "labels.npy", np.roll(truth, 1))
    with pytest.raises(CheckpointError, match="started differently: fixed_labels"):
        sela_ext.train(images, out=tmp_path / "run", resume=True, **options)


def test_a_run_on_fixed_labels_can_be_evaluated_again(tmp_path, folder):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"more{i:02d}.png")
        rows.append(f"{i},more{i:02d}.png,{i % 3}")
    rows += [f"{30 + i},{name}.png,-1" for i, name in enumerate("fabdce")]
    table = write_csv(tmp_path / "labels.csv", rows, "index,name,label_0")
    names = [f"more{i:02d}.png" for i in range(30)]
    truth = write_csv(
        tmp_path / "truth.csv",
        [f"{name},{i % 2}" for i, name in enumerate(names)] + ["a.png,0", "b.png,1"],
        "name,class",
    )
    out = tmp_path / "run"
    result = sela_ext.train(
        str(folder), out=out, fixed_labels=str(table), labels=str(truth), **{**TINY, "batch_size": 8, "epochs": 1}
    )
    assert result.labels.shape == (1, 36)
    report = sela_ext.evaluate(out, what=("clusters",))
    assert report["nmi"] == pytest.approx(result.metrics["nmi"])


def test_the_command_line_takes_a_run(tmp_path, first, capsys):
    from sela_ext.cli import main

    images, _, before = first
    np.save(tmp_path / "images.npy", images)
    arguments = ["train", "--data", str(tmp_path / "images.npy"), "--out", str(tmp_path / "run"), "--epochs", "1"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--fixed-labels", str(before.out), "--threads", "1", "--model", "small-resnet"])
    assert caught.value.code == 0
    assert "fixed labels that the network predicts" in capsys.readouterr().out
    with np.load(tmp_path / "run" / "labels.npz") as saved:
        assert np.array_equal(saved["labels"], before.labels)


def test_a_run_is_not_written_over_its_own_labels(tmp_path, first):
    images, _, before = first
    for fixed in (before.out, f"{before.out}:1", before.out / "labels.npz"):
        with pytest.raises(OptionError, match=r"out: expected a folder of its own, found .*, which holds fixed_labels"):
            sela_ext.train(images, out=before.out, fixed_labels=fixed, overwrite=True, **TINY)
    assert (before.out / "labels.npz").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('name,label_0\n"' + "x" * 200_000 + "\n", "line 2: expected a table of labels"),
        ("name,label_" + "9" * 5000 + "\na,0\n", "expected columns label_0, label_1"),
        ("name,label_0,label_0\na,0,1\n", "expected each column once, found label_0 several times"),
        ("name,label_0\na,1_0\n", "line 2: expected whole numbers as labels, found '1_0'"),
        ("name,label_0\na," + "1" * 5000 + "\n", "line 2: expected whole numbers as labels, found '111"),
        ("name,label_0\na,\u0663\n", "line 2: expected whole numbers as labels"),
    ],
)
def test_hostile_tables_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "labels.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_fixed_labels(tmp_path / "labels.csv", array_source(1))
    assert len(str(caught.value)) < 1000


def test_labels_of_names_that_images_share_are_told_so(tmp_path):
    np.savez(tmp_path / "rows.npz", features=np.zeros((4, 2), np.float32), names=np.array(["a", "a", "b", "c"]))
    table = write_csv(tmp_path / "labels.csv", ["c,0", "b,1", "a,1"], "name,label")
    with pytest.raises(DataError, match=r"found none for 2, .*a name that several images share fits none; a label of"):
        read_fixed_labels(table, open_source(tmp_path / "rows.npz"))
