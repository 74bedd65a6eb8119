import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

CLASSES = ("aeroplane", "bird", "cat")
COLOURS = ((230, 40, 40), (40, 210, 60), (60, 80, 240))


@dataclasses.dataclass(frozen=True)
class Thing:
    label: int
    box: tuple[int, int, int, int]  # left, top, right, bottom, the last two just behind
    difficult: bool = False


def palette():
    """VOC's palette: the bits of the class spread over red, green and blue."""
    colours = []
    for number in range(256):
        rgb, rest = [0, 0, 0], number
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((rest >> channel) & 1) << (7 - bit)
            rest >>= 3
        colours += rgb
    return colours


def annotation(name, size, things):
    lines = [f"<annotation><filename>{name}.jpg</filename>"]
    lines.append(f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>")
    for thing in things:
        left, top, right, bottom = thing.box
        lines.append(
            f"<object><name>{CLASSES[thing.label]}</name><difficult>{int(thing.difficult)}</difficult>"
            f"<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>"
            "</object>"
        )
    return "".join([*lines, "</annotation>"])


def scene(rng, size):
    """A grey picture with one or two squares, disks or triangles, a colour for each class."""
    pixels = rng.integers(90, 140, (size[1], size[0], 3)).astype(np.uint8)
    image, mask = Image.fromarray(pixels), Image.new("P", size, 0)
    mask.putpalette(palette())
    things = []
    for label in rng.permutation(len(CLASSES))[: rng.integers(1, 3)]:
        side = int(rng.integers(20, 32))
        left, top = (int(rng.integers(0, extent - side)) for extent in size)
        box = (left, top, left + side, top + side)
        if any(
            min(box[2], b.box[2]) > max(box[0], b.box[0]) and min(box[3], b.box[3]) > max(box[1], b.box[1])
            for b in things
        ):
            continue
        things.append(Thing(int(label), box))
        inner = (left, top, left + side - 1, top + side - 1)
        for canvas, fill in ((ImageDraw.Draw(image), COLOURS[label]), (ImageDraw.Draw(mask), int(label) + 1)):
            if label == 0:
                canvas.rectangle(inner, fill=fill)
            elif label == 1:
                canvas.ellipse(inner, fill=fill)
            else:
                canvas.polygon(
                    [(left, top + side - 1), (left + side - 1, top + side - 1), (left + side // 2, top)], fill
                )
        border = ImageDraw.Draw(mask)
        border.rectangle(inner, outline=255)
    return image, mask, things


def write_voc(root, train=12, test=8, seed=0, class_files=True, splits=("trainval", "test")):
    """Write a small VOC folder; returns what is in its pictures, by name."""
    root = Path(root)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    rng, everything = np.random.default_rng(seed), {}
    for split, count in zip(splits, (train, test), strict=True):
        names = [f"{split}_{i:06d}" for i in range(count)]
        for name in names:
            size = (int(rng.integers(64, 97)), int(rng.integers(64, 97)))
            image, mask, things = scene(rng, size)
            image.save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            mask.save(root / "SegmentationClass" / f"{name}.png")
            (root / "Annotations" / f"{name}.xml").write_text(annotation(name, size, things))
            everything[name] = things
        for kind in ("Main", "Segmentation"):
            (root / "ImageSets" / kind / f"{split}.txt").write_text("\n".join(names) + "\n")
        for number, label in enumerate(CLASSES if class_files else ()):
            there = ((name, any(thing.label == number for thing in everything[name])) for name in names)
            lines = [f"{name} {1 if yes else -1:2d}\n" for name, yes in there]
            (root / "ImageSets" / "Main" / f"{label}_{split}.txt").write_text("".join(lines))
    return everything


@pytest.fixture
def make_voc(tmp_path):
    """Writes a small VOC folder: `make_voc(**options)` gives its path and what is in its pictures."""

    def make(name="VOC2007", **options):
        return tmp_path / name, write_voc(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def voc(tmp_path_factory):
    """A small VOC folder that tests only read."""
    root = tmp_path_factory.mktemp("voc") / "VOC2007"
    write_voc(root)
    return root
