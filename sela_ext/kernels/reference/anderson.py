"""Pure-torch twin of the Anderson step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def anderson_step(residual: Any, steps: Any, changes: Any, *, cap: float = math.inf) -> npt.NDArray[np.float64]:
    """See `sela_ext.kernels.anderson_step`: the least squares are torch's, by singular values."""
    f, s, c = (torch.as_tensor(value, dtype=torch.float64) for value in (residual, steps, changes))
    scale = c.norm(dim=1)
    scale[scale == 0] = 1.0
    step = f.clone()
    if len(s):
        found = torch.linalg.lstsq((c / scale[:, None]).T, f[:, None], rcond=1e-10, driver="gelsd")
        step = f - (found.solution[:, 0] / scale) @ (s + c)
    if not 2 * float(step.abs().max()) <= cap:
        cap = max(cap, 2 * float(f.abs().max()))
        size = float((step - step.mean()).abs().max())
        step = f.clone() if not math.isfinite(size) else step * min(1.0, cap / size)
    result: npt.NDArray[np.float64] = step.numpy()
    return result
