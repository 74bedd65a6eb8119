"""The page of the data check: one file that needs nothing else, in the looks of the run report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sela_ext.doctor.drawings import charts
from sela_ext.doctor.duplicates import Duplicates, Group
from sela_ext.doctor.suggestions import heads_in_words
from sela_ext.doctor.table import Table
from sela_ext.report.page import write_page as write_text
from sela_ext.report.summary import Tile, duration
from sela_ext.report.text import environment
from sela_ext.report.thumbnails import data_uri

_TEMPLATES = Path(__file__).parent / "templates"
# Groups and images of a group that are shown, bad images and classes that are listed.
GROUPS, MEMBERS, ROWS = 12, 4, 40


@dataclass(frozen=True)
class Shown:
    """An image of a group: its name, what else is known of it, and its thumbnail ("" where there is none)."""

    name: str
    words: str
    source: str
    tiny: bool


@dataclass(frozen=True)
class Card:
    """A group of duplicates on the page."""

    title: str
    words: str
    images: list[Shown]


def write_page(
    target: Path, result: Mapping[str, Any], table: Table, duplicates: Duplicates, read: Callable[[int], Any]
) -> None:
    """Write the page.

    Args:
        target: The file.
        result: Of the check.
        table: Of the images.
        duplicates: Found among them.
        read: Row of the table -> uint8 [H, W, C]; what it raises costs a thumbnail, not the page.

    Raises:
        ResourceError: The page cannot be written.
    """
    found = result["duplicates"]
    data = result["data"]
    html = (
        environment(_TEMPLATES)
        .get_template("doctor.html.j2")
        .render(
            result=result,
            title=data["path"] or data["kind"],
            sentence=sentence(result),
            tiles=tiles(result),
            charts=charts(result),
            exact=_cards(duplicates.exact, found["exact"]["listed"], read),
            near=_cards(duplicates.near, found["near"]["listed"], read),
            suggestions=[(one["option"], value_in_words(one), one["reason"]) for one in result["suggestions"]],
            facts=facts(result),
            rows=ROWS,
            classes=_classes(result),
        )
    )
    write_text(target, html)


def sentence(result: Mapping[str, Any]) -> str:
    """What the data is, in a sentence."""
    data, files = result["data"], result["files"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in files["formats"].items())
    held = data["held_out"]
    beside = "" if held is None else f" and {held['images']:,} held out"
    looked = f"; a sample was looked at: {kinds}" if data["sampled"] else f": {kinds}"
    return f"{data['images']:,} images{beside}, {size_in_words(result['disk']['bytes'])}{looked}."


def tiles(result: Mapping[str, Any]) -> list[Tile]:
    """The numbers to be seen at a glance."""
    data, found, speed = result["data"], result["duplicates"], result["throughput"]
    shown = [
        Tile(f"{data['images']:,}", "Images", f"{data['kind']}, {'grey' if data['channels'] == 1 else 'RGB'}"),
        Tile(f"{result['bad']['count']:,}", "Unreadable", f"of {data['looked_at']:,} looked at"),
        Tile(f"{found['exact']['spare']:,}", "Exact repeats", f"in {found['exact']['groups']:,} groups"),
        Tile(f"{found['near']['images']:,}", "Near duplicates", f"in {found['near']['groups']:,} groups"),
    ]
    if data["held_out"] is not None:
        shown.append(Tile(f"{found['leakage']['held_out_images']:,}", "Leaked", "held-out images in the training set"))
    if result["classes"] is not None:
        shown.append(Tile(f"{result['classes']['count']:,}", "Classes", "used for metrics only"))
    if speed is not None:
        shown.append(
            Tile(
                f"{speed['load_images_per_second']:,.0f}",
                "Images per second",
                f"loaded with augmentation, {speed['threads']} threads",
            )
        )
    return shown


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Throughput, memory and disk as rows of a table."""
    rows: list[tuple[str, str]] = []
    speed, memory, disk, sizes = result["throughput"], result["memory"], result["disk"], result["sizes"]
    if sizes is not None:
        height, width = sizes["height"], sizes["width"]
        if sizes["same"]:
            rows.append(("Size", f"all {height['min']} x {width['min']} (height x width)"))
        else:
            rows.append(("Height", f"{height['min']:,} to {height['max']:,}, median {height['median']:,.0f}"))
            rows.append(("Width", f"{width['min']:,} to {width['max']:,}, median {width['median']:,.0f}"))
    if result["files"]["modes"]:
        rows.append(("Colour modes", ", ".join(f"{n:,} {mode}" for mode, n in result["files"]["modes"].items())))
    if speed is not None and speed["decode_images_per_second_one_thread"] is not None:
        rows.append(("Decoding", f"{speed['decode_images_per_second_one_thread']:,.0f} images/s on one thread"))
        rows.append(
            (
                "Loading an epoch",
                f"{duration(speed['load_seconds_per_epoch'])} at {speed['load_images_per_second']:,.0f} images/s with "
                f"{speed['threads']} threads, measured on {speed['measured_images']:,} images",
            )
        )
    if memory is not None:
        labels = memory["label_pass"]
        rows.append(
            (
                "Label pass",
                f"{size_in_words(labels['stored_logits_bytes'])} of memory for {labels['clusters']:,} clusters with "
                f"the logits kept, {size_in_words(labels['computed_logits_bytes'])} with the logits computed",
            )
        )
        rows.append(("Embeddings", f"{size_in_words(labels['embeddings_bytes'])} for {labels['features']} features"))
        rows.append(("Batches ahead", size_in_words(memory["loader_bytes"])))
        rows.append(
            (
                "All images decoded",
                f"{size_in_words(memory['resident_bytes'])} at the size of training: "
                + ("they fit into memory" if memory["resident_fits"] else "too much to keep in memory"),
            )
        )
        if memory["available_bytes"] is not None:
            rows.append(("Memory available", size_in_words(memory["available_bytes"])))
    rows.append(
        (
            "Files" if result["encoded"] else "Pixels",
            f"{size_in_words(disk['bytes'])}, {size_in_words(int(disk['mean_bytes']))} per image",
        )
    )
    if disk["index_bytes"] is not None:
        rows.append(("JPEG index", f"{size_in_words(disk['index_bytes'])}, made in the first epoch or by packing"))
        rows.append(("A pack", size_in_words(disk["pack_bytes"])))
    rows.append(("Disk free", size_in_words(disk["free_bytes"])))
    return rows


def value_in_words(suggestion: Mapping[str, Any]) -> str:
    """The value of a suggestion."""
    value = suggestion["value"]
    if suggestion["option"] == "clusters" and isinstance(value, list):
        return heads_in_words(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def size_in_words(size: int) -> str:
    """Bytes for people.

    Example:
        >>> size_in_words(999), size_in_words(96_000), size_in_words(150_528_000_000)
        ('999 B', '96.0 kB', '150.5 GB')
    """
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _cards(groups: list[Group], listed: Iterable[Mapping[str, Any]], read: Callable[[int], Any]) -> list[Card]:
    cards = []
    for group, words in zip(groups[:GROUPS], listed, strict=False):
        images = []
        for row, one in zip(group.rows[:MEMBERS], words["images"], strict=False):
            try:
                source, tiny = data_uri(read(int(row)))
            except Exception:  # one image that is gone by now must not cost the page
                source, tiny = "", False
            known = [f"{one['height']} x {one['width']}", size_in_words(one["bytes"])]
            if one["held_out"]:
                known.append("held out")
            if one["label"] is not None:
                known.append(one["class"] or f"class {one['label']}")
            images.append(Shown(one["name"], ", ".join(known), source, tiny))
        said = []
        if words["across_split"]:
            said.append("training and held-out images")
        if words["labels_differ"]:
            said.append("labels differ")
        if words["same_bytes"]:
            said.append("the very same bytes")
        cards.append(Card(f"{words['count']:,} images", "; ".join(said), images))
    return cards


def _classes(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The largest classes, as many as are listed."""
    if result["classes"] is None:
        return []
    return sorted(result["classes"]["classes"], key=lambda one: (-one["images"], one["label"]))[:ROWS]
