from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

ANDERSON_MEMORY: int
ANDERSON_VECTORS: int
AUGMENT_CUDA_SIDE: int
NEWTON_PER_POINT: int
NEWTON_POINT: int
NEWTON_TILE_ROWS: int
NEWTON_VECTORS: int
most_features: int

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

class EffectOptions:
    """What follows the colour operations."""

    def __init__(
        self,
        *,
        blur_probability: float,
        blur_sigma: Sequence[float],
        blur_radius: int,
        tone_probability: float,
        sharpness: Sequence[float],
        noise_probability: float,
        noise_sigma: Sequence[float],
        sobel: bool,
    ) -> None: ...

class Candidates:
    """The entries of a plan that count, row by row, as one pass found them."""

    def __init__(self, *, level: float, limit: int) -> None: ...
    @staticmethod
    def of(
        *,
        offsets: npt.NDArray[np.int64],
        columns: npt.NDArray[np.uint32],
        values: npt.NDArray[np.float32],
        weights: npt.NDArray[np.float32],
        cols: int,
        level: float,
        limit: int,
    ) -> Candidates:
        """Candidates from arrays as the methods below return them; checks them."""

    def append(self, other: Candidates) -> None:
        """Adds the rows of another part behind these, and empties it."""

    def columns(self) -> npt.NDArray[Any]:
        """uint16 or uint32 [entries]."""

    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [rows + 1]."""

    def values(self) -> npt.NDArray[np.float32]:
        """float32 [entries]: log p."""

    def weights(self) -> npt.NDArray[np.float32]:
        """float32 [rows], or empty: all 1."""

    @property
    def cols(self) -> int: ...
    @property
    def entries(self) -> int: ...
    @property
    def level(self) -> float: ...
    @property
    def limit(self) -> int: ...
    @property
    def overflow(self) -> bool: ...
    @property
    def rows(self) -> int: ...

class JpegBatch:
    """What a CUDA device needs of some indexed JPEG files."""

    def __init__(
        self,
        files: Sequence[Buffer],
        indexes: Sequence[Buffer | None],
        boxes: Sequence[Sequence[int]],
        most_coefficients: int,
        most_pixels: int,
    ) -> None: ...
    def images(self) -> list[dict[str, Any]]:
        """What became of each file that was taken, and where its planes will lie."""

    def write(self, out: int) -> None:
        """Writes the upload to an address."""

    @property
    def coefficient_bytes(self) -> int: ...
    @property
    def image_count(self) -> int:
        """Statuses that the device writes."""

    @property
    def plane_bytes(self) -> int: ...
    @property
    def taken(self) -> int: ...
    @property
    def tile_count(self) -> int:
        """Warps that transform."""

    @property
    def upload_bytes(self) -> int: ...
    @property
    def work_count(self) -> int:
        """Blocks of threads that decode."""

    @property
    def workspace_bytes(self) -> int: ...

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
        offset: npt.NDArray[np.float64] | None = None,
        strength: float = 0.0,
        low: npt.NDArray[np.float64] | None = None,
        high: npt.NDArray[np.float64] | None = None,
    ) -> tuple[npt.NDArray[np.float64], float, int, int, int, bool]:
        """Newton's method from d: d, error, steps, products, sums, stalled."""

    def sums(
        self, ratio: float, d: npt.NDArray[np.float64], threads: int, isa: str
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float, npt.NDArray[np.float32]]:
        """Column sums, diagonal of the Hessian, objective and plan at d."""

    @property
    def cols(self) -> int: ...
    @property
    def entries(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def weight(self) -> float: ...

def anderson_cpu(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    scale: float,
    row_weights: int,
    largest_weight: float,
    maxima: int,
    maxima_scale: float,
    reference: npt.NDArray[Any] | None,
    target: npt.NDArray[np.float64],
    log_target: npt.NDArray[np.float64],
    potential: npt.NDArray[np.float64],
    residual: npt.NDArray[np.float64],
    error: float,
    steps: npt.NDArray[np.float64],
    changes: npt.NDArray[np.float64],
    tolerance: float,
    passes: int,
    memory: int,
    cap: float,
    restart: float,
    patience: int,
    faint: float,
    threads: int,
    isa: str,
) -> dict[str, Any]:
    """Many passes with Anderson's acceleration, by addresses (0 = absent); see csrc/sela/anderson.h."""

def anderson_next(
    residual: npt.NDArray[np.float64], steps: npt.NDArray[np.float64], changes: npt.NDArray[np.float64], cap: float
) -> npt.NDArray[np.float64]:
    """The accelerated step from a residual [K], with steps and changes [m, K] behind it, of at most cap nats or so."""

def augment_array(
    options: AugmentOptions,
    effect_options: EffectOptions,
    source: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64],
    parameters: npt.NDArray[np.void],
    effects: npt.NDArray[np.void] | None,
    out: int,
    dtype: str,
    channels_last: bool,
    threads: int,
) -> None:
    """The fused pass over rows of one array [N, H, W, C]; out is an address."""

def augment_device_cuda(
    options: AugmentOptions,
    effect_options: EffectOptions,
    resident: int,
    resident_count: int,
    crops: int,
    planes: int,
    exact: bool,
    height: int,
    width: int,
    channels: int,
    index: int,
    count: int,
    needs: tuple[bool, bool, bool, float],
    seed: int,
    epoch: int,
    view: int,
    given: int,
    given_effects: int,
    drawn: int,
    workspace: int,
    out: int,
    dtype: str,
    channels_last: bool,
    stream: int,
) -> None:
    """The fused pass over images of any size of the current CUDA device, by device addresses (0 = absent)."""

def augment_list(
    options: AugmentOptions,
    effect_options: EffectOptions,
    source: Sequence[npt.NDArray[np.uint8]],
    parameters: npt.NDArray[np.void],
    effects: npt.NDArray[np.void] | None,
    out: int,
    dtype: str,
    channels_last: bool,
    threads: int,
) -> None:
    """The fused pass over a list of arrays [H, W, C] of any sizes; out is an address."""

def augment_planes(
    options: AugmentOptions,
    effect_options: EffectOptions,
    source: Sequence[
        tuple[Sequence[npt.NDArray[np.uint8]], int, int, int, int, Sequence[int], Sequence[bool] | None, bool, int]
    ],
    exact: bool,
    channels: int,
    parameters: npt.NDArray[np.void],
    effects: npt.NDArray[np.void] | None,
    out: int,
    dtype: str,
    channels_last: bool,
    threads: int,
) -> None:
    """The fused pass over images as planes, see `sela_ext.kernels.augment_planes`; out is an address."""

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

def augment_workspace_cuda(
    options: AugmentOptions,
    effect_options: EffectOptions,
    channels: int,
    height: int,
    width: int,
    count: int,
    needs: tuple[bool, bool, bool, float],
) -> int:
    """Bytes that augment_device_cuda needs for its workspace; needs: (contrast, tone, effects, longest blur)."""

def build_info() -> dict[str, Any]:
    """Version, CUDA version and architectures, CPU instruction set in use, compiler."""

def centred(x: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """x, shifted so that target . x = 0."""

def check_parameters(
    options: AugmentOptions,
    parameters: npt.NDArray[np.void],
    height: int,
    width: int,
) -> None:
    """Raises ValueError for parameters that do not fit images of height x width."""

def check_planes(
    options: AugmentOptions,
    source: Sequence[
        tuple[Sequence[npt.NDArray[np.uint8]], int, int, int, int, Sequence[int], Sequence[bool] | None, bool, int]
    ],
    parameters: npt.NDArray[np.void],
) -> None:
    """Raises ValueError for planes that lack samples, or parameters that do not fit them."""

def column_state(
    columns: npt.NDArray[np.float64], weight: float, target: npt.NDArray[np.float64], potential: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float, float]:
    """What column sums come to: (shares, their logarithms, error, target . potential)."""

def cuda_device_count() -> int:
    """Number of CUDA devices; 0 without CUDA, without a driver or a card."""

def decode_jpeg_cuda(batch: JpegBatch, upload: int, workspace: int, planes: int, status: int, stream: int) -> None:
    """Planes of a batch whose upload lies on the current CUDA device, by device addresses."""

def jpeg_header(data: Buffer) -> dict[str, Any]:
    """What the headers say; status "ok" if the file may be decoded."""

def jpeg_planes(
    data: Buffer,
    top: int,
    left: int,
    height: int,
    width: int,
    scale: int,
    index: Any,
    build: bool,
    max_pixels: int,
    isa: str,
) -> tuple[str, Any, bytes | None]:
    """(status, (colour, planes), index); height 0 = the whole image."""

def jpeg_rgb(
    data: Buffer,
    top: int,
    left: int,
    height: int,
    width: int,
    scale: int,
    index: Any,
    build: bool,
    max_pixels: int,
    isa: str,
) -> tuple[str, Any, bytes | None]:
    """(status, uint8 [height, width, 3], index); height 0 = the whole image."""

def needed_boxes(
    options: AugmentOptions,
    parameters: npt.NDArray[np.void],
    heights: npt.NDArray[np.int32],
    widths: npt.NDArray[np.int32],
    steps: Sequence[int],
    smooth: Sequence[bool] | None,
) -> npt.NDArray[np.int32]:
    """Top, left, bottom, right of the pixels whose samples each record of parameters needs, [count, 4]."""

def anderson_step_cuda(
    columns: int,
    potential: int,
    next: int,
    target: int,
    vectors: int,
    state: int,
    cols: int,
    unit: float,
    faint: float,
    restart: float,
    cap: float,
    accelerate: bool,
    round: bool,
    stream: int,
) -> None:
    """The next potential from the column sums of a pass, by device addresses."""

def mapped_faults_begin() -> bool:
    """Have a mapped file that cannot be read any more end the process with its name; False where something is there for SIGBUS."""

def mapped_faults_end() -> None:
    """Have SIGBUS do again what it does by itself."""

def newton_compact_cuda(
    rows: tuple[int, int, int, int, int, int, int, float],
    plan: int,
    level: float,
    ends: int,
    offsets: int,
    columns: int,
    values: int,
    weights: int,
    stream: int,
) -> None:
    """The rows of the entries that remain, by device addresses."""

def newton_count_cuda(
    rows: tuple[int, int, int, int, int, int, int, float],
    plan: int,
    level: float,
    kept: int,
    counts: int,
    stream: int,
) -> None:
    """Entries that remain per row, and rows with a single one counted, by device addresses."""

def newton_product_cuda(
    rows: tuple[int, int, int, int, int, int, int, float],
    x: int,
    largest: float,
    sums: tuple[int, int, int],
    stream: int,
) -> None:
    """The Hessian at a plan times x, by device addresses."""

def newton_rounds_cuda(
    rows: tuple[int, int, int, int, int, int, int, float],
    columns: tuple[int, int, int, int, int, float],
    counts: int,
    weight: float,
    total: float,
    ratio: float,
    tolerance: float,
    steps: int,
    products: int,
    clip: float,
    reach: float,
    want_plan: bool,
    vectors: int,
    state: int,
    sums: tuple[int, int, int],
    count: int,
    stream: int,
) -> None:
    """So many rounds of Newton's method, by device addresses."""

def newton_sums_cuda(
    rows: tuple[int, int, int, int, int, int, int, float],
    ratio: float,
    d: int,
    sums: tuple[int, int, int],
    stream: int,
) -> None:
    """Sums over candidates at d, by device addresses."""

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> npt.NDArray[np.uint32]:
    """Four random words: Philox4x32-10 of one counter."""

def plane_records(
    source: Sequence[
        tuple[Sequence[npt.NDArray[np.uint8]], int, int, int, int, Sequence[int], Sequence[bool] | None, bool, int]
    ],
    addresses: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint8]:
    """Records for augment_device_cuda of images as augment_planes takes them, whose planes lie at these addresses."""

def sample_effects(
    options: EffectOptions,
    index: npt.NDArray[np.int64],
    seed: int,
    epoch: int,
    view: int,
    out: npt.NDArray[np.void],
) -> None:
    """Draws effects into the records of out, which are zeros."""

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
    first_row: int = 0,
    rows_in_all: int = 0,
    totals: int = 0,
    maxima: int = 0,
    maxima_scale: float = 0.0,
    bounds: int = 0,
    bounds_known: bool = False,
) -> tuple[float, float, int, int]:
    """One fused pass on the CPU, by addresses (0 = absent); returns (objective, weight, masked, live)."""

def sinkhorn_sums_cpu(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    scale: float,
    potential: npt.NDArray[np.float64],
    row_weights: int,
    largest_weight: float,
    reference: npt.NDArray[Any] | None,
    want_labels: bool,
    threads: int,
    isa: str,
    every: int,
    candidates: Candidates | None,
    first_row: int,
    rows_in_all: int,
    maxima: int,
    maxima_scale: float,
    bounds: int,
    bounds_known: bool,
) -> tuple[
    npt.NDArray[np.float64],
    npt.NDArray[np.int64],
    npt.NDArray[Any],
    npt.NDArray[np.int32] | None,
    float,
    float,
    int,
    int,
]:
    """The same into new arrays: (column sums, exact integers, lse, labels or None, objective, weight, masked, live)."""

def sinkhorn_exact_totals(totals: int, blocks: int, largest_weight: float, words: int) -> None:
    """The eight words of the totals of objective and weight, by addresses, from those of blocks [2, blocks]."""

def sinkhorn_total(words: int, largest_weight: float) -> float:
    """The total that four words stand for, by their address."""

def store_logits_cpu(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    kind: str,
    lam: float,
    values: int,
    maxima: int,
    threads: int,
    isa: str,
) -> int:
    """Logits to 16 bits, by addresses; returns how many finite entries were stored as -inf."""

def sinkhorn_bounds_stride(cols: int) -> int:
    """Entries of the chunk bounds of one row."""

def store_logits_cuda(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    kind: str,
    lam: float,
    values: int,
    values_stride: int,
    maxima: int,
    saturated: int,
    stream: int,
) -> None:
    """Logits to 16 bits on the current CUDA device, by device addresses; what is stored as -inf is counted there."""

def sinkhorn_candidates_cuda(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    scale: float,
    potential: int,
    first_row: int,
    every: int,
    level: float,
    has_maxima: bool,
    scratch: int,
    offsets: int,
    columns: int,
    values: int,
    stream: int,
) -> None:
    """The candidates that such a pass has counted, by device addresses."""

def sinkhorn_workspace_cuda(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    first_row: int = 0,
    every: int = 1,
    candidates: bool = False,
    has_maxima: bool = False,
) -> tuple[int, int]:
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
    rows_in_all: int = 0,
    first_row: int = 0,
    every: int = 1,
    level: float = 0.0,
    counts: int = 0,
    maxima: int = 0,
    maxima_scale: float = 0.0,
) -> None:
    """One fused pass on the current CUDA device, by device addresses."""

def find_candidates_cpu(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    scale: float,
    prices: int,
    label_prices: int,
    bonus: int,
    labels: int,
    selected: int,
    selected_count: int,
    count: int,
    slack: float,
    floor: float,
    tie: float,
    columns: int,
    values: int,
    found: int,
    regret: int,
    threads: int,
    isa: str,
    first_row: int,
) -> None:
    """The best columns of rows, by addresses (selected: 0 = all rows)."""

def column_margins_cpu(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    scale: float,
    prices: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int32],
    selected: npt.NDArray[np.int64],
    threads: int,
    isa: str,
) -> npt.NDArray[np.float32]:
    """The four smallest losses of each column among rows."""

def find_candidates_cuda(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    scale: float,
    prices: int,
    label_prices: int,
    bonus: int,
    labels: int,
    selected: int,
    selected_count: int,
    count: int,
    slack: float,
    floor: float,
    tie: float,
    columns: int,
    values: int,
    found: int,
    regret: int,
    first_row: int,
    stream: int,
) -> None:
    """The best columns of rows on the current CUDA device, by device addresses (selected: 0 = all rows)."""

def column_margins_workspace_cuda(selected_count: int, cols: int) -> int:
    """Bytes of device memory that column_margins_cuda needs."""

def column_margins_cuda(
    logits: int,
    type: str,
    rows: int,
    cols: int,
    stride: int,
    scale: float,
    prices: int,
    labels: int,
    selected: int,
    selected_count: int,
    margins: int,
    scratch: int,
    stream: int,
) -> None:
    """The four smallest losses of each column on the current CUDA device, by device addresses."""

def smooth_prices(
    columns: npt.NDArray[np.int32],
    values: npt.NDArray[np.float32],
    found: npt.NDArray[np.int32],
    wanted: npt.NDArray[np.float64],
    prices: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int32],
    stages: Sequence[tuple[float, int]],
    relaxation: float,
    tolerance: float,
    tie: float,
    threads: int,
    isa: str,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Sharp Sinkhorn iterations on lists; returns new prices, and the labels at them."""

class IndexStore:
    """Checkpoint indexes by image number, in append-only files."""

    def __init__(self, folder: bytes, rank: int) -> None: ...
    def find(self, image: int, size: int, modified: int) -> tuple[str, bytes]:
        """("index" | "other" | "nothing", payload)"""

    def add(self, image: int, size: int, modified: int, index: bytes, replace: bool) -> None:
        """Appends the index of an image."""

    def refresh(self) -> None:
        """Takes in what other processes have written."""

    def close(self) -> None:
        """Ends reading and writing."""

    def __len__(self) -> int: ...
    def bytes(self) -> int:
        """Size of all files."""

    def failure(self) -> str:
        """Why records are not kept (in the folder); "" = they are."""

    def writes(self) -> bool:
        """Whether records are kept, be it in an unnamed file."""

    def path(self) -> str:
        """Of the file that is written to; "" = an unnamed one."""

class ReadTicket:
    """A batch on its way."""

    def wait(self, milliseconds: int) -> bool:
        """Whether the batch is done, within so much time."""

class Reader:
    """Threads that make batches of JPEG files."""

    def __init__(
        self,
        *,
        options: Sequence[AugmentOptions],
        effects: Sequence[EffectOptions],
        threads: int,
        channels: int,
        exact: bool,
        exif: bool,
        reduce: bool,
        dtype: str,
        channels_last: bool,
        max_pixels: int,
        cache_bytes: int,
        store: IndexStore | None,
        isa: str,
    ) -> None: ...
    def submit(
        self,
        *,
        items: list[Any] | bytes,
        indexes: list[Any] | None,
        index: npt.NDArray[np.int64],
        keys: npt.NDArray[np.int64] | None,
        outs: Sequence[int],
        seed: int,
        epoch: int,
        views: Sequence[int],
        status: npt.NDArray[Any],
        error: npt.NDArray[Any],
        height: npt.NDArray[Any],
        width: npt.NDArray[Any],
        params: Sequence[npt.NDArray[np.void]],
        effects: Sequence[npt.NDArray[np.void] | None],
        arena: tuple[int, int, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]] | None,
    ) -> ReadTicket:
        """Queues a batch, which is written to the arrays given; outs are addresses, not looked at with an arena: (address, bytes, records [views, count], offsets [count], wanted bytes [count])."""

    def close(self) -> None:
        """Ends the threads."""

    def elsewhere(self) -> bool:
        """Whether another process made it."""

    def threads(self) -> int:
        """Threads that are there."""

    def cached_bytes(self) -> int:
        """Memory of the small images that are kept."""

def jpeg_orientation(data: Buffer) -> int:
    """Orientation in the EXIF data of a JPEG file, 1..8; 0 = ask Pillow."""

class Rounding:
    """Labels of admissible cluster sizes from candidate lists."""

    def __init__(
        self,
        rows: int,
        total: int,
        prices: npt.NDArray[np.float64],
        low: npt.NDArray[np.int64],
        high: npt.NDArray[np.int64],
        threads: int,
    ) -> None: ...
    def add(
        self,
        rows: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int32],
        columns: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32],
        found: npt.NDArray[np.int32],
    ) -> int:
        """Adds lists; returns how many columns are new to their row."""

    def solve(self) -> int:
        """Moves rows to admissible sizes; returns how many are left over."""

    def force(self) -> int:
        """Places what is left over regardless of the logits; returns how many rows."""

    def labels(self) -> npt.NDArray[np.int32]:
        """Labels [rows], -1 for rows that take no part."""

    def prices(self) -> npt.NDArray[np.float64]:
        """Prices [clusters], nats."""

    def sizes(self) -> npt.NDArray[np.int64]:
        """Rows per cluster."""

    def wanted(self) -> npt.NDArray[np.int64]:
        """Sizes that are aimed at."""

    def closed(self) -> npt.NDArray[np.uint8]:
        """Clusters from which no list leads to one that lacks images."""

    def paths(self) -> int:
        """Paths taken so far."""

def vector_rows_cpu(
    rows: int,
    type: str,
    width: int,
    index: int,
    number: int,
    count: int,
    mean: int,
    noise: int,
    dropout: int,
    seed: int,
    epoch: int,
    view: int,
    out: int,
    finite: int,
    threads: int,
) -> None:
    """Rows of feature vectors in float32, as they are or as noisy views, by addresses (0 = absent)."""
