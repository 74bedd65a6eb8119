"""The exit status of the program `sela` for each kind of ending, and one line on standard error for each mistake."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

SMALL = ["--epochs", "1", "--clusters", "10", "--image-size", "16", "--threads", "1", "--no-progress"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of good and bad input."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 255, (60, 8, 8), dtype=np.uint8))
    np.save(folder / "logits.npy", rng.standard_normal((60, 7), dtype=np.float32))
    np.save(folder / "many.npy", rng.standard_normal((3_000, 700), dtype=np.float32))
    (folder / "text.npy").write_text("no array")
    (folder / "images").mkdir()
    (folder / "images" / "0.jpg").write_text("no picture")
    (folder / "damaged" / "checkpoints").mkdir(parents=True)
    (folder / "damaged" / "checkpoints" / "step-000000000003.ckpt").write_bytes(b"SELACKP1")
    np.savez(folder / "labels.npz", labels=np.zeros((1, 60), np.int32))
    (folder / "network.pt").write_bytes(b"no network")
    return folder


# What is asked for, in the folder `files`; the status; a part of what is said.
ENDINGS = {
    "help": (["--help"], 0, ""),
    "labels of logits": (["assign", "logits.npy", "--out", "OUT/labels.npy"], 0, ""),
    "a certificate that does not hold": (
        ["verify", "logits.npy", "--labels", "labels.npz", "--balance", "exact"],
        1,
        "",
    ),
    "no command": ([], 2, "command"),
    "an unknown command": (["trian"], 2, "trian"),
    "an unknown option": (["train", "--data", "images.npy", "--out", "OUT/run", "--epoch", "3"], 2, "--epochs"),
    "a value of another type": (["train", "--data", "images.npy", "--out", "OUT/run", "--epochs", "x"], 2, "epochs"),
    "a value out of range": (["train", "--data", "images.npy", "--out", "OUT/run", "--lr", "-1"], 2, "lr"),
    "more clusters than images": (
        ["train", "--data", "images.npy", "--out", "OUT/run", "--clusters", "70"],
        2,
        "clusters",
    ),
    "an output that is a folder": (["assign", "logits.npy", "--out", "."], 2, "folder"),
    "data that are not there": (["train", "--data", "absent", "--out", "OUT/run"], 3, "absent"),
    "data that are none": (["train", "--data", "text.npy", "--out", "OUT/run"], 3, "text.npy"),
    "a folder of bad images": (["train", "--data", "images", "--out", "OUT/run"], 3, "0.jpg"),
    "logits that are none": (["assign", "text.npy", "--out", "OUT/labels.npy"], 3, "text.npy"),
    "no run to report on": (["report", "absent"], 3, "absent"),
    "damaged checkpoints": (
        ["train", "--data", "images.npy", "--out", "damaged", "--resume", *SMALL],
        4,
        "none of the 1 checkpoints can be read",
    ),
    "a network file that is none": (
        ["predict", "network.pt", "--data", "images.npy", "--out", "OUT/labels.npy"],
        4,
        "network.pt",
    ),
    "a loss that is not finite": (
        [
            "train",
            "--data",
            "images.npy",
            "--out",
            "OUT/run",
            *SMALL,
            "--epochs",
            "30",
            "--lr",
            "1000",
            "--weight-decay",
            "1",
        ],
        5,
        "loss is nan at step",
    ),
    "a folder that cannot be made": (["train", "--data", "images.npy", "--out", "/proc/run", *SMALL], 7, "/proc/run"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_ending_has_its_status(server, files, tmp_path, ending):
    arguments, expected, words = ENDINGS[ending]
    status, printed = server.run(*(word.replace("OUT", str(tmp_path)) for word in arguments), folder=files)
    assert status == expected, printed
    assert words in printed
    if expected >= 2:
        assert printed.startswith("sela: error: ")
        assert printed.count("\n") == 1


def test_a_resume_with_other_options_is_status_4(server, files, tmp_path):
    command = ["train", "--data", files / "images.npy", "--out", tmp_path / "run", *SMALL]
    assert server.run(*command)[0] == 0
    status, printed = server.run(*command, "--resume", "--lr", "0.01")
    assert status == 4
    assert "lr: was " in printed
    assert printed.count("\n") == 1
    status, printed = server.run(*command)
    assert status == 2
    assert "set resume to continue the run in it, overwrite to replace it" in printed


def test_a_rank_that_is_killed_is_status_6(server, files, tmp_path):
    command = ["train", "--data", files / "images.npy", "--out", tmp_path / "run", *SMALL]
    ranks = server.start_ranks(2, *command, fault="before step:1:kill:1")
    assert ranks[1].wait() == -signal.SIGKILL
    assert ranks[0].wait() == 6
    assert "rank 1 failed: it was killed" in ranks[0].printed()


def test_ranks_that_see_other_options_are_status_6(server, files, tmp_path):
    command = ["train", "--data", files / "images.npy", "--out", tmp_path / "run", *SMALL]
    ranks = server.start_ranks(2, *command, apart={1: ["--seed", "5"]})
    assert [one.wait() for one in ranks] == [6, 6]
    assert "seed: 5, on rank 0 0" in ranks[1].printed()


def test_a_lack_of_memory_is_status_7(server, files, tmp_path):
    status, printed = server.run("assign", "many.npy", "--out", tmp_path / "x.npy", folder=files, memory=1 << 20)
    assert status == 7
    assert printed.startswith("sela: error: memory: expected")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_status_128_and_its_number(server, runs, files, tmp_path, number, expected):
    out = tmp_path / "run"
    started = server.start(
        "train", "--data", files / "images.npy", "--out", out, *SMALL, "--epochs", "100000", quick=False
    )
    assert runs.wait_for(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0)
    started.kill(number)
    assert started.wait(10) == expected, started.printed()
    assert json.loads((out / "options.json").read_text())["options"]["epochs"] == 100_000


def test_an_error_that_nobody_hears_keeps_its_status(tmp_path):
    """Standard error may be a file on a disk that is full."""
    words = [sys.executable, "-P", "-m", "sela_ext", "assign", str(tmp_path / "absent.npy"), "--out", "labels.npy"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(words, stderr=full, check=False, cwd=tmp_path).returncode == 3
