"""Clustering feature vectors: `sela_ext.SelfLabelling` beside k-means and k-means with bounded sizes.

    python bench/embeddings.py [--quick | --tables | --check]

Data: scikit-learn's digits (1,797 x 64 pixels), and 10,000 images of Fashion-MNIST by their first 64 principal
components, where the files are (Debian's package dataset-fashion-mnist, or SELA_FASHION_MNIST names the folder). Each
method with its defaults, three seeds; true labels only judge. k-means with sizes within one of N / K by
k-means-constrained, where that is installed (extra `peers`). There is no agreement to check: the methods differ in what
they look for; that every row has a label and what the sizes are is. A full run writes the table of docs/embeddings.md;
`--tables` writes it from the rows recorded last, `--check` only says whether it is what they give.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from sela_ext import SelfLabelling
from sela_ext.evaluation import cluster_metrics

SEEDS = (0, 1, 2)
FASHION_MNIST = Path(os.environ.get("SELA_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
FASHION_ROWS = 10_000
COMPONENTS = 64
SHOWN = ("nmi", "ari", "accuracy")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "embeddings.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"

Labels = np.ndarray
Method = Callable[[np.ndarray, int, int], Labels]


def fashion_mnist() -> tuple[np.ndarray, np.ndarray] | None:
    """Principal components of the first images, float64 [10000, 64], and their classes; None without the files."""
    found = []
    for name, header in (("train-images-idx3-ubyte.gz", 16), ("train-labels-idx1-ubyte.gz", 8)):
        try:
            with gzip.open(FASHION_MNIST / name) as file:
                found.append(np.frombuffer(file.read()[header:], np.uint8))
        except OSError:
            print(f"{FASHION_MNIST / name}: not there, left out")
            return None
    pixels = found[0].reshape(-1, 784)[:FASHION_ROWS] / 255.0
    return PCA(COMPONENTS, random_state=0).fit_transform(pixels), found[1][:FASHION_ROWS].astype(np.int64)


def by_means(rows: np.ndarray, clusters: int, seed: int) -> Labels:
    """k-means, four starts."""
    return KMeans(clusters, n_init=4, random_state=seed).fit_predict(rows)


def by_bounded_means(rows: np.ndarray, clusters: int, seed: int) -> Labels:
    """k-means with equal sizes, by minimum-cost flow; one start, since it is slow."""
    from k_means_constrained import KMeansConstrained

    low = len(rows) // clusters
    model = KMeansConstrained(clusters, size_min=low, size_max=-(-len(rows) // clusters), n_init=1, random_state=seed)
    return np.asarray(model.fit_predict(rows))


def by_heads(**options: Any) -> Method:
    """SelfLabelling."""
    return lambda rows, clusters, seed: SelfLabelling(clusters, random_state=seed, **options).fit(rows).labels_


def methods(quick: bool) -> dict[str, Method]:
    """Name -> method, as the table shows them."""
    found: dict[str, Method] = {"k-means": by_means}
    if common.peer("k_means_constrained", "k-means-constrained") is not None and not quick:
        found["k-means, equal sizes"] = by_bounded_means
    found["SelfLabelling"] = by_heads()
    found["SelfLabelling(hidden_dim=256)"] = by_heads(hidden_dim=256)
    return found


def measured(
    rows: np.ndarray, classes: np.ndarray, clusters: int, method: Method, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """Medians over the seeds, and the sizes of the first; time is the processors', whoever else uses them."""
    scores, seconds, sizes = [], [], None
    for seed in seeds:
        begin = time.process_time()
        labels = method(rows, clusters, seed)
        seconds.append(time.process_time() - begin)
        if labels.shape != (len(rows),) or labels.min() < 0 or labels.max() >= clusters:
            raise SystemExit(f"expected {len(rows)} labels in 0..{clusters - 1}, found {labels.shape}")
        scores.append(cluster_metrics(classes, labels))
        if sizes is None:
            sizes = np.bincount(labels, minlength=clusters)
    assert sizes is not None
    return {
        **{name: median(score[name] for score in scores) for name in SHOWN},
        "seconds": median(seconds),
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
    }


def document(text: str) -> str:
    """The page with the table of the rows recorded last."""
    path = common.RESULTS / "embeddings.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if row["time"] == rows[-1]["time"]]
    lines = [
        "| data | method | NMI | ARI | accuracy | smallest, largest cluster | processor seconds |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['data']} | {row['method']} | {row['nmi']:.3f} | {row['ari']:.3f} | {row['accuracy']:.3f} | "
        f"{row['smallest']}, {row['largest']} | {row['seconds']:.2g} |"
        for row in rows
    ]
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Run, print, record, write the page."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--tables", action="store_true", help="only write the page, from the rows recorded last")
    parser.add_argument("--check", action="store_true", help="only compare the page with the rows recorded last")
    given = parser.parse_args()
    if given.tables or given.check:
        text = DOCUMENT.read_text(encoding="utf-8")
        if given.tables:
            DOCUMENT.write_text(document(text), encoding="utf-8")
        sys.exit(int(given.check and document(text) != text))
    import torch

    torch.set_num_threads(given.threads)
    facts = common.machine()
    common.print_machine(facts, given.threads)
    rows, classes = load_digits(return_X_y=True)
    data = {"digits": (rows, classes)}
    if not given.quick:
        fashion = fashion_mnist()
        if fashion is not None:
            data["Fashion-MNIST, 64 components"] = fashion
    seeds = SEEDS[:1] if given.quick else SEEDS
    records: list[dict[str, Any]] = []
    for name, (points, truth) in data.items():
        clusters = len(np.unique(truth))
        lines = []
        for shown_as, method in methods(given.quick).items():
            result = measured(points, truth, clusters, method, seeds)
            records.append({"data": name, "rows": len(points), "clusters": clusters, "method": shown_as, **result})
            sizes = f"{result['smallest']}..{result['largest']}"
            lines.append([shown_as, *[result[key] for key in SHOWN], sizes, result["seconds"]])
        common.table(
            f"{name}: {len(points)} rows, {clusters} clusters, median of {len(seeds)} seeds",
            ["method", "NMI", "ARI", "accuracy", "sizes", "processor s"],
            lines,
        )
    if not given.no_record and not given.quick:
        print(f"\nrecorded in {common.record('embeddings', records, facts).name}")
        DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
