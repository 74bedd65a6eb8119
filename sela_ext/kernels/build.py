"""What this build holds."""

from __future__ import annotations

from typing import Any

from sela_ext import _core


def build_info() -> dict[str, Any]:
    """Tell what this build holds.

    Returns:
        version, cuda (bool), cuda_version, cuda_archs (list of str: machine code, e.g. "90"), cuda_ptx (list of str:
        PTX, which newer cards compile for themselves), cpu_isa ("avx512" | "avx2" | "generic"), compiler.
    """
    return dict(_core.build_info())
