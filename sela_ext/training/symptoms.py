"""What can go wrong with a run without stopping it, told in words, each with its remedy.

Every symptom is a function of the events recorded so far: it returns a message, or None. Thresholds stand beside their
reasons; docs/watching.md lists the symptoms for readers. A run that learns as it should triggers none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What does not change during a run.

    Attributes:
        images: N, of the training.
        clusters: K of every head.
        lr: learning rate.
        batch_size: images per step.
        largest_share: the largest share of the images that a cluster is meant to have, in (0, 1].
        balanced: the label passes ask for clusters of given sizes.
        passes: label passes that will be made; 0 = labels that were dealt at random stay.
        label_tol: tolerance of the label solver.
        device: cpu, cuda, ...
        encoded: the images are files to be decoded.
        index: the option of that name.
        threads: of the loader.
        processors: that this process may use.
        precision: arithmetic of the network.
    """

    images: int
    clusters: tuple[int, ...]
    lr: float = 0.1
    batch_size: int = 256
    largest_share: float = 0.0
    balanced: bool = True
    passes: int = 1
    label_tol: float = 1e-2
    device: str = "cpu"
    encoded: bool = False
    index: str = "run"
    threads: int = 1
    processors: int = 1
    precision: str = "float32"


# A run may have a hundred thousand log entries.
_STEPS_KEPT = 32


@dataclass
class History:
    """The events of a run so far.

    Attributes:
        facts: of the run.
        steps: the last "step" events, as many as any symptom looks at.
        passes: "label_pass" events.
        masked: images without a usable output, where labels were made last.
        share: of the run that was done at the newest event, in [0, 1].
    """

    facts: Facts
    steps: list[Event] = field(default_factory=list)
    passes: list[Event] = field(default_factory=list)
    masked: int = 0
    share: float = 0.0

    def add(self, event: Event, share: float) -> None:
        """Append an event, and how much of the run was done."""
        kind = event.get("event")
        self.share = share
        self.masked = int(_finite(event["masked"])) if "masked" in event else self.masked
        if kind == "step":
            self.steps.append(event)
            del self.steps[:-_STEPS_KEPT]
        elif kind == "label_pass":
            self.passes.append(event)

    @property
    def epoch(self) -> float:
        """Epochs that were done at the newest step."""
        return _number(self.steps[-1].get("epoch"), 0.0) if self.steps else 0.0

    def loss_ratios(self, last: int) -> list[float]:
        """Loss in parts of the level of guessing, of the last step events; empty where one of them tells neither."""
        if len(self.steps) < last:
            return []
        found = [_number(e.get("loss")) / max(_number(e.get("ln_k")), 1e-12) for e in self.steps[-last:]]
        return found if all(map(math.isfinite, found)) else []

    def heads(self, last: int = 1) -> list[Mapping[str, Any]]:
        """The entries of all heads in the last label passes; heads that take turns each have one in as many passes."""
        turns = len(self.facts.clusters) if self.passes and len(_heads(self.passes[-1])) == 1 else 1
        if len(self.passes) < last * turns:
            return []
        return [entry for event in self.passes[-last * turns :] for entry in _heads(event)]


def _number(value: Any, otherwise: float = math.nan) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise


def _finite(value: Any) -> float:
    """A number; 0 where it is none, NaN or infinite."""
    found = _number(value, 0.0)
    return found if math.isfinite(found) else 0.0


def _heads(event: Event) -> list[Mapping[str, Any]]:
    """What an event says of each head; a line of metrics.jsonl that was edited may say anything."""
    found = event.get("heads")
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, (list, tuple)) else []


def _values(entries: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for value in (_number(entry.get(name)) for entry in entries) if math.isfinite(value)]


def _mean(entries: Sequence[Mapping[str, Any]], name: str) -> float:
    values = _values(entries, name)
    return fmean(values) if values else math.nan


def _certainty(entries: Sequence[Mapping[str, Any]]) -> float:
    """Cross-entropy of the heads against their own labels, in parts of guessing: the median, 0 = known by heart."""
    pairs = [(_number(e.get("cross_entropy")), _number(e.get("ln_k"))) for e in entries]
    ratios = [loss / chance for loss, chance in pairs if math.isfinite(loss) and chance > 0]
    return median(ratios) if ratios else math.nan


# --- Clusters

# Half of the images in one of four or more clusters is twice the largest share that anything asks for.
_COLLAPSED = 0.5


def collapsed_clusters(history: History) -> str | None:
    """One cluster holds most images."""
    facts = history.facts
    limit = max(_COLLAPSED, min(1.5 * facts.largest_share, 0.999))
    for entry in _heads(history.passes[-1]) if history.passes else ():
        k, largest = int(_finite(entry.get("clusters"))), _number(entry.get("size_max"), 0.0)
        if k >= 4 and largest > limit * facts.images:
            remedy = (
                f"look at train.log for what the label solver said, and lower lr (now {facts.lr:g})"
                if facts.balanced
                else "use method=sela, whose clusters are balanced, or fewer clusters"
            )
            return (
                f"collapsed: head {entry.get('head')} has {largest / facts.images:.0%} of the images in one of {k} "
                f"clusters; {remedy}"
            )
    return None


# Unit embeddings that differ from their mean by a thirtieth of their length: what is left is rounding of the heads.
# Networks before their first step have .01 and more.
_NO_SPREAD = 1e-3


def collapsed_features(history: History) -> str | None:
    """All images look the same to the network."""
    last = history.passes[-1] if history.passes else {}
    spread = _number(last.get("spread"))
    if not spread < _NO_SPREAD or _number(last.get("epoch"), 0.0) < 1:
        return None
    return (
        f"collapsed: the network gives nearly the same features for all images (spread {spread:.1e} of at most 1); "
        f"lower lr (now {history.facts.lr:g}), or check that the images are not all alike: sela doctor"
    )


# Where a cluster holds fewer images than this, a network learns them by heart one by one: digits with 800 clusters
# (1.8 images each) relabelled 95% of its images in every pass, with 128 (11 each) it learns.
_FEWEST_PER_CLUSTER = 4


def too_many_clusters(history: History) -> str | None:
    """K is large for the number of images."""
    facts = history.facts
    most = max(facts.clusters)
    if not (history.steps or history.passes) or facts.images >= _FEWEST_PER_CLUSTER * most:
        return None
    sensible = max(2, facts.images // 25)
    fewer = f"clusters={sensible} or fewer, or " if sensible < most else ""
    return (
        f"K too large: {most} clusters for {facts.images:,} images are {facts.images / most:.1f} images each, which "
        f"a network learns by heart; use {fewer}more images"
    )


# In the fast recipe, heads that start alike differ by more (NMI below .9) for the first quarter of a run; late in a run
# heads that agree have found the same clusters, which is what one hopes for.
_IDENTICAL, _IDENTICAL_UNTIL = 0.995, 0.25


def identical_heads(history: History) -> str | None:
    """Heads have the same labels from the start."""
    entries = history.heads(last=2)
    alike = _values(entries, "nmi_other")
    if history.share > _IDENTICAL_UNTIL or history.epoch < 1 or not alike or _certainty(entries) < 0.3:
        return None
    if min(alike) < _IDENTICAL:
        return None
    return (
        "heads identical: all heads with the same number of clusters have the same labels, so that one would do; use "
        "init=random or kmeans, where each head starts elsewhere, or a different number of clusters per head"
    )


# --- Labels

# Over so many label passes. Fewer may be chance.
_PASSES = 5
# A pass that changes less than this changes nothing: digits end at 3%.
_FROZEN, _FROZEN_UNTIL = 0.002, 0.5


def frozen_labels(history: History) -> str | None:
    """Labels hardly change although the network does not know them yet."""
    entries = history.heads(_PASSES)
    changed, certainty = _mean(entries, "changed"), _certainty(entries)
    if history.share > _FROZEN_UNTIL or history.epoch < 1 or not (changed < _FROZEN and certainty > 0.5):
        return None
    return (
        f"labels frozen: the last {_PASSES} label passes changed {changed:.2%} of the labels, while the network is far "
        f"from knowing them (cross-entropy {certainty:.0%} of guessing); raise lr (now {history.facts.lr:g}), start "
        "from init=kmeans or predictions, or make fewer label passes"
    )


# Late in a run digits change 4% (K = 10) to 35% (K = 128) of the labels per pass; with a learning rate that is 25 times
# too large 70% and 95%, with 1.8 images per cluster 95%. Where it is still much but falling, as in a run of twelve
# epochs (from 93% to 52%), the run is merely short.
_JUMPING, _JUMPING_FROM, _JUMPING_AFTER, _FALLEN = 0.6, 0.8, 8, 0.75


def jumping_labels(history: History) -> str | None:
    """Labels still change from pass to pass late in the run."""
    facts = history.facts
    entries = history.heads(_PASSES)
    if history.share < _JUMPING_FROM or len(history.passes) < _JUMPING_AFTER or not facts.balanced:
        return None  # k-means numbers its clusters anew in every pass
    changed = _mean(entries, "changed")
    most = max((_mean(_heads(event), "changed") for event in history.passes), default=math.nan)
    if not (changed > _JUMPING and changed > _FALLEN * most):
        return None
    return (
        f"labels jumping: the last {_PASSES} label passes still changed {changed:.0%} of the labels, so that the "
        f"network runs after them; lower lr (now {facts.lr:g}), use fewer clusters (now {max(facts.clusters)}), or "
        "train longer"
    )


# Digits without augmentation, 30 epochs: 8% of guessing after 8 epochs; with it 25% after 10, and less than 10% after
# 30 of 160. Larger sets get there later still.
_BY_HEART, _BY_HEART_EPOCHS, _BY_HEART_UNTIL = 0.1, 10.0, 0.5


def memorised(history: History) -> str | None:
    """The network knows its labels by heart within the first epochs."""
    entries = history.heads()
    certainty = _certainty(entries)
    early = 1 <= history.epoch <= _BY_HEART_EPOCHS and history.share < _BY_HEART_UNTIL
    if not (early and certainty < _BY_HEART):
        return None
    return (
        f"augmentation too weak: after {history.epoch:.0f} epochs the network knows the labels by heart (cross-entropy "
        f"{certainty:.0%} of guessing), and they hardly get better from here; use a stronger augment (smaller crops, "
        "colour jitter), more clusters or a smaller network; if the images do fall into that few obvious groups, all "
        "is well"
    )


# --- Numbers


def masked_rows(history: History) -> str | None:
    """Images without a usable network output."""
    count = history.masked
    if not count:
        return None
    remedy = "lower lr" if history.facts.precision == "float32" else "lower lr, or use precision=float32"
    return (
        f"masked rows: {count:,} images had NaN or infinite logits when labels were made and got none (-1) there; "
        f"{remedy} (now lr {history.facts.lr:g}, {history.facts.precision})"
    )


# One pass that stops a little early does no harm; one that is far off, or several, do.
_FAR_OFF, _OFTEN = 10.0, 3


def unconverged_solver(history: History) -> str | None:
    """The label solver stopped before its tolerance."""
    late = [[entry for entry in _heads(event) if entry.get("converged") is False] for event in history.passes]
    late = [entries for entries in late if entries]
    worst = max((_number(entry.get("error"), 0.0) for entries in late for entry in entries), default=0.0)
    if not late or (len(late) < _OFTEN and worst <= _FAR_OFF * max(history.facts.label_tol, 1e-12)):
        return None
    return (
        f"solver not converged: in {len(late)} of {len(history.passes)} label passes the solver stopped at an error of "
        f"up to {worst:.1e} (label_tol {history.facts.label_tol:g}), so that clusters are less even than asked for; "
        "raise label_max_passes or label_tol, or lower lam"
    )


# Guessing costs ln K. Cosine heads that begin sure and wrong cost 1.3 (K = 4) to 1.0 times that in the first epochs,
# and learn all the same; half as much again in two entries on end, after two epochs, is a network that is being thrown
# about, and so is a loss that doubles in a later part of the run.
_FAR_ABOVE, _FAR_ABOVE_AFTER = 1.5, 2.0
_SPIKE, _SPIKE_ENTRIES, _SPIKE_FROM = 2.0, 10, 0.2
# A network that learns is below 97% of guessing after a fifth of the run, and after five epochs.
_LEARNS, _LEARNS_AFTER, _LEARNS_FROM = 0.97, 5.0, 0.2
# One that does nothing costs as much as guessing; more than that takes steps that are too large.
_THROWN = 1.1


def learning_rate(history: History) -> str | None:
    """The loss is far above the level of guessing, jumps, or does not fall below guessing."""
    facts = history.facts
    lower = f"lower lr (now {facts.lr:g}) by 3 to 10 times"
    recent = history.loss_ratios(2)
    earlier = _number(history.steps[-2].get("epoch"), 0.0) if recent else 0.0
    if recent and earlier >= _FAR_ABOVE_AFTER and min(recent) > _FAR_ABOVE:
        return (
            f"learning rate too high: the loss is {recent[-1]:.2f} times that of guessing (ln K); {lower}, or lengthen "
            "warmup"
        )
    window = history.loss_ratios(_SPIKE_ENTRIES + 1)
    if window and history.share >= _SPIKE_FROM and window[-1] > max(1.0, _SPIKE * median(window[:-1])):
        return (
            f"learning rate too high: the loss jumped from {median(window[:-1]):.2f} to {window[-1]:.2f} times that of "
            f"guessing (ln K); {lower}"
        )
    recent = history.loss_ratios(3)
    if not recent or history.epoch < _LEARNS_AFTER or history.share < _LEARNS_FROM or fmean(recent) <= _LEARNS:
        return None
    if not facts.passes:
        why = "the labels are a random deal that stays, so there is little to learn: make label passes"
    else:
        why = f"{lower}; if that does not help, weaken augment, raise lr, or use fewer clusters"
    name = "learning rate too high" if fmean(recent) > _THROWN else "nothing learnt"
    return f"{name}: after {history.epoch:.0f} epochs the loss is {fmean(recent):.0%} of that of guessing (ln K); {why}"


# --- Speed

# Steps that wait for a quarter of their time, over some log entries and for long enough that somebody cares.
_WAIT, _WAIT_EVENTS, _WAIT_SECONDS = 0.25, 5, 20.0


def waiting_for_images(history: History) -> str | None:
    """The loader is slower than the network."""
    recent = history.steps[-_WAIT_EVENTS:]
    shares = _values(recent, "data_wait_share")
    spent = sum(_values(recent, "interval_seconds"))
    if len(shares) < _WAIT_EVENTS or fmean(shares) < _WAIT or spent < _WAIT_SECONDS:
        return None
    facts = history.facts
    if facts.threads < facts.processors:
        remedy = f"raise threads (now {facts.threads}; this process may use {facts.processors})"
    elif facts.encoded and facts.index == "off":
        remedy = "use index=run, so that later epochs decode only what they need; or `sela pack` the images once"
    elif facts.encoded:
        remedy = "`sela pack` the images once, use a smaller image_size, or a machine with more processors"
    else:
        remedy = "give the images as a folder, an array or a packed set, which are read without Python in between"
    return (
        f"waiting for images: steps spend {fmean(shares):.0%} of their time waiting, the loader is the bottleneck; "
        f"{remedy}"
    )


@dataclass(frozen=True)
class Symptom:
    """A symptom.

    Attributes:
        name: of it.
        find: returns the message, or None.
        after: kinds of events after which there may be something new.
        of_the_clock: depends on how fast the machine is.
    """

    name: str
    find: Callable[[History], str | None]
    after: tuple[str, ...] = ("label_pass",)
    of_the_clock: bool = False


SYMPTOMS = (
    Symptom("masked_rows", masked_rows, after=("label_pass", "evaluation", "end")),
    Symptom("collapsed_clusters", collapsed_clusters),
    Symptom("collapsed_features", collapsed_features),
    Symptom("too_many_clusters", too_many_clusters, after=("step", "label_pass")),
    Symptom("unconverged_solver", unconverged_solver),
    Symptom("learning_rate", learning_rate, after=("step",)),
    Symptom("memorised", memorised),
    Symptom("frozen_labels", frozen_labels),
    Symptom("jumping_labels", jumping_labels),
    Symptom("identical_heads", identical_heads),
    Symptom("waiting_for_images", waiting_for_images, after=("step",), of_the_clock=True),
)


class Symptoms:
    """Looks at every event of a run, and says each symptom once.

    Args:
        facts: of the run.

    Attributes:
        found: what was said, message by name of the symptom.

    Example:
        >>> symptoms = Symptoms(Facts(images=100, clusters=(50,)))
        >>> [message.split(":")[0] for message in symptoms.look({"event": "step", "epoch": 0.1, "loss": 3.9}, 0.1)]
        ['K too large']
        >>> symptoms.look({"event": "step", "epoch": 0.2, "loss": 3.9}, 0.2)
        []
    """

    def __init__(self, facts: Facts) -> None:
        self.history = History(facts)
        self.found: dict[str, str] = {}

    def look(self, event: Event, share: float) -> list[str]:
        """Take note of an event.

        Args:
            event: as it is recorded.
            share: of the run done, in [0, 1].

        Returns:
            What is there to say now, and was not said before.
        """
        self.history.add(event, share)
        new = []
        for symptom in SYMPTOMS:
            if symptom.name in self.found or event.get("event") not in symptom.after:
                continue
            message = symptom.find(self.history)
            if message is not None:
                self.found[symptom.name] = message
                new.append(message)
        return new

    def messages(self, *, of_the_clock: bool) -> list[str]:
        """What was said so far: about the machine's speed, or about all else."""
        names = {symptom.name for symptom in SYMPTOMS if symptom.of_the_clock == of_the_clock}
        return [message for name, message in self.found.items() if name in names]
