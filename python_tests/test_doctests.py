import doctest
import importlib
import pkgutil

import pytest

import sela_ext

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(sela_ext.__path__, "sela_ext.")
    if module.name not in ("sela_ext._core", "sela_ext.__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_every_module_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_main_entrances_have_examples():
    for function in (sela_ext.train, sela_ext.assign, sela_ext.Loader, sela_ext.Augment):
        assert doctest.DocTestFinder(recurse=False).find(function, globs={})[0].examples, function
