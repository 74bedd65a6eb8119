"""What of a run goes into a checkpoint, and back."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from sela_ext.errors import CheckpointError, NumericsError, SelaError
from sela_ext.training.options import Options
from sela_ext.training.ranks import Ranks
from sela_ext.training.recipes import Recipe
from sela_ext.training.run import Run
from sela_ext.training.run_folder import describe_value

# A checksum as it is shown in a message.
_CHECKSUM = re.compile(r"'[0-9a-f]{64}'")
# Options that may differ when a run is continued: they do not change what is learnt.
_FREE_ON_RESUME = (
    "resume",
    "overwrite",
    "checkpoint_seconds",
    "progress",
    "threads",
    "resident",  # pixels differ by less than 0.01 of 255, and there may be less room than before
    "index",
    "callbacks",
    "wandb",
    "dry_run",
    "devices",
    "rank_timeout",
    "rank_silence",
)


def first_state() -> dict[str, Any]:
    """The counters of a run that has not begun."""
    return {
        "step": 0,
        "epoch": 0,
        "position": 0,  # images of this epoch's order that are done
        "seen": 0,  # the same over all epochs: the clock of the schedules
        "passes_done": 0,
        "passes_made": 0,
        "seconds": 0.0,  # since the start, time between runs not counted
        "loss_sum": 0.0,
        "loss_steps": 0,
        "part_sums": {},  # of StepOutput.parts, since the last log entry
        "finished": False,
        "complained": False,
        "clock": {},  # seconds of each part of the run
        "metrics_length": 0,
    }


def described_options(options: Options) -> dict[str, Any]:
    """All options as JSON values."""
    return {spec.name: describe_value(getattr(options, spec.name)) for spec in dataclasses.fields(options)}


def shared_options(options: Options) -> dict[str, Any]:
    """Options that must be the same on all ranks."""
    return {name: value for name, value in described_options(options).items() if name not in ("threads", "callbacks")}


def take(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Everything that a resume needs, on the CPU. All ranks call it, and rank 0 gets what counts.

    Raises:
        NumericsError: weights hold NaN or infinity: a checkpoint of them would take the place of a good one.
    """
    _check_finite(run)
    on_cuda = run.arithmetic.device.type == "cuda"
    random = torch.get_rng_state(), torch.cuda.get_rng_state(run.arithmetic.device) if on_cuda else None
    everyones = run.ranks.gather(random)
    return {
        "identity": _identity(run),
        "state": {**run.state, "labels": torch.from_numpy(run.labels)},
        "recipe": recipe.state(),
        "network": run.network.state_dict(),
        "update": run.update.state(),
        "rng": [one for one, _ in everyones],
        "rng_cuda": [one for _, one in everyones],
    }


def _check_finite(run: Run) -> None:
    """Refuse to keep a network that no step can mend: the loss of a step may be a number, and its gradient none."""
    fine = {name: torch.isfinite(value).all() for name, value in run.network.named_parameters()}
    # An infinite variance makes zeros of what it divides, and no step needs it.
    for name, value in run.network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            fine[name] = ~torch.isnan(value).any()
    told = torch.stack(list(fine.values())).tolist() if fine else []
    broken = [name for name, is_fine in zip(fine, told, strict=True) if not is_fine]
    if broken:
        raise NumericsError(
            f"weights are no numbers after step {run.state['step']} ({broken[0]}, {len(broken)} tensors in all); no "
            f"checkpoint was written, and the last one in {run.folder.checkpoints} is intact; lower lr (now "
            f"{run.options.lr:g}) or use precision float32"
        )


def shared(ranks: Ranks, read: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """What rank 0 reads, on all ranks: they need not see the folder that it lies in.

    Raises:
        CheckpointError: on all ranks, if rank 0 cannot read it.
    """
    saved = ranks.together(lambda: read() if ranks.first else None)
    if not ranks.several:
        return saved
    payload: bytes | None = None
    if saved is not None:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        payload = buffer.getvalue()
    payload = ranks.broadcast_bytes(payload)
    found: dict[str, Any] | None = None if payload is None else torch.load(io.BytesIO(payload), weights_only=True)
    return found


def put_back(run: Run, recipe: Recipe, saved: dict[str, Any]) -> None:
    """Continue where `take` was called.

    Raises:
        CheckpointError: another run's: other options, other data or another network, which are listed; or values that
            no run writes.
    """
    try:
        _compare(saved["identity"], _identity(run))
        _compare_shapes(saved["network"], run.network.state_dict())
        _check_state(run, saved["state"])
        _put_back(run, recipe, saved)
    except SelaError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(
            f"resume: expected the state of this run in its checkpoint, found another: {told}; "
            "begin again with overwrite, or put a copy back"
        ) from error


def _check_state(run: Run, state: dict[str, Any]) -> None:
    """That counters are numbers, and labels those of these images and heads.

    Raises:
        ValueError: names what is not.
    """
    for name, value in first_state().items():
        found = state[name]
        if isinstance(value, float):
            fits = isinstance(found, (int, float)) and math.isfinite(found)
        else:
            fits = type(found) is type(value) and (type(found) is not int or 0 <= found < 1 << 53)
        if not fits:
            raise ValueError(f"{name} is {str(found)[:40]}")
    labels = state["labels"]
    if labels.dtype != torch.int32 or tuple(labels.shape) != run.labels.shape:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}")
    for head, (row, clusters) in enumerate(zip(labels, run.options.clusters, strict=True)):
        if int(row.min()) < -1 or int(row.max()) >= clusters:
            raise ValueError(f"labels of head {head} are {int(row.min())} .. {int(row.max())}")


def _put_back(run: Run, recipe: Recipe, saved: dict[str, Any]) -> None:
    run.state.update(saved["state"])
    run.labels = run.state.pop("labels").numpy()
    recipe.load(saved["recipe"])
    run.network.load_state_dict(saved["network"])
    run.update.load(saved["update"])
    own, states = run.ranks.rank, saved["rng"]
    if len(states) != run.ranks.world_size:  # continued on another number of ranks
        torch.manual_seed((run.options.seed + 1_000_003 * own + run.state["step"]) % 2**63)
        return
    torch.set_rng_state(states[own])
    if saved["rng_cuda"][own] is not None and run.arithmetic.device.type == "cuda":
        torch.cuda.set_rng_state(saved["rng_cuda"][own], run.arithmetic.device)


def _identity(run: Run) -> dict[str, Any]:
    written = described_options(run.options)
    return {
        "options": {name: value for name, value in written.items() if name not in _FREE_ON_RESUME},
        "data": {**run.images.everything.fingerprint(), **_fixed(run)},
    }


def _fixed(run: Run) -> dict[str, str]:
    """What identifies labels that are given: a file may hold others by now."""
    return {} if run.images.fixed is None else {"fixed_labels": run.images.fixed.fingerprint()}


def _compare(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to continue a run with other options or data, and list what differs."""
    differences = [
        f"{_named(part, name)}: was {_shown(old[part].get(name))}, now {_shown(new[part].get(name))}"
        for part in ("options", "data")
        for name in sorted({*old[part], *new[part]})
        if old[part].get(name) != new[part].get(name)
    ]
    if differences:
        raise CheckpointError(
            f"resume: the run in this folder was started differently: {'; '.join(differences)}; give what it was "
            "started with, or name another out"
        )


def _compare_shapes(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> None:
    """Refuse a network that has the name of the run's, and other weights."""

    def shape(value: torch.Tensor | None) -> Any:
        return "none" if value is None else list(value.shape)

    names = [*old, *(name for name in new if name not in old)]
    differ = [name for name in names if shape(old.get(name)) != shape(new.get(name))]
    if differ:
        told = "; ".join(f"{name} was {shape(old.get(name))}, now {shape(new.get(name))}" for name in differ[:3])
        raise CheckpointError(
            f"resume: the network is not the one that the run was started with: {told}"
            + (f"; and {len(differ) - 3} more" if len(differ) > 3 else "")
            + "; give that one as model, or name another out"
        )


def _named(part: str, name: str) -> str:
    """What differs, in words: an option by its name, what tells data apart as the data's."""
    return name if part == "options" or name == "fixed_labels" else f"the data's {name}"


def _shown(value: Any) -> str:
    """A value; of a checksum (SHA-256 in hex) the beginning."""
    text = repr(value)
    return f"{text[:9]}...'" if _CHECKSUM.fullmatch(text) else text
