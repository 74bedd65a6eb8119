from typing import Any

def build_info() -> dict[str, Any]:
    """Version, CUDA version and architectures, CPU instruction set in use, compiler."""

def cuda_device_count() -> int:
    """Number of CUDA devices; 0 without CUDA, without a driver or a card."""
