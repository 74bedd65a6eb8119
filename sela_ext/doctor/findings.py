"""What is wrong or remarkable about the data, in words, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# Classes whose largest has so many times the images of the smallest are unbalanced.
IMBALANCE = 3.0
FEW_IMAGES = 100
# Names that a finding lists.
MOST_NAMES = 20


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        code: a fixed word for it: a key of `ADVICE`.
        severity: "error" (nothing works), "warning" (spoils results or stops a run), "note" (good to know).
        text: a sentence, with numbers.
        advice: what to do.
        names: the first images or files that it is about.
    """

    code: str
    severity: str
    text: str
    advice: str
    names: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


# What to do about each finding, in the order in which they are told; docs/doctor.md says more.
ADVICE = {
    "nothing_readable": "check that the path names the images that you mean, and that they can be opened at all",
    "unreadable": "get these files again or remove them; or train with on_bad_image=skip, which leaves them unlabelled",
    "leakage": "remove these from the training images, or scores on the held-out ones are too good",
    "contradicting_labels": "correct the labels, or leave these images out of evaluation",
    "exact_duplicates": "keep one of each group: duplicates count twice in the balance of the clusters",
    "near_duplicates": "look at the groups; keep one of each where they are copies of one picture",
    "one_colour": "they carry nothing to learn from; remove them",
    "tiny": "enlarged to the network's size they are smears; remove them unless you mean them",
    "extreme_aspect": "crops of them show a small part, much stretched; cut or remove them",
    "outside_split": "only the images below train are used for training; move the others there if they should be",
    "imbalance": "clusters of equal size cannot follow such classes; set marginals, or bear it in mind with metrics",
    "unknown_labels": "metrics leave these images out",
    "few_images": "networks do not learn much from so few: find more",
    "orientation": "pixels are used as stored, so these are seen turned: train with exif=True, or turn the files",
    "wrong_suffix": "nothing need be done here, where content counts; rename them for the sake of other programs",
    "animated": "only the first frame is used; take the frames apart if they matter",
    "sixteen_bit": "the high byte of each value is used; convert them yourself where the range is narrower than that",
    "cmyk": "converted without colour profiles; convert them to RGB yourself where colours matter",
    "by_pillow": "progressive and other uncommon JPEG files load more slowly; jpegtran makes them baseline, losslessly",
    "other_files": "they are ignored; nothing need be done unless some are images in a format that is not supported",
    "special_files": "they are never opened; nothing need be done",
    "search_left_out": "so many pictures look alike that not all were compared; there may be more duplicates",
}
_WARNINGS = {
    "unreadable",
    "one_colour",
    "tiny",
    "extreme_aspect",
    "outside_split",
    "exact_duplicates",
    "near_duplicates",
    "leakage",
    "contradicting_labels",
}


def find(result: Mapping[str, Any]) -> list[Finding]:
    """Everything worth a sentence in a result without its findings, the most important first."""
    found: list[Finding] = []

    def say(code: str, text: str, names: list[str] | None = None) -> None:
        severity = "error" if code == "nothing_readable" else "warning" if code in _WARNINGS else "note"
        found.append(Finding(code, severity, text, ADVICE[code], (names or [])[:MOST_NAMES]))

    _about_pixels(result, say)
    _about_duplicates(result, say)
    _about_labels(result, say)
    _about_files(result, say)
    order = {"error": 0, "warning": 1, "note": 2}
    codes = list(ADVICE)
    return sorted(found, key=lambda one: (order[one.severity], codes.index(one.code)))


Say = Callable[..., None]


def some(count: int, one: str, many: str) -> str:
    """A number with its noun and verb.

    Example:
        >>> some(1, "image is", "images are"), some(2000, "image is", "images are")
        ('1 image is', '2,000 images are')
    """
    return f"{count:,} {one if count == 1 else many}"


def _about_pixels(result: Mapping[str, Any], say: Say) -> None:
    bad, looked = result["bad"], result["data"]["looked_at"]
    if result["data"]["readable"] == 0:
        say("nothing_readable", f"none of the {looked:,} images that were looked at can be read")
    if bad["count"]:
        share = bad["count"] / looked
        say(
            "unreadable",
            f"{some(bad['count'], 'image', 'images')} of {looked:,} ({share:.2%}) cannot be read",
            [one["name"] for one in bad["images"]],
        )
    odd = result["odd"]
    for code, text in (
        ("one_colour", ("image is of one plain colour", "images are of one plain colour")),
        ("tiny", ("image is extremely small", "images are extremely small")),
        ("extreme_aspect", ("image is five times as long as wide or more", "images are five times as long or more")),
    ):
        if odd[code]["count"]:
            say(code, some(odd[code]["count"], *text), odd[code]["first"])


def _about_duplicates(result: Mapping[str, Any], say: Say) -> None:
    found = result["duplicates"]
    exact, near, leakage = found["exact"], found["near"], found["leakage"]
    if exact["groups"]:
        say(
            "exact_duplicates",
            f"{some(exact['spare'], 'image repeats', 'images repeat')} another one pixel by pixel, "
            f"in {some(exact['groups'], 'group', 'groups')}",
            _first_names(exact),
        )
    if near["groups"]:
        say(
            "near_duplicates",
            f"{some(near['images'], 'image looks', 'images look')} like copies of one another, "
            f"in {some(near['groups'], 'group', 'groups')}",
            _first_names(near),
        )
    if leakage["held_out_images"]:
        crossing = [group for part in (exact, near) for group in part["listed"] if group["across_split"]]
        say(
            "leakage",
            f"{some(leakage['held_out_images'], 'held-out image is', 'held-out images are')} among the training images "
            f"({leakage['exact']:,} exactly, {leakage['near']:,} nearly)",
            [one["name"] for group in crossing for one in group["images"] if one["held_out"]],
        )
    if found["contradictions"]["groups"]:
        groups = [group for part in (exact, near) for group in part["listed"] if group["labels_differ"]]
        say(
            "contradicting_labels",
            f"in {some(found['contradictions']['groups'], 'group', 'groups')} of duplicates the labels differ",
            [one["name"] for group in groups for one in group["images"]],
        )
    if found["left_out"]:
        say("search_left_out", f"{found['left_out']:,} comparisons were left out of the search for near duplicates")


def _first_names(part: Mapping[str, Any]) -> list[str]:
    return [one["name"] for group in part["listed"][:5] for one in group["images"]]


def _about_labels(result: Mapping[str, Any], say: Say) -> None:
    classes = result["classes"]
    if classes is not None:
        if classes["imbalance"] >= IMBALANCE:
            say(
                "imbalance",
                f"the largest class has {classes['imbalance']:.1f} times the images of the smallest "
                f"({classes['largest']:,} and {classes['smallest']:,})",
            )
        if classes["unknown"]:
            say("unknown_labels", some(classes["unknown"], "image has no label", "images have no label"))
    if result["data"]["images"] < FEW_IMAGES:
        say("few_images", f"there are only {some(result['data']['images'], 'image', 'images')}")


def _about_files(result: Mapping[str, Any], say: Say) -> None:
    files = result["files"]
    for code, words in (
        ("wrong_suffix", ("image has another format than its name says", "images have another format than their name")),
        ("animated", ("image is an animation", "images are animations")),
        ("sixteen_bit", ("image has 16 bits per channel", "images have 16 bits per channel")),
        ("cmyk", ("image is CMYK", "images are CMYK")),
        ("by_pillow", ("JPEG file is not a plain baseline one", "JPEG files are not plain baseline ones")),
    ):
        if files[code]["count"]:
            say(code, some(files[code]["count"], *words), files[code]["first"])
    turned = sum(files["orientations"].values())
    if turned:
        kinds = ", ".join(f"{count:,} of kind {kind}" for kind, count in files["orientations"].items())
        say("orientation", f"{some(turned, 'image is', 'images are')} stored turned, by their EXIF data: {kinds}")
    other = files["other"]
    if other is not None:
        if other["count"]:
            say("other_files", some(other["count"], "file is no image", "files are no images"), other["first"])
        if other["special"]:
            say(
                "special_files",
                some(other["special"], "pipe, device or dead link lies", "pipes, devices or dead links lie")
                + " in the folder",
            )
        if other["images_not_used"]:
            say(
                "outside_split",
                some(other["images_not_used"], "image lies", "images lie") + " outside the folders that are used",
            )
