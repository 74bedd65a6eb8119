"""Fixtures of the kernel tests."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def writer():
    """The module jpeg_writer.py beside this file: JPEG files of kinds that Pillow does not write."""
    spec = importlib.util.spec_from_file_location("jpeg_writer", Path(__file__).with_name("jpeg_writer.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
