"""Images on the card: the fused augmentation at every size beside torchvision, and its parameters. A part of gpu.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import common
import numpy as np
import torch
from gpu_logits import SEED

from sela_ext import kernels
from sela_ext.kernels import Augment
from sela_ext.kernels.augment import augment_options
from sela_ext.kernels.augment_resident import as_records
from sela_ext.kernels.check_cases import augment_difference, parameter_difference

if TYPE_CHECKING:
    from gpu import Card


def torchvision_batch(images: torch.Tensor, augment: Augment) -> Callable[[], Any] | None:
    """The same steps by torchvision v2 on a batch [B, 3, H, W] of the card: one draw for all of its images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v2 = common.peer("torchvision.transforms.v2", "torchvision")
    if v2 is None:
        return None
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop(augment.size, scale=augment.scale, antialias=True),
            v2.RandomGrayscale(augment.gray_probability),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(augment.mean), list(augment.std)),
        ]
    )
    return lambda: pipeline(images)


def images_case(card: Card, copy: float, rounds: int) -> list[dict[str, Any]]:
    """50,000 x 32 x 32 x 3 resident on the device, augmented in batches as training takes them, and at once."""
    count = max(256, 50_000 // card.tiny)
    data = np.random.default_rng(SEED).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    resident = torch.from_numpy(data).to(card.place)
    augment = Augment.cifar(32, gray_first=True)
    order = kernels.permutation(count, seed=SEED, epoch=0)
    some = order[:256]
    expected, drawn = kernels.augment_resident(data, some, augment, seed=SEED, epoch=1, return_parameters=True)
    found, params = kernels.augment_resident(resident, some, augment, seed=SEED, epoch=1, return_parameters=True)
    difference = augment_difference(augment, found.cpu(), expected)
    if params.tobytes() != drawn.tobytes() or difference is not None:
        raise SystemExit(f"no agreement: {difference or 'parameters differ from those of the CPU'}; nothing is timed")
    table, recorded = [], []
    for batch in (256, 4096, count):
        batch = min(batch, count)
        index = torch.from_numpy(order[:batch].copy()).to(card.place)
        competitors: dict[str, Callable[[], Any]] = {}
        for dtype in (torch.float16, torch.float32):
            out = torch.empty(batch, 3, 32, 32, dtype=dtype, device=card.place)
            competitors[f"sela_ext, {str(dtype).removeprefix('torch.')}"] = lambda out=out, index=index: (
                kernels.augment_resident(resident, index, augment, seed=SEED, epoch=2, out=out)
            )
        pixels = resident[index].permute(0, 3, 1, 2).contiguous()
        theirs = torchvision_batch(pixels, augment) if batch < count or card.dry else None
        if theirs is not None:
            competitors["torchvision v2 (one draw per batch)"] = theirs
        seconds = card.medians(competitors, rounds)
        for label, value in seconds.items():
            width = 2 if label.endswith("float16") else 4
            moved = batch * (32 * 32 * 3 * (1 + width) + 8)
            share = moved / 1e9 / value / copy if label.startswith("sela_ext") else None
            table.append((f"{label}, batch {batch}", batch / value / 1e6, value * 1e3, share and f"{share:.0%}"))
            recorded.append(
                {
                    "case": "augment 32 px",
                    "what": label,
                    "batch": batch,
                    "images_per_second": batch / value,
                    "seconds": value,
                    "bytes": moved,
                    "share_of_copy": share,
                }
            )
    common.table(
        "Augmentation of resident 32 x 32 x 3 images (random box, gray .2, jitter .4 x 4, flip, normalised); the "
        "parameters are the CPU's bits, pixels within 0.01 of 255",
        ("", "million images / s", "ms", "of copy bandwidth"),
        table,
    )
    return recorded


def large_sources(card: Card, count: int) -> tuple[torch.Tensor, kernels.DeviceImages, kernels.DeviceImages]:
    """(resident 256 x 256, uploaded crops of several sizes, uploaded planes at 4:2:0), `count` of each."""
    draw = np.random.default_rng(SEED)
    resident = torch.from_numpy(draw.integers(0, 256, (count, 256, 256, 3), dtype=np.uint8)).to(card.place)
    sides = [(int(h), int(w)) for h, w in draw.integers(200, 400, (count, 2))]
    crops = [draw.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sides]
    planes = []
    for h, w in sides:
        chroma = (-(-h // 2), -(-w // 2))
        shapes = ((h, w), chroma, chroma)
        data = tuple(draw.integers(0, 256, shape, dtype=np.uint8) for shape in shapes)
        planes.append(kernels.Planes(data, h, w, subsampling="4:2:0"))
    where = "cpu" if card.dry else card.place
    return resident, kernels.upload_images(crops, where), kernels.upload_planes(planes, where)


def large_images_case(card: Card, copy: float, rounds: int) -> list[dict[str, Any]]:
    """To 224: from resident 256 x 256 images, and from crops and planes of 200 to 400 pixels uploaded before."""
    count = 8 if card.dry else 512
    resident, crops, planes = large_sources(card, count)
    size = 32 if card.dry else 224
    index, few = np.arange(count), np.arange(4)
    recipes = {
        "paper's set": Augment.sela(size),
        "box and flip": Augment.resized_crop(size),
        "Aug++": Augment.aug_plus(size),
        "window (eval)": Augment.eval(size),
        "gradients": Augment.deepcluster(size),
        # Not resampled: the levels that equalize counts lie in the middle of its bins, here as on the CPU.
        "tones, 256 px": Augment.none(256, tone_probability=1.0, noise_probability=0.3),
    }
    table, recorded = [], []
    for name, augment in recipes.items():
        host = resident[: len(few)].cpu()
        expected = kernels.augment_resident(host, few, augment, seed=SEED, epoch=1)
        found = kernels.augment_resident(resident, few, augment, seed=SEED, epoch=1)
        difference = augment_difference(augment, found.cpu(), expected)
        if difference is not None:
            raise SystemExit(f"no agreement: {name}: {difference}; nothing is timed")
        params = kernels.sample_parameters(augment, crops.heights, crops.widths, index, seed=SEED, epoch=1)
        draws = augment.draws_effects
        effects = kernels.sample_effects(augment, index, seed=SEED, epoch=1) if draws else None
        channels, side = augment.output_channels(3), augment.size
        out = torch.empty(count, channels, side, side, dtype=torch.float16, device=card.place)
        numbers = torch.from_numpy(index).to(card.place)
        keyword: dict[str, Any] = {"out": out}
        competitors: dict[str, Callable[[], Any]] = {
            "sela_ext, resident": lambda augment=augment, keyword=keyword, numbers=numbers: kernels.augment_resident(
                resident, numbers, augment, seed=SEED, epoch=2, **keyword
            ),
            "sela_ext, uploaded crops": lambda augment=augment, p=params, e=effects, keyword=keyword: kernels.augment(
                crops, p, augment, effects=e, **keyword
            ),
            "sela_ext, uploaded planes": lambda augment=augment, p=params, e=effects, keyword=keyword: (
                kernels.augment_planes(planes, p, augment, effects=e, **keyword)
            ),
        }
        if name.startswith("tones"):  # it has no box to cut from larger images
            competitors = {"sela_ext, resident": competitors["sela_ext, resident"]}
        if name == "paper's set":
            pixels = resident.permute(0, 3, 1, 2).contiguous()
            theirs = torchvision_batch(pixels, augment)
            if theirs is not None:
                competitors["torchvision v2 (one draw per batch)"] = theirs
        seconds = card.medians(competitors, rounds)
        for label, value in seconds.items():
            # The bytes of the mean box: what must be read, once; the output, once.
            share_shown = {"random": 0.54, "none": 1.0}.get(augment.crop, 0.77)
            moved = count * (share_shown * 256 * 256 * 3 + side * side * channels * 2)
            share = moved / 1e9 / value / copy if label == "sela_ext, resident" else None
            table.append((f"{name}: {label}", count / value / 1e6, value * 1e3, share and f"{share:.0%}"))
            recorded.append(
                {
                    "case": f"augment {side} px",
                    "what": f"{name}: {label}",
                    "batch": count,
                    "images_per_second": count / value,
                    "seconds": value,
                    "bytes": moved,
                    "share_of_copy": share,
                }
            )
    common.table(
        f"Augmentation to {size} x {size} float16, batch {count}; pixels within 0.01 of 255 of the CPU's",
        ("", "million images / s", "ms", "of copy bandwidth"),
        table,
    )
    return recorded


def sample_case(card: Card, copy: float, rounds: int) -> list[dict[str, Any]]:
    """Parameters of a million images, drawn on the card and by the CPU (one thread)."""
    augment, count = Augment.sela(224), max(1000, 1_000_000 // card.tiny)
    host = np.arange(count)
    drawn = kernels.sample_parameters(augment, 256, 256, host, seed=SEED, epoch=1)
    works: dict[str, Callable[[], Any]] = {
        "CPU": lambda: kernels.sample_parameters(augment, 256, 256, host, seed=SEED, epoch=1)
    }
    if card.device is not None:
        device, index = card.device, torch.from_numpy(host).to(card.place)
        records = torch.empty(count, drawn.dtype.itemsize // 4, dtype=torch.int32, device=card.place)

        def launch() -> None:
            device.core.sample_parameters_cuda(
                *(augment_options(augment, 3), 256, 256, index.data_ptr(), count),
                *(SEED, 1, 0, records.data_ptr(), device.stream()),
            )

        launch()
        difference = parameter_difference(as_records(records), drawn)
        if difference is not None:
            raise SystemExit(f"no agreement: {difference}; nothing is timed")
        works = {"sela_ext, kernel alone": launch, **works}
    moved = count * (8 + drawn.dtype.itemsize)
    table, recorded = [], []
    for label, value in card.medians(works, rounds).items():
        share = moved / 1e9 / value / copy if label.startswith("sela_ext") else None
        table.append((label, count / value / 1e6, value * 1e3, share and f"{share:.0%}"))
        recorded.append({"case": "sample parameters", "what": label, "count": count, "seconds": value, "bytes": moved})
        recorded[-1]["share_of_copy"] = share
    common.table(
        f"What is drawn for {count} images; the bits are the CPU's",
        ("", "million / s", "ms", "of copy bandwidth"),
        table,
    )
    return recorded
