import functools
import importlib.util
from pathlib import Path

import pytest


@functools.cache
def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def published():
    """The published checkpoints, stated again: published.py beside this file."""
    return _load("published")
