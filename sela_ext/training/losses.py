"""The losses of a run since the last entry of its log: means over steps and ranks."""

from __future__ import annotations

import math

from torch import Tensor

from sela_ext.errors import NumericsError
from sela_ext.training.readback import Readback
from sela_ext.training.run import Run, StepOutput


class Losses:
    """Looks at the loss of each step when the next one is queued, so that the device need not be waited for.

    What was looked at on this rank is added up over ranks when the log or a checkpoint is about to need it; the sums
    are a part of the run's state.

    Args:
        run: The run; `loss_sum`, `loss_steps` and `part_sums` of its state are kept here.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._ranks, self._state = run, run.ranks, run.state
        # Of the last step, not looked at yet: loss and parts; names of the parts; images; weight among the ranks.
        self._pending: tuple[Readback, list[str], Tensor, float] | None = None
        self._looked_at: list[list[float]] = []  # loss and parts of steps on this rank, not yet added up
        self._names: list[str] = []  # of the parts

    def take(self, output: StepOutput, index: Tensor, share: float) -> None:
        """Look at the loss of the step before, and note this one's.

        Args:
            output: Of the step.
            index: int64 [B], its images.
            share: Its weight among the ranks.

        Raises:
            NumericsError: The loss of the step before is not finite.
        """
        self._look()
        told = Readback([output.loss, *output.parts.values()])
        self._pending = told, list(output.parts), index, share

    def add_up(self) -> None:
        """Have the sums hold every step, over all ranks.

        Raises:
            NumericsError: The loss of the last step is not finite.
        """
        self._look()
        self._sum()

    def means(self) -> dict[str, float]:
        """Mean loss, then those of its parts, of the steps added up; from here on they are means of further ones."""
        state, steps = self._state, max(self._state["loss_steps"], 1)
        parts = {name: total / steps for name, total in state["part_sums"].items()}
        found = {"loss": state["loss_sum"] / steps, **parts}
        state.update(loss_sum=0.0, loss_steps=0, part_sums={})
        return found

    def _look(self) -> None:
        if self._pending is None:
            return
        told, names, index, share = self._pending
        value, *parts = told.read()
        if not math.isfinite(value):
            run = self._run
            named = ", ".join(run.source.name(i) for i in index.tolist()[:3])
            raise NumericsError(
                f"loss is {value} at step {self._state['step']}, in a batch with {named}, ...; the last checkpoint in "
                f"{run.folder.checkpoints} is intact; lower lr (now {run.options.lr:g}) or use precision float32"
            )
        self._names = names
        self._looked_at.append([value * share, *(part * share for part in parts)])
        self._pending = None
        if not self._ranks.several:
            self._sum()

    def _sum(self) -> None:
        told = self._ranks.totals([number for row in self._looked_at for number in row])
        width = len(self._names) + 1
        for start in range(0, len(told), width):
            value, *parts = (number / self._ranks.world_size for number in told[start : start + width])
            self._state["loss_sum"] += value
            self._state["loss_steps"] += 1
            sums = self._state["part_sums"]
            for name, part in zip(self._names, parts, strict=True):
                sums[name] = sums.get(name, 0.0) + part
        self._looked_at.clear()
