"""Online balanced targets as torch operators, for compiled functions. Importing this module registers them."""

from __future__ import annotations

from typing import Any

import torch

from sela_ext.assign.batch import batch_targets, check_batch
from sela_ext.errors import OptionError
from sela_ext.kernels.ops import define, same_device


def _targets(
    scores: torch.Tensor, queue: torch.Tensor | None = None, iterations: int = 3, lam: float = 20.0
) -> torch.Tensor:
    return _targets_of_sizes(scores, queue, iterations, lam, None)


def _targets_of_sizes(
    scores: torch.Tensor, queue: torch.Tensor | None, iterations: int, lam: float, marginals: torch.Tensor | None
) -> torch.Tensor:
    same_device(scores=scores, queue=queue)
    found: torch.Tensor = batch_targets(scores, queue, iterations, lam, marginals)
    return found


def _fake(
    scores: torch.Tensor, queue: torch.Tensor | None = None, iterations: int = 3, lam: float = 20.0
) -> torch.Tensor:
    check_batch(scores, queue)
    same_device(scores=scores, queue=queue)
    return scores.new_empty(scores.shape)


def _fake_of_sizes(
    scores: torch.Tensor, queue: torch.Tensor | None, iterations: int, lam: float, marginals: torch.Tensor
) -> torch.Tensor:
    if marginals.dim() != 1 or marginals.shape[0] != scores.shape[1]:
        raise OptionError(f"marginals: expected shape ({scores.shape[1]},), found {tuple(marginals.shape)}")
    return _fake(scores, queue, iterations, lam)


_operator = define(
    "assign_batch",
    "(Tensor scores, Tensor? queue=None, SymInt iterations=3, float lam=20.0) -> Tensor",
    _targets,
    _fake,
    capturable=True,
)
_operator_of_sizes = define(
    "assign_batch_marginals",
    "(Tensor scores, Tensor? queue, SymInt iterations, float lam, Tensor marginals) -> Tensor",
    _targets_of_sizes,
    _fake_of_sizes,
)


def assign_batch(
    scores: torch.Tensor,
    queue: torch.Tensor | None = None,
    iterations: int = 3,
    lam: float = 20.0,
    marginals: Any = None,
) -> torch.Tensor:
    """`sela_ext.assign_batch` of tensors: `sela::assign_batch`, or `sela::assign_batch_marginals`.

    `sela_ext.assign_batch` calls this while a function is compiled.

    Args:
        scores: [B, K].
        queue: [Q, K], moved to the device of the scores; None: none.
        iterations: >= 1.
        lam: > 0.
        marginals: [K] positive sizes or shares of the clusters; None: equal.

    Returns:
        [B, K] of the type of the scores, without a gradient.

    Raises:
        DataError: scores or queue of a wrong shape or type.
        OptionError: another argument out of range.

    Example:
        >>> targets = assign_batch(torch.tensor([[1.0, 0.9], [1.0, 0.2]]), iterations=50)
        >>> targets.argmax(1).tolist()
        [1, 0]
    """
    queue = None if queue is None else queue.to(scores.device)
    if marginals is None:
        found: torch.Tensor = _operator(scores, queue, iterations, lam)
    else:
        sizes = torch.as_tensor(marginals, dtype=torch.float64)
        found = _operator_of_sizes(scores, queue, iterations, lam, sizes)
    return found
