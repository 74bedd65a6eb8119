"""Do our figures mean what others' figures mean? Their evaluation on our weights, and ours on theirs.

    python bench/comparability.py [--quick | --tables | --check]

Their evaluation of our weights: features of a run on the built-in digits, judged by scikit-learn, by faiss, by
lightly's kNN, and by the authors' protocols written down again here in plain PyTorch. Our evaluation of their weights:
networks that torchvision and timm build, on image files that torchvision reads and transforms on one side and this
package on the other. Weights are drawn, and batch norm settled on the images, since what is compared is the way from
file to figure. Then a run of this package as a state dict in torchvision's network.

Every line has a largest difference that is allowed; a larger one ends the script with status 1. What is not installed
is named and left out. A full run records its rows and writes the table of docs/comparability.md; `--tables` writes it
from the rows recorded last, `--check` says whether the page is what they give.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

import sela_ext
from sela_ext.data import digits_split, open_source
from sela_ext.evaluation import cluster_metrics, knn_scores, linear_probe, sgd_scores

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "comparability.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
SIGMA = 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Row = dict[str, Any]
Features = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of training images, their classes; test images, ...


def row(what: str, peer: str, ours: float, theirs: float, allowed: float) -> Row:
    """A comparison of two figures."""
    return {"what": what, "peer": peer, "ours": ours, "theirs": theirs, "allowed": allowed}


# Their evaluation


def vote(similarity: np.ndarray, classes: np.ndarray, truth: np.ndarray) -> float:
    """Accuracy of the weighted vote of neighbours: similarity [M, k], their classes [M, k], true classes [M]."""
    scores = np.zeros((len(truth), int(classes.max()) + 1))
    for column in range(classes.shape[1]):
        np.add.at(scores, (np.arange(len(truth)), classes[:, column]), np.exp(similarity[:, column] / SIGMA))
    return float(np.mean(scores.argmax(axis=1) == truth))


def by_authors(features: Features, k: int) -> float:
    """The weighted kNN of the SeLa authors' CIFAR script (that of Wu et al.), in PyTorch."""
    bank, bank_classes, queries, truth = (torch.from_numpy(part) for part in features)
    near = (F.normalize(queries.double()) @ F.normalize(bank.double()).T).topk(k, dim=1)
    one_hot = F.one_hot(bank_classes[near.indices], int(bank_classes.max()) + 1)
    return float(((near.values / SIGMA).exp()[..., None] * one_hot).sum(1).argmax(1).eq(truth).double().mean())


def by_scikit_learn(features: Features, k: int) -> float:
    """KNeighborsClassifier with cosine distances and these weights."""
    from sklearn.neighbors import KNeighborsClassifier

    bank, bank_classes, queries, truth = features
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / SIGMA))
    return float(model.fit(bank, bank_classes).score(queries, truth))


def by_faiss(faiss: Any, features: Features, k: int) -> float:
    """Search by faiss, the vote in numpy."""
    bank, bank_classes, queries, truth = features
    bank, queries = (F.normalize(torch.from_numpy(rows)).numpy() for rows in (bank, queries))
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    similarity, found = index.search(queries, k)
    return vote(similarity.astype(np.float64), bank_classes[found], truth)


def lightly_knn() -> Any | None:
    """Lightly's `knn_predict`, from its file: the package around it would ask for Lightning."""
    spec = importlib.util.find_spec("lightly")
    if spec is None or spec.origin is None:
        print("peer lightly: not installed, skipped")
        return None
    file = Path(spec.origin).parent / "utils/benchmarking/knn.py"
    inner = importlib.util.spec_from_file_location("lightly_knn", file)
    if not file.exists() or inner is None or inner.loader is None:
        print(f"peer lightly {common.version('lightly')}: has no utils/benchmarking/knn.py, skipped")
        return None
    module = importlib.util.module_from_spec(inner)
    inner.loader.exec_module(module)
    return module.knn_predict


def by_lightly(predict: Any, features: Features, k: int) -> float:
    """Lightly's kNN on normalised features."""
    bank, bank_classes, queries, truth = (torch.from_numpy(part) for part in features)
    classes = int(bank_classes.max()) + 1
    found = predict(F.normalize(queries), F.normalize(bank).T.contiguous(), bank_classes, classes, k, SIGMA)
    return float(found[:, 0].eq(truth).double().mean())


def logistic(features: Features) -> float:
    """Multinomial logistic regression on standardised features, C = 1, by L-BFGS in float64: a probe of its own."""
    bank, bank_classes, queries, truth = features
    mean, deviation = bank.mean(0), bank.std(0)
    deviation[deviation == 0] = 1
    x, y = torch.from_numpy((bank - mean) / deviation).double(), torch.from_numpy(bank_classes)
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y, reduction="sum") + weight.square().sum() / 2
        value.backward()
        return value

    search.step(loss)
    tested = torch.from_numpy((queries - mean) / deviation).double()
    return float((tested @ weight + bias).argmax(1).eq(torch.from_numpy(truth)).double().mean())


def by_sgd(features: Features, epochs: int) -> float:
    """The authors' probe of pooled features: SGD, lr .1, a tenth from epoch 85 on, batch 1024."""
    bank, bank_classes, queries, truth = (torch.from_numpy(part) for part in features)
    torch.manual_seed(1)
    probe = nn.Linear(bank.shape[1], int(bank_classes.max()) + 1)
    optimiser = torch.optim.SGD(probe.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * 0.1 ** int(epoch >= 85)
        for rows in torch.randperm(len(bank)).split(1024):
            optimiser.zero_grad()
            F.cross_entropy(probe(bank[rows]), bank_classes[rows]).backward()
            optimiser.step()
    with torch.no_grad():
        return float(probe(queries).argmax(1).eq(truth).double().mean())


def features_of_digits(folder: Path, epochs: int) -> tuple[Features, np.ndarray, np.ndarray]:
    """A run on the digits: its features, its labels, the true ones."""
    options = {"epochs": epochs, "progress": False, "precision": "float32", "threads": 1}
    result = sela_ext.train("digits", out=folder / "digits", **options)
    found = np.asarray(sela_ext.embed(folder / "digits", "digits", precision="float32", threads=1))
    truth = open_source("digits").labels
    assert truth is not None
    train, test = digits_split()
    return (found[train], truth[train], found[test], truth[test]), result.labels[result.head], truth


def their_evaluation(folder: Path, quick: bool) -> Iterable[Row]:
    """Figures of a run's features and labels, ours and others'."""
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics

    features, labels, truth = features_of_digits(folder, 3 if quick else 30)
    faiss, predict = common.peer("faiss"), lightly_knn()
    one = 1 / len(features[2])  # an image that ties decide
    for k in (10, 20, 50, 200):
        ours = knn_scores(*features, k=k, sigma=SIGMA)[k]["top1"]
        yield row(f"kNN, k = {k}", "authors' protocol", ours, by_authors(features, k), one)
        yield row(f"kNN, k = {k}", "scikit-learn", ours, by_scikit_learn(features, k), one)
        if faiss is not None:
            yield row(f"kNN, k = {k}", "faiss", ours, by_faiss(faiss, features, k), one)
        if predict is not None:
            yield row(f"kNN, k = {k}", "lightly", ours, by_lightly(predict, features, k), one)
    yield row("linear, logistic regression", "L-BFGS in PyTorch", linear_probe(*features), logistic(features), 2 * one)
    ours = sgd_scores(*features, schedule="resnet")["top1"]
    yield row("linear, by SGD", "authors' protocol", ours, by_sgd(features, 100), 0.012)
    found = cluster_metrics(truth, labels)
    table = metrics.cluster.contingency_matrix(truth, labels)
    chosen = linear_sum_assignment(-table)
    for name, value in (
        ("nmi", metrics.normalized_mutual_info_score(truth, labels)),
        ("ami", metrics.adjusted_mutual_info_score(truth, labels)),
        ("ari", metrics.adjusted_rand_score(truth, labels)),
        ("accuracy", table[chosen].sum() / len(truth)),
        ("purity", table.max(axis=0).sum() / len(truth)),
    ):
        peer = "scikit-learn" if name not in ("accuracy", "purity") else "scipy"
        yield row(f"clusters: {name}", peer, found[name], float(value), 1e-9)


# Our evaluation


def write_pictures(folder: Path, count: int) -> None:
    """Image files of four classes that colour and pattern tell apart, each with noise; as PNG and as JPEG."""
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("test", count // 2)):
        for label in range(4):
            places = [folder / kind / split / str(label) for kind in ("png", "jpg")]
            for place in places:
                place.mkdir(parents=True)
            for i in range(images):
                height, width = (int(side) for side in rng.integers(150, 260, 2))
                ramp = np.add.outer(np.arange(height) * (label % 2), np.arange(width) * (label // 2 + 1))
                tint = rng.integers(40, 200, 3) + 20 * label
                pixels = tint + 60 * np.sin(ramp / (5 + 2 * label))[..., None] + rng.normal(0, 10, (height, width, 3))
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                for place in places:
                    image.save(place / f"{i:03}.{place.parts[-3]}")


def settled(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """The network with batch-norm statistics of the images: drawn weights alone make all features alike."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.train()
    with torch.no_grad():
        for part in images.split(64):
            network(part)
    return network.eval()


def by_torchvision(folder: Path, size: int) -> tuple[torch.Tensor, np.ndarray]:
    """Images of class folders as torchvision reads and transforms them for evaluation, and their classes."""
    steps = [v2.ToImage(), v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    found = torchvision.datasets.ImageFolder(str(folder), v2.Compose(steps))
    return torch.stack([image for image, _ in found]), np.array(found.targets)


def run_network(network: nn.Module, images: torch.Tensor) -> np.ndarray:
    """Features in eval mode."""
    with torch.no_grad():
        return torch.cat([network(part) for part in images.split(64)]).numpy()


def compared(name: str, ours: Sequence[np.ndarray], theirs: Features, cosine: float) -> Iterable[Row]:
    """Features of the same images from two programs, and the figures that come of them."""
    pairs = zip(ours, (theirs[0], theirs[2]), strict=True)
    near = [F.cosine_similarity(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs]
    yield row(f"{name}: features, lowest cosine", "its own pipeline", float(torch.cat(near).min()), 1.0, cosine)
    one = 1 / len(theirs[3])
    mine = knn_scores(ours[0], theirs[1], ours[1], theirs[3], k=10, sigma=SIGMA)[10]["top1"]
    yield row(f"{name}: kNN, k = 10", "scikit-learn", mine, by_scikit_learn(theirs, 10), 2 * one)
    mine = linear_probe(ours[0], theirs[1], ours[1], theirs[3])
    yield row(f"{name}: linear", "L-BFGS in PyTorch", mine, logistic(theirs), 3 * one)


def our_evaluation(folder: Path, quick: bool) -> Iterable[Row]:
    """Networks of torchvision and timm from file to figure, by us and by them; then ours in torchvision's."""
    write_pictures(folder, 12 if quick else 40)
    size = 64 if quick else 128
    options = {"image_size": size, "precision": "float32", "threads": 1}
    seen = {kind: [by_torchvision(folder / kind / part, size) for part in ("train", "test")] for kind in ("png", "jpg")}

    def judged(network: nn.Module, subject: Any, name: str, kind: str = "png", cosine: float = 1e-3) -> Iterable[Row]:
        (train, train_classes), (test, test_classes) = seen[kind]
        theirs = run_network(network, train), train_classes, run_network(network, test), test_classes
        ours = [np.asarray(sela_ext.embed(subject, folder / kind / part, **options)) for part in ("train", "test")]
        return compared(name, ours, theirs, cosine)

    torch.manual_seed(0)
    network = settled(torchvision.models.resnet18(weights=None), seen["png"][0][0])
    torch.save(network.state_dict(), folder / "resnet18.pth")
    network.fc = nn.Identity()  # type: ignore[assignment]
    subject = f"resnet18:{folder / 'resnet18.pth'}"
    yield from judged(network, subject, "torchvision's resnet18, PNG")
    yield from judged(network, subject, "torchvision's resnet18, JPEG", "jpg", 1e-2)
    timm = common.peer("timm")
    if timm is not None:
        torch.manual_seed(1)
        network = settled(timm.create_model("resnet10t", pretrained=False, num_classes=0), seen["png"][0][0])
        yield from judged(network, network, "timm's resnet10t")

    run, data = folder / "ours", folder / "png/train"
    sela_ext.train(data, out=run, model="resnet18", clusters=4, heads=2, epochs=1, progress=False, **options)
    sela_ext.export(run, folder / "backbone.pth", "torchvision")
    network = torchvision.models.resnet18(weights=None)
    weights = torch.load(folder / "backbone.pth", weights_only=True)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if {key.split(".")[0] for key in missing} - {"fc"} or unexpected:
        raise SystemExit(f"expected torchvision's names in our export, found {unexpected or missing}")
    network.fc = nn.Identity()  # type: ignore[assignment]
    yield from judged(network.eval(), run, "our run in torchvision's resnet18")


# Rows and page


def lines_of(rows: Iterable[Row]) -> list[list[str]]:
    """Rows as cells of text."""
    cells = []
    for one in rows:
        ours, theirs = one["ours"], one["theirs"]
        figures = f"{ours:.4f}", f"{theirs:.4f}", f"{abs(ours - theirs):.1e}", f"{one['allowed']:.1e}"
        cells.append([one["what"], one["peer"], *figures])
    return cells


HEADER = ["figure", "whose", "ours", "theirs", "difference", "allowed"]


def document(text: str) -> str:
    """The page with the table of the rows recorded last."""
    path = common.RESULTS / "comparability.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [one for one in rows if one["time"] == rows[-1]["time"]]
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|--:|--:|--:|--:|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in lines_of(rows)]
    if rows:
        seen = rows[-1]["machine"]
        peers = ", ".join(f"{name} {version}" for name, version in rows[-1]["peers"].items())
        lines += ["", f"{rows[-1]['time'][:10]}; sela_ext {seen['sela_ext']} ({seen['isa']}), {peers}."]
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Run, print, record, write the page."""
    parser = common.arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", action="store_true", help="only write the page, from the rows recorded last")
    parser.add_argument("--check", action="store_true", help="only compare the page with the rows recorded last")
    given = parser.parse_args()
    if given.tables or given.check:
        text = DOCUMENT.read_text(encoding="utf-8")
        if given.tables:
            DOCUMENT.write_text(document(text), encoding="utf-8")
        sys.exit(int(given.check and document(text) != text))
    torch.set_num_threads(given.threads)
    facts = common.machine()
    common.print_machine(facts, given.threads)
    names = ("torch", "torchvision", "scikit-learn", "scipy", "faiss-cpu", "lightly", "timm")
    peers = {name: found for name in names if (found := common.version(name))}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for title, part in (("Their evaluation of our weights", their_evaluation), ("Ours of theirs", our_evaluation)):
            found = [{"part": title, "peers": peers, **one} for one in part(Path(folder), given.quick)]
            common.table(title, HEADER, lines_of(found))
            rows += found
    apart = [one for one in rows if not abs(one["ours"] - one["theirs"]) <= one["allowed"] + 1e-12]
    for one in apart:
        print(f"DIFFERENT: {one['what']} by {one['peer']}: {one['ours']} and {one['theirs']}")
    if apart:
        sys.exit(1)
    print(f"\nall {len(rows)} agree")
    if not given.no_record and not given.quick:
        print(f"recorded in {common.record('comparability', rows, facts).name}")
        DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
