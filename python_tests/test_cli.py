import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sela_ext
from sela_ext.cli import main
from sela_ext.errors import ResourceError
from sela_ext.kernels import Verdict


def sela(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


def test_train_help_names_every_option(capsys):
    import dataclasses

    from sela_ext.training import Options

    status, out, _ = sela(capsys, "train", "--help")
    assert status == 0
    for spec in dataclasses.fields(Options):
        if spec.name == "callbacks":
            continue  # functions have no text
        assert "--" + spec.name.replace("_", "-") in out


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--marginals", "estimated"], "marginals", "estimated"),
        (["--marginals", "1,2,0.5"], "marginals", [1, 2, 0.5]),
        (["--size-bounds", "0.5,2"], "size_bounds", [0.5, 2]),
        (["--relax", "0.3"], "relax", 0.3),
        (["--pca", "0"], "pca", 0),
    ],
)
def test_train_reads_the_options_of_cluster_sizes(capsys, monkeypatch, arguments, name, value):
    given = {}
    monkeypatch.setattr("sela_ext.training.train", lambda data, **options: given.update(options))
    assert sela(capsys, "train", "--data", "digits", "--out", "x", *arguments)[0] == 0
    assert given[name] == value


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["train", "--data", "digits", "--out", "x", "--epoch", "3"],
            2,
            "unknown option --epoch; did you mean --epochs?",
        ),
        (["train", "--data", "digits", "--out", "x", "--epochs", "many"], 2, "epochs: expected a whole number"),
        (["train", "--data", "digits", "--out", "x", "--lr", "nan"], 2, "lr: expected a number > 0"),
        (["train", "--data", "absent/folder", "--out", "x"], 3, "absent/folder"),
        (["train", "--data", "a\n\x1b[31mb", "--out", "x"], 3, r"a\n\x1b[31mb: no such file or folder"),
        (["train", "--data", "", "--out", "x"], 3, "found an empty path"),
        (["train", "--data", "a" * 5000, "--out", "x"], 3, "cannot be opened: File name too long"),
        (["train", "--data", "digits"], 2, "--out"),
        (["tran"], 2, "expected one of train, assign, verify"),
        (["tran"], 2, "found tran; did you mean 'train'?"),
        (
            ["export", "x", "--out", "y", "--format", "onx"],
            2,
            "--format: expected one of torchvision, safetensors, onnx",
        ),
        (["train", "--out", "x"], 2, "expected --data, or a --config"),
        (["train", "--data", "digits", "--out", "x", "--augment", "cifra"], 2, "did you mean 'cifar'?"),
        (["evaluate", "random:small-resnet", "--data", "digits", "--what", "lineal"], 2, "did you mean 'linear'?"),
        (["train", "--config", "absent.yaml"], 2, "config: expected a YAML or JSON file of options"),
        ([], 2, "command"),
        (["assign", "absent.npy", "--out", "x.npy"], 3, "absent.npy: expected a .npy file"),
        (["report", "absent"], 3, "absent: expected a run folder"),
    ],
)
def test_mistakes_are_one_line_with_their_exit_status(capsys, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = sela(capsys, *arguments)
    assert code == status
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_assign_labels_a_file_of_logits(capsys, tmp_path):
    logits = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
    np.save(tmp_path / "logits.npy", logits)
    code, out, _ = sela(capsys, "assign", str(tmp_path / "logits.npy"), "--out", str(tmp_path / "labels.npy"))
    assert code == 0
    assert "converged, error" in out
    labels = np.load(tmp_path / "labels.npy")
    assert labels.shape == (300,)
    assert np.bincount(labels, minlength=7).min() > 300 / 7 / 2


@pytest.fixture
def logits_file(tmp_path):
    logits = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
    np.save(tmp_path / "logits.npy", logits)
    return tmp_path / "logits.npy"


def test_assign_writes_all_of_the_result_as_npz_and_a_table_as_csv(capsys, logits_file):
    a = sela_ext.assign(np.load(logits_file), tol=1e-3, storage="fixed16")
    options = ("--tol", "1e-3", "--storage", "fixed16")
    assert sela(capsys, "assign", str(logits_file), "--out", str(logits_file.parent / "a.npz"), *options)[0] == 0
    with np.load(logits_file.parent / "a.npz") as saved:
        assert np.array_equal(saved["labels"], a.labels)
        assert np.array_equal(saved["potential"], a.potential)
        assert saved["sizes"].sum() == 300
        assert float(saved["error"]) == a.error
        assert bool(saved["converged"])
    assert sela(capsys, "assign", str(logits_file), "--out", str(logits_file.parent / "a.csv"), *options)[0] == 0
    header, *lines = (logits_file.parent / "a.csv").read_text().splitlines()
    assert header == "index,label"
    assert lines == [f"{i},{label}" for i, label in enumerate(a.labels)]


def test_assign_takes_its_options_from_flags_and_files(capsys, logits_file):
    folder = logits_file.parent
    np.save(folder / "marginals.npy", np.arange(1, 8))
    np.save(folder / "weights.npy", np.r_[np.zeros(10), np.ones(290)])
    np.save(folder / "start.npy", np.linspace(-1, 1, 7))
    options = ["--marginals", str(folder / "marginals.npy"), "--row-weights", str(folder / "weights.npy")]
    options += ["--start", str(folder / "start.npy"), "--method", "anderson", "--threads", "1", "--max-passes", "50"]
    out = str(folder / "labels.npy")
    code, printed, err = sela(capsys, "assign", str(logits_file), "--out", out, "--progress", *options)
    expected = sela_ext.assign(
        np.load(logits_file),
        marginals=np.arange(1, 8),
        row_weights=np.r_[np.zeros(10), np.ones(290)],
        start=np.linspace(-1, 1, 7),
        method="anderson",
        max_passes=50,
    )
    assert code == 0
    assert np.array_equal(np.load(out), expected.labels)
    assert printed.count("\n") == 1
    assert "300 x 7: converged" in printed
    assert "(anderson)" in printed
    assert err.count("reads, error") == len(expected.history)
    bounded = ("--size-bounds", "30,60")
    assert sela(capsys, "assign", str(logits_file), "--out", out, *bounded)[0] == 0
    assert np.array_equal(np.load(out), sela_ext.assign(np.load(logits_file), size_bounds=(30, 60)).labels)
    assert sela(capsys, "assign", str(logits_file), "--out", out, "--relax", "0.01")[0] == 0
    assert np.array_equal(np.load(out), sela_ext.assign(np.load(logits_file), relax=0.01).labels)


def test_assign_takes_features_and_weights(capsys, tmp_path):
    rng = np.random.default_rng(0)
    features, weight, bias = rng.standard_normal((400, 6)), rng.standard_normal((5, 6)), rng.standard_normal(5)
    np.save(tmp_path / "features.npy", features.astype(np.float16))
    np.save(tmp_path / "weight.npy", weight)
    np.save(tmp_path / "bias.npy", bias)
    files = [str(tmp_path / name) for name in ("features.npy", "weight.npy", "bias.npy", "labels.npy")]
    code, printed, _ = sela(capsys, "assign", files[0], "--weight", files[1], "--bias", files[2], "--out", files[3])
    assert code == 0
    assert "400 x 5: converged" in printed
    expected = sela_ext.assign(sela_ext.FeatureLogits(features.astype(np.float16), weight, bias))
    assert np.array_equal(np.load(files[3]), expected.labels)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--storage", "int8"), 2, "storage: expected one of"),
        (("--size-bounds", "3"), 2, "expected two numbers LOW,HIGH, found 3"),
        (("--bias", "x.npy"), 2, "--bias: expected --weight"),
        (("--weight", "absent.npy"), 3, "absent.npy: expected a .npy file of weights"),
        (("--marginals", "absent.npy"), 3, "absent.npy: expected a .npy file of marginals"),
    ],
)
def test_assign_refuses_in_one_line(capsys, logits_file, options, status, message):
    out = logits_file.parent / "labels.npy"
    code, _, err = sela(capsys, "assign", str(logits_file), "--out", str(out), *options)
    assert code == status
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_assign_refuses_a_file_that_is_cut_off(capsys, logits_file):
    with open(logits_file, "r+b") as file:
        file.truncate(1000)
    code, _, err = sela(capsys, "assign", str(logits_file), "--out", str(logits_file.parent / "labels.npy"))
    assert code == 3
    assert "logits.npy: expected a .npy file of logits" in err


def test_info_names_versions_and_devices(capsys):
    code, out, _ = sela(capsys, "info")
    assert code == 0
    names = {line.split()[0] for line in out.splitlines()}
    assert {"version", "cpu_isa", "cuda_archs", "torch", "python", "device", "extra", "data", "presets"} <= names
    assert " digits " in out


def test_info_tells_which_extras_are_there(capsys, monkeypatch):
    import importlib.metadata

    def version(name):
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError
        return "9.8.7"

    monkeypatch.setattr("importlib.metadata.version", version)
    code, out, _ = sela(capsys, "info")
    assert code == 0
    assert "extra         timm absent: networks timm/NAME; pip install 'sela_ext[timm]'" in out.splitlines()
    assert "extra         faiss 9.8.7: nearest neighbours among very many features" in out.splitlines()


def test_info_is_one_json_object_on_request(capsys):
    code, out, _ = sela(capsys, "info", "--json")
    assert code == 0
    assert json.loads(out)["version"] == sela_ext.__version__
    code, out, _ = sela(capsys, "info", "--presets", "--json")
    assert code == 0
    assert "digits" in json.loads(out)


def test_info_knows_every_extra_that_is_for_users(capsys):
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    declared = set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))
    for_developers = {"test", "dev", "docs", "peers", "inspect"}
    assert declared - for_developers == set(json.loads(sela(capsys, "info", "--json")[1])["extras"])


COMMANDS = [
    "train",
    "assign",
    "verify",
    "evaluate",
    "predict",
    "embed",
    "export",
    "pack",
    "finetune",
    "report",
    "doctor",
    "info",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_examples_each_on_a_line(capsys, command):
    code, out, _ = sela(capsys, command, "--help")
    assert code == 0
    lines = re.split(r"^examples?:$", out, flags=re.MULTILINE)[1].strip("\n").splitlines()
    assert lines
    assert all(line.startswith(f"  sela {command}") for line in lines)


def test_the_commands_are_these(capsys):
    out = sela(capsys, "--help")[1]
    assert re.search(r"\n    (\w+)  ", out)
    assert re.findall(r"^    (\w+) ", out, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize(("version", "shown"), [("13.0", "no CUDA device"), (None, "this torch is built without CUDA")])
def test_info_says_why_there_is_no_device(capsys, monkeypatch, version, shown):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.version.cuda", version)
    code, out, _ = sela(capsys, "info")
    assert code == 0
    assert out.splitlines()[-1].endswith(shown)


def test_info_tells_the_verdict_on_every_device(capsys, monkeypatch):
    def verdict(device):
        if device == 2:
            raise ResourceError("cuda:2: no memory left")
        state, reason = [("passed", ""), ("failed", "column sum 3: expected 1, found 2")][device]
        return Verdict(state, reason, f"cuda:{device}", "Some Card, architecture 9.0, driver 550", kept=device == 1)

    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("sela_ext.kernels.device_verdict", verdict)
    code, out, _ = sela(capsys, "info")
    assert code == 0
    assert [" ".join(line.split()[1:]) for line in out.splitlines() if line.startswith("device")] == [
        "cuda:0: Some Card, architecture 9.0, driver 550: self-check passed",
        "cuda:1: Some Card, architecture 9.0, driver 550: self-check FAILED before: column sum 3: expected 1, found 2; "
        "torch and the CPU do the work",
        "cuda:2: not checked: cuda:2: no memory left",
    ]


def test_the_report_can_be_written_again(capsys, tmp_path):
    run = tmp_path / "run"
    options = ("--epochs", "1", "--clusters", "5", "--heads", "1", "--threads", "1", "--no-progress")
    code, _, err = sela(capsys, "train", "--data", "digits", "--out", str(run), *options)
    assert code == 0, err
    assert json.loads((run / "options.json").read_text())["options"]["data"] == "digits"
    (run / "report.html").unlink()
    code, out, err = sela(capsys, "report", str(run))
    assert code == 0, err
    assert (run / "report.html").stat().st_size > 1000
    assert "report.html" in out


def test_a_closed_pipe_is_no_error():
    shell = f"{sys.executable} -P -m sela_ext train --help | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stderr == ""
