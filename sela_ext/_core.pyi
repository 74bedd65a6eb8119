from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

AUGMENT_CUDA_SIDE: int

class AugmentOptions:
    """How parameters are drawn and images are finished."""

    def __init__(
        self,
        *,
        size: int,
        crop: str,
        resize: int,
        scale: Sequence[float],
        log_ratio: Sequence[float],
        ratio: Sequence[float],
        flip_probability: float,
        gray_probability: float,
        jitter_probability: float,
        brightness: Sequence[float],
        contrast: Sequence[float],
        saturation: Sequence[float],
        hue: Sequence[float],
        gray_first: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None: ...

def augment_array(
    options: AugmentOptions,
    source: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64],
    parameters: npt.NDArray[np.void],
    out: int,
    dtype: str,
    channels_last: bool,
    threads: int,
) -> None:
    """The fused pass over rows of one array [N, H, W, C]; out is an address."""

def augment_list(
    options: AugmentOptions,
    source: Sequence[npt.NDArray[np.uint8]],
    parameters: npt.NDArray[np.void],
    out: int,
    dtype: str,
    channels_last: bool,
    threads: int,
) -> None:
    """The fused pass over a list of arrays [H, W, C] of any sizes; out is an address."""

def augment_resident_cuda(
    options: AugmentOptions,
    images: int,
    images_count: int,
    height: int,
    width: int,
    channels: int,
    index: int,
    count: int,
    seed: int,
    epoch: int,
    view: int,
    given: int,
    drawn: int,
    out: int,
    dtype: str,
    channels_last: bool,
    stream: int,
) -> None:
    """The fused pass over images of the current CUDA device, by device addresses (0 = absent)."""

def build_info() -> dict[str, Any]:
    """Version, CUDA version and architectures, CPU instruction set in use, compiler."""

def check_parameters(
    options: AugmentOptions,
    parameters: npt.NDArray[np.void],
    height: int,
    width: int,
) -> None:
    """Raises ValueError for parameters that do not fit images of height x width."""

def cuda_device_count() -> int:
    """Number of CUDA devices; 0 without CUDA, without a driver or a card."""

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> npt.NDArray[np.uint32]:
    """Four random words: Philox4x32-10 of one counter."""

def sample_parameters(
    options: AugmentOptions,
    heights: npt.NDArray[np.int32],
    widths: npt.NDArray[np.int32],
    index: npt.NDArray[np.int64],
    seed: int,
    epoch: int,
    view: int,
    out: npt.NDArray[np.void],
) -> None:
    """Draws augmentation parameters into the records of out."""

def sample_parameters_cuda(
    options: AugmentOptions,
    height: int,
    width: int,
    index: int,
    count: int,
    seed: int,
    epoch: int,
    view: int,
    drawn: int,
    stream: int,
) -> None:
    """Draws augmentation parameters on the current CUDA device, by device addresses."""

def shuffle(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A random permutation of 0 .. count - 1, keyed by (seed, epoch)."""
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
