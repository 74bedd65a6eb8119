"""The training loop of SeLa, top to bottom: relabel, train, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from sela_ext import build_info
from sela_ext.data import Loader, Source, open_source
from sela_ext.errors import CheckpointError, NumericsError
from sela_ext.models import Network, build_backbone
from sela_ext.report import write_report
from sela_ext.training.checkpoint import load_checkpoint, save_checkpoint
from sela_ext.training.embedding import Arithmetic, embed
from sela_ext.training.evaluate import Evaluation, evaluate_network
from sela_ext.training.labelling import label_pass, random_labels
from sela_ext.training.machine import Interrupt, use_threads
from sela_ext.training.options import AUTO, Options, make_options
from sela_ext.training.outcome import TrainResult, closing_lines, opening_line, save_network, spread_labels
from sela_ext.training.presets import PRESETS
from sela_ext.training.progress import RunProgress
from sela_ext.training.prototypes import place_prototypes
from sela_ext.training.resolve import Plan, named_augment, probe_image_size, resolve
from sela_ext.training.run_folder import RunFolder, describe_value
from sela_ext.training.schedule import label_pass_times, learning_rate, passes_due
from sela_ext.training.split import find_eval, hold_out

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Options that may differ when a run is continued: they do not change what is learnt.
_FREE_ON_RESUME = ("resume", "overwrite", "checkpoint_seconds", "progress", "threads")


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
    everything = open_source(data, labels=chosen.labels)
    is_digits = isinstance(data, str) and data == "digits"
    kept, held, why_held = hold_out(everything, chosen.holdout, is_digits, chosen.seed)
    source = everything if not len(held) else everything.subset(kept)
    eval_source, why_eval = find_eval(data, chosen.eval_data, everything, held, why_held)
    plan = resolve(chosen, _given(options), source, digits=is_digits)
    folder.create(overwrite=chosen.overwrite)
    with use_threads(plan.options.threads), Interrupt() as interrupt, contextlib.closing(folder):
        return _run(data, plan, folder, everything, source, kept, held, eval_source, why_eval, interrupt)


def _run(
    data: Any,
    plan: Plan,
    folder: RunFolder,
    everything: Source,
    source: Source,
    kept: NDArray[np.int64],
    held: NDArray[np.int64],
    eval_source: Source | None,
    why_eval: str,
    interrupt: Interrupt,
) -> TrainResult:
    opt = plan.options
    images, truth = len(source), source.labels
    arithmetic = Arithmetic(torch.device(opt.device), _DTYPES[opt.precision])

    # --- Network, optimiser, loader
    torch.manual_seed(opt.seed)
    size = plan.augment.size
    backbone = build_backbone(opt.model, channels=source.channels, image_size=(size, size))
    network = Network(
        backbone.module,
        backbone.feature_dim,
        opt.clusters,
        projection=opt.projection,
        head_kind=opt.head_kind,
        temperature=opt.temperature,
        channels_in=backbone.channels_in,
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
    short = images % opt.batch_size
    drop_last = images > opt.batch_size and 0 < short < opt.batch_size / 2
    per_epoch = images - short if drop_last else images
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
    )

    def embed_all(**how: Any) -> Any:
        return embed(
            network,
            source,
            arithmetic=arithmetic,
            seed=opt.seed,
            threads=opt.threads,
            on_bad_image=opt.on_bad_image,
            max_bad_fraction=opt.max_bad_fraction,
            **how,
        )

    # --- Everything a resume needs is in this one dict, beside network, optimiser and scaler.
    state: dict[str, Any] = {
        "step": 0,
        "epoch": 0,
        "position": 0,  # samples of this epoch's order already used
        "seen": 0,  # images seen, over all epochs
        "passes_done": 0,
        "passes_made": 0,
        "seconds": 0.0,  # of training so far, evaluation not counted
        "loss_sum": 0.0,
        "loss_steps": 0,
        "finished": False,
        "labels": torch.from_numpy(random_labels(images, opt.clusters, opt.seed)),
        "bank": torch.zeros(0),
        "bank_valid": torch.zeros(images, dtype=torch.bool),
        "metrics_length": 0,
    }
    identity = {
        "options": {
            name: describe_value(value) if not isinstance(value, (int, float, str, list, type(None))) else value
            for name, value in dataclasses.asdict(opt).items()
            if name not in _FREE_ON_RESUME
        },
        "data": source.fingerprint(),
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
    folder.open_logs(state["metrics_length"])
    folder.write_options(
        {
            "version": build_info()["version"],
            "options": {**dataclasses.asdict(opt), "data": data},
            "reasons": {**plan.reasons, "eval_data": why_eval},
            "resolved": {
                "images": len(everything),
                "training_images": images,
                "held_out_images": len(held),
                "channels": source.channels,
                "image_size": probe_image_size(source),
                "data": source.describe(),
                "network": backbone.name,
                "parameters": sum(p.numel() for p in network.parameters()),
                "feature_dim": backbone.feature_dim,
                "augment": dataclasses.asdict(plan.augment),
                "torch": torch.__version__,
                **build_info(),
            },
        }
    )

    def save(finished: bool = False) -> None:
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

    def relabel(which: list[int] | None = None) -> None:
        """One label pass: embeddings of all images by the label source, then balanced labels."""
        nonlocal labels, bank, bank_valid
        if opt.label_source == "bank":
            embeddings, valid = bank, bank_valid
        elif opt.label_source == "eval":
            view = plan.plain if opt.label_augment == "none" else named_augment(opt.label_augment, size)
            seen = embed_all(augment=view)
            embeddings, valid = seen.embeddings, seen.valid
        else:
            # Its own draws: the epoch counter of the passes lies beyond that of the training.
            seen = embed_all(augment=plan.augment, train_mode=True, epoch=2**31 + state["passes_made"])
            embeddings, valid = seen.embeddings, seen.valid
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
                "heads": result.heads,
            }
        )
        best = min(result.heads, key=lambda head: head["cross_entropy"])
        loose = [head["head"] for head in result.heads if not head["converged"]]
        folder.log(
            f"label pass {state['passes_made']} at epoch {state['seen'] / per_epoch:.2f}: changed "
            f"{np.mean([head['changed'] for head in result.heads]):.3f}, cross-entropy {best['cross_entropy']:.3f} "
            f"of ln K {best['ln_k']:.3f}, solver error {max(head['error'] for head in result.heads):.1e}"
            + (f", not converged: heads {loose}" if loose else "")
            + (f", {result.masked} rows masked" if result.masked else "")
        )

    def evaluate() -> Evaluation:
        return evaluate_network(
            network,
            source,
            eval_source,
            plan.plain,
            arithmetic,
            previous=labels,
            options=opt,
        )

    def record_evaluation(event: str, result: Evaluation) -> None:
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

    # --- The loop
    if opt.label_passes and plan.budget_seconds is None:
        times = label_pass_times(opt.label_passes, opt.epochs, per_epoch, opt.label_spacing)
    elif opt.label_passes and opt.label_spacing == "quadratic":
        times = [t for t in label_pass_times(opt.label_passes, 1.0, 1, "quadratic") if t < 1.0]  # shares of the budget
    else:
        times = []
    with RunProgress(opt.progress) as progress:
        progress.say(opening_line(plan, source, everything, len(held), backbone.name))
        if saved is not None:
            progress.say(f"continuing at epoch {state['epoch']}, step {state['step']}")
        last_save = started = time.monotonic()
        seconds_before, wait_before, seen_before = state["seconds"], loader.wait_seconds, state["seen"]
        pending: tuple[torch.Tensor, torch.Tensor] | None = None  # loss of the last step, not yet looked at

        def check_loss() -> None:
            """Look at the last step's loss: a step late, so that the device need not be waited for."""
            nonlocal pending
            if pending is None:
                return
            loss_value = float(pending[0])
            if not np.isfinite(loss_value):
                names = [source.names[i] for i in pending[1].tolist()[:3]]
                raise NumericsError(
                    f"loss is {loss_value} at step {state['step']}, in a batch with {', '.join(names)}, ...; the last "
                    f"checkpoint in {folder.checkpoints} is intact; lower lr (now {opt.lr:g}) or use precision float32"
                )
            state["loss_sum"] += loss_value
            state["loss_steps"] += 1
            pending = None

        def done() -> bool:
            if state["finished"]:
                return True
            if plan.budget_seconds is not None:
                return bool(state["seconds"] >= plan.budget_seconds)
            return bool(state["epoch"] >= opt.epochs)

        if saved is None and (opt.init == "kmeans" or opt.label_source == "bank"):
            # Look at all images once. The untrained batch norm has no statistics of its own: it takes the batches'.
            first = embed_all(augment=plan.plain, train_mode=True)
            if opt.init == "kmeans":
                place_prototypes(network.heads, first.embeddings, first.valid, opt.seed)
            if opt.label_source == "bank":
                bank, bank_valid = first.embeddings, first.valid
        if saved is None and opt.init != "random" and not opt.label_passes:
            relabel()  # the only one: the untrained network's labels are kept
        while not done():
            for batch in loader.epoch(state["epoch"], start=state["position"]):
                # Label passes that are due. Under a budget with even spacing: one at the start of every epoch.
                share = (
                    state["seconds"] / plan.budget_seconds
                    if plan.budget_seconds is not None
                    else state["seen"] / (per_epoch * opt.epochs)
                )
                now = state["seen"] if plan.budget_seconds is None else share
                due = passes_due(times, state["passes_done"], now)
                each_epoch = (
                    plan.budget_seconds is not None
                    and opt.label_passes > 0
                    and opt.label_spacing == "linear"
                    and state["passes_done"] <= state["epoch"]
                )
                if due > state["passes_done"] or each_epoch:
                    check_loss()
                    turn = [state["passes_made"] % len(opt.clusters)] if opt.label_heads == "turn" else None
                    relabel(turn)
                    state["passes_done"] = due if times else state["epoch"] + 1

                # One step.
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(opt.lr, min(share, 1.0), opt.lr_schedule, opt.warmup)
                pictures = batch.images
                if opt.half_resolution and _half(opt.seed, state["step"]) < opt.half_resolution:
                    pictures = F.avg_pool2d(pictures, 2)
                target = torch.from_numpy(labels[:, batch.index.numpy()]).to(arithmetic.device, torch.int64)
                if len(batch.index) < 2:
                    state["position"] = batch.position
                    continue  # batch norm cannot normalise a batch of one
                with arithmetic.autocast():
                    embedding = network(pictures)
                logits = network.heads.split(network.heads(embedding))
                losses = torch.stack(
                    [F.cross_entropy(part, goal, ignore_index=-1) for part, goal in zip(logits, target, strict=True)]
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
                state["position"] = batch.position
                state["seen"] += len(batch.index)
                state["seconds"] = seconds_before + time.monotonic() - started

                # Log, show, save.
                if state["step"] % opt.log_every == 0:
                    check_loss()
                    elapsed = max(time.monotonic() - started, 1e-9)
                    rate = (state["seen"] - seen_before) / elapsed
                    wait = (loader.wait_seconds - wait_before) / elapsed
                    mean_loss = state["loss_sum"] / max(state["loss_steps"], 1)
                    state["loss_sum"], state["loss_steps"] = 0.0, 0
                    folder.record(
                        {
                            "event": "step",
                            "step": state["step"],
                            "epoch": state["seen"] / per_epoch,
                            "loss": mean_loss,
                            "lr": optimizer.param_groups[0]["lr"],
                            "images_per_second": rate,
                            "data_wait_share": wait,
                        }
                    )
                    progress.update(
                        share,
                        f"epoch {state['seen'] / per_epoch:.1f}  loss {mean_loss:.3f}  {rate:,.0f} images/s  "
                        f"data wait {wait:.0%}  label passes {state['passes_made']}",
                    )
                if interrupt.number or time.monotonic() - last_save >= opt.checkpoint_seconds:
                    check_loss()
                    save()
                    last_save = time.monotonic()
                    if interrupt.number:
                        interrupt.leave(
                            f"stopped at step {state['step']}; the checkpoint is written, continue with resume"
                        )
                if plan.budget_seconds is not None and state["seconds"] >= plan.budget_seconds:
                    break
            else:
                state["epoch"] += 1
                state["position"] = 0
                ended = done()
                if opt.evaluate_every and not ended and state["epoch"] % opt.evaluate_every == 0:
                    record_evaluation("evaluation", evaluate())
                continue
            break
        check_loss()

        # --- The end: final labels, metrics, network, report
        if not state["finished"]:
            save(finished=True)
        progress.say("evaluating")
        result = evaluate()
        record_evaluation("end", result)
        all_labels, all_confidence = spread_labels(result, images, len(everything), kept, held)
        folder.write_labels(all_labels, all_confidence, everything.names)
        bad = [*loader.bad_images, *result.bad]
        folder.write_bad_images([(int(kept[i]), name, reason) for i, name, reason in bad])
        save_network(folder, network, opt, result, backbone.name)
        result.metrics["images_per_second"] = (state["seen"] - seen_before) / max(
            state["seconds"] - seconds_before, 1e-9
        )
        result.metrics["seconds"] = state["seconds"]
        report = write_report(folder.path, everything.read)
        progress.say(closing_lines(result, folder.path, report, state, per_epoch, len(bad)))
    folder.log(f"finished: {result.metrics}")
    network.eval()
    return TrainResult(all_labels, all_confidence, result.metrics, result.head, folder.path, report, network)


def _given(options: dict[str, Any]) -> set[str]:
    """Options that are set, by the user or by the preset; "auto" is not set."""
    preset = options.get("preset")
    written = options if preset is None else {**PRESETS[preset].options, **options}
    return {name for name, value in written.items() if not (isinstance(value, str) and value == AUTO)}


def _half(seed: int, step: int) -> float:
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
