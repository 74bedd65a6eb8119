import json
import subprocess
import sys

import numpy as np
import pytest

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
        assert "--" + spec.name.replace("_", "-") in out


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
        (["train", "--data", "digits"], 2, "--out"),
        (["tran"], 2, "tran"),
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


def test_info_names_versions_and_devices(capsys):
    code, out, _ = sela(capsys, "info")
    assert code == 0
    assert "cpu_isa" in out
    assert "torch" in out


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
