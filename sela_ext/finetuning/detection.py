"""Object detection: Faster R-CNN on the backbone."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sela_ext.data.prefetch import prefetch
from sela_ext.errors import DataError
from sela_ext.finetuning.scores import Boxes, detection_scores
from sela_ext.finetuning.task import Report, Setting, Task, draws, order, read_ahead, to_tensor
from sela_ext.finetuning.trunk import Stages, stages_of
from sela_ext.finetuning.voc import Objects

_FPN_CHANNELS = 256
_ASPECTS = (0.5, 1.0, 2.0)
_SINGLE_MAP_SIZES = (32, 64, 128, 256, 512)


class Pyramid(nn.Module):
    """Feature pyramid on the maps of a backbone: [B, 256, ...] by name, and one coarser map."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        self.body = stages
        self.fpn = FeaturePyramidNetwork(stages.widths, _FPN_CHANNELS, LastLevelMaxPool())
        self.out_channels = _FPN_CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [B, 3, H, W] to maps by name."""
        found: dict[str, Tensor] = self.fpn({str(i): one for i, one in enumerate(self.body(images))})
        return found


class LastMap(nn.Module):
    """The last map of a backbone alone."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.body = stages
        self.out_channels = stages.widths[-1]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [B, 3, H, W] to the map "0"."""
        return {"0": self.body(images)[-1]}


class Detection(Task):
    """Torchvision's Faster R-CNN: on a feature pyramid for residual networks, else on the last convolution's map.

    The fully connected layers of AlexNet and VGG become those that judge a region, as in Fast R-CNN.

    Source: Ren et al., "Faster R-CNN", NeurIPS 2015; Lin et al., "Feature pyramid networks", CVPR 2017.
    """

    score = "ap50"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        options = setting.options
        self.train_names = setting.tree.split("Main", options.train_split)
        self.test_names = setting.tree.split("Main", options.test_split)
        self.train_objects = [setting.tree.objects(name) for name in self.train_names]
        self.test_objects = [setting.tree.objects(name) for name in self.test_names]
        self.classes = sorted({name for objects in self.train_objects for name in objects.names})
        if not self.classes:
            raise DataError(f"{setting.tree.path}: expected objects in {options.train_split}, found none")
        self.number = {name: i for i, name in enumerate(self.classes)}
        unknown = sorted({name for objects in self.test_objects for name in objects.names} - {*self.classes})
        if unknown:
            raise DataError(
                f"{setting.tree.path}: expected the classes of {options.train_split} in {options.test_split}, found "
                f"{', '.join(unknown[:3])} besides"
            )
        self.images = len(self.train_names)
        stages = stages_of(setting.trunk)
        self._body = stages.stages
        self.model = self._build(stages).to(setting.device)
        self.freeze()

    def _build(self, stages: Stages) -> nn.Module:
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
        from torchvision.ops import MultiScaleRoIAlign

        size, trunk = self.setting.options.image_size, self.setting.trunk
        settings: dict[str, Any] = {
            "min_size": size,
            "max_size": round(size * 5 / 3),
            "image_mean": list(trunk.mean),
            "image_std": list(trunk.std),
            "rpn_post_nms_top_n_train": 2 * self.setting.options.proposals,
            "rpn_post_nms_top_n_test": self.setting.options.proposals,
            "box_batch_size_per_image": self.setting.options.regions,
        }
        head = stages.head
        stages.head = None  # it goes where regions are judged
        if len(stages.strides) > 1:
            sizes: list[tuple[int, ...]] = [(8 * stride,) for stride in (*stages.strides, 2 * stages.strides[-1])]
            names = [str(i) for i in range(len(stages.strides))]
            body: nn.Module = Pyramid(stages)
            pool = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)
        else:
            sizes = [_SINGLE_MAP_SIZES]
            body = LastMap(stages)
            pool = MultiScaleRoIAlign(["0"], output_size=stages.pool, sampling_ratio=2)
        if head is not None:
            settings["box_head"] = nn.Sequential(nn.Flatten(), head)
            settings["box_predictor"] = FastRCNNPredictor(trunk.feature_dim, len(self.classes) + 1)
        else:
            settings["num_classes"] = len(self.classes) + 1
        anchors = AnchorGenerator(sizes, (_ASPECTS,) * len(sizes))
        model: nn.Module = FasterRCNN(body, rpn_anchor_generator=anchors, box_roi_pool=pool, **settings)
        return model

    def backbone(self) -> nn.Module:
        """The convolutions of the backbone."""
        return self._body

    def epoch(self, number: int) -> Generator[Any, None, None]:
        """Batches of (images, targets), mirrored half of the time."""
        options = self.setting.options
        shuffled = order(self.images, options.seed, number)
        size = min(options.batch_size, self.images)

        def batches() -> Generator[Any, None, None]:
            batch = []
            samples = read_ahead(shuffled, lambda i: self._sample(i, number), options.threads)
            for sample in samples:
                batch.append(sample)
                if len(batch) == size:
                    yield tuple(zip(*batch, strict=True))
                    batch = []
            if batch:
                yield tuple(zip(*batch, strict=True))

        return prefetch(batches(), depth=3, on_wait=lambda seconds: None)

    def _sample(self, i: int, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = to_tensor(self.setting.tree.image(self.train_names[i]))
        objects = self.train_objects[i]
        wanted = ~objects.difficult
        boxes = torch.from_numpy(objects.boxes[wanted])
        labels = [self.number[name] + 1 for name, use in zip(objects.names, wanted, strict=True) if use]
        height, width = image.shape[1:]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        if bool((boxes[:, 2:] <= boxes[:, :2]).any()):
            name = self.train_names[i]
            raise DataError(
                f"Annotations/{name}.xml: expected boxes inside {width} x {height} pixels, found one outside"
            )
        if draws(self.setting.options.seed, epoch, i).random() < 0.5:
            image = image.flip(2)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        return image, {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}

    def loss(self, batch: Any) -> Tensor:
        """Sum of the four losses of Faster R-CNN."""
        device = self.setting.device
        images = [image.to(device) for image in batch[0]]
        targets = [{key: value.to(device) for key, value in target.items()} for target in batch[1]]
        with self.setting.autocast():
            losses = self.model(images, targets)
        total: Tensor = torch.stack([value.float() for value in losses.values()]).sum()
        return total

    @torch.no_grad()
    def evaluate(self, report: Report) -> dict[str, Any]:
        """Average precision of boxes: VOC's, by area and by eleven points, and COCO's."""
        self.model.eval()
        found, truth = [], []
        images = read_ahead(self.test_names, self.setting.tree.image, self.setting.options.threads)
        for i, pixels in enumerate(images):
            with self.setting.autocast():
                output = self.model([to_tensor(pixels).to(self.setting.device)])[0]
            boxes = output["boxes"].double().cpu().numpy()
            found.append(Boxes(boxes, output["labels"].cpu().numpy() - 1, output["scores"].double().cpu().numpy()))
            truth.append(self._truth(self.test_objects[i]))
            report((i + 1) / len(self.test_names))
        return detection_scores(found, truth, self.classes)

    def _truth(self, objects: Objects) -> Boxes:
        labels = np.array([self.number[name] for name in objects.names], np.int64)
        return Boxes(objects.boxes.astype(np.float64), labels, difficult=objects.difficult)
