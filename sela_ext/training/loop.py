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
from torch.nn import functional as F

from sela_ext import build_info
from sela_ext.data import Augment, Loader
from sela_ext.data.orientation import read_upright
from sela_ext.errors import CheckpointError, NumericsError, OptionError
from sela_ext.kernels import device_verdict
from sela_ext.kernels.device import place_of, usable
from sela_ext.models import Backbone, Network, build_backbone
from sela_ext.report import write_report
from sela_ext.training.checkpoint import load_checkpoint, save_checkpoint
from sela_ext.training.embedding import Arithmetic, Embedded, embed, open_index
from sela_ext.training.evaluate import Evaluation, evaluate_network
from sela_ext.training.labelling import label_pass, random_labels
from sela_ext.training.machine import Interrupt, torch_settings
from sela_ext.training.options import AUTO, Options, make_options
from sela_ext.training.outcome import (
    TrainResult,
    bad_images,
    closing_lines,
    opening_line,
    save_network,
    spread_labels,
)
from sela_ext.training.presets import PRESETS
from sela_ext.training.progress import RunProgress
from sela_ext.training.prototypes import place_prototypes
from sela_ext.training.resolve import Plan, named_augment, resolve
from sela_ext.training.run_folder import RunFolder, describe_value
from sela_ext.training.schedule import label_pass_times, learning_rate, passes_due
from sela_ext.training.split import Images, choose_images, has_labels

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Options that may differ when a run is continued: they do not change what is learnt.
_FREE_ON_RESUME = ("resume", "overwrite", "checkpoint_seconds", "progress", "threads", "index")


def train(data: Any, *, out: str | os.PathLike[str], **options: Any) -> TrainResult:
    """Train a network on unlabelled images by SeLa, and label the images.

    Args:
        data: "digits" (built in) | path (folder of images, IDX file or folder of them) | list of paths | uint8 array
            [N, H, W] or [N, H, W, C] | torch Dataset.
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
        return _run(data, plan, folder, images, interrupt)


def first_use(device: torch.device, log: Callable[[str], None]) -> None:
    """Have a CUDA device checked before any work: one that the check breaks costs nothing yet. Logs the verdict.

    Raises:
        ResourceError: the device cannot be used.
    """
    if device.type == "cuda":
        place = place_of(device)
        usable(place)
        log(f"device {device_verdict(place)}")


def _run(data: Any, plan: Plan, folder: RunFolder, images: Images, interrupt: Interrupt) -> TrainResult:
    opt, source, count = plan.options, images.train, len(images.train)
    truth = source.labels if has_labels(source) else None
    arithmetic = Arithmetic(torch.device(opt.device), _DTYPES[opt.precision])
    first_use(arithmetic.device, folder.log)

    # --- Network, optimiser, loader
    torch.manual_seed(opt.seed)
    size = plan.augment.size
    backbone = build_backbone(opt.model, channels=source.channels, image_size=(size, size))
    half_resolution = _half_resolution(plan, backbone)
    network = Network(
        backbone.module,
        backbone.feature_dim,
        opt.clusters,
        projection=opt.projection,
        head_kind=opt.head_kind,
        temperature=opt.temperature,
        channels_in=backbone.channels_in,
        name=backbone.name,
    ).to(arithmetic.device)
    network.to(memory_format=torch.channels_last)
    network.train()
    matrices = [p for p in network.parameters() if p.requires_grad and (p.ndim > 1 or opt.decay_vectors)]
    vectors = [p for p in network.parameters() if p.requires_grad and not (p.ndim > 1 or opt.decay_vectors)]
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": opt.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=opt.lr,
        momentum=opt.momentum,
        nesterov=opt.nesterov,
    )
    scaler = torch.amp.GradScaler(arithmetic.device.type, enabled=arithmetic.dtype is torch.float16)
    # The last, short batch of an epoch is left out when it is less than half a batch: its statistics are noise.
    short = count % opt.batch_size
    drop_last = count > opt.batch_size and 0 < short < opt.batch_size / 2
    per_epoch = count - short if drop_last else count
    # Entry points of JPEG files, kept beside the run: every pass over the images, and every resume, finds them.
    parts = {"train": source, "held": images.held, "judged": None if images.judged is images.held else images.judged}
    indexes = {
        name: open_index(part, opt.index, folder.index, name) for name, part in parts.items() if part is not None
    }
    loader = Loader(
        source,
        batch_size=opt.batch_size,
        augment=plan.augment,
        seed=opt.seed,
        shuffle=True,
        dtype=arithmetic.dtype,
        channels_last=True,
        threads=opt.threads,
        drop_last=drop_last,
        device=arithmetic.device,
        on_bad_image=opt.on_bad_image,
        max_bad_fraction=opt.max_bad_fraction,
        exact=opt.exact,
        exif=opt.exif,
        index=indexes["train"],
    )

    def embed_all(augment: Augment, *, train_mode: bool = False, epoch: int = 0) -> Embedded:
        return embed(
            network,
            source,
            augment,
            arithmetic,
            batch_size=max(64, min(512, opt.batch_size)),
            train_mode=train_mode,
            seed=opt.seed,
            epoch=epoch,
            threads=opt.threads,
            on_bad_image=opt.on_bad_image,
            max_bad_fraction=opt.max_bad_fraction,
            exact=opt.exact,
            exif=opt.exif,
            index=indexes["train"],
        )

    # --- Everything a resume needs is in this one dict, beside network, optimiser and scaler.
    state: dict[str, Any] = {
        "step": 0,
        "epoch": 0,
        "position": 0,  # images of this epoch's order that are done
        "seen": 0,  # the same over all epochs: the clock of the schedules
        "passes_done": 0,
        "passes_made": 0,
        "seconds": 0.0,  # since the start, time between runs not counted
        "loss_sum": 0.0,
        "loss_steps": 0,
        "finished": False,
        "complained": False,
        "labels": torch.from_numpy(random_labels(count, opt.clusters, opt.seed)),
        "bank": torch.zeros(0),
        "bank_valid": torch.zeros(count, dtype=torch.bool),
        "metrics_length": 0,
    }
    written = {spec.name: describe_value(getattr(opt, spec.name)) for spec in dataclasses.fields(opt)}
    identity = {
        "options": {name: value for name, value in written.items() if name not in _FREE_ON_RESUME},
        "data": images.everything.fingerprint(),
    }
    saved = load_checkpoint(folder.checkpoints) if opt.resume else None
    if saved is not None:
        _compare(saved["identity"], identity)
        state.update(saved["state"])
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        if saved["rng_cuda"] is not None and arithmetic.device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng_cuda"], arithmetic.device)
    labels = state["labels"].numpy()
    bank, bank_valid = state["bank"].to(arithmetic.device), state["bank_valid"].to(arithmetic.device)
    folder.open_logs(state["metrics_length"], state["step"])
    folder.write_options(
        {
            "version": build_info()["version"],
            "options": {**written, "data": data},
            "reasons": {**plan.reasons, "eval_data": images.reason},
            "resolved": {
                "images": len(images.everything),
                "training_images": count,
                "held_out_images": len(images.held_rows),
                "channels": source.channels,
                "image_size": list(plan.image_size),
                "data": images.everything.describe(),
                "network": backbone.name,
                "parameters": sum(p.numel() for p in network.parameters()),
                "feature_dim": backbone.feature_dim,
                "half_resolution": half_resolution,
                "augment": dataclasses.asdict(plan.augment),
                "torch": torch.__version__,
                **build_info(),
            },
        }
    )
    if opt.label_passes and plan.budget_seconds is None:
        times = label_pass_times(opt.label_passes, opt.epochs, per_epoch, opt.label_spacing)  # in images seen
    elif opt.label_passes and not plan.pass_each_epoch:
        times = label_pass_times(opt.label_passes, 400, 1 / 400, opt.label_spacing)  # in shares of the budget
    else:
        times = []
    last_save = started = time.monotonic()
    save_seconds, seconds_before = 0.0, state["seconds"]
    images_done, wait_before = 0, loader.wait_seconds
    pending: tuple[torch.Tensor, torch.Tensor] | None = None  # loss and images of the last step, not yet looked at

    def save(finished: bool = False) -> None:
        nonlocal last_save, save_seconds
        began = time.monotonic()
        state.update(
            labels=torch.from_numpy(labels),
            bank=bank.cpu(),
            bank_valid=bank_valid.cpu(),
            finished=finished,
            metrics_length=folder.metrics_length(),
        )
        on_cuda = arithmetic.device.type == "cuda"
        save_checkpoint(
            folder.checkpoints,
            state["step"],
            {
                "identity": identity,
                "state": state,
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state(arithmetic.device) if on_cuda else None,
            },
        )
        last_save = time.monotonic()
        save_seconds = last_save - began

    def time_to_save() -> bool:
        """As often as asked, but no more than a twentieth of the time."""
        wait = opt.checkpoint_seconds and max(opt.checkpoint_seconds, 20 * save_seconds)
        return time.monotonic() - last_save >= wait

    def relabel(which: list[int] | None = None) -> None:
        """One label pass: embeddings of all images by the label source, then balanced labels."""
        nonlocal labels
        waited = 0.0
        if opt.label_source == "bank":
            embeddings, valid = bank, bank_valid
        else:
            # Looking at all images takes a while: a signal ends the run at once, and resume repeats the pass.
            with interrupt.at_once():
                if opt.label_source == "eval":
                    seen = embed_all(_label_view(plan))
                else:  # its own draws: the epoch counter of the passes lies beyond that of the training
                    seen = embed_all(plan.augment, train_mode=True, epoch=2**31 + state["passes_made"])
            embeddings, valid, waited = seen.embeddings, seen.valid, seen.wait_seconds
        result = label_pass(
            network.heads,
            embeddings,
            valid,
            labels,
            which=which,
            lam=opt.lam,
            tol=opt.label_tol,
            method=opt.label_method,
            max_passes=opt.label_max_passes,
            marginals=opt.marginals,
            balance=opt.balance,
            threads=opt.threads,
            truth=truth,
        )
        labels = result.labels
        state["passes_made"] += 1
        folder.record(
            {
                "event": "label_pass",
                "pass": state["passes_made"],
                "step": state["step"],
                "epoch": state["seen"] / per_epoch,
                "masked": result.masked,
                "solve_seconds": result.seconds,
                "wait_seconds": waited,
                "heads": result.heads,
            }
        )
        folder.log(f"label pass {state['passes_made']} at epoch {state['seen'] / per_epoch:.2f}: {result.describe()}")
        for complaint in result.complaints:
            folder.log(complaint)
        if result.complaints and not state["complained"]:
            state["complained"] = True
            progress.say(f"label pass {state['passes_made']}: {result.complaints[0]} (further ones go to train.log)")

    def evaluate(event: str) -> Evaluation:
        # A signal here ends the run at once: nothing is learnt meanwhile, and resume repeats the evaluation.
        with interrupt.at_once():
            result = evaluate_network(
                network, images, plan.plain, arithmetic, previous=labels, options=opt, indexes=indexes
            )
        folder.record(
            {
                "event": event,
                "step": state["step"],
                "epoch": state["seen"] / per_epoch,
                "head": result.head,
                **result.metrics,
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
            names = ", ".join(source.name(i) for i in pending[1].tolist()[:3])
            raise NumericsError(
                f"loss is {value} at step {state['step']}, in a batch with {names}, ...; the last checkpoint in "
                f"{folder.checkpoints} is intact; lower lr (now {opt.lr:g}) or use precision float32"
            )
        state["loss_sum"] += value
        state["loss_steps"] += 1
        pending = None

    def share_done() -> float:
        """Share of the run that is done, by images or by the clock."""
        if plan.budget_seconds is not None:
            return float(state["seconds"] / plan.budget_seconds)
        return float(state["seen"] / (per_epoch * opt.epochs))

    def done() -> bool:
        over = share_done() >= 1 if plan.budget_seconds is not None else state["epoch"] >= opt.epochs
        return bool(state["finished"] or over)

    # --- The loop
    with RunProgress(opt.progress) as progress, contextlib.closing(loader):
        progress.say(opening_line(plan, images, backbone.name))
        if saved is not None:
            progress.say(f"continuing at epoch {state['epoch']}, step {state['step']}")
        elif opt.init == "kmeans" or opt.label_source == "bank":
            # Look at all images once. The untrained batch norm has no statistics of its own: it takes the batches'.
            first = embed_all(plan.plain, train_mode=True)
            if opt.init == "kmeans":
                place_prototypes(network.heads, first.embeddings, first.valid, opt.seed)
            if opt.label_source == "bank":
                bank, bank_valid = first.embeddings, first.valid
        if saved is None and opt.init != "random" and not opt.label_passes:
            relabel()  # the only one: the untrained network's labels are kept
        while not done():
            with interrupt.deferred(), contextlib.closing(loader.epoch(state["epoch"], state["position"])) as batches:
                for batch in batches:
                    # Label passes that are due.
                    now = state["seen"] if plan.budget_seconds is None else share_done()
                    due = passes_due(times, state["passes_done"], now)
                    if plan.pass_each_epoch:
                        due = state["epoch"] + 1
                    if due > state["passes_done"]:
                        check_loss()
                        relabel([state["passes_made"] % opt.heads] if opt.label_heads == "turn" else None)
                        state["passes_done"] = due

                    # One step. Batch norm cannot normalise a batch of one: it is passed over.
                    if len(batch.index) > 1:
                        for group in optimizer.param_groups:
                            group["lr"] = learning_rate(opt.lr, min(share_done(), 1.0), opt.lr_schedule, opt.warmup)
                        pictures = batch.images
                        if half_resolution and _draw(opt.seed, state["step"]) < half_resolution:
                            pictures = F.avg_pool2d(pictures, 2)
                        target = torch.from_numpy(labels[:, batch.index.numpy()]).to(arithmetic.device, torch.int64)
                        with arithmetic.autocast():
                            embedding = network(pictures)
                        logits = network.heads.split(network.heads(embedding))
                        losses = torch.stack(
                            [
                                F.cross_entropy(part, goal, ignore_index=-1)
                                for part, goal in zip(logits, target, strict=True)
                            ]
                        )
                        loss = losses.sum() if opt.loss == "sum" else losses.mean()
                        optimizer.zero_grad(set_to_none=True)
                        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                        scaler.step(optimizer)
                        scaler.update()
                        check_loss()
                        pending = loss.detach(), batch.index
                        if opt.label_source == "bank":
                            index = batch.index.to(arithmetic.device)
                            bank[index] = embedding.detach().to(bank.dtype)
                            bank_valid[index] = True
                        state["step"] += 1
                        images_done += len(batch.index)
                    state["position"] = batch.position
                    state["seen"] = state["epoch"] * per_epoch + batch.position
                    state["seconds"] = seconds_before + time.monotonic() - started

                    # Log, show, save.
                    if state["step"] % opt.log_every == 0:
                        check_loss()
                        elapsed = max(time.monotonic() - started, 1e-9)
                        event = {
                            "event": "step",
                            "step": state["step"],
                            "epoch": state["seen"] / per_epoch,
                            "loss": state["loss_sum"] / max(state["loss_steps"], 1),
                            "lr": optimizer.param_groups[0]["lr"],
                            "images_per_second": images_done / elapsed,
                            "data_wait_share": (loader.wait_seconds - wait_before) / elapsed,
                        }
                        state["loss_sum"], state["loss_steps"] = 0.0, 0
                        folder.record(event)
                        progress.update(
                            share_done(),
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
            if (
                opt.evaluate_every
                and state["position"] == 0
                and state["epoch"] % opt.evaluate_every == 0
                and not done()
            ):
                evaluate("evaluation")
        check_loss()

        # --- The end: final labels, metrics, network, report
        if not state["finished"]:
            with interrupt.deferred():
                save(finished=True)
        progress.say("evaluating")
        result = evaluate("end")
        all_labels, all_confidence = spread_labels(result, images)
        bad = bad_images(loader.bad_images, result, images)
        folder.write_labels(all_labels, all_confidence, images.everything.names)
        folder.write_bad_images(bad)
        save_network(folder, network, opt, result, backbone.name)
        worked = max(state["seconds"] - seconds_before, 1e-9)
        result.metrics.update(images_per_second=images_done / worked, seconds=state["seconds"])
        read = functools.partial(read_upright, images.everything) if opt.exif else images.everything.read
        report = write_report(folder.path, read)
        progress.say(closing_lines(result, folder.path, report, state, per_epoch, len(bad)))
    folder.log(f"finished: {result.metrics}")
    network.eval()
    return TrainResult(all_labels, all_confidence, result.metrics, result.head, folder.path, report, network)


def _half_resolution(plan: Plan, backbone: Backbone) -> float:
    """Share of the steps at half resolution; none where the network takes one size only.

    Raises:
        OptionError: it was asked for, and the network cannot.
    """
    share, half = plan.options.half_resolution, plan.augment.size // 2
    if not share:
        return 0.0
    try:
        found = build_backbone(backbone.module, channels=backbone.channels_in, image_size=(half, half))
        if found.feature_dim == backbone.feature_dim:
            return share
        problem = f"{found.feature_dim} features instead of {backbone.feature_dim}"
    except OptionError as error:
        problem = str(error)
    if "half_resolution" in plan.given:
        raise OptionError(f"half_resolution: expected a network that takes {half} x {half} too; {problem}")
    plan.reasons["half_resolution"] = f"not used: the network does not take {half} x {half}"
    return 0.0


def _label_view(plan: Plan) -> Augment:
    """How the eval label pass looks at images, with the normalisation of the training."""
    view = plan.options.label_augment
    if view == "none":
        return plan.plain
    named = named_augment(view, plan.augment.size)
    return dataclasses.replace(named, mean=plan.augment.mean, std=plan.augment.std)


def _given(options: dict[str, Any]) -> set[str]:
    """Options that are set, by the user or by the preset; "auto" is not set."""
    preset = options.get("preset")
    written = options if preset is None else {**PRESETS[preset].options, **options}
    return {name for name, value in written.items() if not (isinstance(value, str) and value == AUTO)}


def _draw(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on seed and step alone."""
    return float(np.random.Generator(np.random.Philox(key=np.array([seed, 2**33 + step], np.uint64))).random())


def _compare(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to continue a run with other options or data, and list what differs."""
    differences = [
        f"{name}: was {old[part].get(name)!r}, now {new[part].get(name)!r}"
        for part in ("options", "data")
        for name in sorted({*old[part], *new[part]})
        if old[part].get(name) != new[part].get(name)
    ]
    if differences:
        raise CheckpointError(f"resume: the run in this folder was started differently: {'; '.join(differences)}")


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
