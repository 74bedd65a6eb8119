"""Machines that lack something: the case D25 of the fault list, for whole runs by the command line.

That loaders need neither shared memory nor other processes is in python_tests/data/test_faults.py.
"""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import sela_ext
from sela_ext.training.checkpoint import load_checkpoint
from sela_ext.training.progress import RunProgress

OPTIONS = {
    "model": "small-convnet", "image_size": 16, "epochs": 1, "batch_size": 16, "clusters": [4, 3], "projection": 0,
    "seed": 3, "threads": 1, "log_every": 1,
}  # fmt: skip
FLAGS = [
    *("--model", "small-convnet", "--image-size", "16", "--epochs", "1", "--batch-size", "16", "--clusters", "4,3"),
    *("--projection", "0", "--seed", "3", "--threads", "1", "--log-every", "1"),
]
# The program, on a machine whose users have no names; it looks at what it used when it is done. What a library writes
# to the standard streams behind Python's back goes there, and nowhere else.
PROGRAM = """
import atexit, os, pwd, sys
import sela_ext.training.watch as watch
from sela_ext.cli import main

def nobody(number):
    raise KeyError(f"uid not found: {number}")

def look():
    assert "/dev/shm" not in open("/proc/self/maps").read()
    assert open(f"/proc/self/task/{os.getpid()}/children").read() == ""

def chatty(event, info):
    if os.environ.get("CHATTY"):
        os.write(1, b"stray")
        os.write(2, b"stray")

pwd.getpwuid = nobody
watch.callbacks_of = lambda value: [chatty]
if os.path.exists("/proc/self/maps"):
    atexit.register(look)
main()
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
HOMELESS = {"HOME": "/proc/nowhere"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """48 pictures whose names are not ASCII, some of them not even UTF-8."""
    root, rng = tmp_path_factory.mktemp("photos") / "bilder-ä日", np.random.default_rng(1)
    root.mkdir()
    for i in range(48):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data, "PNG")
        name = f"ß{i:02d}-日.png".encode() if i % 5 else b"latin-\xe9%02d.png" % i
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(data.getvalue())
    return root


@pytest.fixture(scope="module")
def usual(photos, tmp_path_factory):
    """The run on a machine that lacks nothing."""
    return sela_ext.train(photos, out=tmp_path_factory.mktemp("usual") / "run", progress=False, **OPTIONS)


def train(photos, out, *, variables=None, without=(), closed=(), cwd=None):
    """Run the program: status, standard output, standard error."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **(variables or {})}
    for name in without:
        environment.pop(name, None)

    def close():
        for number in closed:
            os.close(number)

    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, "train", "--data", photos, "--out", out, *FLAGS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment,
        cwd=cwd,
        timeout=300,
        preexec_fn=close if closed else None,
    )
    return done.returncode, done.stdout, done.stderr


def assert_whole(out, usual):
    """Everything is there, and holds what it holds elsewhere."""
    with np.load(out / "labels.npz") as found:
        np.testing.assert_array_equal(found["labels"], usual.labels)
        np.testing.assert_array_equal(found["confidence"], usual.confidence)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in events].count("end") == 1
    assert load_checkpoint(out / "checkpoints", tidy=False)["state"]["finished"]
    names = (out / "labels.csv").read_text(encoding="utf-8")
    assert "ß01-日.png" in names
    assert "latin-\\xe900.png" in names
    assert "</html>" in (out / "report.html").read_text(encoding="utf-8")
    assert "stray" not in (out / "train.log").read_text(encoding="utf-8")


# D25
def test_d25_a_machine_that_lacks_all_of_it_runs_with_one_warning(photos, usual, tmp_path):
    # No CUDA, no nvcc on the path, no display, no home, no name of the user, a terminal that can do nothing, an
    # encoding that has none of the names, a current folder that nobody can write to. No shared memory is used, and no
    # other process.
    empty = tmp_path / "no-programs"
    empty.mkdir()
    variables = {**ASCII, **HOMELESS, "CUDA_VISIBLE_DEVICES": "", "TERM": "dumb", "PATH": str(empty)}
    without = ["DISPLAY", "LANG", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "CUDA_HOME", "CUDA_PATH", "USER", "LOGNAME"]
    out = tmp_path / "läuft"
    cwd = "/proc" if os.path.isdir("/proc/self") else "/"
    status, said, err = train(photos, out, variables=variables, without=without, cwd=cwd)
    assert (status, err.count(b"Warning")) == (0, 1), err
    assert b"no curves for TensorBoard" in err  # whose library wants UTF-8, which these names are not on this machine
    assert b"done: 1.0 epochs" in said
    assert_whole(out, usual)


# D25
def test_d25_closed_streams_cost_nothing_and_their_numbers_go_to_no_file(photos, usual, tmp_path):
    out = tmp_path / "run"
    status, said, err = train(photos, out, variables={"CHATTY": "yes"}, closed=[0, 1, 2])
    assert (status, said, err) == (0, b"", b"")
    assert_whole(out, usual)
    for path in out.rglob("*"):
        assert path.is_dir() or b"stray" not in path.read_bytes(), path


# D25
@pytest.mark.slow
@pytest.mark.parametrize(
    "lack",
    [
        {"closed": [0]},
        {"closed": [1]},
        {"closed": [2]},
        {"closed": [0, 1]},
        {"closed": [1, 2]},
        {"variables": {"CUDA_VISIBLE_DEVICES": ""}},
        {"without": ["PATH"]},
        {"without": ["HOME"]},
        {"variables": HOMELESS},
        {"variables": {"TERM": "dumb"}, "without": ["DISPLAY"]},
        {"variables": {"LC_ALL": "C"}, "without": ["LANG"]},
        {"variables": {"PYTHONIOENCODING": "ascii:strict"}},
        {"cwd": "/proc"},
    ],
    ids=str,
)
def test_d25_each_lack_by_itself_is_not_even_a_warning(photos, usual, tmp_path, lack):
    status, said, err = train(photos, tmp_path / "run", **lack)
    assert (status, err) == (0, b"")
    assert (said == b"") == (1 in lack.get("closed", []))
    assert_whole(tmp_path / "run", usual)


# D25
def test_d25_a_run_folder_whose_name_is_not_utf8_lacks_curves_alone(photos, usual, tmp_path):
    out = tmp_path / os.fsdecode(b"l\xe4uft")
    with pytest.warns(UserWarning, match=r"no curves for TensorBoard.*l\\udce4uft"):
        sela_ext.train(photos, out=out, progress=False, **OPTIONS)
    assert_whole(out, usual)
    assert not list(out.glob("tensorboard/*"))
    again = sela_ext.predict(out, photos, threads=1)
    assert again.shape == usual.labels.shape


# D25
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_d25_what_an_output_cannot_encode_is_escaped_and_the_next_line_is_shown_too(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    progress = RunProgress(True)
    progress.say("ä日\udce4.png")
    progress.say("the next line")
    written = stream.buffer.getvalue().decode(encoding).splitlines()
    assert written == [
        {"ascii": "\\xe4\\u65e5\\udce4.png", "latin-1": "ä\\u65e5\\udce4.png", "utf-8": "ä日\\udce4.png"}[encoding],
        "the next line",
    ]
