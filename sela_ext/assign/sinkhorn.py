"""Plain Sinkhorn iterations on the column potential."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sela_ext.assign.problem import Evaluation, Problem

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def solve_sinkhorn(problem: Problem, start: npt.NDArray[np.float64]) -> Evaluation:
    """Iterate g += log b - log col(g) until the error is at most tol, or no pass is left.

    The reference method: every iteration is one pass, and its iterates are those of alternating log-sum-exp.
    """
    at = problem.evaluate(start)
    stages = problem.stages(at)  # several passes at a time, where they stay on a device
    following = at.potential + at.sinkhorn_step(problem.target)
    while at.excess(problem.target) > problem.tol or problem.tol == 0:
        if problem.exhausted:
            break
        count = problem.stage_passes(stages)
        if stages is not None and count > 1:
            found, following = problem.evaluate_stage(stages, problem.centred(following), count, at)
            at = found[-1]
            continue
        stages = None
        at = problem.evaluate(problem.centred(at.potential + at.sinkhorn_step(problem.target)), previous=at)
    return at
