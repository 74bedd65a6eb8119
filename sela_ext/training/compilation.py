"""torch.compile for the backbone, where there is a compiler for it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sela_ext.models import Network

if TYPE_CHECKING:
    from sela_ext.training.embedding import Arithmetic


class NotCompiledWarning(UserWarning):
    """The network could not be compiled; it runs as it is."""


def compile_backbone(network: Network, examples: Iterable[Tensor], arithmetic: Arithmetic) -> str:
    """Compile the backbone in place, and try it on images of every size that will come.

    Names in the state dict stay plain, weights, statistics and random numbers are as before. Each further size of a
    batch is compiled when it comes.

    Args:
        network: in train mode; its backbone is compiled.
        examples: images [B, C, H, W] of any content, one batch for each size.
        arithmetic: device and precision of the training.

    Returns:
        "" or, after a NotCompiledWarning, the reason why the network runs as it is.
    """
    backbone = network.backbone
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    devices = [arithmetic.device] if arithmetic.device.type == "cuda" else []
    reason = ""
    try:
        backbone.compile(dynamic=False)
        with torch.random.fork_rng(devices=devices):
            for images in examples:
                with arithmetic.autocast():
                    features = network.features(images)
                features.float().sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # compilers fail in many ways, and none of them must end a run
        backbone._compiled_call_impl = None
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        warnings.warn(
            f"compile: expected a compiler that torch.compile can use, found {reason}; the network runs uncompiled",
            NotCompiledWarning,
            stacklevel=2,
        )
    finally:
        backbone.zero_grad(set_to_none=True)
        backbone.load_state_dict(before)
    return reason


@contextlib.contextmanager
def uncompiled(network: Network) -> Iterator[None]:
    """Run the network as it is: a pass in eval mode, or over batches of another size, is not worth compiling for."""
    if network.backbone._compiled_call_impl is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
