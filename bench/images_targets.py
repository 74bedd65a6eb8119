"""The targets of the images, each read off the rows of one run of bench/images.py; "question" says what a row answers.

Nothing is measured here. A rate is a row with "images_per_second"; "case" says which pipeline on which images, "what"
by whom, "ours" whether that is this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import target_table
from target_table import Row, Target, Value, pick

HEADER = target_table.HEADER

PACKAGES = {
    "torchvision": "torchvision",
    "Pillow": "Pillow",
    "albumentations": "Albumentations",
    "opencv-python-headless": "OpenCV",
    "simplejpeg": "simplejpeg",
    "nvidia-dali-cuda120": "DALI",
    "ffcv": "FFCV",
}
"""Packages whose versions are kept, and what people call them."""

V2, V1, ALBUMENTATIONS, DALI = "torchvision v2", "torchvision v1", "Albumentations", "DALI"
FFCV = "FFCV"
TORCHVISION_IO, SIMPLEJPEG, PILLOW = "torchvision.io", "simplejpeg", "Pillow"

EXACT_PLAIN, PLANAR_PLAIN = "exact, plain files", "planar, plain files"
PLANAR_FIRST = "planar, first epoch"
EXACT_LATER, PLANAR_LATER = "exact, later epochs", "planar, later epochs"
EXACT_PACKED, PLANAR_PACKED = "exact, packed", "planar, packed"
READER_LATER = "planar, later epochs, reader alone"
FROM_ARRAY = "from an array"
TO_PLANES, TO_RGB = "to planes", "to RGB"
CROP_PLAIN, CROP_INDEXED = "planes of a crop", "planes of a crop, with an index"

SELA, SELA_GENERATED = "SeLa 224, photographs", "SeLa 224, generated files"
AUG_PLUS, EVAL = "Aug++ 224, photographs", "eval 256/224, photographs"
SMALL, SMALL_FILES = "32 px, from memory", "32 px, files"
SELA_EXACT = "SeLa 224, photographs, exact"
DECODE, DECODE_HALF = "decoding, photographs", "decoding to half the size, photographs"
TWO = ", two threads"


def rate(rows: Sequence[Row], case: str, what: str) -> float | None:
    """Images per second."""
    found = pick(rows, case=case, what=what)
    found = [row for row in found if row.get("images_per_second")]
    return float(found[0]["images_per_second"]) if found else None


def best_of(rows: Sequence[Row], case: str, names: Sequence[str]) -> tuple[float, str] | None:
    """The highest of some rates, and whose it is."""
    found = [(r, name) for name in names if (r := rate(rows, case, name)) is not None]
    return max(found) if found else None


def peers_of(rows: Sequence[Row], case: str) -> list[str]:
    """Who competes in a case."""
    return [row["what"] for row in pick(rows, question="rate", case=case, ours=False)]


def against(case: str, ours: Sequence[str], rivals: Sequence[str] | None = None) -> Callable[[Sequence[Row]], Value]:
    """Our best of some forms, as a multiple of the fastest of the rivals; None: of all peers in the case."""

    def value(rows: Sequence[Row]) -> Value:
        mine = best_of(rows, case, ours)
        theirs = best_of(rows, case, peers_of(rows, case) if rivals is None else rivals)
        if mine is None or theirs is None:
            return Value(None)
        return Value(mine[0] / theirs[0], f"{mine[1]}: {mine[0]:,.0f} images/s, {theirs[1]}: {theirs[0]:,.0f}")

    return value


def two_threads(case: str, what: str) -> Callable[[Sequence[Row]], Value]:
    """Wall clock, two threads as a multiple of one."""

    def value(rows: Sequence[Row]) -> Value:
        one, two = (rate(rows, case + TWO, f"{what}, {n}") for n in ("one thread", "two threads"))
        if one is None or two is None:
            return Value(None)
        return Value(two / one, f"{one:,.0f} and {two:,.0f} images/s by the wall clock")

    return value


def of_avx512(case: str) -> Callable[[Sequence[Row]], Value]:
    """The share of AVX-512's rate that AVX2 reaches."""

    def value(rows: Sequence[Row]) -> Value:
        avx512, avx2 = (pick(rows, question="isa", case=case, what=isa) for isa in ("avx512", "avx2"))
        if not avx512 or not avx2:
            return Value(None)
        return Value(avx2[0]["images_per_second"] / avx512[0]["images_per_second"], case)

    return value


# "Packed or from the second epoch": whichever of the two is faster.
LATER = (PLANAR_PACKED, PLANAR_LATER)
BOTH = (TORCHVISION_IO, SIMPLEJPEG)

TARGETS = (
    Target(
        "SeLa 224, plain files, exact, against torchvision v2", "x", 4, 5, True, against(SELA, (EXACT_PLAIN,), (V2,))
    ),
    Target("... against the best peer", "x", 1.5, 2, True, against(SELA, (EXACT_PLAIN,))),
    Target(
        "SeLa 224, plain files, planar, against torchvision v2", "x", 5, 6, True, against(SELA, (PLANAR_PLAIN,), (V2,))
    ),
    Target("... against the best peer", "x", 1.9, 2.2, True, against(SELA, (PLANAR_PLAIN,))),
    Target("SeLa 224, packed or later epochs, against torchvision v2", "x", 8, 10, True, against(SELA, LATER, (V2,))),
    Target("... against the best peer", "x", 3, 3.5, True, against(SELA, LATER)),
    Target(
        "the same, two threads against two workers of torchvision v2",
        "x",
        9,
        11,
        True,
        against(SELA + TWO, LATER, (V2,)),
    ),
    Target("... of the best peer", "x", 3, 4, True, against(SELA + TWO, LATER)),
    Target(
        "Aug++ 224, packed or later epochs, against torchvision v2", "x", 30, 40, True, against(AUG_PLUS, LATER, (V2,))
    ),
    Target("... against the best peer", "x", 3, 4, True, against(AUG_PLUS, LATER)),
    Target("32 px from memory, against torchvision v2", "x", 110, 140, True, against(SMALL, (FROM_ARRAY,), (V2,))),
    Target("... against torchvision v1", "x", 75, 95, True, against(SMALL, (FROM_ARRAY,), (V1,))),
    Target("... against DALI", "x", 9, 11, True, against(SMALL, (FROM_ARRAY,), (DALI,))),
    Target("... two threads", "x", 1.8, 1.95, True, two_threads(SMALL, FROM_ARRAY)),
    Target(
        "full decode to planes, against torchvision.io",
        "x",
        1.5,
        1.7,
        True,
        against(DECODE, (TO_PLANES,), (TORCHVISION_IO,)),
    ),
    Target("... against simplejpeg", "x", 1.45, 1.6, True, against(DECODE, (TO_PLANES,), (SIMPLEJPEG,))),
    Target(
        "full decode to RGB, Pillow's bits, against the faster of both",
        "x",
        1.15,
        1.4,
        True,
        against(DECODE, (TO_RGB,), BOTH),
    ),
    Target(
        "decode of a crop with an index, against torchvision.io",
        "x",
        3,
        3.5,
        True,
        against(DECODE, (CROP_INDEXED,), (TORCHVISION_IO,)),
    ),
    Target("... against simplejpeg", "x", 2.8, 3.3, True, against(DECODE, (CROP_INDEXED,), (SIMPLEJPEG,))),
    Target(
        "eval 256/224, packed or later epochs, against torchvision v2", "x", 4, 6, True, against(EVAL, LATER, (V2,))
    ),
    Target("AVX2 of AVX-512, JPEG files", "x", 0.7, 0.85, True, of_avx512(SELA)),
    Target("... 32 px", "x", 0.55, 0.7, True, of_avx512(SMALL)),
)


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table: measure, gate, stretch, ours, verdict, note."""
    return target_table.lines(TARGETS, rows)
