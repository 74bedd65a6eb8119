"""The competitors of bench/images.py, each written as its users write it.

A competitor is made from a `Task` and gives its epoch: a function whose iterator yields normalised float32 batches
[B, 3, size, size]. One that is not installed, or cannot do the task, raises `Absent` with the reason.
"""

from __future__ import annotations

import importlib
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import images_targets as names
import numpy as np
import torch
from images_cases import Absent, Task
from torchvision import io as tv_io
from torchvision import transforms as v1
from torchvision.transforms import v2

Epoch = Callable[[], Iterator[torch.Tensor]]

JITTER = (0.4, 0.4, 0.4, 0.4)
MILDER = (0.4, 0.4, 0.4, 0.1)  # Aug++'s
BLUR = (23, (0.1, 2.0))  # kernel and deviation of Aug++'s blur at 224


def imported(module: str) -> Any:
    """A module, or Absent."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise Absent("not installed") from error


class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Items of a task: `transform` of what `load` makes of a path, or of an image of the array."""

    def __init__(self, task: Task, load: Callable[[Any], Any], transform: Callable[[Any], Any]) -> None:
        self.items: Any = task.files[: task.count] if task.files else np.load(task.array)[: task.count]
        self.load, self.transform = load, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.transform(self.load(self.items[i]))


def loaded(task: Task, load: Callable[[Any], Any], transform: Callable[[Any], Any]) -> Epoch:
    """Batches by torch's DataLoader: in this process for one thread, else by so many workers, which stay."""
    workers = task.threads if task.threads > 1 else 0
    generator = torch.Generator().manual_seed(7)
    loader = torch.utils.data.DataLoader(
        Images(task, load, transform),
        batch_size=task.batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=generator,
    )
    return lambda: iter(loader)


def pipeline(task: Task, module: Any, blur: Any) -> list[Any]:
    """The task as a user of torchvision writes it, up to the conversion to float."""
    augment = task.augment()
    if task.preset == "eval":
        return [module.Resize(augment.resize_side, antialias=True), module.CenterCrop(task.size)]
    crop = module.RandomResizedCrop(task.size, scale=augment.scale, antialias=True)
    gray, flip = module.RandomGrayscale(0.2), module.RandomHorizontalFlip()
    if task.preset == "aug_plus":
        jitter = module.RandomApply([module.ColorJitter(*MILDER)], p=0.8)
        return [crop, jitter, gray, module.RandomApply([blur], p=0.5), flip]
    return [crop, gray, module.ColorJitter(*JITTER), flip]


def v2_transform(task: Task) -> Any:
    """Transforms v2 of uint8 tensors [3, H, W]."""
    augment = task.augment()
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(augment.mean), list(augment.std))]
    return v2.Compose([*pipeline(task, v2, v2.GaussianBlur(*BLUR)), *to_float])


def torchvision_v2(task: Task) -> Epoch:
    """Transforms v2 on uint8 tensors of torchvision.io, the fast way that its documentation recommends."""

    def load(item: Any) -> torch.Tensor:
        if isinstance(item, str):
            return tv_io.decode_jpeg(tv_io.read_file(item), mode=tv_io.ImageReadMode.RGB)
        return torch.from_numpy(item).permute(2, 0, 1)

    return loaded(task, load, v2_transform(task))


class PillowBlur:
    """The blur of MoCo's and SimSiam's code: Pillow's, three box filters that come near a Gaussian."""

    def __call__(self, image: Any) -> Any:
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*BLUR[1])))


def torchvision_v1(task: Task) -> Epoch:
    """Transforms v1 on PIL images, as most published code has it."""
    from PIL import Image

    augment = task.augment()
    to_float = [v1.ToTensor(), v1.Normalize(list(augment.mean), list(augment.std))]
    transform = v1.Compose([*pipeline(task, v1, PillowBlur()), *to_float])

    def load(item: Any) -> Any:
        if not isinstance(item, str):
            return Image.fromarray(item)
        with Image.open(item) as image:
            return image.convert("RGB")

    return loaded(task, load, transform)


def albumentations(task: Task) -> Epoch:
    """Albumentations on the pixels of simplejpeg, both on OpenCV's and libjpeg-turbo's fast paths."""
    a, to_tensor = imported("albumentations"), imported("albumentations.pytorch")
    imported("cv2").setNumThreads(0)
    decode = imported("simplejpeg").decode_jpeg if task.files else None
    augment = task.augment()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if task.preset == "eval":
            steps = [a.SmallestMaxSize(augment.resize_side), a.CenterCrop(task.size, task.size)]
        else:
            crop = a.RandomResizedCrop((task.size, task.size), scale=augment.scale)
            plus = task.preset == "aug_plus"
            turn = MILDER[3] if plus else JITTER[3]
            jitter = a.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-turn, turn), p=0.8 if plus else 1.0)
            gray, flip = a.ToGray(p=0.2), a.HorizontalFlip()
            blur = a.GaussianBlur(blur_limit=(BLUR[0], BLUR[0]), sigma_limit=BLUR[1], p=0.5)
            steps = [crop, jitter, gray, blur, flip] if plus else [crop, gray, jitter, flip]
        transform = a.Compose([*steps, a.Normalize(augment.mean, augment.std), to_tensor.ToTensorV2()])

    def load(item: Any) -> Any:
        return decode(Path(item).read_bytes()) if decode is not None else item

    return loaded(task, load, lambda image: transform(image=image)["image"])


def dali(task: Task) -> Epoch:
    """DALI on the CPU, with its own loop. Its hue is a rotation in YIQ; gray is a saturation of 0."""
    imported("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    augment = task.augment()
    side = [task.size, task.size]
    linear = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    turn = 360 * (MILDER if task.preset == "aug_plus" else JITTER)[3]
    array = np.load(task.array)[: task.count] if task.array else None

    def batches() -> Iterator[list[np.ndarray]]:
        while True:
            for begin in range(0, task.count, task.batch):
                yield list(array[begin : begin + task.batch])

    def images() -> Any:
        if array is not None:
            return fn.external_source(source=batches(), dtype=types.UINT8, layout="HWC")
        return fn.readers.file(files=list(task.files[: task.count]), random_shuffle=False, name="files")[0]

    def cropped() -> Any:
        area = {"random_area": list(augment.scale), "random_aspect_ratio": list(augment.ratio)}
        if array is not None:
            return fn.random_resized_crop(images(), size=side, **area, **linear)
        if task.preset == "eval":
            whole = fn.decoders.image(images(), device="cpu", output_type=types.RGB)
            return fn.resize(whole, resize_shorter=augment.resize_side, **linear)
        part = fn.decoders.image_random_crop(images(), device="cpu", output_type=types.RGB, **area)
        return fn.resize(part, size=side, **linear)

    def coloured(x: Any) -> Any:
        factors = {name: fn.random.uniform(range=[0.6, 1.4]) for name in ("brightness", "contrast")}
        kept = fn.random.coin_flip(probability=0.8)  # the others turn gray
        saturation = fn.random.uniform(range=[0.6, 1.4]) * kept
        return fn.color_twist(x, **factors, saturation=saturation, hue=fn.random.uniform(range=[-turn, turn]))

    threads = {"batch_size": task.batch, "num_threads": task.threads, "device_id": None, "seed": 7}

    @pipeline_def(**threads, enable_conditionals=True)
    def whole() -> Any:
        x = cropped()
        mirror = 0
        if task.preset != "eval":
            mirror = fn.random.coin_flip()
        if task.preset == "aug_plus":
            if fn.random.coin_flip(probability=0.8, dtype=types.BOOL):
                x = coloured(x)
            if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
                x = fn.gaussian_blur(x, window_size=BLUR[0], sigma=fn.random.uniform(range=list(BLUR[1])))
        elif task.preset != "eval":
            x = coloured(x)
        scaled = {"mean": [255 * m for m in augment.mean], "std": [255 * s for s in augment.std]}
        return fn.crop_mirror_normalize(x, crop=side, dtype=types.FLOAT, output_layout="CHW", mirror=mirror, **scaled)

    iterator = DALIGenericIterator(
        [whole()],
        ["images"],
        **({"reader_name": "files"} if task.files else {"size": task.count}),
        last_batch_policy=LastBatchPolicy.PARTIAL,
        auto_reset=True,
    )

    def epoch() -> Iterator[torch.Tensor]:
        for found in iterator:
            yield found[0]["images"]

    return epoch


def ffcv(task: Task) -> Epoch:
    """FFCV reads nothing but its own files, which this script does not write: it is named, and left out."""
    imported("ffcv")
    raise Absent("reads only files of its own format, which are not written here")


PEERS: dict[str, Callable[[Task], Epoch]] = {
    names.V2: torchvision_v2,
    names.V1: torchvision_v1,
    names.ALBUMENTATIONS: albumentations,
    names.DALI: dali,
    names.FFCV: ffcv,
}
# Those that have threads of their own, which would go on in this process while another one is timed.
APART = (names.DALI,)
