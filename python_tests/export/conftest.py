"""Two short runs, trained once for all tests of this folder: digits, and a folder of files with odd names."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext

OPTIONS = {"epochs": 1, "threads": 1, "precision": "float32", "progress": False, "seed": 3}
# Names of image files as they come in the wild; two pairs share a file name.
NAMES = [
    b"plain.png", b"a b.png", b"-rf.png", b'with,comma "and" quotes.png', b"new\nline.png", b"return\rhere.png",
    b"percent%s{0}.png", b"<b>bold</b>.png", b"caf\xc3\xa9.png", b"not utf-8 \xff\xfe.png", b"nan.png",
    b"one/same.png", b"two/same.png", b"one/deep/er.png", b"two/deep/er.png", b"x" * 240 + b".png",
    b"\xe2\x80\xaereversed.png", b"no_suffix", b"back\\slash.png", b"=SUM(A1).png",
]  # fmt: skip


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """One epoch of the digits, three heads."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    sela_ext.train("digits", out=out, clusters=[10, 7, 10], **OPTIONS)
    torch.set_num_threads(1)
    return out


@pytest.fixture(scope="session")
def odd_files(tmp_path_factory):
    """A folder of image files with the names above."""
    folder = tmp_path_factory.mktemp("odd files")
    draws = np.random.default_rng(0)
    for name in NAMES:
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            Image.fromarray(draws.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
    return folder


@pytest.fixture(scope="session")
def files_run(tmp_path_factory, odd_files):
    """One epoch of a ResNet-18 on them, two heads."""
    out = tmp_path_factory.mktemp("runs") / "files"
    sela_ext.train(
        str(odd_files), out=out, model="resnet18", clusters=[3, 5], batch_size=10, head_kind="linear", **OPTIONS
    )
    torch.set_num_threads(1)
    return out
