"""`evaluate`: every protocol of the paper on a run, on released weights, or on a network by name, in one report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from sela_ext import build_info
from sela_ext.data import Source
from sela_ext.errors import DataError, OptionError, nearest
from sela_ext.evaluation import (
    Pooled,
    Stages,
    Viewing,
    cluster_metrics,
    cluster_table,
    few_shot_rows,
    fine_tune_scores,
    knn_scores,
    label_statistics,
    linear_scores,
    sgd_scores,
    stage_scores,
)
from sela_ext.evaluation.crops import CROPS
from sela_ext.evaluation.inputs import positive
from sela_ext.evaluation.knn import principal_directions
from sela_ext.evaluation.published import TRIVIAL, known_data, published_for
from sela_ext.evaluation.schedule import ProbeSchedule, named_schedule
from sela_ext.inference.apply import label_images
from sela_ext.inference.labelled import DataSet, data_sets
from sela_ext.inference.passes import Machine, choose_machine, look, settle
from sela_ext.inference.subject import PIXELS, Prepared, Subject, open_subject
from sela_ext.models import Network
from sela_ext.training.embedding import Embedded
from sela_ext.training.evaluate import known_features
from sela_ext.training.labelling import choose_head
from sela_ext.training.machine import torch_settings
from sela_ext.training.progress import RunProgress

WHAT = ("clusters", "knn", "linear", "layers", "few-shot")
_OTHER_NAMES = {"alexnet": "layers", "few_shot": "few-shot"}
PROBES = ("logistic", "sgd", "augmented")
# The first is the figure called "knn", as in the metrics of a run; the others are those of the published tables.
NEIGHBOURS = (20, 10, 50, 200)
# Directions that pixels are reduced to, and that features are clustered in.
_DIRECTIONS = 64
# What of a head stands at the top of a report.
_FLAT = ("nmi", "ami", "ari", "accuracy", "majority_accuracy", "purity", "class_entropy")
_FLAT_PROBES = ("knn", "knn_top5", "linear", "linear_top5")
_ROWS = 16_384


def evaluate(
    run: Any,
    data: Any = None,
    what: str | Iterable[str] = ("clusters", "knn", "linear"),
    *,
    k: int | Sequence[int] = NEIGHBOURS,
    sigma: float = 0.1,
    pca: int | None = None,
    probe: str = "logistic",
    schedule: str | ProbeSchedule | None = None,
    epochs: int | None = None,
    crops: int = 1,
    fractions: Sequence[float] = (0.01, 0.1),
    fine_tune: bool = False,
    model: Any = None,
    image_size: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    threads: Any = "auto",
    on_bad_image: str = "raise",
    seed: int = 0,
    download: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Judge labels and features against true labels, on one labelled data set or several.

    Args:
        run: a run folder; a result of `train`; one of its checkpoints; a file of released weights (see
            `sela_ext.load_released`); "resnet18:IMAGENET1K_V1" or "resnet18:file.pth" (torchvision's names);
            "random:resnet18", a network as it is built, its batch norm settled on the images; "pixels", no network at
            all: 64 principal directions of the pixels; or an `nn.Module` that maps images to features.
        data: labelled images, as for `train`; "TRAIN::TEST" or a pair (train, test), where test images do not lie where
            `train` finds them; a list or a mapping {name: data} of several sets. None: those of the run.
        what: of "clusters", "knn", "linear", "layers" (probes after every stage; "alexnet" is another name of it) and
            "few-shot"; a sequence, or a text with commas.
        k: neighbours, one number or several; the first is the figure called knn.
        sigma: temperature of the neighbours' votes.
        pca: principal directions that kNN sees; None: the features as they are.
        probe: of "linear": "logistic" regression to convergence, "sgd" by the paper's schedule on features computed
            once, or "augmented": the same with random crops and flips of the images, the network frozen.
        schedule: of probes by SGD: "resnet", "resnet-146", "alexnet", "alexnet-paper" or a `ProbeSchedule`. None:
            "resnet" for pooled features, "alexnet" for layers.
        epochs: stretch the schedule to so many.
        crops: test views of the layers' probes: 1 or 10.
        fractions: shares of the labels for "few-shot".
        fine_tune: for "few-shot", train the whole network too.
        model: the network of a run that was given one of the user's own.
        image_size: pixels; default: as in training, or 224 for photographs.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto" (the run's), "float32", "bfloat16" or "float16".
        threads: processor threads; "auto" = all.
        on_bad_image: "raise" or "skip".
        seed: of random networks, k-means, probes and few-shot subsets.
        download: fetch torchvision's weights if they are not there.
        progress: show a bar.

    Returns:
        JSON-able. At the top the figures of the first data set, shares in [0, 1]: nmi, ami, ari, accuracy,
        majority_accuracy, purity, class_entropy (of the head chosen without labels), knn, knn_top5, linear,
        linear_top5. "data_sets": for each set the same and all the rest: "clusters" (every head, every cluster),
        "knn_scores" for each k, "layers", "few_shot", "published", "trivial". "subject": what was evaluated.

    Raises:
        OptionError: an option out of range.
        CheckpointError: nothing that can be evaluated, damaged, or weights that do not fit.
        DataError: images or labels missing or unreadable.
        ResourceError: weights that would have to be fetched.

    Example:
        >>> import sela_ext
        >>> found = sela_ext.evaluate("random:small-resnet", "digits", what=("knn",), k=20)
        >>> 0.8 < found["knn"] < 1
        True

    Source: Asano et al. 2020, section 4 and appendix; the k-means figures of networks without cluster heads are a
    yardstick of this package: one cluster per class on 64 principal directions of the features.
    """
    wanted = _wanted(what)
    if probe not in PROBES:
        raise OptionError(f"probe: expected one of {', '.join(PROBES)}, found {probe!r}{nearest(probe, PROBES)}")
    neighbours = tuple(k) if isinstance(k, Iterable) else (int(k),)
    _check_numbers(neighbours, sigma, pca, crops, fractions, seed)
    begin = time.perf_counter()
    with RunProgress(progress) as bar:
        subject = open_subject(run, model=model, image_size=image_size, seed=seed, download=download, say=bar.say)
        machine = choose_machine(
            subject,
            device=device,
            precision=precision,
            threads=threads,
            batch_size=batch_size,
            on_bad_image=on_bad_image,
        )
        plan = _Plan(wanted, neighbours, sigma, pca, probe, schedule, epochs, crops, tuple(fractions), fine_tune, seed)
        if schedule is not None or epochs is not None:
            named_schedule("resnet" if schedule is None else schedule, epochs)
        sets = data_sets(subject, data)
        reports = []
        with torch_settings(machine.threads, machine.arithmetic.device):
            for number, one in enumerate(sets):

                def tell(share: float, text: str, number: int = number, name: str = one.name) -> None:
                    bar.update((number + share) / len(sets), f"{name}: {text}")

                reports.append(_evaluate_on(subject, one, machine, plan, tell))
    flat = {name: reports[0][name] for name in (*_FLAT, *_FLAT_PROBES) if name in reports[0]}
    return {
        "version": build_info()["version"],
        "subject": {
            "name": subject.name,
            "kind": subject.kind,
            "network": subject.model,
            "precision": str(machine.arithmetic.dtype).removeprefix("torch."),
            "device": str(machine.arithmetic.device),
            "seed": seed,
        },
        "what": list(wanted),
        **flat,
        "data_sets": reports,
        "seconds": time.perf_counter() - begin,
    }


@dataclass(frozen=True)
class _Plan:
    """What was asked for; the options of `evaluate`."""

    what: tuple[str, ...]
    k: tuple[int, ...]
    sigma: float
    pca: int | None
    probe: str
    schedule: str | ProbeSchedule | None
    epochs: int | None
    crops: int
    fractions: tuple[float, ...]
    fine_tune: bool
    seed: int


def _wanted(what: str | Iterable[str]) -> tuple[str, ...]:
    names = [name.strip() for name in what.split(",")] if isinstance(what, str) else list(what)
    found = tuple(dict.fromkeys(_OTHER_NAMES.get(name, name) for name in names))
    wrong = [name for name in found if name not in WHAT]
    if wrong or not found:
        if not wrong:
            raise OptionError("what: empty")
        hint = nearest(wrong[0], WHAT)
        raise OptionError(f"what: expected some of {', '.join(WHAT)}, found {wrong[0]!r}{hint}")
    return found


def _check_numbers(
    k: Sequence[int], sigma: float, pca: int | None, crops: int, fractions: Sequence[float], seed: int
) -> None:
    """Refuse what a protocol would refuse, before hours of looking at images."""
    if not k:
        raise OptionError("k: expected a number of neighbours or several, found none")
    if min(k) < 1:
        raise OptionError(f"k: expected at least 1 neighbour, found {min(k)}")
    positive(sigma, "sigma")
    if pca is not None and pca < 1:
        raise OptionError(f"pca: expected at least 1 direction, found {pca}")
    if crops not in (1, CROPS):
        raise OptionError(f"crops: expected 1 or {CROPS}, found {crops}")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed: expected a whole number in 0 .. 2^63 - 1, found {seed}")
    wrong = [one for one in fractions if not 0 < one <= 1]
    if wrong or not fractions:
        raise OptionError(f"fractions: expected shares in (0, 1], found {wrong[0] if wrong else 'none'}")


Tell = Callable[[float, str], None]


class _Look:
    """The passes over one data set, made when first needed and kept."""

    def __init__(self, subject: Subject, prepared: Prepared, one: DataSet, machine: Machine, tell: Tell) -> None:
        self.prepared = prepared
        self._subject, self._one, self._machine, self._tell = subject, one, machine, tell
        self._train: Embedded | None = None
        self._test: Embedded | None = None
        self._directions: tuple[Tensor, Tensor] | None = None

    @property
    def train(self) -> Embedded:
        if self._train is None:
            self._tell(0.0, f"{len(self._one.train):,} training images")
            self._train = self._reduced(look(self.prepared, self._one.train, self._machine))
        return self._train

    @property
    def test(self) -> Embedded | None:
        if self._test is None and self._one.test is not None:
            _ = self.train  # pixels are reduced by directions of the training images
            self._tell(0.1, f"{len(self._one.test):,} test images")
            self._test = self._reduced(look(self.prepared, self._one.test, self._machine))
        return self._test

    def labelled(self) -> tuple[Tensor, NDArray[np.int64], Tensor | None, NDArray[np.int64] | None]:
        """Features and classes of the labelled images: training, test."""
        assert self._one.train.labels is not None
        features, classes = known_features(self.train, self._one.train.labels)
        test = self.test
        if test is None or self._one.test is None or self._one.test.labels is None:
            return features, classes, None, None
        return features, classes, *known_features(test, self._one.test.labels)

    def divided(self, seed: int) -> tuple[Tensor, NDArray[np.int64], Tensor, NDArray[np.int64]]:
        """The same with a fifth of the training images judged where there are no test images."""
        features, classes, test, test_classes = self.labelled()
        if test is not None and test_classes is not None:
            return features, classes, test, test_classes
        teach, judge = self._one.apart(seed)
        truth, seen = self._one.train.labels, self.train
        assert truth is not None
        assert seen.features is not None
        valid = seen.valid.cpu().numpy()
        teach, judge = teach[valid[teach]], judge[valid[judge]]
        rows = seen.features.cpu()
        return rows[torch.from_numpy(teach)], truth[teach], rows[torch.from_numpy(judge)], truth[judge]

    def sources(self, seed: int) -> tuple[Source, Source]:
        """The images themselves, for probes that see them augmented."""
        if self._one.test is not None:
            return self._one.train, self._one.test
        teach, judge = self._one.apart(seed)
        return self._one.train.subset(teach), self._one.train.subset(judge)

    def _reduced(self, seen: Embedded) -> Embedded:
        if self._subject.kind != PIXELS:
            return seen
        assert seen.features is not None
        if self._directions is None:
            self._directions = principal_directions(seen.features[seen.valid], _DIRECTIONS)
        reduced = _project(seen.features, self._directions)
        return Embedded(reduced, reduced, seen.valid, seen.bad)


def _project(features: Tensor, directions: tuple[Tensor, Tensor]) -> Tensor:
    """(features - mean) @ directions, a block at a time."""
    mean, vectors = directions
    return torch.cat([(block - mean) @ vectors for block in torch.split(features, _ROWS)])


def _evaluate_on(subject: Subject, one: DataSet, machine: Machine, plan: _Plan, tell: Tell) -> dict[str, Any]:
    """All that was asked for, on one data set."""
    labels = one.train.labels
    assert labels is not None
    prepared = settle(subject.prepare(one.train), one.train, machine)
    of_images = [name for name, asked in _image_protocols(plan).items() if asked]
    if one.train.vectors is not None and of_images:
        raise OptionError(f"{of_images[0]}: expected images, which are seen augmented; found {one.train.describe()}")
    view = _Look(subject, prepared, one, machine, tell)
    classes = int(np.unique(labels[labels >= 0]).size)
    known = known_data(one.name, one.train.class_names, classes)
    report: dict[str, Any] = {
        "name": one.name,
        "known_as": known,
        "images": len(one.train),
        "test_images": 0 if one.test is None else len(one.test),
        "classes": classes,
        "division": one.how,
        "image_size": prepared.plain.size,
        "feature_dim": prepared.network.feature_dim,
        "parameters": sum(p.numel() for p in prepared.network.parameters()),
    }
    begin = time.perf_counter()
    if "clusters" in plan.what:
        report.update(_clusters(subject, one, view, classes, plan, tell))
    if "knn" in plan.what:
        report.update(_knn(view, machine, plan, tell))
    if "linear" in plan.what:
        report.update(_linear(one, view, machine, plan, tell))
    if "layers" in plan.what:
        report["layers"] = _layers(one, view, machine, plan, tell)
    if "few-shot" in plan.what:
        report["few_shot"] = _few_shot(one, view, machine, plan, tell)
    bad = view.train.bad if view._train is not None else []
    report["unreadable_images"] = len(bad)
    report["published"] = [
        {"model": entry.model, "source": entry.source, **entry.figures} for entry in published_for(subject.model, known)
    ]
    if known in TRIVIAL:
        report["trivial"] = TRIVIAL[known]
    report["seconds"] = time.perf_counter() - begin
    return report


def _image_protocols(plan: _Plan) -> dict[str, bool]:
    """What needs images rather than features, and whether it was asked for."""
    return {
        "what=layers": "layers" in plan.what,
        "probe=augmented": "linear" in plan.what and plan.probe == "augmented",
        "fine_tune": "few-shot" in plan.what and plan.fine_tune,
    }


def _clusters(subject: Subject, one: DataSet, view: _Look, classes: int, plan: _Plan, tell: Tell) -> dict[str, Any]:
    """Metrics of every head, and at the top those of the head chosen without labels."""
    truth = one.train.labels
    assert truth is not None
    network = view.prepared.network
    heads: list[dict[str, Any]] = []
    if not network.heads.clusters:
        tell(0.2, "k-means")
        labels, origin = (
            _k_means(view.train, classes, plan.seed)[None],
            "k-means on the features, one cluster per class",
        )
        sizes, entropies = [classes], [math.nan]
    else:
        labels, origin = _labels_of(subject, one, view)
        sizes = network.heads.clusters
        entropies = _cross_entropies(network, view.train, labels)
    for head, clusters in enumerate(sizes):
        tell(0.2 + 0.2 * head / len(sizes), f"cluster metrics, head {head}")
        record: dict[str, Any] = {"head": head, "clusters": clusters}
        if not math.isnan(entropies[head]):
            record["cross_entropy"] = entropies[head]
        record.update(label_statistics(labels[head], clusters))
        record.update(cluster_metrics(truth, labels[head], clusters))
        table = cluster_table(truth, labels[head], clusters)
        record["cluster_sizes"] = table["size"].tolist()
        record["cluster_purity"] = _listed(table["purity"])
        record["cluster_entropy"] = _listed(table["entropy"])
        if head < len(subject.history):
            record["nmi_between_passes"] = subject.history[head]
        heads.append(record)
    best = subject.head
    if best is None or best >= len(heads):
        best = choose_head(heads) if "cross_entropy" in heads[0] else 0
    return {
        **{name: float(heads[best][name]) for name in _FLAT},
        "clusters": {"labels": origin, "head": best, "heads": heads},
    }


def _labels_of(subject: Subject, one: DataSet, view: _Look) -> tuple[NDArray[np.int32], str]:
    """Labels of the training images, int32 [heads, N], and where they come from."""
    stored, elsewhere = subject.labels, ""
    heads = len(view.prepared.network.heads.clusters)
    if stored is not None and len(stored) == heads:
        if one.own and subject.kept_only and stored.shape[1] == len(one.train):
            return stored, "as the run's checkpoint holds them"
        if one.own and one.everything is not None and one.kept is not None:
            if subject.label_names == one.everything.names:
                return stored[:, one.kept], "as the run left them"
            raise DataError(f"{one.name}: the images are not the ones that {subject.name} labelled; name them as data")
        if subject.kind == "released" and stored.shape[1] == len(one.train) and (stored >= 0).any(axis=1).all():
            if _same_order(view.prepared.network, view.train, stored):
                return stored, "as they came with the weights, in the order of the images"
            elsewhere = "; those that came with the weights are of other images, or in another order"
    labels, _ = label_images(subject, view.prepared, view.train)
    rule = "its potentials" if subject.potentials is not None else "what it finds most likely"
    return labels, f"by the network and {rule}{elsewhere}"


@torch.no_grad()
def _same_order(network: Network, seen: Embedded, stored: NDArray[np.int32]) -> bool:
    """Whether stored labels belong to these images in this order: whether the network's logits know of them.

    Logits are taken from their cluster's mean. Under another order that of an image's label then exceeds the image's
    mean logit, weighted by the labels' shares, by nothing on average. The bar is five standard errors, on the mean of
    all heads.
    """
    scores = []
    for head, row in enumerate(stored):
        labels = torch.from_numpy(row.astype(np.int64)).to(seen.embeddings.device)
        known = seen.valid & (labels >= 0)
        labels, embeddings = labels[known], torch.split(seen.embeddings[known], _ROWS)
        count = len(labels)
        share = torch.bincount(labels, minlength=network.heads.clusters[head]).double() / count
        total = torch.zeros_like(share)
        for block in embeddings:
            total += network.heads.logits_of(head, block).double().sum(dim=0)
        found = []
        for block, own in zip(embeddings, torch.split(labels, _ROWS), strict=True):
            logits = network.heads.logits_of(head, block).double() - total / count
            found.append(logits.gather(1, own[:, None])[:, 0] - logits @ share)
        excess = torch.cat(found)
        error = float(excess.std(correction=0)) / math.sqrt(count)
        scores.append(float(excess.mean()) / error if error > 0 else 0.0)
    return sum(scores) / len(scores) > 5


@torch.no_grad()
def _cross_entropies(network: Network, seen: Embedded, labels: NDArray[np.int32]) -> list[float]:
    """Mean cross-entropy of every head against its labels."""
    found = []
    for head in range(len(network.heads.clusters)):
        total, count = 0.0, 0
        for start in range(0, len(seen.embeddings), _ROWS):
            rows = slice(start, start + _ROWS)
            goal = torch.from_numpy(labels[head, rows].astype(np.int64)).to(seen.embeddings.device)
            goal = torch.where(seen.valid[rows], goal, -1)
            logits = network.heads.logits_of(head, seen.embeddings[rows])
            total += float(F.cross_entropy(logits, goal, ignore_index=-1, reduction="sum"))
            count += int((goal >= 0).sum())
        found.append(total / max(count, 1))
    return found


def _k_means(seen: Embedded, clusters: int, seed: int) -> NDArray[np.int32]:
    """Labels of k-means on the first principal directions, int32 [N]; -1 where an image could not be read."""
    assert seen.features is not None
    features = seen.features[seen.valid]
    if features.shape[1] > _DIRECTIONS:
        features = _project(features, principal_directions(features, _DIRECTIONS))
    found = KMeans(clusters, n_init=10, random_state=seed % 2**32).fit_predict(features.cpu().numpy())
    labels = np.full(len(seen.valid), -1, np.int32)
    labels[seen.valid.cpu().numpy()] = found
    return labels


def _knn(view: _Look, machine: Machine, plan: _Plan, tell: Tell) -> dict[str, Any]:
    features, classes, test, test_classes = view.labelled()
    tell(0.5, "nearest neighbours")
    place = machine.arithmetic.device
    test = None if test is None else test.to(place)
    scores = knn_scores(features.to(place), classes, test, test_classes, k=plan.k, sigma=plan.sigma, pca=plan.pca)
    return {
        "knn": scores[plan.k[0]]["top1"],
        "knn_top5": scores[plan.k[0]]["top5"],
        "knn_k": plan.k[0],
        "knn_sigma": plan.sigma,
        "knn_pca": plan.pca,
        "knn_judged": "the test images" if test is not None else "each training image by the others",
        "knn_scores": {str(count): found for count, found in scores.items()},
    }


def _linear(one: DataSet, view: _Look, machine: Machine, plan: _Plan, tell: Tell) -> dict[str, Any]:
    tell(0.6, f"linear probe, {plan.probe}")

    def inner(share: float, text: str) -> None:
        tell(0.6 + 0.2 * share, text)

    if plan.probe == "augmented":
        train, test = view.sources(plan.seed)
        found = stage_scores(
            Pooled(view.prepared.network.backbone),
            train,
            test,
            _viewing(view, machine),
            schedule=plan.schedule or "resnet",
            epochs=plan.epochs,
            normalize=False,
            seed=plan.seed,
            progress=inner,
        )["pooled"]
    else:
        features, classes, judged, judged_classes = view.divided(plan.seed)
        if plan.probe == "sgd":
            found = sgd_scores(
                features.to(machine.arithmetic.device),
                classes,
                judged,
                judged_classes,
                schedule=plan.schedule or "resnet",
                epochs=plan.epochs,
                seed=plan.seed,
                progress=inner,
            )
        else:
            found = linear_scores(
                features.to(machine.arithmetic.device), classes, judged, judged_classes, seed=plan.seed
            )
    return {
        "linear": found["top1"],
        "linear_top5": found["top5"],
        "linear_probe": plan.probe,
        "linear_judged": "the test images" if one.test is not None else "a fifth of the images, not taught",
    }


def _layers(one: DataSet, view: _Look, machine: Machine, plan: _Plan, tell: Tell) -> dict[str, Any]:
    train, test = view.sources(plan.seed)
    schedule = named_schedule(plan.schedule or "alexnet", plan.epochs)
    tell(0.8, "probes of the layers")
    scores = stage_scores(
        Stages(view.prepared.network.backbone),
        train,
        test,
        _viewing(view, machine),
        schedule=schedule,
        crops=plan.crops,
        seed=plan.seed,
        progress=lambda share, text: tell(0.8 + 0.1 * share, text),
    )
    return {"epochs": schedule.epochs, "crops": plan.crops, "stages": scores}


def _few_shot(one: DataSet, view: _Look, machine: Machine, plan: _Plan, tell: Tell) -> dict[str, Any]:
    features, classes, judged, judged_classes = view.divided(plan.seed)
    train, test = view.sources(plan.seed) if plan.fine_tune else (None, None)
    found: dict[str, Any] = {}
    for number, fraction in enumerate(plan.fractions):
        tell(0.9 + 0.1 * number / len(plan.fractions), f"{fraction:.3g} of the labels")
        rows = few_shot_rows(classes, fraction, plan.seed)
        scores = linear_scores(features[torch.from_numpy(rows)], classes[rows], judged, judged_classes, seed=plan.seed)
        entry: dict[str, Any] = {"images": len(rows), "linear": scores}
        if train is not None and test is not None:
            assert train.labels is not None
            chosen = train.subset(few_shot_rows(train.labels, fraction, plan.seed))
            entry["fine_tuned"] = fine_tune_scores(
                view.prepared.network.backbone, chosen, test, _viewing(view, machine), seed=plan.seed
            )
        found[str(fraction)] = entry
    return found


def _viewing(view: _Look, machine: Machine) -> Viewing:
    return Viewing(
        view.prepared.probe,
        view.prepared.plain,
        device=machine.arithmetic.device,
        dtype=machine.arithmetic.dtype,
        threads=machine.threads,
        on_bad_image=machine.on_bad_image,
        reading=view.prepared.reading,
    )


def _listed(values: NDArray[Any]) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values.tolist()]
