"""SeLa: from unlabelled images to labels and a trained network.

Importing this package loads the compiled core and nothing else; torch is imported at the first use of a name that
needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

try:
    from sela_ext import _core  # noqa: F401 - a clear error if it is missing
except ImportError as error:  # pragma: no cover - depends on how the package was installed
    raise ImportError(
        "sela_ext: the compiled core (sela_ext._core) cannot be loaded. Expected an installed package, found "
        f"{__file__}. If this is the source folder, run `pip install .` and start Python from another folder "
        f"(or use `pytest` instead of `python -m pytest`). Cause: {error}"
    ) from error

from sela_ext.assign import (
    Assignment,
    Certificate,
    FeatureLogits,
    MemoryPlan,
    assign,
    assign_batch,
    assign_heads,
    memory_plan,
    shard_rows,
    verify,
)
from sela_ext.doctor import doctor
from sela_ext.export import export
from sela_ext.kernels.build import build_info
from sela_ext.kernels.jpeg import decode_jpeg

__version__: str = build_info()["version"]

# Public names that need torch or other heavy packages, and the module each one comes from.
_LAZY = {
    "train": "sela_ext.training",
    "finetune": "sela_ext.finetuning",
    "load_released": "sela_ext.compat",
    "Loader": "sela_ext.data",
    "Augment": "sela_ext.data",
    "SelfLabelling": "sela_ext.embeddings",
    "embed": "sela_ext.inference",
    "evaluate": "sela_ext.inference",
    "predict": "sela_ext.inference",
    "pack": "sela_ext.data",
    "verify_pack": "sela_ext.data",
}

__all__ = [
    "Assignment",
    "Certificate",
    "FeatureLogits",
    "MemoryPlan",
    "__version__",
    "assign",
    "assign_batch",
    "assign_heads",
    "build_info",
    "decode_jpeg",
    "doctor",
    "export",
    "memory_plan",
    "shard_rows",
    "verify",
    *sorted(_LAZY),
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'sela_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
