"""The stream of events of a run: to its files, to the screen, to whoever else wants to know."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sela_ext.errors import OptionError, SelaError
from sela_ext.processors import available_processors
from sela_ext.training.clock import Clock, Remaining, describe_shares, words
from sela_ext.training.options import Options
from sela_ext.training.outputs import (
    CsvTable,
    Output,
    TensorBoard,
    WeightsAndBiases,
    import_wandb,
    markdown_table,
)
from sela_ext.training.progress import RunProgress
from sela_ext.training.run import Run
from sela_ext.training.run_folder import RunFolder, describe_value, finite
from sela_ext.training.symptoms import Facts, Symptoms

Event = Mapping[str, Any]
Callback = Callable[[dict[str, Any], "RunInfo"], Any]

# Methods whose label passes give clusters of equal, or given, sizes.
BALANCED = ("sela", "sela-v2")
# Where sizes are estimated or relaxed, most images in one cluster may be right; nine tenths are not.
_FREE_SHARE = 0.6
# A run that is over sooner than this needs no forecast.
_WORTH_A_FORECAST = 20.0


@dataclass(frozen=True)
class RunInfo:
    """What a callback is told beside the event.

    Attributes:
        out: the run folder.
        options: of the run, as options.json has them: none is "auto".
        images: N, of the training.
        step: optimiser steps done.
        epoch: epochs done.
        share: of the run done, in [0, 1].
        warnings: said so far.
    """

    out: Path
    options: Mapping[str, Any]
    images: int
    step: int
    epoch: float
    share: float
    warnings: tuple[str, ...]


def callbacks_of(value: Any) -> list[Callback]:
    """The option `callbacks` as a list.

    Raises:
        OptionError: something in it cannot be called.
    """
    found = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    for one in found:
        if not callable(one):
            raise OptionError(
                f"callbacks: expected a function, or a list of functions, of (event, info), found {one!r}"
            )
    return found


def wandb_project(value: Any) -> str | None:
    """The option `wandb` as the name of a project; None = off.

    Raises:
        OptionError: neither yes, no nor a name.
    """
    if value is None or value is False or value in ("false", "no", "off"):
        return None
    if value is True or value in ("true", "yes", "on"):
        return "sela"
    if isinstance(value, str) and value.strip():
        return value
    raise OptionError(f"wandb: expected True or the name of a project, found {value!r}")


def check_outputs(options: Any) -> None:
    """Look at the options that name outputs, before anything is written.

    Raises:
        OptionError: callbacks that cannot be called, or wandb asked for and not installed.
    """
    callbacks_of(options.callbacks)
    if wandb_project(options.wandb) is not None:
        import_wandb()


class Watcher:
    """Takes every event of a run, and passes it on.

    It goes to the symptoms, metrics.jsonl, metrics.csv, TensorBoard, Weights & Biases, the screen and the callbacks, in
    this order.

    Args:
        folder: the run folder.
        progress: the screen.
        facts: for the symptoms.
        epochs: of the run; None where a budget says when it ends.
        clock: of the run.
        callbacks: called with (event, info) after each event is written; what returns False or "stop" ends the run.
        wandb: project; None = off.

    Attributes:
        stopped: the name of the callback that ended the run, or "".
        symptoms: what was found so far.

    A callback that raises ends the run with an `OptionError` that names it; the last checkpoint stands.
    """

    def __init__(
        self,
        folder: RunFolder,
        progress: RunProgress,
        facts: Facts,
        *,
        epochs: float | None,
        clock: Clock,
        callbacks: Sequence[Callback] = (),
        wandb: str | None = None,
    ) -> None:
        self.stopped = ""
        self.symptoms = Symptoms(facts)
        self._folder, self._progress, self._clock = folder, progress, clock
        self._epochs = epochs
        self._callbacks = list(callbacks)
        self._wandb = wandb
        self._options: Mapping[str, Any] = {}
        self._outputs: list[Output] = []
        self._heads = len(facts.clusters)
        self._remaining = Remaining()
        self._forecast = False
        self._labels = ""
        self._seconds: Mapping[str, float] = {}

    def open(self, metrics_length: int, step: int, share: float, described: Mapping[str, Any]) -> None:
        """Open the files, cut back to where the checkpoint left them, and recall what was said.

        Args:
            metrics_length: bytes of metrics.jsonl that stay.
            step: of the checkpoint; 0 = a run that begins.
            share: of the run done, in [0, 1].
            described: what options.json holds.
        """
        self._folder.open_logs(metrics_length)
        told = describe_value(described)
        self._options = told.get("options", {})
        events = self._folder.recorded()
        last = max((float(event.get("epoch") or 0.0) for event in events), default=0.0)
        for event in events:
            part = float(event.get("epoch") or 0.0) / last if last else 0.0
            self.symptoms.look(event, self._share(event, share * part))
            self._tell_labels(event)
        path = self._folder.path
        table = CsvTable(path / "metrics.csv", self._heads)
        self._outputs.append(table)
        table.open(events)
        texts = {"options": markdown_table(self._options, told.get("reasons", {}))}
        self._outputs.append(TensorBoard(path / "tensorboard", step + 1 if step else None, texts))
        if self._wandb is not None:
            self._outputs.append(WeightsAndBiases(self._wandb, path, self._options, resumed=step > 0))

    def record(self, event: Event, share: float) -> None:
        """Take an event.

        Args:
            event: with "event", "step" and "epoch".
            share: of the run done, in [0, 1].

        Raises:
            OptionError: a callback raised.
        """
        share = min(self._share(event, share), 1.0)
        event = finite(event)
        new = self.symptoms.look(event, share)
        if event.get("event") == "end":
            event = {
                **event,
                "warnings": self.symptoms.messages(of_the_clock=False),
                "wait_warnings": self.symptoms.messages(of_the_clock=True),
            }
        self._folder.record(event)
        for output in self._outputs:
            output.record(event)
        for message in new:
            self._folder.log(f"warning: {message}")
            self._progress.say(f"warning: {message}")
        self._tell_labels(event)
        if event.get("event") == "step":
            self._show(event, share)
        self._call(event, share)

    def closing_lines(self) -> list[str]:
        """What the summary of the run says: where the time went, and the warnings."""
        shares = describe_shares(self._seconds)
        lines = [f"time: {shares}"] if shares else []
        if self.stopped:
            lines.append(f"ended early by callback {self.stopped}")
        return lines + [f"warning: {message}" for message in self.symptoms.found.values()]

    def time_keys(self, waited: float) -> dict[str, float]:
        """Seconds of each part of the run, under the names that events carry.

        Args:
            waited: seconds that steps waited for images, in this session.
        """
        self._seconds = self._clock.seconds(waited)
        return {f"{part}_seconds": value for part, value in self._seconds.items()}

    def close(self, status: int = 0) -> None:
        """Close what is open."""
        for output in self._outputs:
            output.close(status)
        self._outputs = []

    def _share(self, event: Event, share: float) -> float:
        """By epochs where those end the run, so that a resumed run comes to the same; else as told."""
        epoch = event.get("epoch")
        return share if self._epochs is None or epoch is None else float(epoch) / self._epochs

    def _tell_labels(self, event: Event) -> None:
        if event.get("event") != "label_pass" or not event.get("heads"):
            return
        heads = event["heads"]
        changed = [head["changed"] for head in heads if head.get("changed") is not None]
        late = sum(head.get("converged") is False for head in heads)
        solver = "converged" if not late else f"{late} of {len(heads)} heads not converged"
        mean = f"{sum(changed) / len(changed):.1%} changed, " if changed else ""
        self._labels = f"label pass {event.get('pass', '')}: {mean}{solver}"

    def _show(self, event: Event, share: float) -> None:
        loss, chance = event.get("loss"), event.get("ln_k")
        beside = f"/{chance:.2f}" if chance is not None else ""
        shown = "nan" if loss is None else f"{loss:.3f}"
        text = (
            f"epoch {event['epoch']:.1f}  loss {shown}{beside}  {event.get('images_per_second', 0.0):,.0f} img/s  "
            f"wait {event.get('data_wait_share', 0.0):.0%}"
        )
        rest = self._remaining.update(share)
        self._progress.update(share, text, note=self._labels, remaining=rest)
        if rest is not None and not self._forecast:
            self._forecast = True
            if rest >= _WORTH_A_FORECAST:
                told = f"about {words(rest)} to go, by the first steps"
                self._folder.log(told)
                self._progress.say(told)

    def _call(self, event: Event, share: float) -> None:
        for callback in self._callbacks:
            name = getattr(callback, "__qualname__", None) or type(callback).__qualname__
            info = RunInfo(
                out=self._folder.path,
                options=self._options,
                images=self.symptoms.history.facts.images,
                step=int(event["step"]),
                epoch=float(event["epoch"]),
                share=share,
                warnings=tuple(self.symptoms.found.values()),
            )
            try:
                answer = callback(copy.deepcopy(dict(event)), info)
            except SelaError:
                raise
            except Exception as error:
                told = " ".join(str(error).split())
                raise OptionError(
                    f"callbacks: {name} raised {type(error).__name__}{': ' + told if told else ''} at step "
                    f"{info.step} ({event['event']}); the last checkpoint in {self._folder.checkpoints} is intact: "
                    "repair or remove the callback, then resume"
                ) from error
            stop = answer is False or (isinstance(answer, str) and answer == "stop")
            if stop and not self.stopped and event["event"] != "end":
                self._folder.log(f"callback {name} ends the run at step {info.step}")
                self._progress.say(f"callback {name} ends the run")
                self.stopped = name


class Unwatched:
    """What the other ranks have in place of rank 0's watcher: nothing is recorded, shown or called."""

    stopped = ""

    def open(self, metrics_length: int, step: int, share: float, described: Mapping[str, Any]) -> None:
        """Open nothing."""

    def record(self, event: Event, share: float) -> None:
        """Take no event."""

    def closing_lines(self) -> list[str]:
        """Nothing to say."""
        return []

    def time_keys(self, waited: float) -> dict[str, float]:
        """No times."""
        return {}

    def close(self, status: int = 0) -> None:
        """Close nothing."""


@contextlib.contextmanager
def watch(run: Run, progress: RunProgress, clock: Clock) -> Iterator[Watcher | Unwatched]:
    """The watcher of a run, closed at the end of the context; it watches on rank 0 alone."""
    if not run.ranks.first:
        yield Unwatched()
        return
    opt = run.options
    shares = [1.0 / min(opt.clusters)]
    if isinstance(opt.marginals, (list, tuple)):
        shares = [float(share) / sum(map(float, opt.marginals)) for share in opt.marginals]
    elif opt.marginals is not None or opt.relax is not None or opt.size_bounds is not None:
        shares = [_FREE_SHARE]
    facts = Facts(
        images=len(run.source),
        clusters=tuple(opt.clusters),
        lr=opt.lr,
        batch_size=opt.batch_size,
        largest_share=max(shares),
        balanced=opt.method in BALANCED,
        passes=opt.label_passes or int(opt.fixed_labels is not None or opt.init != "random"),
        label_tol=opt.label_tol,
        device=run.arithmetic.device.type,
        encoded=run.source.encoded,
        index=str(opt.index),
        threads=opt.threads,
        processors=available_processors(),
        precision=opt.precision,
    )
    watcher = Watcher(
        run.folder,
        progress,
        facts,
        epochs=opt.epochs if run.plan.budget_seconds is None else None,
        clock=clock,
        callbacks=callbacks_of(opt.callbacks),
        wandb=wandb_project(opt.wandb),
    )
    try:
        yield watcher
    except BaseException:
        watcher.close(status=1)
        raise
    watcher.close()


def chance_level(options: Options) -> float | None:
    """Loss of a network that guesses: ln K, mean or sum over heads; None where the loss has further terms."""
    if options.rotnet:
        return None
    levels = [math.log(k) for k in options.clusters]
    return math.fsum(levels) / (1 if options.loss == "sum" else len(levels))
