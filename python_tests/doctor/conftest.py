"""Pictures made up for these tests: no two of them alike."""

import numpy as np
import pytest
from PIL import Image, ImageDraw


def draw(seed, size=(160, 120)):
    """A picture of shapes on a shaded ground, as different from the next one as photographs are."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    ground = np.zeros((height, width, 3))
    for channel in range(3):
        for _ in range(4):
            fy, fx, phase = rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(0, 6.28)
            ground[..., channel] += np.cos(6.28 * (fy * y + fx * x) + phase)
    ground = (ground - ground.min()) / np.ptp(ground) * 255
    picture = Image.fromarray(ground.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(9):
        left, right = sorted(rng.integers(0, width, 2).tolist())
        top, bottom = sorted(rng.integers(0, height, 2).tolist())
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)([left, top, right + 1, bottom + 1], fill=colour)
    return picture


@pytest.fixture(scope="session")
def pictures():
    return [draw(seed) for seed in range(60)]


@pytest.fixture
def fill(tmp_path):
    """Fill a folder with pictures, each of its own size: fill(folder, count, first=seed of the first)."""

    def fill(folder, count, first=0, suffix=".jpg"):
        folder = tmp_path / folder
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(first, first + count):
            draw(seed, (64 + seed % 7, 48 + seed % 5)).save(folder / f"{seed:04d}{suffix}", quality=90)
        return folder

    return fill
