"""Maps that are too small for bfloat16 on a processor.

Note [Weights that meet nothing]
On a map that is smaller than the stride or the padding of a convolution some weights meet nothing but padding: of 3x3
weights with a stride of 2 on a map of 1x1, all but one. Their gradients are zero. In bfloat16 on the CPU (torch 2.14.1)
they are never written, and hold what the memory held before: other numbers in every run, up to 1e28 or NaN. float32 is
right. Measured for kernels of 3 to 11, strides of 1 to 4 and maps of 1x1 to 4x4: gradients are wrong where the map is
smaller than the stride both ways, or, with a stride of 1, smaller than the padding one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def unmet_weights(module: nn.Module, channels: int, sides: Sequence[int]) -> str:
    """The first convolution whose gradient bfloat16 leaves unwritten on the CPU, see Note [Weights that meet nothing].

    Args:
        module: maps images [B, C, S, S] to anything.
        channels: C.
        sides: every S that it will see, pixels.

    Returns:
        Its name, the size of its maps and that of the images, in words; "" where there is none.
    """
    found: list[str] = []
    hooks = [
        child.register_forward_pre_hook(_look(name, found))
        for name, child in module.named_modules()
        if isinstance(child, nn.Conv2d)
    ]
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    training = module.training
    module.eval()  # no statistics of batch norms change, and no random numbers are drawn
    try:
        with torch.no_grad():
            for side in sides:
                module(torch.zeros(2, channels, side, side, device=device))
                if found:
                    return f"{found[0]} when images are {side} x {side}"
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return ""


def _look(name: str, found: list[str]) -> Any:
    def look(conv: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        size = (inputs[0].shape[-2], inputs[0].shape[-1])
        within_stride = all(one < stride for one, stride in zip(size, conv.stride, strict=True))
        sides = (0, 0) if isinstance(conv.padding, str) else conv.padding
        within_padding = any(one < padding for one, padding in zip(size, sides, strict=True))
        if max(conv.kernel_size) > 1 and (within_stride or within_padding):
            found.append(f"{name or 'the convolution'} sees maps of {size[0]} x {size[1]}")

    return look
