"""What bench/solver.py solves: logits of real and synthetic networks, and the float64 truth about a potential.

Every case is features [N, D], head weights [K, D] and a bias [K], so that the same matrix exists stored (`logits`) and
recomputed (`sela_ext.FeatureLogits`). The cases of a real network train one on the spot, for some minutes and once: the
features and heads are kept in the cache folder (`SELA_CACHE_DIR`, else `$XDG_CACHE_HOME/sela_ext`, else
`~/.cache/sela_ext`), under `bench`.
"""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.kernels.self_check import cache_folder

if TYPE_CHECKING:
    import torch

LAM = 25.0
FASHION = Path("/usr/share/datasets/fashion-mnist")  # as Debian's package dataset-fashion-mnist installs it
IMAGES = 60_000
VERSION = 1  # of what is cached; a change of a generator makes it a larger one
CHUNK = 4_000_000  # entries that a generator makes at once: 16 MB in float32
LIVE = 1e-4  # an entry of the plan that counts as live


@dataclass(frozen=True)
class Case:
    """One matrix of logits = features @ weight.T + bias, and what it stands for.

    Attributes:
        name: as in tables and rows.
        about: in a few words.
        features: float32 [N, D].
        weight: float32 [K, D].
        bias: float32 [K].
    """

    name: str
    about: str
    features: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.features)

    @property
    def cols(self) -> int:
        return len(self.weight)

    def logits(self, dtype: Any = np.float32) -> np.ndarray:
        """The matrix [N, K], made in chunks: no temporary is larger than some 16 MB."""
        out = np.empty((self.rows, self.cols), dtype)
        head = np.ascontiguousarray(self.weight.T)
        for part in chunks(self.rows, self.cols):
            out[part] = self.features[part] @ head + self.bias
        return out


def chunks(rows: int, cols: int) -> Iterator[slice]:
    """Slices of the rows with at most CHUNK entries each."""
    step = max(1, CHUNK // cols)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


# ---------------------------------------------------------------- a network of its own


def images() -> tuple[np.ndarray, np.ndarray, str]:
    """(uint8 [60,000, pixels], classes [60,000], name): Fashion-MNIST where installed, else digits, moved about."""
    if has_fashion():
        return (
            unpacked("train-images-idx3-ubyte.gz", 16).reshape(-1, 784),
            unpacked("train-labels-idx1-ubyte.gz", 8),
            "Fashion-MNIST",
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * 15.9).astype(np.uint8)
    random = np.random.default_rng(0)
    which = random.integers(0, len(small), IMAGES)
    out = np.zeros((IMAGES, 12, 12), np.uint8)
    for corner in range(25):
        y, x = divmod(corner, 5)
        out[corner::25, y : y + 8, x : x + 8] = small[which[corner::25]]
    noise = random.integers(0, 24, out.shape, np.uint8)
    return np.maximum(out, noise).reshape(IMAGES, -1), digits.target[which], "digits"


def has_fashion() -> bool:
    """Whether Fashion-MNIST is installed."""
    return (FASHION / "train-images-idx3-ubyte.gz").is_file()


def unpacked(name: str, header: int) -> np.ndarray:
    """The bytes behind the header of one of its files."""
    with gzip.open(FASHION / name) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def prepared(pixels: np.ndarray) -> np.ndarray:
    """Pixels as the network wants them: float32, mean about 0, deviation about 1."""
    return (pixels.astype(np.float32) / 255 - 0.286) / 0.353


def network(pixels: int) -> Any:
    """An untrained perceptron with batch norm: pixels -> 512 -> 256."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(pixels, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU()
    )


def settle(body: Any, x: Any) -> None:
    """Run the images through once in train mode: batch norm then knows their statistics."""
    import torch

    body.train()
    with torch.no_grad():
        for part in x.split(4096):
            body(part)


def embed(body: Any, x: Any) -> Any:
    """Features [N, 256] in evaluation mode."""
    import torch

    body.eval()
    with torch.no_grad():
        return torch.cat([body(part) for part in x.split(4096)])


def folded(body: Any) -> dict[str, np.ndarray]:
    """The network in evaluation mode as two affine maps with a rectifier after each: w1, b1, w2, b2."""
    out = {}
    for i, (linear, norm) in enumerate(((body[0], body[1]), (body[3], body[4])), start=1):
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        weight, bias = linear.weight.detach(), linear.bias.detach()
        out[f"w{i}"] = (weight * scale[:, None]).t().contiguous().numpy()
        out[f"b{i}"] = ((bias - norm.running_mean) * scale + norm.bias.detach()).numpy()
    return out


def train(clusters: int, passes: int, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Self-labelling in small: label passes, each followed by two epochs on the labels; features and head at the end.

    passes = 0 gives the untrained network.
    """
    import torch
    from torch import nn

    import sela_ext

    x = torch.from_numpy(prepared(pixels))
    body = network(x.shape[1])
    settle(body, x)
    torch.manual_seed(clusters)
    head = nn.Linear(256, clusters)
    both = [*body.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(both, lr=0.05, momentum=0.9, weight_decay=1e-5)
    for _ in range(passes):
        with torch.no_grad():
            logits = head(embed(body, x))
        labels = sela_ext.assign(logits, tol=1e-3, max_passes=100).labels.long()
        del logits
        body.train()
        for _ in range(2):
            for batch in torch.randperm(len(x)).split(256):
                seen = x[batch] + 0.1 * torch.randn(len(batch), x.shape[1])
                loss = nn.functional.cross_entropy(head(body(seen)), labels[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    features = embed(body, x).numpy()
    return {
        "features": features,
        "weight": head.weight.detach().numpy(),
        "bias": head.bias.detach().numpy(),
        **folded(body),
    }


def folder() -> Path | None:
    """Where trained cases are kept; None without a home."""
    base = cache_folder()
    return None if base is None else base / "bench"


def kept_as(clusters: int, passes: int) -> tuple[Path | None, str]:
    """The file of a network after so many label passes, and the name of its images."""
    name = "Fashion-MNIST" if has_fashion() else "digits"
    where = folder()
    return None if where is None else where / f"{name.lower()}-{clusters}-{passes}-v{VERSION}.npz", name


def is_kept(clusters: int, passes: int) -> bool:
    """Whether that network need not be trained."""
    path = kept_as(clusters, passes)[0]
    return path is not None and path.is_file()


def network_arrays(clusters: int, passes: int) -> tuple[dict[str, np.ndarray], str]:
    """Features and head of a network after so many label passes, from the cache or made now; name of the images."""
    path, name = kept_as(clusters, passes)
    if path is not None and path.is_file():
        with np.load(path) as kept:
            return dict(kept), name
    print(f"{name}, {clusters} clusters, {passes} label passes: made once, takes a while", flush=True)
    start = time.perf_counter()
    arrays = train(clusters, passes, images()[0])
    print(f"  {time.perf_counter() - start:.0f} s" + ("" if path is None else f", kept as {path}"), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **arrays)
        partial.replace(path)
    return arrays, name


def network_case(clusters: int, passes: int) -> Case:
    """The first label pass (passes = 0), or one after so many rounds of labels and training."""
    arrays, name = network_arrays(clusters, passes)
    stage = "trained" if passes else "first-round"
    about = f"{name}, " + (f"after {passes} label passes" if passes else "untrained network")
    title = f"{stage} {IMAGES // 1000}k x {clusters}"
    return Case(title, about, arrays["features"], arrays["weight"], arrays["bias"])


# ---------------------------------------------------------------- synthetic ones


def clustered_case(rows: int, cols: int, sharpness: float, title: str, *, seed: int = 0) -> Case:
    """300 classes of unequal size in 64 dimensions, sorted by class; a random head, its logits times the sharpness."""
    random = np.random.default_rng(seed)
    dims, classes = 64, 300
    centres = random.standard_normal((classes, dims), np.float32)
    kinds = np.sort(random.choice(classes, rows, p=random.dirichlet(np.full(classes, 0.5))))
    features = centres[kinds] + np.float32(0.7) * random.standard_normal((rows, dims), np.float32)
    weight = np.float32(sharpness / dims**0.5) * random.standard_normal((cols, dims), np.float32)
    bias = np.float32(sharpness * 0.3) * random.standard_normal(cols, np.float32)
    return Case(title, f"300 classes in 64 dimensions, sharpness {sharpness:g}", features, weight, bias)


def peaked_case(rows: int, cols: int) -> Case:
    """Images of a class share their favourite cluster: about one live entry per row, spans of hundreds of nats."""
    random = np.random.default_rng(1)
    centres = random.standard_normal((cols, 32), np.float32)
    weight = random.standard_normal((cols, 32), np.float32) / np.float32(32**0.5) + np.float32(0.3) * centres
    features = centres[random.integers(0, cols, rows)] + np.float32(0.3) * random.standard_normal(
        (rows, 32), np.float32
    )
    title = f"hard {rows // 1000}k x {cols}"
    return Case(title, "a class per cluster in 32 dimensions", features, 2 * weight, np.zeros(cols, np.float32))


CASES: dict[str, Callable[[], Case]] = {
    "first-round-1000": lambda: network_case(1000, 0),
    "trained-128": lambda: network_case(128, 5),
    "synthetic-3000": lambda: clustered_case(20_000, 3000, 1.0, "synthetic 20k x 3000"),
    "trained-1000": lambda: network_case(1000, 5),
    "hard-1000": lambda: peaked_case(60_000, 1000),
    "first-round-128": lambda: network_case(128, 0),
    "synthetic-1000": lambda: clustered_case(100_000, 1000, 1.0, "synthetic 100k x 1000"),
    "sharp-1000": lambda: clustered_case(100_000, 1000, 3.0, "synthetic 100k x 1000, sharp"),
}


def dense_logits(rows: int, cols: int) -> np.ndarray:
    """Independent normal numbers of deviation 0.1: a few hundred live entries per row."""
    return np.float32(0.1) * np.random.default_rng(0).standard_normal((rows, cols), np.float32)


# ---------------------------------------------------------------- ImageNet's size


def easy_into(out: np.ndarray, threads: int) -> None:
    """A first round with nothing to separate: normal numbers of deviation 0.1, and 0.05 between the columns."""
    rows, cols = out.shape
    column = np.float32(0.05) * np.random.default_rng(0).standard_normal(cols, np.float32)

    def fill(number: int, part: slice) -> None:
        block = np.random.default_rng((1, number)).standard_normal((part.stop - part.start, cols), np.float32)
        block *= np.float32(0.1)
        block += column
        out[part] = block

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(fill, n, part) for n, part in enumerate(chunks(rows, cols))]:
            done.result()


PEAKED_CLASSES, PEAKED_DIMS, PEAKED_SCALE = 1000, 32, 3.0


def peaked_arrays(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [rows, 32] of 1,000 classes sorted by class, and the weights [cols, 32] of a sharp head."""
    random = np.random.default_rng(1)
    centres = random.standard_normal((PEAKED_CLASSES, PEAKED_DIMS), np.float32)
    weight = np.float32(PEAKED_SCALE / PEAKED_DIMS**0.5) * random.standard_normal((cols, PEAKED_DIMS), np.float32)
    features = centres[np.arange(rows) * PEAKED_CLASSES // rows]
    for part in chunks(rows, PEAKED_DIMS):
        features[part] += np.float32(0.3) * random.standard_normal(features[part].shape, np.float32)
    return features, weight


def peaked_into(out: np.ndarray, threads: int) -> None:
    """After some training: a few live entries per row, spans of hundreds of nats."""
    features, weight = peaked_arrays(*out.shape)
    head = np.ascontiguousarray(weight.T)
    for part in chunks(*out.shape):
        out[part] = features[part] @ head


def first_round_into(out: np.ndarray, threads: int) -> None:
    """A real first round: an untrained network and random head on as many augmented images, about 200 live entries.

    Images are made of two of the data set each, one of them flipped and moved by up to two pixels, in changing parts;
    they come sorted by the class of the other one, as folders are read.
    """
    arrays, _ = network_arrays(1000, 0)
    pixels, classes, _ = images()
    by_class = np.argsort(classes, kind="stable")
    side = int(pixels.shape[1] ** 0.5)
    rows, cols = out.shape
    width = arrays["w2"].shape[1]
    random = np.random.default_rng(2)
    head = np.float32(FIRST_SCALE / width**0.5) * random.uniform(-1, 1, (width, cols)).astype(np.float32)
    for number, part in enumerate(chunks(rows, cols)):
        random = np.random.default_rng((3, number))
        one = by_class[np.arange(part.start, part.stop) * len(pixels) // rows]
        other = random.integers(0, len(pixels), len(one))
        dy, dx = random.integers(-2, 3, 2)
        moved = np.roll(pixels[other].reshape(-1, side, side)[:, :, ::-1], (dy, dx), (1, 2)).reshape(len(other), -1)
        share = random.uniform(0.0, 0.4, (len(one), 1)).astype(np.float32)
        x = (1 - share) * prepared(pixels[one]) + share * prepared(moved)
        for layer in "12":
            x = x @ arrays[f"w{layer}"] + arrays[f"b{layer}"]
            np.maximum(x, 0, out=x)
        out[part] = x @ head


# Of the head's weights, in the units of torch's own first weights: what leaves about 200 live entries of 3,000 per row.
FIRST_SCALE = 1.5

LARGE: dict[str, Callable[[np.ndarray, int], None]] = {
    "easy": easy_into,
    "peaked": peaked_into,
    "first round": first_round_into,
}
LARGE_SHAPE = (1_281_167, 3000)


# ---------------------------------------------------------------- the truth


@dataclass(frozen=True)
class Products:
    """features @ weight.T, some rows at a time: for `truth` of logits that are nowhere stored."""

    features: np.ndarray
    weight: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.features), len(self.weight)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.features[part] @ self.weight.T


@dataclass(frozen=True)
class Truth:
    """What float64 says about a potential on the logits as they are.

    Attributes:
        l1: sum over columns of |share - 1/K|.
        columns: float64 [K], shares.
        labels: int32 [N], argmax of lambda * logits + potential; None if not asked for.
        live: entries of the plan above 1e-4 per row.
    """

    l1: float
    columns: np.ndarray
    labels: np.ndarray | None
    live: float


def truth(
    logits: np.ndarray | torch.Tensor | Products, potential: Any, *, labels: bool = True, lam: float = LAM
) -> Truth:
    """Columns, error and labels of a potential [K] in plain float64 torch: no code of this package.

    A potential with a number that is not finite has the error inf.
    """
    import torch

    g = torch.as_tensor(np.asarray(potential, np.float64))
    rows, cols = logits.shape
    if not bool(torch.isfinite(g).all()):
        return Truth(float("inf"), np.full(cols, np.nan), None, float("nan"))
    columns = torch.zeros(cols, dtype=torch.float64)
    found = np.empty(rows, np.int32) if labels else None
    live = 0
    for part in chunks(rows, cols):
        t = torch.as_tensor(logits[part]).double().mul_(lam).add_(g)
        if found is not None:
            found[part] = t.argmax(1).numpy()
        plan = t.softmax(1)
        columns += plan.sum(0)
        if labels:
            live += int((plan > LIVE).sum())
    shares = (columns / rows).numpy()
    return Truth(float(np.abs(shares - 1 / cols).sum()), shares, found, live / rows if labels else float("nan"))


def span(logits: np.ndarray, lam: float = LAM) -> float:
    """Median over some rows of lambda * (largest - smallest logit), nats."""
    some = np.asarray(logits[:: max(1, len(logits) // 2000)], np.float32)
    return lam * float(np.median(some.max(1) - some.min(1)))
