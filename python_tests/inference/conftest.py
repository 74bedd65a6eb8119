"""A short run on the digits, trained once for all tests of this folder."""

import pytest
import torch

import sela_ext

OPTIONS = {"epochs": 1, "clusters": [10, 7, 10], "threads": 1, "precision": "float32", "progress": False, "seed": 3}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The result of a run of one epoch, three heads."""
    result = sela_ext.train("digits", out=tmp_path_factory.mktemp("runs") / "digits", **OPTIONS)
    torch.set_num_threads(1)
    return result


@pytest.fixture
def run(trained):
    """Its folder, which no test changes."""
    return trained.out
