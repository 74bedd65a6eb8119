import json

import numpy as np
import pytest

import sela_ext
from sela_ext.cli import main

QUIET = ["--threads", "1", "--precision", "float32"]


def sela(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(one) for one in arguments])
    shown = capsys.readouterr()
    return caught.value.code, shown.out, shown.err


def test_evaluate_prints_a_table_and_writes_everything(capsys, run, tmp_path):
    file = tmp_path / "figures.json"
    code, out, _ = sela(capsys, "evaluate", run, "--what", "clusters,knn", "--k", "20,50", "--json", file, *QUIET)
    assert code == 0
    assert "kNN, k = 20" in out
    assert f"all of it in {file}" in out.replace("\n", "")
    report = json.loads(file.read_text())
    assert list(report["data_sets"][0]["knn_scores"]) == ["20", "50"]
    assert report["nmi"] == sela_ext.evaluate(run, what="clusters", threads=1, precision="float32")["nmi"]


def test_evaluate_takes_several_sets_and_answers_in_json(capsys, run):
    code, out, _ = sela(
        capsys, "evaluate", run, "--data", "digits", "--data", "digits::digits", "--what", "knn", "--json", "-", *QUIET
    )
    assert code == 0
    report = json.loads(out)
    assert [one["test_images"] for one in report["data_sets"]] == [360, 1797]


def test_predict_writes_labels_in_three_forms(capsys, run, tmp_path):
    expected = sela_ext.predict(run, "digits", threads=1, precision="float32")
    for name in ("labels.csv", "labels.npz", "labels.npy"):
        code, out, _ = sela(capsys, "predict", run, "--data", "digits", "--out", tmp_path / name, *QUIET)
        assert code == 0
        assert "1,797 images, labels of 3 heads" in out
    header, first, *_ = (tmp_path / "labels.csv").read_text().splitlines()
    assert header == "index,name,label_0,label_1,label_2"
    assert first == f"0,digits/00000,{','.join(map(str, expected[:, 0]))}"
    assert np.array_equal(np.load(tmp_path / "labels.npy"), expected)
    with np.load(tmp_path / "labels.npz") as saved:
        assert np.array_equal(saved["labels"], expected)
        assert saved["names"][1796] == "digits/01796"
    sela(capsys, "predict", run, "--data", "digits", "--out", tmp_path / "one.npy", "--head", "1", *QUIET)
    assert np.array_equal(np.load(tmp_path / "one.npy"), expected[1])


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "random:small-resnet", "--data", "digits", "--json"),
        ("predict", "RUN", "--data", "digits", "--out"),
        ("embed", "pixels", "--data", "digits", "--out"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(capsys, run, tmp_path, monkeypatch, arguments):
    def unwanted(*given, **options):
        raise AssertionError("images were looked at")

    for module in (sela_ext.inference.protocols, sela_ext.inference.apply):
        monkeypatch.setattr(module, "look", unwanted)
    arguments = [run if one == "RUN" else one for one in arguments]
    for file, found in (("", "found the folder"), ("absent/file.npy", "absent first")):
        code, out, err = sela(capsys, *arguments, tmp_path / file, *QUIET)
        assert (code, out) == (2, "")
        assert f"{arguments[-1]}: expected a file" in err
        assert found in err
    assert not list(tmp_path.iterdir())


def test_embed_writes_features(capsys, run, tmp_path):
    code, out, _ = sela(capsys, "embed", run, "--data", "digits", "--out", tmp_path / "features.npy", *QUIET)
    assert code == 0
    assert "1,797 images, features of 128 numbers" in out
    expected = sela_ext.embed(run, "digits", threads=1, precision="float32")
    assert np.array_equal(np.load(tmp_path / "features.npy"), expected)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["evaluate", "absent"], 4, "absent: expected a run folder"),
        (["evaluate", "random:small-resnet"], 2, "data: expected labelled images"),
        (["evaluate", "random:small-resnet", "--data", "absent"], 3, "absent: no such file or folder"),
        (["evaluate", "random:nothing", "--data", "digits"], 2, "found 'nothing'"),
        (
            ["evaluate", "pixels", "--data", "digits", "--k", "many"],
            2,
            "expected whole numbers with commas, found many",
        ),
        (["evaluate", "pixels", "--wat"], 2, "unknown option --wat; did you mean --what?"),
        (["predict", "absent", "--data", "digits", "--out", "x.npy"], 4, "absent: expected a run folder"),
        (["predict", "absent", "--data", "digits", "--out", "x.npy", "--head", "two"], 2, "--head: expected best"),
        (["embed", "absent", "--data", "digits", "--out", "x.npy"], 4, "absent: expected a run folder"),
    ],
)
def test_mistakes_are_one_line_with_their_exit_status(capsys, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = sela(capsys, *arguments)
    assert code == status
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
