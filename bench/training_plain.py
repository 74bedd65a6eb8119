"""SeLa as one would write it in PyTorch and torchvision: what bench/training.py compares with.

PIL images, torchvision v2 transforms, a DataLoader, one linear layer per head, and a label pass as the authors make it:
all images once more in eval mode, then Sinkhorn's iterations on each head's probabilities, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

MOST_ITERATIONS = 300  # of Sinkhorn, per head


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images in memory or JPEG files, through a transform."""

    def __init__(self, images: Any, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if isinstance(image, np.ndarray):
            picture = Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
        else:
            picture = Image.open(image).convert("RGB")
        return self.transform(picture), index


def transform_of(augment: Any, *, train: bool, crop: bool) -> Any:
    """The transforms of an `Augment`; without `train` only its size, through a centre crop where `crop`."""
    from torchvision.transforms import v2

    size = augment.size
    steps: list[Any] = []
    if train:
        jitter = v2.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)
        steps += [
            v2.RandomResizedCrop(size, scale=augment.scale, antialias=True),
            v2.RandomGrayscale(augment.gray_probability),
            v2.RandomApply([jitter], augment.jitter_probability),
            v2.RandomHorizontalFlip(augment.flip_probability),
        ]
    elif crop:
        steps += [v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size)]
    else:
        steps += [v2.Resize((size, size), antialias=True)]
    mean, std = list(augment.mean), list(augment.std)
    return v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), ToChannels(mean, std)])


class ToChannels:
    """Normalises by the means of the images' own channels: one for grey images."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (t[: image.shape[0]] if len(t) >= image.shape[0] else t for t in (self.mean, self.std))
        return (image - mean) / std


class PlainNetwork(nn.Module):
    """Backbone, projection, and a layer per head, with the weights of a network of ours."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(network.backbone)
        self.projection = copy.deepcopy(network.projection)
        self.cosine, self.temperature = network.heads.kind == "cosine", network.heads.temperature
        self.channels_in = network.channels_in
        self.heads = nn.ModuleList()
        biases = (
            [None] * len(network.heads.clusters)
            if network.heads.bias is None
            else network.heads.split(network.heads.bias[None])
        )
        for weight, bias in zip(network.heads.weight.detach().split(network.heads.clusters), biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            layer.weight.data.copy_(weight)
            if bias is not None:
                layer.bias.data.copy_(bias[0].detach())
            self.heads.append(layer)

    def embed(self, images: Tensor) -> Tensor:
        """What the heads see."""
        if images.shape[1] == 1 and self.channels_in == 3:
            images = images.expand(-1, 3, -1, -1)
        return self.projection(self.backbone(images))

    def logits(self, embedding: Tensor) -> list[Tensor]:
        """Logits of every head."""
        if not self.cosine:
            return [head(embedding) for head in self.heads]
        embedding = F.normalize(embedding, dim=1)
        return [F.linear(embedding, F.normalize(head.weight, dim=1)) / self.temperature for head in self.heads]


class PlainLoop:
    """The training loop and its label pass.

    Args:
        network: of ours; copied.
        images: uint8 [N, H, W, C], or paths of JPEG files.
        augment: of ours.
        labels: int64 [heads, N].
        batch_size: images per step.
        options: momentum, nesterov, weight_decay and rate of SGD.
        dtype: of autocast; float32: none.
        channels_last: the memory format of network and images.
        workers: processes of the DataLoader; 0: this one.
        crop: whether images are looked at through a centre crop.
    """

    def __init__(
        self,
        network: Any,
        images: Any,
        augment: Any,
        labels: Tensor,
        batch_size: int,
        options: dict[str, Any],
        dtype: torch.dtype,
        *,
        channels_last: bool = False,
        workers: int = 0,
        crop: bool = False,
    ) -> None:
        self.network = PlainNetwork(network).train()
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.format)
        self.labels = labels
        self.dtype, self.batch_size, self.workers = dtype, batch_size, workers
        self.training = Pictures(images, transform_of(augment, train=True, crop=crop))
        self.looking = Pictures(images, transform_of(augment, train=False, crop=crop))
        self.optimizer = torch.optim.SGD(self.network.parameters(), **options)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of augmented images and their numbers."""
        yield from DataLoader(self.training, self.batch_size, shuffle=True, num_workers=self.workers, drop_last=True)

    def loss(self, images: Tensor, index: Tensor) -> Tensor:
        """Mean of the heads' cross-entropies."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
            logits = self.network.logits(self.network.embed(images.contiguous(memory_format=self.format)))
            losses = [F.cross_entropy(part, goal) for part, goal in zip(logits, self.labels[:, index], strict=True)]
        return torch.stack(losses).mean()

    def step(self, images: Tensor, index: Tensor) -> float:
        """One step of SGD; the loss is read at once, as one does for a running mean."""
        loss = self.loss(images, index)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def collect(self) -> Tensor:
        """Embeddings of all images in eval mode, float32 [N, E]."""
        self.network.eval()
        parts = []
        for images, _ in DataLoader(self.looking, self.batch_size, num_workers=self.workers):
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
                parts.append(self.network.embed(images.contiguous(memory_format=self.format)).float())
        self.network.train()
        return torch.cat(parts)

    @torch.no_grad()
    def solve(self, embeddings: Tensor, lam: float, tol: float) -> Tensor:
        """Balanced labels of every head, int64 [heads, N]."""
        return torch.stack([sinkhorn(F.log_softmax(part, 1), lam, tol) for part in self.network.logits(embeddings)])


def sinkhorn(log_p: Tensor, lam: float, tol: float) -> Tensor:
    """Labels by Sinkhorn's iterations in float64, two products each, until the sizes' L1 error is at most tol."""
    scores = lam * (log_p.double() - log_p.max(1, keepdim=True).values)
    plan, (count, clusters) = scores.exp(), log_p.shape
    columns = torch.full((clusters,), 1 / clusters, dtype=torch.float64)
    for _ in range(MOST_ITERATIONS):
        reached = (1 / count / (plan @ columns)) @ plan
        if float((columns * reached - 1 / clusters).abs().sum()) <= tol:
            break
        columns = 1 / clusters / reached.clamp_min(1e-300)
    return (scores + columns.log()).argmax(1)
