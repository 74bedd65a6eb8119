"""Sinkhorn iterations that stay on a CUDA device: several passes with Anderson's steps between them, read back once.

Note [Stages]
After a pass the next potential is computed where the column sums are (csrc/cuda/anderson_kernels.cuh), and the next
pass is launched without waiting. A stage of M passes is read back at its end: every pass of it with its own sums, so
that errors, objectives and the number of passes are what they are without stages. What a stage cannot do is end in the
middle: up to M - 1 passes are read that were not needed any more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sela_ext.errors import ResourceError
from sela_ext.kernels.device import first_line

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from sela_ext.kernels.sinkhorn import DevicePass
    from sela_ext.kernels.sinkhorn_sums import SinkhornSums

    Vector = npt.NDArray[np.float64]

# The state, 64-bit numbers in the order of AndersonState in csrc/sela/anderson.h, without the products at its end.
STATE = np.dtype(
    [(name, np.int64) for name in ("known", "next", "begun", "plain", "ended", "steps")]
    + [("error", np.float64), ("best", np.float64)]
)
# What a host takes to read sums back, to find the next potential and to launch a pass; what a device takes to begin
# one; passes of a solve. Rough numbers: stages are a little longer or shorter by them, nothing else.
ASKING, BEGINNING, PASSES = 150e-6, 10e-6, 20.0
BANDWIDTH = 2e12  # bytes/s
LONGEST = 8


def stage_length(size: int) -> int:
    """Passes over so many bytes of logits to launch before the host looks.

    With stages of M passes a solve of P passes of t seconds asks the host P / M times, and reads (M - 1) / 2 passes too
    many: M = sqrt(2 P asking / t) is best.
    """
    return max(1, min(LONGEST, round(math.sqrt(2 * PASSES * ASKING / (size / BANDWIDTH + BEGINNING)))))


class AndersonDevice:
    """Iterations on a device from one point on.

    Args:
        passes: over the logits.
        target: [K] shares b > 0, of sum 1.
        weight: of the rows.
        unit: of the integer column sums.
        potential: the point where the host got to.
        residual: log b - log shares there, with sum_k b_k residual_k = 0.
        error: there.
        faint: part of its target below which a share ends the iterations.
        restart: an error this many times the best one: back to the best point; inf: never.
        cap: nats that an accelerated step may go.
        accelerate: Anderson's steps, or plain ones.
        steps: [K, known], what the host knows already: differences of potentials, oldest first.
        changes: [K, known], those of the residuals at them.

    Attributes:
        passes: over the logits.
        target: [K].
        ended: whether a column receives next to nothing: what comes next is the host's.
    """

    def __init__(
        self,
        passes: DevicePass,
        *,
        target: Vector,
        weight: float,
        unit: float,
        potential: Vector,
        residual: Vector,
        error: float,
        faint: float,
        restart: float,
        cap: float,
        accelerate: bool,
        steps: Vector,
        changes: Vector,
    ) -> None:
        import torch

        self.passes, self.target, self.ended = passes, target, False
        self._card = passes.card
        self._unit, self._numbers = unit / weight, (faint, restart, cap, accelerate, passes.name != "float64")
        core, place, cols = self._card.core, self._card.place, len(target)
        with self._card.current():
            self._target = torch.from_numpy(np.array(target)).to(place)
            self._vectors = torch.zeros(core.ANDERSON_VECTORS, cols, dtype=torch.float64, device=place)
            # The latest point and the best one are the same.
            self._vectors[:4] = torch.from_numpy(np.stack([potential, residual, potential, residual])).to(place)
            known, most = steps.shape[1], int(core.ANDERSON_MEMORY)
            pairs = np.zeros((2, most, cols))
            pairs[:, :known] = steps.T, changes.T
            self._vectors[4:] = torch.from_numpy(pairs.reshape(2 * most, cols)).to(place)
            begin = np.zeros(1, STATE)
            begin["known"], begin["next"] = known, known % most
            begin["begun"] = 1
            begin["error"] = begin["best"] = error
            products = (pairs[1] @ pairs[1].T).reshape(-1).view(np.int64)
            self._state = torch.from_numpy(np.concatenate([begin.view(np.int64), products])).to(place)

    def run(
        self, first: Vector, reference: torch.Tensor | None, *, scale: float, count: int, want_labels: bool
    ) -> tuple[list[tuple[Vector, SinkhornSums]], Vector]:
        """So many passes from a potential on.

        Args:
            first: float64 [K], as the pass will round it.
            reference: row log-sum-exp of an earlier pass.
            scale: lambda.
            count: passes.
            want_labels: of all of them.

        Returns:
            The potential and the sums of each; the potential to go on from.

        Raises:
            ResourceError: a launch that failed, or a stream that is being captured.
        """
        import torch

        card, cols = self._card, len(self._target)
        with card.current():
            card.refuse_capture("anderson_step")
            points = torch.empty(count + 1, cols, dtype=torch.float64, device=card.place)
            points[0] = torch.from_numpy(np.array(first)).to(card.place)
            collects, before = [], reference
            for i in range(count):

                def after(columns: torch.Tensor, lse: torch.Tensor, i: int = i) -> None:
                    nonlocal before
                    before = lse
                    self._step(columns, points[i], points[i + 1])

                launch, collect = self.passes.prepared(
                    points[i], scale=scale, reference=before, want_labels=want_labels, after=after
                )
                launch()
                collects.append(collect)
            potentials = points.cpu().numpy()
            self._look()
            found = [(potentials[i].copy(), collect()) for i, collect in enumerate(collects)]
        return found, potentials[-1].copy()

    def follow(self, columns: npt.NDArray[np.int64], potential: Vector) -> Vector:
        """One step for rows that are on several devices: the same bits as in a stage, with a look at every pass.

        Args:
            columns: int64 [K], integer column sums of all rows.
            potential: float64 [K], at which they were taken.

        Returns:
            The potential to go on from.

        Raises:
            ResourceError: a launch that failed, or a stream that is being captured.
        """
        import torch

        with self._card.current():
            self._card.refuse_capture("anderson_step")
            there = torch.from_numpy(np.ascontiguousarray(columns)).to(self._card.place)
            points = torch.from_numpy(np.stack([potential, potential])).to(self._card.place)
            self._step(there, points[0], points[1])
            self._look()
            following: Vector = points[1].cpu().numpy().copy()
        return following

    def _look(self) -> None:
        """Read back whether the iterations have ended."""
        self.ended = bool(self._state[: len(STATE.names or ())].cpu().numpy().view(STATE)[0]["ended"])

    def _step(self, columns: torch.Tensor, potential: torch.Tensor, following: torch.Tensor) -> None:
        try:
            self._card.core.anderson_step_cuda(
                columns.data_ptr(),
                potential.data_ptr(),
                following.data_ptr(),
                self._target.data_ptr(),
                self._vectors.data_ptr(),
                self._state.data_ptr(),
                len(self._target),
                self._unit,
                *self._numbers,
                self._card.stream(),
            )
        except RuntimeError as error:
            raise ResourceError(first_line(error)) from error
