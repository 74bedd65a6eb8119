"""Augmentation on the CPU: sela_ext against torchvision (v2 on tensors, v1 on PIL images) and other loaders.

    python bench/images.py --quick

Checked first: on the same drawn parameters the kernel equals torchvision v2 run in float within 0.01 of 255. Then:

1. 32 px from memory: 50,000 x 32 x 32 x 3 uint8 -> float32, RandomResizedCrop (.2, 1), gray .2, jitter .4 x 4, flip,
   normalised; drawing the parameters is part of the time. Images per second of processor time, one thread each; peers
   as their users run them, one image at a time or in batches of 256 where they take batches.
2. The same with each instruction set, and with two threads by the wall clock.
3. 224 px: the paper's augmentation of decoded photographs (decoding is not timed).
4. Decoding alone, whole and in part, against torchvision.io, Pillow and simplejpeg; pixels equal to Pillow's.
5. 224 px: the same part of a pipeline, and Aug++ and the evaluation's, from decoded RGB and from a JPEG file's planes.

Photographs: a folder of JPEG files named by SELA_DATA_DIR (or ../shared/data beside the repository, unpacked or as
photos_250.tar.zst); without one, smooth generated images of the same sizes.
"""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import torch
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from sela_ext import kernels
from sela_ext.kernels import Augment

BATCH = 256
SEED = 7
LIMIT = 0.01  # of 255


# ---------------------------------------------------------------- images


def photograph_files(count: int) -> tuple[list[bytes], str]:
    """(JPEG files, where they are from)."""
    folder = Path(os.environ.get("SELA_DATA_DIR") or Path(__file__).resolve().parents[2] / "shared" / "data")
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpeg", ".jpg"))
    archive = folder / "photos_250.tar.zst"
    if files:
        return [p.read_bytes() for p in files[:count]], f"{min(count, len(files))} photographs"
    if archive.is_file():
        with tempfile.TemporaryDirectory() as unpacked:
            raw = Path(unpacked) / "photos.tar"
            try:
                subprocess.run(["zstd", "-dqo", str(raw), str(archive)], check=True)
                with tarfile.open(raw) as tar:
                    members = sorted(tar.getnames())
                    names = [m for m in members if m.lower().endswith((".jpeg", ".jpg"))][:count]
                    found = [file.read() for m in names if (file := tar.extractfile(m)) is not None]
                return found, f"{len(found)} photographs"
            except (OSError, subprocess.CalledProcessError):
                print(f"{archive.name}: cannot be unpacked here (zstd)")
    rng = np.random.default_rng(0)
    shapes = [(375, 500) if i % 3 else (500, 375) for i in range(count)]
    return [_encode(smooth(rng, *shape)) for shape in shapes], f"{count} generated images"


def _decode(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def _encode(image: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=92)
    return file.getvalue()


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A generated image with large soft structures and a little noise."""
    coarse = torch.from_numpy(rng.random((1, 3, 12, 16), dtype=np.float32))
    soft = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    return (soft.numpy() * 235 + rng.integers(0, 20, (height, width, 3))).astype(np.uint8)


def patches(images: list[np.ndarray], count: int) -> np.ndarray:
    """uint8 [count, 32, 32, 3] cut out of the images at half size."""
    rng = np.random.default_rng(1)
    halves = [np.ascontiguousarray(image[::2, ::2]) for image in images if min(image.shape[:2]) >= 66]
    out = np.empty((count, 32, 32, 3), np.uint8)
    for i in range(count):
        image = halves[i % len(halves)]
        y, x = rng.integers(0, image.shape[0] - 31), rng.integers(0, image.shape[1] - 31)
        out[i] = image[y : y + 32, x : x + 32]
    return out


# ---------------------------------------------------------------- agreement


def reference(image: np.ndarray, record: np.void, augment: Augment) -> torch.Tensor:
    """Torchvision v2's functions in float on the same parameters, in [0, 1]."""
    x = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    box = [int(record[name]) for name in ("top", "left", "height", "width")]
    x = functional.resized_crop(x, *box, [augment.size, augment.size], antialias=True)
    if record["gray"] and augment.gray_first:
        x = functional.rgb_to_grayscale(x, 3)
    steps = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    names = ("brightness", "contrast", "saturation", "hue")
    for k in record["order"]:
        x = [*steps, functional.adjust_hue][k](x, float(record[names[k]]))
    if record["gray"] and not augment.gray_first:
        x = functional.rgb_to_grayscale(x, 3)
    return functional.horizontal_flip(x) if record["flip"] else x


def agreement(images: list[np.ndarray], augment: Augment) -> float:
    """Largest difference from torchvision, of 255."""
    sizes = np.array([image.shape[:2] for image in images])
    params = kernels.sample_parameters(augment, sizes[:, 0], sizes[:, 1], range(len(images)), seed=SEED, epoch=0)
    batch = kernels.augment(images, params, augment)
    mean, std = (torch.tensor(v)[:, None, None] for v in augment.channel_values(3))
    worst = 0.0
    for image, record, found in zip(images, params, batch, strict=True):
        worst = max(worst, float((found * std + mean - reference(image, record, augment)).abs().max()))
    return worst * 255


# ---------------------------------------------------------------- competitors


def transforms_of(augment: Augment, module: Any) -> list[Any]:
    """The same pipeline as a user of torchvision writes it, up to the conversion to float."""
    return [
        module.RandomResizedCrop(augment.size, scale=augment.scale, antialias=True),
        module.RandomGrayscale(augment.gray_probability),
        module.ColorJitter(0.4, 0.4, 0.4, 0.4),
        module.RandomHorizontalFlip(),
    ]


def ours_small(data: np.ndarray, augment: Augment, threads: int, batch: int = BATCH) -> Callable[[int], None]:
    order = kernels.permutation(len(data), seed=SEED, epoch=0)
    out = torch.empty(batch, 3, augment.size, augment.size)
    height, width = data.shape[1:3]

    def run(count: int) -> None:
        for begin in range(0, count, batch):
            rows = order[begin : begin + batch]
            params = kernels.sample_parameters(augment, height, width, rows, seed=SEED, epoch=1)
            kernels.augment(data, params, augment, rows=rows, out=out[: len(rows)], threads=threads)

    return run


def ours_large(images: list[np.ndarray], augment: Augment) -> Callable[[int], None]:
    heights, widths = np.array([image.shape[:2] for image in images]).T
    out = torch.empty(len(images), 3, augment.size, augment.size)

    def run(count: int) -> None:
        for epoch in range(count // len(images)):
            params = kernels.sample_parameters(augment, heights, widths, range(len(images)), seed=SEED, epoch=epoch)
            kernels.augment(images, params, augment, out=out, threads=1)

    return run


def torchvision_v2(tensors: Any, augment: Augment) -> Callable[[int], None]:
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(augment.mean), list(augment.std))]
    pipeline = v2.Compose(transforms_of(augment, v2) + to_float)
    return lambda count: _in_batches(lambda i: pipeline(tensors[i % len(tensors)]), count)


def torchvision_v1(images: Any, augment: Augment) -> Callable[[int], None]:
    from PIL import Image

    to_float = [v1.ToTensor(), v1.Normalize(list(augment.mean), list(augment.std))]
    pipeline = v1.Compose(transforms_of(augment, v1) + to_float)
    pictures = [Image.fromarray(image) for image in images]
    return lambda count: _in_batches(lambda i: pipeline(pictures[i % len(pictures)]), count)


def _in_batches(one: Callable[[int], torch.Tensor], count: int) -> None:
    for begin in range(0, count, BATCH):
        torch.stack([one(i) for i in range(begin, min(begin + BATCH, count))])


@functools.lru_cache
def peer(module: str, shown_as: str) -> Any:
    """A competitor's module; absence is said once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return common.peer(module, shown_as)


def albumentations(images: Any, augment: Augment) -> Callable[[int], None] | None:
    a = peer("albumentations", "Albumentations")
    if a is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cv2

        cv2.setNumThreads(0)
        pipeline = a.Compose(
            [
                a.RandomResizedCrop((augment.size, augment.size), scale=augment.scale),
                a.ToGray(p=augment.gray_probability),
                a.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.4, 0.4), p=1.0),
                a.HorizontalFlip(),
                a.Normalize(augment.mean, augment.std),
            ]
        )

    def run(count: int) -> None:
        for begin in range(0, count, BATCH):
            np.stack(
                [pipeline(image=images[i % len(images)])["image"] for i in range(begin, min(begin + BATCH, count))]
            )

    return run


def dali(images: Any, augment: Augment) -> Callable[[int], None] | None:
    if peer("nvidia.dali", "DALI") is None:
        return None
    from nvidia.dali import fn, pipeline_def, types

    batch = min(BATCH, len(images))

    def source() -> Any:
        while True:
            for begin in range(0, len(images) - batch + 1, batch):
                yield list(images[begin : begin + batch])

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, prefetch_queue_depth=1, seed=SEED)
    def pipeline() -> Any:
        x = fn.external_source(source=source(), dtype=types.UINT8, layout="HWC")
        side = [augment.size, augment.size]
        area = list(augment.scale)
        x = fn.random_resized_crop(x, size=side, random_area=area, interp_type=types.INTERP_LINEAR, antialias=True)
        x = fn.color_twist(
            x,
            brightness=fn.random.uniform(range=[0.6, 1.4]),
            contrast=fn.random.uniform(range=[0.6, 1.4]),
            saturation=fn.random.uniform(range=[0.6, 1.4]) * fn.random.coin_flip(probability=0.8),
            hue=fn.random.uniform(range=[-144.0, 144.0]),
        )
        return fn.crop_mirror_normalize(
            x,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in augment.mean],
            std=[255 * s for s in augment.std],
            mirror=fn.random.coin_flip(),
        )

    built = pipeline()
    built.build()

    def run(count: int) -> None:
        for _ in range(max(1, count // batch)):
            built.run()

    return run


# ---------------------------------------------------------------- decoding alone


def crop_boxes(images: list[np.ndarray]) -> list[tuple[int, int, int, int]]:
    """Boxes as the paper's augmentation draws them: RandomResizedCrop, 0.2 to 1 of the area."""
    heights, widths = np.array([image.shape[:2] for image in images]).T
    params = kernels.sample_parameters(Augment.sela(224), heights, widths, range(len(images)), seed=SEED, epoch=0)
    return [tuple(int(p[name]) for name in ("top", "left", "height", "width")) for p in params]


def decoders(files: list[bytes], images: list[np.ndarray]) -> dict[str, tuple[Callable[[int], None], int]]:
    """Ways to decode, one thread each; all pixels are compared with Pillow's first."""
    from torchvision.io import decode_jpeg

    unequal = sum(not np.array_equal(kernels.decode_jpeg(d), image) for d, image in zip(files, images, strict=True))
    if unequal:
        sys.exit(f"bench/images.py: expected Pillow's pixels, found {unequal} files with others; nothing is timed")
    boxes = crop_boxes(images)
    indices = [kernels.jpeg_index(d) for d in files]
    tensors = [torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in files]
    ways: dict[str, Callable[[int], Any]] = {
        "sela_ext to RGB": lambda i: kernels.decode_jpeg(files[i]),
        "sela_ext to planes": lambda i: kernels.decode_planes(files[i]),
        "sela_ext to planes of a crop": lambda i: kernels.decode_planes(files[i], boxes[i]),
        "the same with an index": lambda i: kernels.decode_planes(files[i], boxes[i], index=indices[i]),
        "torchvision.io": lambda i: decode_jpeg(tensors[i]),
        "Pillow": lambda i: _decode(files[i]),
    }
    simplejpeg = peer("simplejpeg", "simplejpeg")
    if simplejpeg is not None:
        ways["simplejpeg"] = lambda i: simplejpeg.decode_jpeg(files[i])

    def repeated(way: Callable[[int], Any]) -> Callable[[int], None]:
        def run(count: int) -> None:
            for i in range(count):
                way(i % len(files))

        return run

    return {name: (repeated(way), len(files)) for name, way in ways.items()}


# ---------------------------------------------------------------- from planes


def planes_of(image: np.ndarray) -> kernels.Planes:
    """What a JPEG file of 4:2:0 would hold of an RGB image."""
    from PIL import Image

    ycc = np.array(Image.fromarray(image).convert("YCbCr"))
    height, width = ycc.shape[:2]
    data = [np.ascontiguousarray(ycc[..., 0])]
    for c in (1, 2):
        even = np.pad(ycc[..., c], ((0, height % 2), (0, width % 2)), mode="edge").astype(np.uint16)
        data.append(((even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2] + 2) >> 2).astype(np.uint8))
    return kernels.Planes(tuple(data), height, width, subsampling="4:2:0")


def planes_part(images: list[np.ndarray], rounds: int) -> list[tuple[str, float, float, float, float, float]]:
    """The part of a pipeline behind the decoder at 224 px, one thread, per preset.

    (name, microseconds per image from decoded RGB, from planes, from planes exactly, by torchvision v2 from RGB
    tensors with its own parameters of the same distribution, mean difference of planes from exact of 255).
    """
    source = [planes_of(image) for image in images]
    tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    index = range(len(images))
    rows = []
    for name in ("sela", "aug_plus", "eval"):
        augment = getattr(Augment, name)(224)
        params = kernels.sample_parameters(augment, heights, widths, index, seed=SEED, epoch=0)
        effects = kernels.sample_effects(augment, index, seed=SEED, epoch=0)
        out = torch.empty(len(images), 3, 224, 224)
        shared: dict[str, Any] = {"effects": effects, "out": out, "threads": 1}
        theirs: list[Any] = [v2.Resize(256, antialias=True), v2.CenterCrop(224)] if name == "eval" else []
        if name == "sela":
            theirs = transforms_of(augment, v2)
        elif name == "aug_plus":
            theirs = [
                v2.RandomResizedCrop(224, scale=augment.scale, antialias=True),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
                v2.RandomHorizontalFlip(),
            ]
        pipeline = v2.Compose(
            [*theirs, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(augment.mean), list(augment.std))]
        )
        runs: list[Callable[[], Any]] = [
            functools.partial(kernels.augment, images, params, augment, **shared),
            functools.partial(kernels.augment_planes, source, params, augment, **shared),
            functools.partial(kernels.augment_planes, source, params, augment, exact=True, **shared),
            functools.partial(_all_of, pipeline, tensors),
        ]
        best = [float("inf")] * len(runs)
        for _ in range(rounds + 1):
            for k, run in enumerate(runs):
                began = time.process_time()
                run()
                best[k] = min(best[k], (time.process_time() - began) / len(images))
        apart = kernels.augment_planes(source, params, augment, exact=True, effects=effects)
        apart -= kernels.augment_planes(source, params, augment, effects=effects)
        difference = float((apart * torch.tensor(augment.std)[:, None, None]).abs().mean()) * 255
        rows.append((name, *(1e6 * seconds for seconds in best), difference))
    return rows


def _all_of(pipeline: Any, tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        pipeline(tensor)


# ---------------------------------------------------------------- timing


def rates(
    competitors: dict[str, tuple[Callable[[int], None], int]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median images per second of each, taken in turn. competitors: name -> (run, images per round)."""
    for run, count in competitors.values():
        run(min(count, BATCH) if count >= BATCH else count)
    found: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, (run, count) in competitors.items():
            began = clock()
            run(count)
            found[name].append(count / (clock() - began))
    return {name: median(values) for name, values in found.items()}


def fastest(runs: list[Callable[[int], None]], count: int, rounds: int) -> list[float]:
    """Images per wall-clock second of each run's fastest round, taken in turn."""
    best = [0.0] * len(runs)
    for _ in range(rounds):
        for k, run in enumerate(runs):
            began = time.perf_counter()
            run(count)
            best[k] = max(best[k], count / (time.perf_counter() - began))
    return best


def rate_of_isa(isa: str) -> float | None:
    """Images per second of processor time at 32 px with one instruction set, in a process of its own."""
    environment = {**os.environ, "SELA_CPU_ISA": isa}
    command = [sys.executable, __file__, "--only-small"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    return float(run.stdout) if run.returncode == 0 else None


def only_small() -> None:
    """What rate_of_isa reads: nothing but the rate of this process."""
    data = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    run = ours_small(data, Augment.cifar(32, gray_first=True), 1)
    print(rates({"ours": (run, 40 * BATCH)}, 7, time.process_time)["ours"])


def main() -> None:
    parser = common.arguments("Augmentation on the CPU against torchvision and others.")
    parser.add_argument("--only-small", action="store_true", help="print sela_ext's rate at 32 px and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only_small:
        only_small()
        return
    rounds = 3 if options.quick else 9
    facts = common.machine()
    common.print_machine(facts, 1)
    small, large = Augment.cifar(32, gray_first=True), Augment.sela(224)

    files, origin = photograph_files(48 if options.quick else 240)
    images = [_decode(data) for data in files]
    data = patches(images, 50_000)
    differences = {
        "32 px": agreement(list(data[:256]), small),
        "224 px": agreement(images[:24], large),
    }
    for name, difference in differences.items():
        print(f"agreement with torchvision v2 in float, {name}: largest difference {difference:.5f} of 255")
        if not difference < LIMIT:
            sys.exit(f"bench/images.py: expected less than {LIMIT} of 255, found {difference}; nothing is timed")

    rows: list[dict[str, Any]] = []

    def report(title: str, found: dict[str, float], case: str) -> None:
        ours = next(iter(found.values()))
        lines = [(name, rate, ours / rate) for name, rate in found.items()]
        common.table(title, ("", "images / s", "sela_ext is x faster"), lines)
        rows.extend({"case": case, "name": name, "images_per_second": rate, "ratio": x} for name, rate, x in lines)

    found = rates(decoders(files, images), rounds, time.process_time)
    peers = [name for name in ("torchvision.io", "simplejpeg", "Pillow") if name in found]
    decoded = [(name, rate, *(rate / found[p] for p in peers)) for name, rate in found.items()]
    title = f"Decoding {origin}, images per second of processor time, one thread"
    common.table(title, ("", "images / s", *(f"x {p}" for p in peers)), decoded)
    rows.extend({"case": "decode", "name": name, "images_per_second": rate} for name, rate in found.items())

    few = 512 if options.quick else 2048
    tensors = torch.from_numpy(data[: 4 * BATCH]).permute(0, 3, 1, 2)
    competitors: dict[str, tuple[Callable[[int], None], int]] = {
        "sela_ext": (ours_small(data, small, 1), 64 * BATCH),
        "torchvision v2, uint8 tensors": (torchvision_v2(tensors, small), few),
        "torchvision v1, PIL images": (torchvision_v1(data[: 4 * BATCH], small), few),
    }
    for name, made in (
        ("Albumentations", albumentations(data[: 4 * BATCH], small)),
        ("DALI (other hue, no gray)", dali(data, small)),
    ):
        if made is not None:
            competitors[name] = (made, 4 * few)
    if peer("ffcv", "FFCV") is not None:
        print("peer FFCV: reads only its own file format, which this file does not write; skipped")
    found = rates(competitors, rounds, time.process_time)
    report("32 px from memory, images per second of processor time, one thread", found, "32px")

    best = found["sela_ext"]
    isas = {isa: rate_of_isa(isa) for isa in ("avx512", "avx2", "generic")}
    known = {isa: rate for isa, rate in isas.items() if rate is not None}
    baseline = found["torchvision v2, uint8 tensors"]
    lines = [(isa, rate, rate / max(known.values()), rate / baseline) for isa, rate in known.items()]
    common.table("32 px by instruction set", ("", "images / s", "of the best", "x torchvision v2"), lines)
    rows.extend({"case": "32px isa", "name": isa, "images_per_second": rate} for isa, rate in known.items())

    lines = []
    for batch in (BATCH, 4 * BATCH):
        one, two = fastest([ours_small(data, small, t, batch) for t in (1, 2)], batch, 400 if options.quick else 2000)
        lines.append((f"batches of {batch}", one, two, two / one))
    title = "32 px, wall clock: the fastest of many batches, since anything else that runs takes a core away"
    common.table(title, ("", "1 thread, images / s", "2 threads", "x"), lines)
    rows.extend({"case": "32px threads", "name": n, "one": one, "two": two, "scaling": x} for n, one, two, x in lines)

    photos = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
    competitors = {
        "sela_ext": (ours_large(images, large), len(images) * (4 if options.quick else 2)),
        "torchvision v2, uint8 tensors": (torchvision_v2(photos, large), len(images)),
        "torchvision v1, PIL images": (torchvision_v1(images, large), len(images)),
    }
    made = albumentations(images, large)
    if made is not None:
        competitors["Albumentations"] = (made, len(images))
    report(
        f"224 px, {origin} in memory, images per second of processor time, one thread",
        rates(competitors, rounds, time.process_time),
        "224px",
    )
    parts = planes_part(images[:64], rounds)
    common.table(
        f"224 px behind the decoder, microseconds of processor time per image, the first 64 of {origin} as 4:2:0",
        ("", "from RGB", "from planes", "exactly", "torchvision v2", "x", "planes - exact, mean of 255"),
        [
            (name, rgb, planar, exact, v2_time, v2_time / planar, off)
            for name, rgb, planar, exact, v2_time, off in parts
        ],
    )
    names = ("name", "rgb", "planes", "exact", "torchvision_v2", "mean_difference")
    rows.extend({"case": "224px planes", **dict(zip(names, part, strict=True))} for part in parts)
    print(f"\n32 px: {best:.0f} images / s per core, {best / baseline:.0f} x torchvision v2")
    if not options.no_record:
        print(f"rows appended to {common.record('images', rows, {**facts, 'differences': differences})}")


if __name__ == "__main__":
    main()
