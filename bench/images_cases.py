"""What bench/images.py reads: photographs, generated JPEG files, small images, as files and in memory.

Photographs are the JPEG files in the folder that SELA_DATA_DIR names (or ../shared/data beside the repository, unpacked
or as photos_250.tar.zst). Everything else is generated, the same in every run.
"""

from __future__ import annotations

import functools
import io
import os
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sela_ext.kernels import Augment

ARCHIVE = "photos_250.tar.zst"
SUFFIXES = (".jpeg", ".jpg")
PHOTOGRAPH = (375, 500)  # height and width that most of the photographs have

Preset = Literal["sela", "aug_plus", "eval", "small"]


class Absent(Exception):  # noqa: N818, nobody's fault
    """A competitor that cannot be asked; the message is the reason."""


@dataclass(frozen=True)
class Task:
    """What one competitor does in one round.

    Attributes:
        preset: which pipeline.
        size: side of the output, pixels.
        files: JPEG files; none where the images are in memory.
        pack: a folder with a pack of the files, for the ways that read one.
        array: a .npy file with uint8 [N, H, W, 3], loaded before anything is timed; "" where they are in files.
        count: images that are used: the first ones of the files or the array.
        repeat: how often our own loader takes each of them in a round, whose beginning and end should not be what is
            timed; the competitors' rounds take long enough.
        batch: images of a batch.
        threads: threads, or workers where a competitor has processes.
    """

    preset: Preset
    size: int
    files: tuple[str, ...] = ()
    pack: str = ""
    array: str = ""
    count: int = 0
    repeat: int = 1
    batch: int = 64
    threads: int = 1

    @property
    def images(self) -> int:
        """Images of a round."""
        return self.count * self.repeat

    def augment(self) -> Augment:
        """The pipeline in our terms."""
        if self.preset == "small":
            return Augment.cifar(self.size, gray_first=True)
        augment: Augment = getattr(Augment, self.preset)(self.size)
        return augment


def photographs(folder: Path, count: int) -> list[str]:
    """Paths of at most `count` photographs, spread over all that there are, in the order of their names.

    Those of an archive are unpacked into `folder`. Where none are found the list is empty.
    """
    place = Path(os.environ.get("SELA_DATA_DIR") or Path(__file__).resolve().parents[2] / "shared" / "data")
    files = sorted(str(path) for path in place.glob("*") if path.suffix.lower() in SUFFIXES)
    if not files and (place / ARCHIVE).is_file():
        files = unpacked(place / ARCHIVE, folder)
    picked = np.unique(np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)) if files else []
    return [files[i] for i in picked]


def unpacked(archive: Path, folder: Path) -> list[str]:
    """The JPEG files of a .tar.zst, written into `folder` under their last names."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "photographs.tar"
    try:
        subprocess.run(["zstd", "-dqfo", str(raw), str(archive)], check=True)
        with tarfile.open(raw) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.lower().endswith(SUFFIXES) else None
                if file is not None:
                    (folder / Path(member.name).name).write_bytes(file.read())
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        print(f"{archive.name}: cannot be unpacked here ({error})")
        return []
    finally:
        raw.unlink(missing_ok=True)
    return sorted(str(path) for path in folder.iterdir())


def generated(folder: Path, count: int) -> list[str]:
    """`count` generated JPEG files in `folder`, with the sizes, the subsampling and about the bytes of photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        path = folder / f"generated_{i:04d}.jpg"
        path.write_bytes(encoded(soft_image(rng, *(PHOTOGRAPH if i % 3 else PHOTOGRAPH[::-1])), 95))
        paths.append(str(path))
    return paths


def soft_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A generated image with large soft structures and a little noise, uint8 [height, width, 3]."""
    coarse = torch.from_numpy(rng.random((1, 3, 12, 16), dtype=np.float32))
    soft = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    return np.asarray(soft.numpy() * 235 + rng.integers(0, 20, (height, width, 3))).astype(np.uint8)


def encoded(image: np.ndarray, quality: int) -> bytes:
    """A JPEG file of an image."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


@functools.lru_cache(maxsize=512)
def pixels(path: str) -> np.ndarray:
    """Pillow's RGB pixels of a file, uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def patches(images: Sequence[np.ndarray], count: int, side: int = 32) -> np.ndarray:
    """uint8 [count, side, side, 3] cut out of the images at half size."""
    rng = np.random.default_rng(1)
    halves = [np.ascontiguousarray(image[::2, ::2]) for image in images if min(image.shape[:2]) >= 2 * side + 2]
    out = np.empty((count, side, side, 3), np.uint8)
    for i in range(count):
        image = halves[i % len(halves)]
        y, x = rng.integers(0, image.shape[0] - side + 1), rng.integers(0, image.shape[1] - side + 1)
        out[i] = image[y : y + side, x : x + side]
    return out


def small_files(folder: Path, images: np.ndarray) -> list[str]:
    """The images as JPEG files in `folder`, at Pillow's default quality of 75."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(images):
        path = folder / f"small_{i:05d}.jpg"
        path.write_bytes(encoded(image, 75))
        paths.append(str(path))
    return paths
