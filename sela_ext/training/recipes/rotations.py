"""The RotNet hybrid: every image in its four rotations, and a layer that tells them apart.

Source: Gidaris, Singh, Komodakis, "Unsupervised representation learning by predicting image rotations", ICLR 2018;
beside cluster labels: SeLa paper, section 4 (SeLa [10k x 1] + RotNet).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sela_ext.data import Loader
from sela_ext.training.run import Run

# Images that the accuracy at the end is measured on, at most: its error is then below half a percent.
_JUDGED = 10_000


def four_rotations(images: Tensor) -> Tensor:
    """Turn images [B, C, S, S] by 0, 90, 180 and 270 degrees: [4 B, C, S, S], first all of them as they are.

    Raises:
        ValueError: images that are not square, whose rotations have another shape.

    Example:
        >>> four_rotations(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[1]
        tensor([[[2., 4.],
                 [1., 3.]]])
    """
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"four_rotations: expected square images, found {tuple(images.shape[2:])}")
    turned = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
    return turned.contiguous(memory_format=torch.channels_last)


def tell_rotations(rotation: nn.Module, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the rotations, mean over all four of every image.

    Args:
        rotation: maps embeddings to logits [4 B, 4].
        embeddings: [4 B, E], of what `four_rotations` gave.

    Returns:
        The loss, and what the log says of it: rotation_loss and rotation_accuracy.
    """
    logits = rotation(embeddings.float())
    target = torch.arange(4, device=logits.device).repeat_interleave(len(logits) // 4)
    loss = F.cross_entropy(logits, target)
    right = (logits.detach().argmax(1) == target).float().mean()
    return loss, {"rotation_loss": loss.detach(), "rotation_accuracy": right}


@torch.no_grad()
def rotation_accuracy(run: Run) -> float:
    """Share of the rotations that the network tells right, of images as they are: held-out ones where there are some.

    At most 10,000 images are looked at, spread evenly over them.
    """
    opt, network = run.options, run.evaluated
    assert network.rotation is not None
    source = run.source if run.images.held is None else run.images.held
    resident = run.residents.get("train" if run.images.held is None else "held")
    if len(source) > _JUDGED:
        resident = None
        source = source.subset(np.linspace(0, len(source) - 1, _JUDGED).astype(np.int64))
    loader = Loader(
        source,
        batch_size=min(len(source), max(16, min(128, opt.batch_size))),
        augment=run.plan.plain,
        shuffle=False,
        dtype=run.arithmetic.dtype,
        channels_last=True,
        threads=opt.threads,
        device=run.arithmetic.device,
        on_bad_image=opt.on_bad_image,
        max_bad_fraction=1.0,
        exact=opt.exact,
        exif=opt.exif,
        resident=False if resident is None else resident,
    )
    was_training = network.training
    network.eval()
    right = torch.zeros((), device=run.arithmetic.device)
    seen = 0
    try:
        for batch in loader.epoch(0):
            with run.arithmetic.autocast():
                embeddings = network(four_rotations(batch.images))
            _, parts = tell_rotations(network.rotation, embeddings)
            right += parts["rotation_accuracy"] * len(batch.index)
            seen += len(batch.index)
    finally:
        network.train(was_training)
        loader.close()
    return float(right) / max(seen, 1)
