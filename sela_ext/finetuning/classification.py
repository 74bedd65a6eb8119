"""Multi-label classification: which of the classes are in an image."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sela_ext.data import Augment, Batch, Loader
from sela_ext.errors import DataError
from sela_ext.finetuning.scores import image_precision, mean_known
from sela_ext.finetuning.task import Report, Setting, Task, normalised, read_ahead, to_tensor

_RANDOM_CROPS = 10


class Classification(Task):
    """A linear layer per class on the backbone's features, trained by binary cross-entropy.

    Fully connected layers that the backbone has in front of its features (fc6 and fc7 of AlexNet and VGG) are drawn
    anew and trained; the convolutions before them are trained with `layers="all"` only.

    Source: the protocol of Caron et al. (DeepCluster, ECCV 2018), which the SeLa paper takes, batch norm frozen.
    """

    score = "map"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        options, trunk = setting.options, setting.trunk
        train = setting.tree.presence(options.train_split)
        test = setting.tree.presence(options.test_split)
        if train[1] != test[1]:
            missing = sorted({*train[1]} ^ {*test[1]})
            raise DataError(
                f"{setting.tree.path}: expected the same classes in {options.train_split} and {options.test_split}, "
                f"found {', '.join(missing[:3])} in one of them only"
            )
        self.classes = train[1]
        self.train_table, self.test_table = torch.from_numpy(train[2]), test[2]
        self.images = len(train[0])
        self.test_names = test[0]
        crop: dict[str, Any] = {
            "scale": (options.crop_low, options.crop_high),
            "ratio": (1.0, 1.0),
            "flip_probability": 0.5,
            "mean": trunk.mean,
            "std": trunk.std,
        }
        augment = Augment.resized_crop(options.image_size, **crop)
        self.loader = self._loader(train[0], augment, options.batch_size, shuffle=True)
        if options.test_crops == "random":
            self.test_loader = self._loader(test[0], augment, options.batch_size, shuffle=False)
        elif options.test_crops == "centre":
            centre = Augment.eval(options.image_size, mean=trunk.mean, std=trunk.std)
            self.test_loader = self._loader(test[0], centre, options.batch_size, shuffle=False)
        head = nn.Linear(trunk.feature_dim, len(self.classes))
        nn.init.constant_(head.bias, 0.1)
        full = self._fully_connected()
        for layer in full.modules() if full is not None else ():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.01)
                nn.init.constant_(layer.bias, 0.1)
        self.model = nn.Sequential(trunk.module, head).to(setting.device)
        self.freeze()
        if full is not None:
            full.requires_grad_(True)

    def _loader(self, names: list[str], augment: Augment, batch_size: int, *, shuffle: bool) -> Loader:
        return Loader(
            [self.setting.tree.image_path(name) for name in names],
            batch_size=min(batch_size, len(names)),
            augment=augment,
            seed=self.setting.options.seed,
            shuffle=shuffle,
            threads=self.setting.options.threads,
            drop_last=shuffle and len(names) > batch_size,
            device=self.setting.device,
        )

    def _fully_connected(self) -> nn.Module | None:
        """Fc6 and fc7 of the backbone, where it has such."""
        part = getattr(self.setting.trunk.module, "classifier", None)
        has = isinstance(part, nn.Module) and any(isinstance(layer, nn.Linear) for layer in part.modules())
        return part if has else None

    def backbone(self) -> nn.Module:
        """The backbone, fully connected layers included."""
        return self.setting.trunk.module

    def epoch(self, number: int) -> Generator[Batch, None, None]:
        """Batches of random crops."""
        return self.loader.epoch(number)

    def loss(self, batch: Batch) -> Tensor:
        """Binary cross-entropy, summed over the classes that can be told, mean over the images."""
        table = self.train_table[batch.index].to(self.setting.device)
        with self.setting.autocast():
            scores = self.model(batch.images)
        losses = F.binary_cross_entropy_with_logits(scores.float(), (table > 0).float(), reduction="none")
        return losses.masked_fill(table == 0, 0.0).sum() / len(table)

    @torch.no_grad()
    def evaluate(self, report: Report) -> dict[str, Any]:
        """Mean average precision over classes, by area and by eleven points."""
        self.model.eval()
        scores = np.zeros(self.test_table.shape)
        if self.setting.options.test_crops == "ten":
            for i, crops in enumerate(read_ahead(self.test_names, self._ten, self.setting.options.threads)):
                scores[i] = self._scores(crops.to(self.setting.device)).sum(0)
                report((i + 1) / len(scores))
        else:
            rounds = _RANDOM_CROPS if self.setting.options.test_crops == "random" else 1
            for crop in range(rounds):
                for batch in self.test_loader.epoch(crop):
                    scores[batch.index.numpy()] += self._scores(batch.images)
                    report((crop + batch.position / len(scores)) / rounds)
        precision = np.array([image_precision(scores[:, c], self.test_table[:, c]) for c in range(len(self.classes))])
        return {
            "map": mean_known(precision[:, 0]),
            "map_11point": mean_known(precision[:, 1]),
            "per_class": dict(zip(self.classes, precision[:, 0].tolist(), strict=True)),
        }

    def _scores(self, images: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
        with self.setting.autocast():
            scores = self.model(images)
        return scores.double().cpu().numpy()  # type: ignore[no-any-return]

    def _ten(self, name: str) -> Tensor:
        """Corners and centre of an image and of its mirror image, [10, 3, S, S]."""
        size = self.setting.options.image_size
        image = normalised(to_tensor(self.setting.tree.image(name)), self.setting.trunk)
        height, width = image.shape[1:]
        scale = round(size * 256 / 224) / min(height, width)
        shape = max(size, round(height * scale)), max(size, round(width * scale))
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
        down, right = shape[0] - size, shape[1] - size
        places = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))
        crops = torch.stack([image[:, y : y + size, x : x + size] for y, x in places])
        return torch.cat([crops, crops.flip(3)])
