"""Which runs answer which question of docs/results.md: data sets, methods, studies, and the order of the runs."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
# Values of fixed_labels that only `results_run.py` can fill in.
TRUE_LABELS, TEACHER = "the true labels", "the labels of the teacher"


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        name: how rows and options call it.
        title: how tables call it.
        find: path, or name that `sela_ext.train` knows; None where it is not there.
        judged: name of the folder of test images beside it; None where `sela_ext.train` finds them.
        shown: how a command line names it.
        missing: what to do when it is not there.
        model: the network of every method.
        other: another network, for label transfer.
        classes: true classes.
        epochs: length of the runs of each study.
        epoch_seconds: processor seconds of an epoch of SeLa, roughly: for estimates alone.
        overhead_seconds: the same of what surrounds the epochs.
    """

    name: str
    title: str
    find: Callable[[], str | None]
    judged: str | None
    shown: str
    missing: str
    model: str
    other: str
    classes: int
    epochs: Mapping[str, int]
    epoch_seconds: float
    overhead_seconds: float

    def test(self) -> str | None:
        """Path of the test images, where it has to be named."""
        found = self.find()
        return None if self.judged is None or found is None else str(Path(found).with_name(self.judged))


def _fashion() -> str | None:
    folder = Path(os.environ.get("SELA_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    return str(folder) if any(folder.glob("train-images*")) else None


def _cifar() -> str | None:
    folder = Path(os.environ.get("SELA_DATA_DIR", ROOT.parent / "shared" / "data")) / "train"
    return str(folder) if (folder / "airplane").is_dir() else None


DATA = {
    one.name: one
    for one in (
        Data(
            "digits", "digits", lambda: "digits", None, "digits", "", "small-resnet", "small-convnet", 10,
            {"methods": 160, "goals": 160, "ablation": 160, "transfer": 160, "imbalance": 160}, 0.6, 12,
        ),
        Data(
            "fashion-mnist", "Fashion-MNIST", _fashion, None, "fashion-mnist",
            "Debian's package dataset-fashion-mnist has it, or SELA_FASHION_MNIST names the folder",
            "small-resnet", "small-convnet", 10,
            {"methods": 12, "goals": 46, "ablation": 6, "transfer": 12, "imbalance": 12}, 25, 90,
        ),
        Data(
            "cifar10", "CIFAR-10 JPEG", _cifar, "test", "cifar10/train",
            "SELA_DATA_DIR names a folder that holds train/ and test/ with a folder of JPEG files per class",
            "small-convnet", "small-resnet", 10,
            {"methods": 15, "goals": 46, "ablation": 8, "transfer": 15, "imbalance": 15}, 33, 90,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run. Studies may share it: `key` leaves out what does not change the run.

    Attributes:
        study: the question that it answers.
        name: what is compared, as the table calls it.
        data: name of the data set.
        kind: "train", "random" (a network as it is built) or "pixels" (no network).
        options: of `sela_ext.train`, without seed and what belongs to the machine.
        seed: of everything random.
        teacher: the run whose labels this one is trained on.
        rank: place in the order of all runs, smallest first.
    """

    study: str
    name: str
    data: str
    kind: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    teacher: Case | None = None
    rank: tuple[float, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What makes the run what it is."""
        found: dict[str, Any] = {"kind": self.kind, "data": self.data, "options": dict(self.options), "seed": self.seed}
        if self.teacher is not None:
            found["teacher"] = self.teacher.identity()
        return found

    @property
    def key(self) -> str:
        """A short name of the run."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """The run in words."""
        return f"{self.name}, {self.data}, seed {self.seed}"

    def core_minutes(self) -> float:
        """Processor minutes that the run may take."""
        data, epochs = DATA[self.data], float(self.options.get("epochs", 0))
        if self.kind == "pixels":
            return 0.5 * data.overhead_seconds / 60
        crops = {"sela-v2": 2.5, "deepcluster": 1.2}.get(str(self.options.get("method")), 1.0)
        if self.options.get("rotnet"):
            crops = 4.0
        if self.options.get("label_source") in ("eval", "official"):
            crops = 1.4
        network = {"small-resnet": 1.0, "small-convnet": 1.6, "resnet18": 6.0}
        scale = network[str(self.options.get("model", data.model))] / network[data.model]
        return (epochs * data.epoch_seconds * crops * scale + data.overhead_seconds) / 60


def command(case: Case) -> str:
    """The same run as a line to type; the folder's name stands for any."""
    data = DATA[case.data]
    judged = None if data.judged is None else str(Path(data.shown).with_name(data.judged))
    if case.kind != "train":
        subject = "pixels" if case.kind == "pixels" else f"random:{data.model}"
        test = "" if judged is None else f"::{judged}"
        return f"sela evaluate {subject} --data {data.shown}{test}"
    words = ["sela", "train", "--data", data.shown, "--out", "runs/x"]
    if judged is not None:
        words += ["--eval-data", judged]
    for name, value in case.options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
            continue
        if name == "fixed_labels":
            value = "classes.npy" if value == TRUE_LABELS else "runs/teacher"
        words += [flag, ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    if case.seed:
        words += ["--seed", str(case.seed)]
    return shlex.join(words)


# What is compared by the study `methods`; the first four learn without labels.
METHODS: dict[str, dict[str, Any]] = {
    "SeLa": {},
    "k-means in the loop": {"method": "kmeans"},
    "DeepCluster": {"method": "deepcluster", "clusters": 128},  # some ten per class, as its authors have it
    "SeLa-v2": {"method": "sela-v2"},
    "supervised network": {"fixed_labels": TRUE_LABELS, "clusters": [10]},
}
UNTRAINED = {"random network": "random", "pixels": "pixels"}
UNSUPERVISED = ("SeLa", "k-means in the loop", "DeepCluster", "SeLa-v2")

# What is changed in the study `ablation`, group by group; the first of a group may be the recipe as it is.
ABLATION: dict[str, dict[str, dict[str, Any]]] = {
    "the recipe": {"as it is": {}},
    "label passes": {
        "0, labels dealt at random": {"label_passes": 0, "init": "random"},
        "0, labels of the untrained network": {"label_passes": 0},
        "1 in ten epochs": {"label_passes": 0.1},
        "1 in two epochs": {"label_passes": 0.5},
        "2 an epoch": {"label_passes": 2.0},
    },
    "heads": {
        "1 x 10 clusters": {"clusters": 10, "heads": 1},
        "10 x 10": {"clusters": 10, "heads": 10},
        "1 x 128": {"clusters": 128, "heads": 1},
    },
    "clusters": {
        "10 x 32": {"clusters": 32, "heads": 10},
        "10 x 128": {"clusters": 128, "heads": 10},
        "10 x 256": {"clusters": 256, "heads": 10},
    },
    "label source": {
        "eval": {"label_source": "eval"},
        "official": {"label_source": "official"},
    },
    "heads' kind": {"linear": {"head_kind": "linear"}},
    "first labels": {"random": {"init": "random"}, "predictions": {"init": "predictions"}},
    "lambda": {"10": {"lam": 10.0}, "50": {"lam": 50.0}},
    "balance": {"exact": {"balance": "exact"}},
    "network": {"small-convnet": {"model": "small-convnet"}, "resnet18": {"model": "resnet18"}},
}

# Subsets, and ways to share the images out among the clusters, of the study `imbalance`.
LEVELS = ("none", "light", "heavy")
SHARES: dict[str, dict[str, Any]] = {
    "SeLa, equal sizes": {},
    "SeLa, estimated sizes": {"marginals": "estimated"},
    "SeLa, relaxed": {"relax": 1.0},  # at .1 three epochs on the digits leave clusters of 0 to 646 images
    "SeLa, sizes bounded": {"size_bounds": [0.5, 1.5]},
    "k-means in the loop": {"method": "kmeans"},
}

STUDIES = ("methods", "goals", "ablation", "transfer", "imbalance")


def _base(data: Data, study: str) -> dict[str, Any]:
    return {"model": data.model, "epochs": data.epochs[study]}


def _methods(data: Data) -> list[Case]:
    cases = []
    for place, (name, options) in enumerate(METHODS.items()):
        rank = 1.0 if data.name != "digits" else 0.0
        merged = {**_base(data, "methods"), **options}
        if "clusters" in options:
            merged["clusters"] = [data.classes]
        cases.append(Case("methods", name, data.name, "train", merged, rank=(rank, place)))
    for name, kind in UNTRAINED.items():
        options = {"model": data.model} if kind == "random" else {}
        cases.append(Case("methods", name, data.name, kind, options, rank=(0.0, -1.0)))
    return cases


def _goals(data: Data) -> list[Case]:
    cases = [Case("goals", "SeLa", data.name, "train", _base(data, "goals"), rank=(0.5, 0.0))]
    if data.name == "cifar10":
        longer = {**_base(data, "goals"), "epochs": 88}
        cases.append(Case("goals", "SeLa, 25 minutes", data.name, "train", longer, rank=(5.0, 0.0)))
    return cases


def _ablation(data: Data) -> list[Case]:
    cases = []
    for place, (group, variants) in enumerate(ABLATION.items()):
        for name, changed in variants.items():
            options = {**_base(data, "ablation"), **changed}
            if isinstance(changed.get("label_passes"), float):  # passes per epoch
                options["label_passes"] = max(1, round(changed["label_passes"] * options["epochs"]))
            cases.append(Case("ablation", f"{group}: {name}", data.name, "train", options, rank=(2.0, place)))
    return cases


def _transfer(data: Data) -> list[Case]:
    base = _base(data, "transfer")
    teacher = Case("transfer", f"{data.model}, SeLa (the teacher)", data.name, "train", base)
    taught = {**base, "fixed_labels": TEACHER}
    other = {**base, "model": data.other}
    cases = [
        teacher,
        Case("transfer", f"{data.other}, SeLa", data.name, "train", other),
        Case("transfer", f"{data.other}, the teacher's labels", data.name, "train", {**taught, "model": data.other}),
        Case("transfer", f"{data.model}, the teacher's labels", data.name, "train", taught),
        Case("transfer", f"{data.model}, the same and rotations", data.name, "train", {**taught, "rotnet": True}),
    ]
    return [
        replace(case, rank=(3.0, place), teacher=teacher if "fixed_labels" in case.options else None)
        for place, case in enumerate(cases)
    ]


def _imbalance(data: Data) -> list[Case]:
    cases = []
    for level in LEVELS:
        for name, options in SHARES.items():
            merged = {**_base(data, "imbalance"), **options}
            if level != "none":
                merged["imbalance"] = level
            cases.append(Case("imbalance", f"{level}: {name}", data.name, "train", merged, rank=(4.0, 0.0)))
    return cases


_MAKERS = {
    "methods": _methods, "goals": _goals, "ablation": _ablation, "transfer": _transfer, "imbalance": _imbalance,
}  # fmt: skip
# Where a study runs unless asked: small scale suffices for the ablations.
_DEFAULT_DATA = {
    "methods": ("digits", "fashion-mnist", "cifar10"),
    "goals": ("digits", "fashion-mnist", "cifar10"),
    "ablation": ("digits",),
    "transfer": ("digits", "fashion-mnist"),
    "imbalance": ("digits", "fashion-mnist", "cifar10"),
}


def cases_of(
    studies: Iterable[str] = STUDIES, data: Iterable[str] | None = None, seeds: Iterable[int] = SEEDS
) -> list[Case]:
    """The runs of some studies, in the order in which they should run.

    A seed after the other, so that the picture is whole early; what the gates ask for first.

    Args:
        studies: of STUDIES.
        data: names of data sets; None: those that each study looks at.
        seeds: one run each.
    """
    found = []
    for study in studies:
        names = list(data) if data is not None else _DEFAULT_DATA[study]
        for name in names:
            for case in _MAKERS[study](DATA[name]):
                for seed in seeds:
                    teacher = None if case.teacher is None else replace(case.teacher, seed=seed)
                    group = 0.0 if case.rank[0] <= 1 else case.rank[0]
                    size = list(DATA).index(name)
                    rank = (group, seed, case.rank[0], size, *case.rank[1:])
                    found.append(replace(case, seed=seed, teacher=teacher, rank=rank))
    return sorted(found, key=lambda case: case.rank)


def once(cases: Iterable[Case]) -> list[Case]:
    """Each run once, at its first place; teachers in front of what they teach."""
    found: dict[str, Case] = {}
    for case in cases:
        if case.teacher is not None:
            found.setdefault(case.teacher.key, case.teacher)
        found.setdefault(case.key, case)
    return list(found.values())
