"""`sela pack` and `sela doctor`: images before training on them."""

from __future__ import annotations

import argparse
from typing import Any

from sela_ext.errors import OptionError


def add_pack(commands: Any) -> None:
    """Add `pack`."""
    pack = commands.add_parser(
        "pack",
        help="pack images into a few large files, with what makes reading them fast",
        description="Pack images into shards: the bytes of the files unchanged, and for JPEG files an index with which "
        "only the part of an image that is needed is decoded; or pixels, of small images. An interrupted packing goes "
        "on where it stopped. The pack's folder is then data like any other.",
        epilog="examples: sela pack my/photos --out packs/photos | "
        "sela pack my/photos --out packs/small --max-side 512 | sela pack --verify packs/photos",
    )
    pack.add_argument("data", nargs="?", help='"digits", a folder of images, IDX files, a .npy of uint8 images, ...')
    pack.add_argument("--out", help="folder of the pack; empty, absent or an unfinished pack unless --overwrite")
    pack.add_argument("--verify", metavar="PACK", help="read a whole pack and compare it with its checksums")
    pack.add_argument(
        "--labels", metavar="FILE", help="true labels to keep with the images: .npy file, int [N], or .csv"
    )
    pack.add_argument("--classes", metavar="FILE", help="text file with the name of a class per line: their numbers")
    pack.add_argument(
        "--raw",
        choices=("auto", "yes", "no"),
        default="auto",
        help="store pixels instead of files (default auto: for arrays and for small images of one size)",
    )
    pack.add_argument("--max-side", type=int, help="reduce images with a longer side than this (default: unchanged)")
    pack.add_argument(
        "--quality", type=int, default=90, help="of the JPEG files of reduced images, 1..100 (default 90)"
    )
    pack.add_argument(
        "--shard-bytes",
        type=_byte_count,
        metavar="BYTES",
        help="size at which a new shard begins, as 1000000, 500M or 2G (default 1G; no limit where all are raw)",
    )
    pack.add_argument(
        "--on-bad-image",
        choices=("raise", "skip"),
        default="raise",
        help="skip: the image keeps its number, has no bytes, and is listed in bad_images.csv (default raise)",
    )
    pack.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="share of images that may be skipped, 0..1 (default 0.01)"
    )
    pack.add_argument("--threads", type=int, help="threads (default: all processors); the bytes do not depend on it")
    pack.add_argument("--overwrite", action="store_true", help="delete a pack in the folder first")
    pack.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on where an interrupted packing stopped (the default)",
    )
    pack.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="a bar on a terminal (the default)"
    )
    pack.set_defaults(run=_pack, parser=pack)


def add_doctor(commands: Any) -> None:
    """Add `doctor`."""
    doctor = commands.add_parser(
        "doctor",
        help="check images before training on them",
        description="Look at every image: bad files, duplicates, leakage between train and test, odd sizes, classes; "
        "measure how fast they load; say what training would choose and what memory it takes. Exit status: 0 if there "
        "are usable images, 3 if none can be read.",
        epilog="examples: sela doctor my/photos | sela doctor my/photos --out check.html --json check.json | "
        "sela doctor my/photos --quick",
    )
    doctor.add_argument("data", help='"digits", a folder of images, or any other file or folder that train takes')
    doctor.add_argument("--json", metavar="FILE", help="write the result as JSON, its keys as in docs/doctor.md")
    doctor.add_argument("--out", metavar="PAGE.html", help="write a page with charts and thumbnails")
    doctor.add_argument("--labels", help=".npy file of true labels, int [N], -1 = unknown")
    doctor.add_argument("--eval-data", help="held-out images to compare with (default: those beside the data)")
    doctor.add_argument("--threads", type=int, default=0, help="threads (default 0: all processors)")
    doctor.add_argument("--sample", type=int, metavar="N", help="look at N images only")
    doctor.add_argument("--quick", action="store_true", help="look at 2,000 images only")
    doctor.set_defaults(run=_doctor, parser=doctor)


def _byte_count(text: str) -> int:
    """A number of bytes, in units of 1024: "500M"."""
    unit = text[-1:].upper()
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(unit, 1)
    try:
        return int(float(text[: -1 if scale > 1 else None]) * scale)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a number of bytes such as 1000000, 500M or 2G, found {text}"
        ) from error


def _pack(given: argparse.Namespace) -> int:
    from sela_ext.data import pack, verify_pack

    if given.verify is not None:
        if given.data is not None or given.out is not None:
            raise OptionError("--verify: expected nothing but a pack, found DATA or --out as well")
        report = verify_pack(given.verify, threads="auto" if given.threads is None else given.threads)
        print(f"{report}; all checksums match")
        return 0
    if given.data is None or given.out is None:
        raise OptionError("pack: expected DATA and --out, or --verify PACK; see sela pack --help")
    report = pack(
        given.data,
        given.out,
        labels=given.labels,
        classes=given.classes,
        raw="auto" if given.raw == "auto" else given.raw == "yes",
        max_side=given.max_side,
        quality=given.quality,
        shard_bytes=given.shard_bytes,
        on_bad_image=given.on_bad_image,
        max_bad_fraction=given.max_bad_fraction,
        overwrite=given.overwrite,
        resume=given.resume,
        threads="auto" if given.threads is None else given.threads,
        progress=given.progress,
    )
    print(report)
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from sela_ext.doctor import doctor
    from sela_ext.doctor.terminal import show
    from sela_ext.errors import DataError

    result = doctor(
        given.data,
        labels=given.labels,
        eval_data=given.eval_data,
        json=given.json,
        out=given.out,
        threads=given.threads,
        sample=given.sample,
        quick=given.quick,
        progress=True,
    )
    show(result, [file for file in (given.json, given.out) if file])
    if not result["usable"]:
        first = result["bad"]["images"][0]
        raise DataError(f"{given.data}: none of the images can be read: {first['name']}: {first['reason']}")
    return 0
