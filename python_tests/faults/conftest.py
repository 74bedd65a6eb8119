"""Fixtures: a server that starts the program without its imports, small data, and the helpers of runs.py."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest


def _load():
    spec = importlib.util.spec_from_file_location("runs", Path(__file__).with_name("runs.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def runs():
    """The module runs.py beside this file."""
    return _load()


@pytest.fixture(scope="session")
def server(runs, tmp_path_factory):
    """Starts runs."""
    found = runs.Server(tmp_path_factory.mktemp("printed"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Digits, few of them: the arguments that name them and their classes."""
    from sklearn.datasets import load_digits

    folder, digits = tmp_path_factory.mktemp("data"), load_digits()
    np.save(folder / "images.npy", (digits.images[:160] * 15).astype(np.uint8))
    np.save(folder / "classes.npy", digits.target[:160])
    return ["--data", str(folder / "images.npy"), "--labels", str(folder / "classes.npy")]


@pytest.fixture(scope="module")
def command(request, data):
    """A training with the options SMALL of the test's module; where to, the test adds."""
    return ["train", *data, *request.module.SMALL]


@pytest.fixture(scope="module")
def unbroken(server, command, tmp_path_factory):
    """The folder of such a run that nothing happens to."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    status, printed = server.run(*command, "--out", out)
    assert status == 0, printed
    return out


@pytest.fixture
def sela(capfd):
    """The program in this process: its status, standard output and standard error, those of its children too."""
    from sela_ext.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        printed = capfd.readouterr()
        return ended.value.code, printed.out, printed.err

    return run
