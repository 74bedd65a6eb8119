"""Runs what documents say: their commands and code, in a folder with small stand-ins for the files that they name."""

import importlib.util
import io
import json
import os
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sela_ext
from sela_ext.cli import main

ROOT = Path(__file__).resolve().parents[2]

# What is appended to every command, so that it ends in seconds: the later of two equal options counts. Nothing else of
# a command is changed.
SHORTER = {
    "train": ["--epochs", "1", "--threads", "1", "--no-progress"],
    "evaluate": ["--threads", "1", "--no-progress"],
    "predict": ["--threads", "1"],
    "embed": ["--threads", "1"],
    "export": ["--threads", "1"],
    "doctor": ["--threads", "1"],
    "pack": ["--threads", "1", "--no-progress"],
    "assign": ["--threads", "1"],
    "finetune": [
        "--iterations",
        "2",
        "--image-size",
        "64",
        "--test-crops",
        "centre",
        "--threads",
        "1",
        "--no-progress",
    ],
}
# The same for images that are read from files, which the defaults train resnet18 on, at 128 pixels.
SHORTER_ON_FILES = ["--image-size", "64", "--heads", "2"]


def load(path):
    """A helper of another folder of tests."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "python_tests" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_photos(folder, count, seed, size=(72, 64)):
    """Pictures of one colour each with noise, so that there is something to tell apart."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.clip(rng.integers(0, 256, 3) + rng.normal(0, 30, (size[1], size[0], 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.jpg", quality=90)


def write_stand_ins(folder):
    """Small files under the names that documents and examples use."""
    write_photos(folder / "my/photos/2024", 24, 0)
    write_photos(folder / "my/photos/2025/summer", 24, 1)
    write_photos(folder / "my/new-photos", 7, 2)
    write_photos(folder / "new/photos", 7, 2)
    for number, name in enumerate(("cat", "dog")):
        write_photos(folder / "my/labelled/train" / name, 16, 10 + number)
        write_photos(folder / "my/labelled/test" / name, 6, 20 + number)
    rng = np.random.default_rng(0)
    np.save(folder / "features.npy", rng.standard_normal((240, 16)).astype(np.float32))
    np.save(folder / "y.npy", rng.integers(0, 5, 240))
    np.save(folder / "logits.npy", rng.standard_normal((240, 12)).astype(np.float32))
    np.save(folder / "weight.npy", rng.standard_normal((12, 16)))
    np.save(folder / "bias.npy", rng.standard_normal(12))
    load("finetuning/conftest.py").write_voc(folder / "VOCdevkit/VOC2007", train=8, test=4)
    (folder / "run.yaml").write_text("data: digits\nout: runs/from-file\nclusters: 10\n", encoding="utf-8")


class Desk:
    """A folder in which documents are read and done.

    Attributes:
        folder: where it happens.
        known: names that code blocks have defined so far.
        output: what the last command wrote.
        commands: how many were executed.
        left_out: beginnings of those that are not.
    """

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.known = {}
        self.output = ""
        self.commands = 0
        self.left_out = {}
        self.setattr = monkeypatch.setattr
        self._setenv = monkeypatch.setenv

    load = staticmethod(load)

    def setenv(self, **values):
        """Environment variables of this test alone."""
        for name, value in values.items():
            self._setenv(name, value)

    def command(self, line, more=()):
        """One line of a shell; commands joined by && are done one by one."""
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if not words or part.startswith(tuple(self.left_out)):
                continue
            self.commands += 1
            if words[0] == "pip":
                check_pip(part.strip())
                continue
            if words == ["pytest"]:
                check_pytest()
                continue
            assert words[0] == "sela", f"expected a command of sela, pip or pytest, found {part}"
            self.sela([*words[1:], *more])

    def sela(self, words):
        extra = list(SHORTER.get(words[0], []))
        data = words[words.index("--data") + 1] if "--data" in words else ""
        if words[0] == "train" and data.startswith(("my/", "packs/")):
            extra += SHORTER_ON_FILES
        if "--budget" in words:
            extra = ["--budget", "1s", *extra[extra.index("--epochs") + 2 :]]
        if "--verify" in words:
            extra = []
        written = io.StringIO()
        with redirect_stdout(written), redirect_stderr(written), pytest.raises(SystemExit) as caught:
            main([*words, *extra])
        self.output = written.getvalue()
        assert caught.value.code == 0, f"sela {shlex.join(words)}\n{self.output}"

    def python(self, code, where):
        """A block of code; what earlier ones defined is known."""
        exec(compile(code, where, "exec"), self.known)

    def page(self, name, languages=("bash", "python", "yaml")):
        """All blocks of a page, in order; returns how many of each language."""
        counts = dict.fromkeys(languages, 0)
        for language, code, line in blocks_of(ROOT / name):
            if language not in languages:
                continue
            counts[language] += 1
            if language == "bash":
                for one in code.splitlines():
                    self.command(one)
            elif language == "yaml":
                Path(re.match(r"# (\S+\.yaml)\n", code)[1]).write_text(code, encoding="utf-8")
            else:
                self.python("\n" * line + code, f"{name}")
        return counts


def blocks_of(path):
    """(language, code, line) of every fenced block."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield match[1], match[2], text.count("\n", 0, match.start()) + 1


def check_pip(command):
    """A pip line is not executed: continuous integration does what it says, from scratch."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    if command == "pip install .":  # a part of the other
        command = "pip install '.[test]'"
    assert command in script.splitlines(), f"expected {command} as a line of .ci/run"


def check_pytest():
    """Nor is pytest, by itself."""
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == "pytest"


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A folder with stand-ins, in which the test works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})  # one processor: what "auto" threads are
    write_stand_ins(tmp_path)
    return tmp_path


@pytest.fixture
def desk(stand_ins, monkeypatch):
    """The same with `sela_ext.train` that ends after one epoch."""
    train = sela_ext.train

    def shorter(data, **options):
        limits = {} if options.get("budget") else {"epochs": 1}
        if isinstance(data, str) and data.startswith("my/"):
            limits |= {"image_size": 64, "heads": 2}
        return train(data, **{**options, **limits, "threads": 1, "progress": False})

    monkeypatch.setattr(sela_ext, "train", shorter)
    return Desk(stand_ins, monkeypatch)


@pytest.fixture(scope="session")
def documents():
    """Root of the repository, and its fenced blocks by path."""
    return ROOT, blocks_of


@pytest.fixture
def read_notebook():
    """A notebook as its cells."""
    return lambda name: json.loads((ROOT / name).read_text(encoding="utf-8"))
