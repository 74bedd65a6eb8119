"""Helpers of these tests, and one headless browser for all of them."""

import importlib.util
import sys
from pathlib import Path

import pytest


def _load(name):
    """A module beside this file; test modules may import it by this name afterwards."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


report_runs = _load("report_runs")
report_browser = _load("report_browser")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A headless Chromium, ended after the last test."""
    if report_browser.CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium); none is on the PATH")
    browser = report_browser.Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """The browser, with light colours, nothing remembered of earlier pages, and a page without complaints."""
    yield chromium
    assert chromium.problems == []
