from typing import Any

def build_info() -> dict[str, Any]:
    """Version, CUDA version and architectures, CPU instruction set in use, compiler."""

def cuda_device_count() -> int:
    """Number of CUDA devices; 0 without CUDA, without a driver or a card."""

def sinkhorn_resolution(rows: int, largest_weight: float) -> float:
    """Value of one unit of the integer column sums."""

def sinkhorn_pass_cpu(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    scale: float,
    potential: int,
    row_weights: int,
    largest_weight: float,
    reference: int,
    column_sums: int,
    lse: int,
    labels: int,
    threads: int,
    isa: str,
) -> tuple[float, float, int]:
    """One fused pass on the CPU, by addresses (0 = absent); returns (objective, weight, masked)."""

def sinkhorn_workspace_cuda(rows: int, cols: int, type: str) -> tuple[int, int]:
    """Device memory of a pass on CUDA beside its arrays: doubles of totals, bytes of scratch."""

def sinkhorn_pass_cuda(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    scale: float,
    potential: int,
    row_weights: int,
    largest_weight: float,
    reference: int,
    column_sums: int,
    lse: int,
    labels: int,
    totals: int,
    masked: int,
    scratch: int,
    stream: int,
) -> None:
    """One fused pass on the current CUDA device, by device addresses."""
