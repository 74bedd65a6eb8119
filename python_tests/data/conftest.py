"""What the tests of the sources share."""

import functools
import importlib.util
from pathlib import Path

import pytest


@functools.cache
def _source_files():
    spec = importlib.util.spec_from_file_location("source_files", Path(__file__).with_name("source_files.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def files():
    """The module source_files.py beside this file."""
    return _source_files()
