"""What the three tasks have in common: the pieces that the loop in `run` asks a task for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sela_ext import kernels
from sela_ext.finetuning.options import FinetuneOptions
from sela_ext.finetuning.trunk import Trunk, batch_norm_in_eval, freeze_batch_norm
from sela_ext.finetuning.voc import VocTree

T = TypeVar("T")
Report = Callable[[float], None]


@dataclass(frozen=True)
class Setting:
    """What a task is built from.

    Attributes:
        tree: the VOC folder.
        trunk: the backbone.
        options: with no "auto" left.
    """

    tree: VocTree
    trunk: Trunk
    options: FinetuneOptions

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return torch.device(self.options.device)

    def autocast(self) -> torch.autocast:
        """The context in which the network computes."""
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.options.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)


class Task(ABC):
    """A network to train on one task, its batches, its loss and its scores.

    Attributes:
        setting: what it was built from.
        model: the network; its trainable parameters require gradients.
        images: number of training images.
        classes: names.
        score: name of the score that the literature reports first.
    """

    setting: Setting
    model: nn.Module
    images: int
    classes: list[str]
    score: str

    @abstractmethod
    def epoch(self, number: int) -> Generator[Any, None, None]:
        """Yield the batches of an epoch; what is in them follows from seed and epoch alone."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch."""

    @abstractmethod
    def evaluate(self, report: Report) -> dict[str, Any]:
        """Judge the network on the test images; `report` is called with the share done.

        Returns:
            Scores in [0, 1] by name, and "per_class".
        """

    @abstractmethod
    def backbone(self) -> nn.Module:
        """The part that came with its weights and holds the convolutions."""

    def freeze(self) -> None:
        """Take out of training what the options say."""
        if self.setting.options.layers == "fc6-8":
            self.backbone().requires_grad_(False)
        elif self.setting.options.batch_norm == "frozen":
            freeze_batch_norm(self.backbone())

    def train_mode(self) -> None:
        """Put the network into train mode, its frozen batch norm into eval mode."""
        self.model.train()
        if self.setting.options.batch_norm == "frozen":
            batch_norm_in_eval(self.backbone())


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the images in an epoch."""
    return [int(i) for i in kernels.permutation(count, seed=seed, epoch=epoch)]


def draws(seed: int, epoch: int, image: int) -> np.random.Generator:
    """Random numbers that follow from seed, epoch and image alone."""
    key = np.array([seed, (epoch << 32) | image], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def read_ahead(items: Sequence[T], read: Callable[[T], Any], threads: int) -> Iterator[Any]:
    """Yield read(item) in order; a few are read ahead by threads."""
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="sela-read") as pool:
        try:
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) > 2 * threads + 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def to_tensor(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Pixels uint8 [H, W, 3] as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255.0)


def normalised(images: Tensor, trunk: Trunk) -> Tensor:
    """Images [..., 3, H, W] in [0, 1], as the backbone saw them when it was trained."""
    mean, std = torch.tensor(trunk.mean, device=images.device), torch.tensor(trunk.std, device=images.device)
    return (images - mean[:, None, None]) / std[:, None, None]
