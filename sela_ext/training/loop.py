"""The training loop of SeLa, top to bottom: relabel, train, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, overload

import torch

from sela_ext import build_info
from sela_ext.data.orientation import read_upright
from sela_ext.data.source import UInt8Array
from sela_ext.errors import OptionError, out_of_memory, shown
from sela_ext.kernels.mapped_faults import told_mapped_faults
from sela_ext.report import write_report
from sela_ext.training import faults, snapshot
from sela_ext.training.checkpoint import load_checkpoint, save_checkpoint
from sela_ext.training.clock import Clock
from sela_ext.training.config import Kept, merge, read_config
from sela_ext.training.evaluate import Evaluation
from sela_ext.training.fixed_labels import refuse_own_folder
from sela_ext.training.launch import launch
from sela_ext.training.losses import Losses
from sela_ext.training.machine import Interrupt, torch_settings
from sela_ext.training.options import AUTO, Options, make_options, with_preset
from sela_ext.training.outcome import (
    TrainResult,
    bad_images,
    closing_lines,
    noun_of,
    opening_line,
    save_network,
    spread_labels,
)
from sela_ext.training.plan import RunPlan, plan_run, with_time
from sela_ext.training.progress import RunProgress
from sela_ext.training.ranks import Ranks, world_size_of_environment
from sela_ext.training.recipes import make_recipe
from sela_ext.training.resident import keep_images
from sela_ext.training.resolve import Plan, check_device, choose_device, resolve
from sela_ext.training.run import Run, device_of, make_run
from sela_ext.training.run_folder import RunFolder
from sela_ext.training.run_lock import RunLock
from sela_ext.training.schedule import label_pass_times, learning_rate, passes_due
from sela_ext.training.split import Images, choose_images
from sela_ext.training.turns import turns
from sela_ext.training.watch import chance_level, check_outputs, watch

_Path = str | os.PathLike[str]


@overload
def train(
    data: Any = None, *, out: _Path | None = None, dry_run: Literal[True], config: _Path | None = None, **options: Any
) -> RunPlan: ...
@overload
def train(
    data: Any = None,
    *,
    out: _Path | None = None,
    dry_run: Literal[False] = False,
    config: _Path | None = None,
    **options: Any,
) -> TrainResult: ...
def train(
    data: Any = None,
    *,
    out: _Path | None = None,
    dry_run: bool = False,
    config: _Path | None = None,
    **options: Any,
) -> TrainResult | RunPlan:
    """Train a network on unlabelled images by SeLa, and label the images.

    Args:
        data: "digits" (built in) | path (folder of images, IDX file or folder of them) | list of paths | uint8 array
            [N, H, W] or [N, H, W, C] | torch Dataset | feature vectors, float array [N, D] or a file of them: heads are
            then trained on noisy views of the rows (see docs/embeddings.md).
        out: run folder; must be empty or absent unless `resume` or `overwrite`.
        dry_run: tell what memory and time the run would take, and end: nothing is trained or written.
        config: a YAML or JSON file of options, data and out among them; what is given here goes before it, and it
            before a preset. The options.json of a run repeats that run: what was "auto" is taken again as it was
            chosen then, unless other options or data are given.
        **options: see `sela train --help` or `sela_ext.training.Options`; "auto" values are chosen from data and
            device, and written to options.json with the reason.

    Returns:
        Labels of every head, metrics where true labels exist, and the trained network; with `dry_run` the plan.

    Raises:
        OptionError: unknown option, wrong type or range, or one that does not fit the data.
        DataError: images missing or unreadable.
        CheckpointError: `resume` with other options or other data, or with damaged checkpoints.
        NumericsError: the loss is not finite.
        ResourceError: memory does not suffice, or the run folder cannot be written.
        DistributedError: with several processes, one of them died, hangs, failed, or sees other data or options.

    Example:
        >>> import sela_ext, tempfile, os
        >>> out = os.path.join(tempfile.mkdtemp(), "run")
        >>> result = sela_ext.train("digits", out=out, epochs=1, progress=False, seed=1)
        >>> result.labels.shape
        (12, 1797)

    Source: Asano, Rupprecht, Vedaldi, "Self-labelling via simultaneous clustering and representation learning",
    ICLR 2020.
    """
    kept = Kept()
    given_options, given_data, given_out = options, data, out
    if config is not None:
        data, out, options, kept = merge(read_config(config), data, out, options)
    if data is None or out is None:
        name, kind = ("data", 'images, such as "digits" or a folder') if data is None else ("out", "a run folder")
        raise OptionError(f"{name}: expected {kind}, found none; give it, or a config that does")
    chosen = make_options({**options, "dry_run": dry_run})
    check_outputs(chosen)
    device = check_device(chosen.device if chosen.device != AUTO else choose_device()[0])
    started = world_size_of_environment()
    wanted = _number_of_ranks(chosen.devices, started, device)
    if started == 1 and wanted > 1 and not dry_run:
        RunFolder.check(out, resume=chosen.resume, overwrite=chosen.overwrite, data=data)
        result: TrainResult = launch(_train_rank, (given_data, given_out, {**given_options, "config": config}), wanted)
        return result
    if wanted != kept.devices:
        kept = Kept()
    if started == 1:  # a dry run starts no ranks, and plans for the first one of those that there would be
        joined = Ranks(world_size=wanted, local_world_size=wanted)
    else:
        joined = Ranks.join(device, timeout=chosen.rank_timeout, silence=chosen.rank_silence)
    with joined as ranks, out_of_memory("use a smaller batch_size or model, fewer clusters or heads, or fewer threads"):
        return _train(data, out, chosen, _given(options), ranks, kept)


def _train_rank(data: Any, out: _Path | None, options: dict[str, Any]) -> TrainResult:
    """What a rank that `launch` started does."""
    result: TrainResult = train(data, out=out, **options)
    return result


def _number_of_ranks(devices: Any, started: int, device: torch.device) -> int:
    """How many processes are to share the run, of which so many were started already.

    Raises:
        OptionError: `devices` is no number, another one than was started, or more than there are.
    """
    if isinstance(devices, str) and devices == AUTO:
        return started
    if isinstance(devices, bool) or not isinstance(devices, int) or not 1 <= devices <= 10_000:
        raise OptionError(f"devices: expected auto or a number of processes from 1 to 10000, found {shown(devices)}")
    if started > 1 and devices != started:
        raise OptionError(
            f"devices: expected auto or {started}, the number of processes that were started, found {devices}; leave "
            "it out under torchrun"
        )
    there = torch.cuda.device_count() if device.type == "cuda" else devices
    if started == 1 and devices > there:
        raise OptionError(
            f"devices: expected at most {there}, the CUDA devices of this machine, found {devices}; use fewer, or "
            "device cpu"
        )
    return devices


def _train(data: Any, out: _Path, chosen: Options, given: set[str], ranks: Ranks, kept: Kept) -> TrainResult | RunPlan:
    """The run, as one of its ranks."""
    with contextlib.ExitStack() as closing:
        closing.enter_context(told_mapped_faults())

        def prepare() -> tuple[Plan, Images, RunFolder]:
            if ranks.first:
                folder = RunFolder.check(out, resume=chosen.resume, overwrite=chosen.overwrite, data=data)
            else:
                folder = RunFolder(Path(out).expanduser())
            refuse_own_folder(chosen.fixed_labels, folder.path)
            images = choose_images(data, chosen)
            is_digits = isinstance(data, str) and data == "digits"
            plan = resolve(chosen, given, images.train, digits=is_digits, fixed=images.fixed, ranks=ranks, kept=kept)
            if ranks.first and not chosen.dry_run:
                folder.create()
                closing.enter_context(RunLock(folder.path))
                folder.clear(overwrite=chosen.overwrite)
            return plan, images, folder

        plan, images, folder = ranks.together(prepare)
        if chosen.dry_run:
            return _dry_run(plan, images, folder, ranks)
        ranks.must_agree("options", snapshot.shared_options(plan.options))
        ranks.must_agree("data", images.everything.fingerprint())
        closing.enter_context(torch_settings(plan.options.threads, device_of(plan.options.device, ranks)))
        interrupt = closing.enter_context(Interrupt())
        closing.enter_context(contextlib.closing(folder))
        run = ranks.together(lambda: make_run(plan, images, folder, interrupt, ranks))
        closing.callback(run.close)
        return _run(data, run)


def _run(data: Any, run: Run) -> TrainResult:
    plan, opt, folder, interrupt, ranks = run.plan, run.options, run.folder, run.interrupt, run.ranks
    state = run.state
    state.update(snapshot.first_state())
    recipe = make_recipe(run)
    run.labels = recipe.first_labels()
    views = recipe.views()
    memory = plan_run(run, views)
    ranks.together(memory.check)
    memory = keep_images(memory, run, views)
    loader = run.make_loader(views)
    run.replicate()
    saved = snapshot.shared(ranks, lambda: load_checkpoint(folder.checkpoints)) if opt.resume else None
    if saved is not None:
        ranks.together(lambda: snapshot.put_back(run, recipe, saved))
    described = _described(data, run, memory)
    clock = Clock(state["clock"])
    times = _pass_times(run)
    last_save = started = time.monotonic()
    save_seconds, seconds_before = 0.0, state["seconds"]
    images_done = images_shown = 0
    halted = False  # a callback ended the run
    losses = Losses(run)

    def save(finished: bool = False) -> None:
        nonlocal last_save, save_seconds
        began = time.monotonic()
        with clock.part("checkpoint"):
            state["clock"] = clock.seconds(loader.wait_seconds)
            state.update(finished=finished, metrics_length=folder.metrics_length() if ranks.first else 0)
            taken = snapshot.take(run, recipe)
            run.on_first(lambda: str(save_checkpoint(folder.checkpoints, state["step"], taken)))
        last_save = time.monotonic()
        save_seconds = last_save - began

    def time_to_save() -> bool:
        """As often as asked, but no more than a twentieth of the time."""
        wait = opt.checkpoint_seconds and max(opt.checkpoint_seconds, 20 * save_seconds)
        return time.monotonic() - last_save >= wait

    def relabel(which: list[int] | None = None) -> None:
        """One label pass, as the method makes them."""
        faults.at("label pass begins")
        # A signal here ends the run at once: a pass may take minutes, and resume repeats it.
        with interrupt.at_once(), clock.part("label_pass"):
            result = recipe.relabel(which)
        run.labels = result.labels
        state["passes_made"] += 1
        faults.at("label pass ends")
        watcher.record(
            {
                "event": "label_pass",
                "pass": state["passes_made"],
                "step": state["step"],
                "epoch": run.epochs_done,
                "masked": result.masked,
                "spread": result.spread,
                "solve_seconds": result.seconds,
                "wait_seconds": result.wait_seconds,
                "heads": result.heads,
            },
            run.share_done,
        )
        folder.log(f"label pass {state['passes_made']} at epoch {run.epochs_done:.2f}: {result.describe()}")
        for complaint in result.complaints:
            folder.log(complaint)
        if result.complaints and not state["complained"]:
            state["complained"] = True
            progress.say(f"label pass {state['passes_made']}: {result.complaints[0]} (further ones go to train.log)")
        agree_to_stop()

    def relabel_when_due() -> None:
        """The label passes whose time has come, in one."""
        now = state["seen"] if plan.budget_seconds is None else run.share_done
        due = state["epoch"] + 1 if plan.pass_each_epoch else passes_due(times, state["passes_done"], now)
        if due > state["passes_done"]:
            losses.add_up()
            # Labels that init asks for are those of every head.
            turn = opt.label_heads == "turn" and (state["passes_made"] or opt.init == "random")
            relabel([state["passes_made"] % opt.heads] if turn else None)
            state["passes_done"] = due

    def evaluate(event: str) -> Evaluation:
        # A signal here ends the run at once: nothing is learnt meanwhile, and resume repeats the evaluation.
        with interrupt.at_once(), clock.part("evaluation"):
            result = recipe.evaluate()
        times = watcher.time_keys(loader.wait_seconds)
        watcher.record(
            {
                "event": event,
                "step": state["step"],
                "epoch": run.epochs_done,
                "head": result.head,
                "masked": result.masked,
                **result.metrics,
                "stability_by_clusters": result.stability,
                "heads": result.heads,
                "elapsed_seconds": state["seconds"],
                **(times if event == "end" else {}),
            },
            run.share_done,
        )
        agree_to_stop()
        return result

    def agree_to_stop() -> None:
        """Have all ranks know what a callback on the first one wants."""
        nonlocal halted
        halted = ranks.broadcast(bool(watcher.stopped))

    def agree_on_signals() -> tuple[int, bool]:
        """The signal that any rank got, and whether it is time to save; the clock is rank 0's."""
        nonlocal halted
        if not ranks.several:
            halted = bool(watcher.stopped)
            return interrupt.number, not interrupt.number and time_to_save()
        wishes = [time_to_save(), bool(watcher.stopped), state["seconds"]]
        number, told = interrupt.agree(ranks.totals, [ranks.first * float(wish) for wish in wishes])
        halted, state["seconds"] = bool(told[1]), told[2]
        return number, bool(told[0])

    def done() -> bool:
        over = run.share_done >= 1 if plan.budget_seconds is not None else state["epoch"] >= opt.epochs
        return bool(state["finished"] or halted or over)

    # --- The loop
    screen = RunProgress(opt.progress and ranks.first)
    with screen as progress, contextlib.closing(loader), contextlib.ExitStack() as closing:
        run.stage = progress.stage
        if ranks.first:
            folder.write_options(described)
        watcher = closing.enter_context(watch(run, progress, clock))
        watcher.open(state["metrics_length"], state["step"], run.share_done, described)
        progress.say(opening_line(plan, run.images, run.backbone.name))
        if saved is not None:
            progress.say(f"continuing at epoch {state['epoch']}, step {state['step']}")
        else:
            recipe.begin()
            if opt.init != "random" and not opt.label_passes:
                relabel()  # the only one: the untrained network's labels are kept
        clock.enter("train")
        while not done():
            with interrupt.deferred():
                if state["position"] == 0:
                    relabel_when_due()  # before the epoch's images are chosen, which may go by their labels
                order = recipe.order(state["epoch"])
            epoch = turns(
                loader,
                ranks,
                epoch=state["epoch"],
                position=state["position"],
                order=order,
                batch_size=opt.batch_size,
                drop_last=run.drop_last,
                uneven=opt.on_bad_image == "skip",
            )
            with interrupt.deferred(), contextlib.closing(epoch) as steps:
                for turn in steps:
                    relabel_when_due()
                    faults.at("before step")
                    if turn.batch is not None:
                        share = min(run.share_done, 1.0)
                        rate = learning_rate(opt.lr, share, opt.lr_schedule, opt.warmup, opt.lr_milestones)
                        run.update.set_rate(rate)
                        output = run.step(recipe.step, turn.batch)
                        run.update.take(output.loss if turn.share == 1 else output.loss * turn.share)
                        losses.take(output, turn.batch.index, turn.share)
                        recipe.after_step(turn.batch, output)
                        state["step"] += 1
                        images_done += turn.images
                    state["position"] = turn.position
                    state["seen"] = state["epoch"] * run.per_epoch + turn.position
                    state["seconds"] = seconds_before + time.monotonic() - started
                    faults.at("after step")

                    # Log, show, save.
                    if turn.batch is not None and state["step"] % opt.log_every == 0:
                        losses.add_up()
                        means = losses.means()
                        event = {
                            "event": "step",
                            "step": state["step"],
                            "epoch": run.epochs_done,
                            "loss": means.pop("loss"),
                            "ln_k": chance_level(opt),
                            **means,
                            "lr": run.update.optimizer.param_groups[0]["lr"],
                            **clock.rates(images_done - images_shown, images_done, loader.wait_seconds),
                        }
                        images_shown = images_done
                        watcher.record(event, run.share_done)
                    ends, saves = agree_on_signals()
                    if ends or saves:
                        losses.add_up()
                        save()
                    if ends:
                        ranks.leave_together()
                        words = f"stopped at step {state['step']}, checkpoint written; continue with resume"
                        interrupt.leave(words if ranks.first else "")
                    if halted or (plan.budget_seconds is not None and done()):
                        break
                else:
                    state["epoch"] += 1
                    state["position"] = 0
                    state["seen"] = state["epoch"] * run.per_epoch
                    folder.log(f"epoch {state['epoch']}: waited for images {loader.wait_share:.1%} of the time so far")
            between_epochs = state["position"] == 0 and not done()
            if opt.evaluate_every and between_epochs and state["epoch"] % opt.evaluate_every == 0:
                evaluate("evaluation")
        losses.add_up()
        run.update.finish()
        faults.at("after last epoch")

        # --- The end: final labels, metrics, network, report
        if not state["finished"]:
            with interrupt.deferred():
                save(finished=True)
        run.at_end = True
        result = evaluate("end")
        images = run.images
        all_labels, all_confidence = spread_labels(result, images)
        bad = bad_images([one for part in ranks.gather(loader.bad_images) for one in part], result, images)
        worked = max(state["seconds"] - seconds_before, 1e-9)
        result.metrics.update(images_per_second=images_done / worked, seconds=state["seconds"])

        def write() -> Path:
            faults.at("before labels")
            folder.write_labels(all_labels, all_confidence, images.everything.names)
            folder.write_bad_images(bad)
            folder.write_overview(result.overview)
            save_network(folder, run.evaluated, opt, result, run.backbone.name)
            watcher.close()
            faults.at("before report")
            with progress.stage("writing the report", 0) as advance:
                advance(0)
                return write_report(
                    folder.path, _image_reader(run), at=functools.partial(faults.at, name="report.html")
                )

        report = run.on_first(write)
        said, noun = watcher.closing_lines(), noun_of(images.everything)
        progress.say(closing_lines(result, folder.path, report, state, run.per_epoch, len(bad), said, noun))
    folder.log(f"finished: {result.metrics}")
    network = run.evaluated.eval()
    return TrainResult(
        all_labels, all_confidence, result.metrics, result.head, folder.path, report, network, result.stability
    )


def _dry_run(plan: Plan, images: Images, folder: RunFolder, ranks: Ranks) -> RunPlan:
    """Say what this rank of the run would need, the first one aloud, and write nothing."""
    unwritten = dataclasses.replace(plan, options=dataclasses.replace(plan.options, index="off"))
    settings = torch_settings(plan.options.threads, device_of(plan.options.device, ranks))
    with settings, Interrupt() as interrupt, torch.random.fork_rng():
        run = make_run(unwritten, images, folder, interrupt, ranks)
        run.state.update(snapshot.first_state())
        views = make_recipe(run).views()
        found = plan_run(run, views, opening=opening_line(run.plan, images, run.backbone.name))
        found = with_time(keep_images(found, run, views), run, views)
    with RunProgress(plan.options.progress and ranks.first) as progress:
        progress.say(found.table())
    found.check()
    return found


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


def _described(data: Any, run: Run, memory: RunPlan) -> dict[str, Any]:
    """What options.json holds."""
    return {
        "version": build_info()["version"],
        "options": {**snapshot.described_options(run.options), "data": data},
        "reasons": {**run.plan.reasons, "eval_data": run.images.reason},
        "given": sorted(run.plan.given),
        "resolved": {
            "images": len(run.images.everything),
            "training_images": len(run.source),
            "held_out_images": len(run.images.held_rows),
            "fixed_labels": None if run.images.fixed is None else run.images.fixed.where,
            **_shape_of(run),
            "data": run.images.everything.describe(),
            "network": run.backbone.name,
            "parameters": sum(p.numel() for p in run.network.parameters()),
            "feature_dim": run.backbone.feature_dim,
            "half_resolution": run.half_resolution,
            "memory_bytes": {device: memory.peak(device)[0] for device in memory.free},
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
    return {name for name, value in with_preset(options).items() if not (isinstance(value, str) and value == AUTO)}


def _signature() -> inspect.Signature:
    """The signature that help() shows: data, out, config, and every option with its default."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("data", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
        inspect.Parameter("out", keyword, default=None),
        inspect.Parameter("config", keyword, default=None),
        *(inspect.Parameter(spec.name, keyword, default=spec.default) for spec in dataclasses.fields(Options)),
    ]
    return inspect.Signature(parameters, return_annotation=TrainResult)


_documented: Callable[..., TrainResult] = train
_documented.__signature__ = _signature()  # type: ignore[attr-defined]
