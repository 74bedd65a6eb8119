"""`finetune`: the loop that trains a backbone on a VOC task, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sela_ext.errors import NumericsError, OptionError, ResourceError
from sela_ext.finetuning.classification import Classification
from sela_ext.finetuning.detection import Detection
from sela_ext.finetuning.options import FinetuneOptions, learning_rate, make_options, settle
from sela_ext.finetuning.segmentation import Segmentation
from sela_ext.finetuning.task import Setting, Task
from sela_ext.finetuning.trunk import load_trunk
from sela_ext.finetuning.voc import VocTree
from sela_ext.training.checkpoint import write_atomically
from sela_ext.training.machine import Interrupt, torch_settings
from sela_ext.training.options import AUTO
from sela_ext.training.progress import RunProgress
from sela_ext.training.run_folder import describe_value

_TASKS: dict[str, tuple[Callable[[Setting], Task], str]] = {
    "classification": (Classification, "Main"),
    "detection": (Detection, "Main"),
    "segmentation": (Segmentation, "Segmentation"),
}
_FILES = ("options.json", "finetune.log", "metrics.jsonl", "metrics.json", "checkpoint.pt")
_LARGEST_GRADIENT = 10.0


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run gave.

    Attributes:
        metrics: scores in [0, 1] by name ("map", "map_11point" | "ap50", "ap50_11point", "ap75", "ap" | "miou",
            "pixel_accuracy"), "per_class", and what the run was.
        out: the folder.
        model: the network, in eval mode.
    """

    metrics: dict[str, Any]
    out: Path
    model: nn.Module


def finetune(
    backbone: str | os.PathLike[str] | nn.Module,
    *,
    voc: str | os.PathLike[str],
    task: str,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> FinetuneResult:
    """Fine-tune a backbone on PASCAL VOC and judge it there.

    Args:
        backbone: a run folder, a checkpoint that `load_released` takes, the name of a network, or an `nn.Module` that
            maps images to [B, D] (trained in place).
        voc: folder with JPEGImages, Annotations, ImageSets and SegmentationClass.
        task: "classification" (multi-label, mean average precision), "detection" (Faster R-CNN) or "segmentation"
            (fully convolutional).
        out: folder for metrics.json, metrics.jsonl, finetune.log, options.json and checkpoint.pt; must be empty or
            absent unless `overwrite`; default runs/finetune-TASK.
        **options: see `sela finetune --help` or `sela_ext.finetuning.options.FinetuneOptions`; "auto" values are those
            of the literature, and written to options.json.

    Returns:
        Scores and the trained network.

    Raises:
        OptionError: unknown option, wrong type or range, or a backbone that does not fit the task.
        DataError: the VOC folder, or a file in it, is not as VOC has it.
        CheckpointError: the backbone's file cannot be loaded.
        NumericsError: the loss is not finite; the last checkpoint stays.

    Source: protocols of the SeLa paper, section 4.3 and appendix: Caron et al. (2018) for classification,
    Faster R-CNN for detection, FCN for segmentation.
    """
    chosen = settle(make_options(options), task)
    folder = _check_folder(Path(out if out is not None else f"runs/finetune-{task}").expanduser(), chosen.overwrite)
    tree = VocTree(voc)
    kind, sets = _TASKS[task]
    splits = tree.choose_splits(sets, chosen.train_split, chosen.test_split)
    with torch_settings(chosen.threads, torch.device(chosen.device)), Interrupt() as interrupt:
        torch.manual_seed(chosen.seed)
        trunk = load_trunk(backbone, pretrained=chosen.pretrained, size=max(64, chosen.image_size))
        if chosen.batch_norm == AUTO:
            chosen = dataclasses.replace(chosen, batch_norm="frozen" if trunk.trained else "train")
        chosen = dataclasses.replace(chosen, train_split=splits[0], test_split=splits[1])
        work = kind(Setting(tree, trunk, chosen))
        with _Folder(folder, chosen.overwrite) as files:
            named = backbone if isinstance(backbone, (str, os.PathLike)) else type(backbone).__qualname__
            files.write(
                "options.json",
                {
                    "backbone": named,
                    "network": trunk.name,
                    "voc": tree.path,
                    "task": task,
                    "trained": trunk.trained,
                    **dataclasses.asdict(chosen),
                },
            )
            return _run(work, task, files, interrupt)


def _run(work: Task, task: str, files: _Folder, interrupt: Interrupt) -> FinetuneResult:
    options, setting = work.setting.options, work.setting
    parameters = [parameter for parameter in work.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    scaler = torch.amp.GradScaler(setting.device.type, enabled=options.precision == "float16")
    started = last_save = time.monotonic()
    loss_sum, loss_steps = 0.0, 0
    step = 0

    def save() -> None:
        nonlocal last_save
        files.save(
            {
                "step": step,
                "task": task,
                "network": setting.trunk.name,
                "classes": work.classes,
                "model": {key: value.detach().cpu() for key, value in work.model.state_dict().items()},
            }
        )
        last_save = time.monotonic()

    with RunProgress(options.progress) as progress:
        trained = sum(parameter.numel() for parameter in parameters)
        opening = (
            f"{task}: {setting.trunk.name} on {setting.device} in {options.precision}; {work.images:,} images of "
            f"{options.train_split}, judged on {options.test_split}; {options.iterations:,} steps of "
            f"{options.batch_size}; {trained:,} weights trained"
        )
        progress.say(opening)
        files.log(opening)
        work.train_mode()
        with interrupt.deferred():
            for epoch, batch in _batches(work, options.iterations):
                rate = learning_rate(options, step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = work.loss(batch)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise NumericsError(
                        f"loss is {value} at step {step} of {task}; the last checkpoint in {files.path} is intact; "
                        f"lower lr (now {options.lr:g}), or use precision float32 or batch_norm train"
                    )
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
                scaler.step(optimizer)
                scaler.update()
                step += 1
                loss_sum, loss_steps = loss_sum + value, loss_steps + 1
                if step % options.log_every == 0 or step == options.iterations:
                    mean, loss_sum, loss_steps = loss_sum / loss_steps, 0.0, 0
                    files.record({"event": "step", "step": step, "epoch": epoch, "loss": mean, "lr": rate})
                    progress.update(step / options.iterations, f"step {step:,}  loss {mean:.3f}")
                if interrupt.number or time.monotonic() - last_save >= options.checkpoint_seconds > 0:
                    save()
                    if interrupt.number:
                        interrupt.leave(f"stopped at step {step}; the network is in {files.path / 'checkpoint.pt'}")
            save()
        progress.say("evaluating")
        metrics = work.evaluate(lambda share: progress.update(share, "evaluating"))
        metrics = {
            "task": task,
            "network": setting.trunk.name,
            "layers": options.layers,
            **metrics,
            "train_split": options.train_split,
            "test_split": options.test_split,
            "iterations": step,
            "seconds": time.monotonic() - started,
        }
        files.record({"event": "end", "step": step, **metrics})
        files.write("metrics.json", metrics)
        shown = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if isinstance(v, float) and k != "seconds")
        closing = f"done in {metrics['seconds']:.0f} s: {shown}\nmetrics {files.path / 'metrics.json'}"
        progress.say(closing)
        files.log(closing.replace("\n", "; "))
    work.model.eval()
    return FinetuneResult(metrics, files.path, work.model)


def _batches(work: Task, steps: int) -> Iterator[tuple[int, Any]]:
    """As many batches as there are steps, epoch after epoch."""
    epoch = 0
    while steps:
        with contextlib.closing(work.epoch(epoch)) as batches:
            for batch in batches:
                yield epoch, batch
                steps -= 1
                if not steps:
                    return
        epoch += 1


def _check_folder(path: Path, overwrite: bool) -> Path:
    """Refuse a folder that holds something, before any work."""
    if path.exists() and not path.is_dir():
        raise OptionError(f"out: expected a folder, found the file {path}; name another")
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    known = {*_FILES, *(f"{name}.partial" for name in _FILES)}
    if found and not overwrite:
        raise OptionError(
            f"out: expected an empty or absent folder, found {path} with {len(found)} entries; set overwrite to "
            "replace the run in it, or name another"
        )
    foreign = [name for name in found if name not in known]
    if foreign:
        raise OptionError(
            f"overwrite: expected nothing but a fine-tuning run in {path}, found {', '.join(foreign[:3])}; nothing was "
            "deleted; name another folder"
        )
    return path


class _Folder:
    """The files of a run."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in _FILES if overwrite else ():
                (path / name).unlink(missing_ok=True)
            self._events = open(path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - open for the run
            self._log = open(path / "finetune.log", "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ResourceError(f"out: cannot write in {path}: {error.strerror}; name another folder") from error

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()
        self._log.close()

    def log(self, line: str) -> None:
        """Append a line to finetune.log."""
        self._log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + line + "\n")
        self._log.flush()

    def record(self, event: dict[str, Any]) -> None:
        """Append an object to metrics.jsonl; numbers that are not finite become null."""
        self._events.write(json.dumps(_finite(event), allow_nan=False) + "\n")
        self._events.flush()

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file at once."""
        text = json.dumps(_finite(describe_value(content)), indent=2, allow_nan=False)
        write_atomically(self.path / name, text.encode())

    def save(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt so that a crash leaves the old one or the whole new one."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        needed, free = buffer.getbuffer().nbytes, shutil.disk_usage(self.path).free
        path = self.path / "checkpoint.pt"
        if free < needed:
            raise ResourceError(f"{path}: expected {needed:,} free bytes, found {free:,}; free some space")
        write_atomically(path, buffer.getbuffer())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _signature() -> inspect.Signature:
    """The signature that help() shows: every option with its default."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("backbone", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        inspect.Parameter("voc", keyword),
        inspect.Parameter("task", keyword),
        inspect.Parameter("out", keyword, default=None),
        *(inspect.Parameter(spec.name, keyword, default=spec.default) for spec in dataclasses.fields(FinetuneOptions)),
    ]
    return inspect.Signature(parameters, return_annotation=FinetuneResult)


_finetune: Callable[..., FinetuneResult] = finetune
_finetune.__signature__ = _signature()  # type: ignore[attr-defined]
