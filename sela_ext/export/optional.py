"""Packages that only some formats need."""

from __future__ import annotations

import importlib
from typing import Any

from sela_ext.errors import OptionError


def optional_package(module: str, extra: str, what: str) -> Any:
    """Import a package that need not be there.

    Args:
        module: to import.
        extra: of this package, that brings it.
        what: needs it, for the message.

    Raises:
        OptionError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise OptionError(
            f"{what}: expected the package {package}, which is not installed; pip install 'sela_ext[{extra}]'"
        ) from error
