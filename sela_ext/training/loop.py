"""The training loop of SeLa, top to bottom: relabel, train, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sela_ext import build_info
from sela_ext.data.orientation import read_upright
from sela_ext.data.source import UInt8Array
from sela_ext.errors import NumericsError
from sela_ext.report import write_report
from sela_ext.training import snapshot
from sela_ext.training.checkpoint import load_checkpoint, save_checkpoint
from sela_ext.training.evaluate import Evaluation
from sela_ext.training.machine import Interrupt, torch_settings
from sela_ext.training.options import AUTO, Options, make_options
from sela_ext.training.outcome import (
    TrainResult,
    bad_images,
    closing_lines,
    noun_of,
    opening_line,
    save_network,
    spread_labels,
)
from sela_ext.training.presets import PRESETS
from sela_ext.training.progress import RunProgress
from sela_ext.training.recipes import RECIPES
from sela_ext.training.resolve import resolve
from sela_ext.training.run import Run, make_run
from sela_ext.training.run_folder import RunFolder
from sela_ext.training.schedule import label_pass_times, learning_rate, passes_due
from sela_ext.training.split import choose_images


def train(data: Any, *, out: str | os.PathLike[str], **options: Any) -> TrainResult:
    """Train a network on unlabelled images by SeLa, and label the images.

    Args:
        data: "digits" (built in) | path (folder of images, IDX file or folder of them) | list of paths | uint8 array
            [N, H, W] or [N, H, W, C] | torch Dataset | feature vectors, float array [N, D] or a file of them: heads are
            then trained on noisy views of the rows (see docs/embeddings.md).
        out: run folder; must be empty or absent unless `resume` or `overwrite`.
        **options: see `sela train --help` or `sela_ext.training.Options`; "auto" values are chosen from data and
            device, and written to options.json with the reason.

    Returns:
        Labels of every head, metrics where true labels exist, and the trained network.

    Raises:
        OptionError: unknown option, wrong type or range, or one that does not fit the data.
        DataError: images missing or unreadable.
        CheckpointError: `resume` with other options or other data, or with damaged checkpoints.
        NumericsError: the loss is not finite.

    Example:
        >>> import sela_ext, tempfile, os
        >>> out = os.path.join(tempfile.mkdtemp(), "run")
        >>> result = sela_ext.train("digits", out=out, epochs=1, progress=False, seed=1)
        >>> result.labels.shape
        (12, 1797)

    Source: Asano, Rupprecht, Vedaldi, "Self-labelling via simultaneous clustering and representation learning",
    ICLR 2020.
    """
    chosen = make_options(options)
    folder = RunFolder.check(out, resume=chosen.resume, overwrite=chosen.overwrite, data=data)
    images = choose_images(data, chosen)
    is_digits = isinstance(data, str) and data == "digits"
    plan = resolve(chosen, _given(options), images.train, digits=is_digits)
    folder.create(overwrite=chosen.overwrite)
    with torch_settings(plan.options.threads), Interrupt() as interrupt, contextlib.closing(folder):
        return _run(data, make_run(plan, images, folder, interrupt))


def _run(data: Any, run: Run) -> TrainResult:
    plan, opt, folder, interrupt = run.plan, run.options, run.folder, run.interrupt
    state = run.state
    state.update(snapshot.first_state())
    recipe = RECIPES[opt.method](run)
    run.labels = recipe.first_labels()
    loader = run.make_loader(recipe.views())
    saved = load_checkpoint(folder.checkpoints) if opt.resume else None
    if saved is not None:
        snapshot.put_back(run, recipe, saved)
    folder.open_logs(state["metrics_length"], state["step"])
    folder.write_options(_described(data, run))
    times = _pass_times(run)
    last_save = started = time.monotonic()
    save_seconds, seconds_before = 0.0, state["seconds"]
    images_done, wait_before = 0, loader.wait_seconds
    pending: tuple[torch.Tensor, torch.Tensor] | None = None  # loss and images of the last step, not yet looked at

    def save(finished: bool = False) -> None:
        nonlocal last_save, save_seconds
        began = time.monotonic()
        state.update(finished=finished, metrics_length=folder.metrics_length())
        save_checkpoint(folder.checkpoints, state["step"], snapshot.take(run, recipe))
        last_save = time.monotonic()
        save_seconds = last_save - began

    def time_to_save() -> bool:
        """As often as asked, but no more than a twentieth of the time."""
        wait = opt.checkpoint_seconds and max(opt.checkpoint_seconds, 20 * save_seconds)
        return time.monotonic() - last_save >= wait

    def relabel(which: list[int] | None = None) -> None:
        """One label pass, as the method makes them."""
        result = recipe.relabel(which)
        run.labels = result.labels
        state["passes_made"] += 1
        folder.record(
            {
                "event": "label_pass",
                "pass": state["passes_made"],
                "step": state["step"],
                "epoch": run.epochs_done,
                "masked": result.masked,
                "solve_seconds": result.seconds,
                "wait_seconds": result.wait_seconds,
                "heads": result.heads,
            }
        )
        folder.log(f"label pass {state['passes_made']} at epoch {run.epochs_done:.2f}: {result.describe()}")
        for complaint in result.complaints:
            folder.log(complaint)
        if result.complaints and not state["complained"]:
            state["complained"] = True
            progress.say(f"label pass {state['passes_made']}: {result.complaints[0]} (further ones go to train.log)")

    def evaluate(event: str) -> Evaluation:
        # A signal here ends the run at once: nothing is learnt meanwhile, and resume repeats the evaluation.
        with interrupt.at_once():
            result = recipe.evaluate()
        folder.record(
            {
                "event": event,
                "step": state["step"],
                "epoch": run.epochs_done,
                "head": result.head,
                **result.metrics,
                "stability_by_clusters": result.stability,
                "heads": result.heads,
                "elapsed_seconds": state["seconds"],
            }
        )
        return result

    def check_loss() -> None:
        """Look at the last step's loss: a step late, so that the device need not be waited for."""
        nonlocal pending
        if pending is None:
            return
        value = float(pending[0])
        if not np.isfinite(value):
            names = ", ".join(run.source.name(i) for i in pending[1].tolist()[:3])
            raise NumericsError(
                f"loss is {value} at step {state['step']}, in a batch with {names}, ...; the last checkpoint in "
                f"{folder.checkpoints} is intact; lower lr (now {opt.lr:g}) or use precision float32"
            )
        state["loss_sum"] += value
        state["loss_steps"] += 1
        pending = None

    def done() -> bool:
        over = run.share_done >= 1 if plan.budget_seconds is not None else state["epoch"] >= opt.epochs
        return bool(state["finished"] or over)

    # --- The loop
    with RunProgress(opt.progress) as progress, contextlib.closing(loader):
        progress.say(opening_line(plan, run.images, run.backbone.name))
        if saved is not None:
            progress.say(f"continuing at epoch {state['epoch']}, step {state['step']}")
        else:
            recipe.begin()
            if opt.init != "random" and not opt.label_passes:
                relabel()  # the only one: the untrained network's labels are kept
        while not done():
            epoch = loader.epoch(state["epoch"], state["position"])
            with interrupt.deferred(), contextlib.closing(epoch) as batches:
                for batch in batches:
                    # Label passes that are due.
                    now = state["seen"] if plan.budget_seconds is None else run.share_done
                    due = state["epoch"] + 1 if plan.pass_each_epoch else passes_due(times, state["passes_done"], now)
                    if due > state["passes_done"]:
                        check_loss()
                        relabel([state["passes_made"] % opt.heads] if opt.label_heads == "turn" else None)
                        state["passes_done"] = due

                    # One step. Batch norm cannot normalise a batch of one: it is passed over.
                    if len(batch.index) > 1:
                        for group in run.optimizer.param_groups:
                            group["lr"] = learning_rate(opt.lr, min(run.share_done, 1.0), opt.lr_schedule, opt.warmup)
                        output = recipe.step(batch)
                        run.optimizer.zero_grad(set_to_none=True)
                        run.scaler.scale(output.loss).backward()  # type: ignore[no-untyped-call]
                        run.scaler.step(run.optimizer)
                        run.scaler.update()
                        check_loss()
                        pending = output.loss.detach(), batch.index
                        recipe.after_step(batch, output)
                        state["step"] += 1
                        images_done += len(batch.index)
                    state["position"] = batch.position
                    state["seen"] = state["epoch"] * run.per_epoch + batch.position
                    state["seconds"] = seconds_before + time.monotonic() - started

                    # Log, show, save.
                    if state["step"] % opt.log_every == 0:
                        check_loss()
                        elapsed = max(time.monotonic() - started, 1e-9)
                        event = {
                            "event": "step",
                            "step": state["step"],
                            "epoch": run.epochs_done,
                            "loss": state["loss_sum"] / max(state["loss_steps"], 1),
                            "lr": run.optimizer.param_groups[0]["lr"],
                            "images_per_second": images_done / elapsed,
                            "data_wait_share": (loader.wait_seconds - wait_before) / elapsed,
                        }
                        state["loss_sum"], state["loss_steps"] = 0.0, 0
                        folder.record(event)
                        progress.update(
                            run.share_done,
                            f"epoch {event['epoch']:.1f}  loss {event['loss']:.3f}  "
                            f"{event['images_per_second']:,.0f} img/s  wait {event['data_wait_share']:.0%}",
                        )
                    if interrupt.number or time_to_save():
                        check_loss()
                        save()
                        if interrupt.number:
                            interrupt.leave(
                                f"stopped at step {state['step']}, checkpoint written; continue with resume"
                            )
                    if plan.budget_seconds is not None and done():
                        break
                else:
                    state["epoch"] += 1
                    state["position"] = 0
                    folder.log(f"epoch {state['epoch']}: waited for images {loader.wait_share:.1%} of the time so far")
            between_epochs = state["position"] == 0 and not done()
            if opt.evaluate_every and between_epochs and state["epoch"] % opt.evaluate_every == 0:
                evaluate("evaluation")
        check_loss()

        # --- The end: final labels, metrics, network, report
        if not state["finished"]:
            with interrupt.deferred():
                save(finished=True)
        progress.say("evaluating")
        result = evaluate("end")
        images = run.images
        all_labels, all_confidence = spread_labels(result, images)
        bad = bad_images(loader.bad_images, result, images)
        folder.write_labels(all_labels, all_confidence, images.everything.names)
        folder.write_bad_images(bad)
        save_network(folder, run.network, opt, result, run.backbone.name)
        worked = max(state["seconds"] - seconds_before, 1e-9)
        result.metrics.update(images_per_second=images_done / worked, seconds=state["seconds"])
        report = write_report(folder.path, _image_reader(run))
        progress.say(
            closing_lines(result, folder.path, report, state, run.per_epoch, len(bad), noun_of(images.everything))
        )
    folder.log(f"finished: {result.metrics}")
    run.network.eval()
    return TrainResult(
        all_labels, all_confidence, result.metrics, result.head, folder.path, report, run.network, result.stability
    )


def _pass_times(run: Run) -> list[float]:
    """When label passes are due: in images seen, or in shares of a budget. Empty: one for each epoch, or none."""
    opt = run.options
    if not opt.label_passes or (run.plan.budget_seconds is not None and run.plan.pass_each_epoch):
        return []
    if run.plan.budget_seconds is None:
        return label_pass_times(opt.label_passes, opt.epochs, run.per_epoch, opt.label_spacing)
    return label_pass_times(opt.label_passes, 400, 1 / 400, opt.label_spacing)


def _image_reader(run: Run) -> Callable[[int], UInt8Array] | None:
    """What shows the report images; None for feature vectors, which have none."""
    everything = run.images.everything
    if everything.vectors is not None:
        return None
    return functools.partial(read_upright, everything) if run.options.exif else everything.read


def _described(data: Any, run: Run) -> dict[str, Any]:
    """What options.json holds."""
    return {
        "version": build_info()["version"],
        "options": {**snapshot.described_options(run.options), "data": data},
        "reasons": {**run.plan.reasons, "eval_data": run.images.reason},
        "resolved": {
            "images": len(run.images.everything),
            "training_images": len(run.source),
            "held_out_images": len(run.images.held_rows),
            **_shape_of(run),
            "data": run.images.everything.describe(),
            "network": run.backbone.name,
            "parameters": sum(p.numel() for p in run.network.parameters()),
            "feature_dim": run.backbone.feature_dim,
            "half_resolution": run.half_resolution,
            "torch": torch.__version__,
            **build_info(),
        },
    }


def _shape_of(run: Run) -> dict[str, Any]:
    """What the network is given: images of a size, augmented, or vectors."""
    vectors = run.source.vectors
    if vectors is not None:
        return {"vector_size": vectors.width}
    return {
        "channels": run.source.channels,
        "image_size": list(run.plan.image_size),
        "augment": dataclasses.asdict(run.plan.augment),
    }


def _given(options: dict[str, Any]) -> set[str]:
    """Options that are set, by the user or by the preset; "auto" is not set."""
    preset = options.get("preset")
    written = options if preset is None else {**PRESETS[preset].options, **options}
    return {name for name, value in written.items() if not (isinstance(value, str) and value == AUTO)}


def _signature() -> inspect.Signature:
    """The signature that help() shows: data, out, and every option with its default."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("data", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        inspect.Parameter("out", keyword),
        *(inspect.Parameter(spec.name, keyword, default=spec.default) for spec in dataclasses.fields(Options)),
    ]
    return inspect.Signature(parameters, return_annotation=TrainResult)


_train: Callable[..., TrainResult] = train
_train.__signature__ = _signature()  # type: ignore[attr-defined]
