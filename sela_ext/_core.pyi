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

class Candidates:
    """The entries of a plan that count, row by row, as one pass found them."""

    def __init__(self, *, level: float, limit: int) -> None: ...
    def columns(self) -> npt.NDArray[Any]:
        """uint16 or uint32 [entries]."""

    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [rows + 1]."""

    def values(self) -> npt.NDArray[np.float32]:
        """float32 [entries]: log p."""

    def weights(self) -> npt.NDArray[np.float32]:
        """float32 [rows], or empty: all 1."""

    @property
    def entries(self) -> int: ...
    @property
    def overflow(self) -> bool: ...
    @property
    def rows(self) -> int: ...

class NewtonRows:
    """Candidates in the form that Newton's method works on."""

    def __init__(self, candidates: Candidates) -> None:
        """Takes the arrays out of the candidates, which are empty afterwards."""

    def counts(self) -> npt.NDArray[np.float64]:
        """float64 [K]: weight of single rows."""

    def product(
        self, plan: npt.NDArray[np.float32], x: npt.NDArray[np.float64], threads: int, isa: str
    ) -> npt.NDArray[np.float64]:
        """The Hessian at a plan times x."""

    def prune(self, plan: npt.NDArray[np.float32], level: float) -> None:
        """Drops the entries of at most exp(-level) in a plan."""

    def solve(
        self,
        target: npt.NDArray[np.float64],
        defect: npt.NDArray[np.float64],
        d: npt.NDArray[np.float64],
        ratio: float,
        tolerance: float,
        steps: int,
        products: int,
        clip: float,
        reach: float,
        prune: float,
        threads: int,
        isa: str,
    ) -> tuple[npt.NDArray[np.float64], float, int, int, int, bool]:
        """Newton's method from d: d, error, steps, products, sums, stalled."""

    def sums(
        self, ratio: float, d: npt.NDArray[np.float64], threads: int, isa: str
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float, npt.NDArray[np.float32]]:
        """Column sums, diagonal of the Hessian, objective and plan at d."""

    @property
    def entries(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def weight(self) -> float: ...

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
    every: int = 1,
    candidates: Candidates | None = None,
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
