"""Semantic segmentation: a fully convolutional head on the backbone."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sela_ext.data.prefetch import prefetch
from sela_ext.finetuning.scores import confusion, segmentation_scores
from sela_ext.finetuning.task import Report, Setting, Task, draws, normalised, order, read_ahead, to_tensor
from sela_ext.finetuning.trunk import Stages, dilate, stages_of
from sela_ext.finetuning.voc import UNDECIDED

# The shorter side is drawn from half to twice this multiple of the crop: torchvision's 520 for 480.
_BASE = 520 / 480
_FINEST_STRIDE = 8


class FullyConvolutional(nn.Module):
    """Backbone, torchvision's FCN head on its last map, and bilinear upsampling to the size of the image."""

    def __init__(self, stages: Stages, classes: int) -> None:
        super().__init__()
        from torchvision.models.segmentation.fcn import FCNHead

        self.body = stages
        self.head = FCNHead(stages.widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to scores [B, classes, H, W]."""
        scores = self.head(self.body(images)[-1])
        return F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False)


class Segmentation(Task):
    """A fully convolutional network; strides beyond 8 of a residual backbone are dilated.

    Source: Long, Shelhamer, Darrell, "Fully convolutional networks for semantic segmentation", CVPR 2015, in
    torchvision's form.
    """

    score = "miou"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.train_names = setting.tree.split("Segmentation", setting.options.train_split)
        self.test_names = setting.tree.split("Segmentation", setting.options.test_split)
        self.images = len(self.train_names)
        self.classes = [str(i) for i in range(setting.options.classes)]
        stages = stages_of(setting.trunk)
        stages.head = None
        spread = 1
        for stage, stride in zip(stages.stages, stages.strides, strict=True):
            if len(stages.strides) > 1 and stride > _FINEST_STRIDE:
                spread = dilate(stage, spread)
        self._body = stages.stages
        self.model = FullyConvolutional(stages, len(self.classes)).to(setting.device)
        self.freeze()

    def backbone(self) -> nn.Module:
        """The convolutions of the backbone."""
        return self._body

    def epoch(self, number: int) -> Generator[Any, None, None]:
        """Batches of (images [B, 3, S, S], masks [B, S, S]): random crops of images scaled by .5 to 2, mirrored."""
        options = self.setting.options
        shuffled = order(self.images, options.seed, number)
        size = min(options.batch_size, self.images)
        if self.images > size:
            shuffled = shuffled[: self.images // size * size]

        def batches() -> Generator[Any, None, None]:
            batch: list[tuple[Tensor, Tensor]] = []
            for sample in read_ahead(shuffled, lambda i: self._sample(i, number), options.threads):
                batch.append(sample)
                if len(batch) == size:
                    images, masks = zip(*batch, strict=True)
                    yield torch.stack(images), torch.stack(masks)
                    batch = []

        return prefetch(batches(), depth=3, on_wait=lambda seconds: None)

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        """Image [3, H, W], normalised, and its mask int64 [H, W]."""
        pixels = self.setting.tree.image(name)
        height, width = pixels.shape[:2]
        mask = self.setting.tree.mask(name, (height, width), len(self.classes))
        return normalised(to_tensor(pixels), self.setting.trunk), torch.from_numpy(mask).long()

    def _sample(self, i: int, epoch: int) -> tuple[Tensor, Tensor]:
        image, mask = self._read(self.train_names[i])
        size = self.setting.options.image_size
        random = draws(self.setting.options.seed, epoch, i)
        short = random.uniform(0.5, 2.0) * _BASE * size
        scale = short / min(mask.shape)
        shape = [max(1, round(side * scale)) for side in mask.shape]
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
        mask = F.interpolate(mask[None, None].float(), shape, mode="nearest-exact")[0, 0].long()
        if random.random() < 0.5:
            image, mask = image.flip(2), mask.flip(1)
        pad = (0, max(0, size - shape[1]), 0, max(0, size - shape[0]))
        image, mask = F.pad(image, pad), F.pad(mask, pad, value=UNDECIDED)
        y = int(random.integers(mask.shape[0] - size + 1))
        x = int(random.integers(mask.shape[1] - size + 1))
        return image[:, y : y + size, x : x + size], mask[y : y + size, x : x + size]

    def loss(self, batch: Any) -> Tensor:
        """Cross-entropy over the pixels that are decided."""
        images, masks = (part.to(self.setting.device) for part in batch)
        with self.setting.autocast():
            scores = self.model(images)
        total = F.cross_entropy(scores.float(), masks, ignore_index=UNDECIDED, reduction="sum")
        decided: Tensor = (masks != UNDECIDED).sum().clamp(min=1)
        return total / decided

    @torch.no_grad()
    def evaluate(self, report: Report) -> dict[str, Any]:
        """Mean intersection over union, of whole images at their own size."""
        self.model.eval()
        table = np.zeros((len(self.classes), len(self.classes)), np.int64)
        for i, (image, mask) in enumerate(read_ahead(self.test_names, self._read, self.setting.options.threads)):
            with self.setting.autocast():
                scores = self.model(image[None].to(self.setting.device))
            table += confusion(scores[0].argmax(0).cpu().numpy(), mask.numpy(), len(self.classes))
            report((i + 1) / len(self.test_names))
        return segmentation_scores(table)
