"""pack.json, the manifest of a pack: written last, read first. docs/formats.md describes it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sela_ext.data.safe_files import damaged, open_regular, unreadable, write_whole
from sela_ext.errors import DataError

VERSION = 1
MANIFEST = "pack.json"
UNFINISHED = "packing.json"
BAD_IMAGES = "bad_images.csv"
# Where the manifest's own checksum stands; it is taken with zeros in this place.
CHECKSUM_AT = len('{"sha256": "')
CHECKSUM_DIGITS = 64
MANIFEST_LIMIT = 1 << 26


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:05d}.sela"


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What the manifest says of a shard: images, bytes of the file, SHA-256 (hex) of the file."""

    images: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of pack.json.

    Attributes:
        id: 32 hexadecimal digits, in every shard's head as well.
        images: N.
        skipped: How many of them have no bytes.
        channels: 1 or 3.
        labels: Whether the labels in the tables mean something.
        class_names: Name of class c at position c, or None.
        names_sha256: See `hash_names`.
        options: What the bytes depend on besides the images.
        source: Fingerprint of what was packed.
        shards: In order.
    """

    id: str
    images: int
    skipped: int
    channels: int
    labels: bool
    class_names: list[str] | None
    names_sha256: str
    options: dict[str, Any] = field(repr=False)
    source: dict[str, Any] = field(repr=False)
    shards: list[ShardSummary] = field(repr=False)


def write_manifest(folder: Path, manifest: Manifest, written_by: str) -> None:
    """Write pack.json, which makes the folder a pack.

    Raises:
        ResourceError: It cannot be written.
    """
    fields = {
        "format": "sela pack",
        "version": VERSION,
        "id": manifest.id,
        "images": manifest.images,
        "skipped": manifest.skipped,
        "channels": manifest.channels,
        "labels": manifest.labels,
        "class_names": manifest.class_names,
        "names_sha256": manifest.names_sha256,
        "options": manifest.options,
        "source": manifest.source,
        "written_by": written_by,
        "shards": [
            {"file": shard_name(i), "images": shard.images, "bytes": shard.size, "sha256": shard.sha256}
            for i, shard in enumerate(manifest.shards)
        ],
    }
    zeros = "0" * CHECKSUM_DIGITS
    text = json.dumps({"sha256": zeros, **fields}, indent=1)
    text = '{"sha256": ' + text[text.index('"' + zeros) :] + "\n"
    data = text.encode("ascii")
    write_whole(folder / MANIFEST, _with_checksum(data, hashlib.sha256(data).hexdigest()))


def read_manifest(folder: Path) -> Manifest:
    """Read and check pack.json.

    Raises:
        DataError: Damaged, of a newer version, or not what it should be.
    """
    path = folder / MANIFEST
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            data = file.read(MANIFEST_LIMIT + 1)
    except OSError as error:
        raise unreadable(path, "read", error) from error
    if len(data) > MANIFEST_LIMIT:
        damaged(path, f"expected at most {MANIFEST_LIMIT} bytes, found more")
    if not is_manifest(data):
        raise DataError(f"{path}: expected the manifest of a pack, found another file")
    digest = data[CHECKSUM_AT : CHECKSUM_AT + CHECKSUM_DIGITS].decode("latin-1")
    if hashlib.sha256(_with_checksum(data, "0" * CHECKSUM_DIGITS)).hexdigest() != digest:
        damaged(path, "the manifest does not match its checksum")
    try:
        fields = json.loads(data)
        if fields["format"] != "sela pack":
            raise ValueError(f'expected the format "sela pack", found {fields["format"]!r}')
        version = _whole_number(fields, "version", 1)
        if version > VERSION:
            raise DataError(
                f"{path}: written by a newer version of this package (format {version}, this one reads {VERSION}); "
                "upgrade it"
            )
        return _manifest(fields)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        damaged(path, f"not a manifest as it should be: {error!r}")


def is_manifest(data: bytes) -> bool:
    """Whether a file may be the manifest of a pack, by its first bytes."""
    return data.startswith(b'{"sha256": "') and len(data) > CHECKSUM_AT + CHECKSUM_DIGITS


def contents_of(shards: Iterable[ShardSummary]) -> str:
    """One checksum for all shards (hex)."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def _with_checksum(data: bytes, digest: str) -> bytes:
    return data[:CHECKSUM_AT] + digest.encode() + data[CHECKSUM_AT + CHECKSUM_DIGITS :]


def _manifest(fields: dict[str, Any]) -> Manifest:
    images = _whole_number(fields, "images", 1)
    pack_id = fields["id"]
    if not isinstance(pack_id, str) or len(bytes.fromhex(pack_id)) != 16:
        raise ValueError(f"expected an id of 32 hexadecimal digits, found {pack_id!r}")
    channels = _whole_number(fields, "channels", 1)
    if channels not in (1, 3):
        raise ValueError(f"expected 1 or 3 channels, found {channels}")
    class_names = fields["class_names"]
    if class_names is not None and not (
        isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
    ):
        raise ValueError("expected class_names to be a list of strings or null")
    for name, kind in (("labels", bool), ("names_sha256", str), ("options", dict), ("source", dict), ("shards", list)):
        if not isinstance(fields[name], kind):
            raise ValueError(f"expected {name} to be of type {kind.__name__}, found {fields[name]!r}")
    shards = []
    for i, shard in enumerate(fields["shards"]):
        if shard["file"] != shard_name(i):
            raise ValueError(f"expected shard {i} to be {shard_name(i)}, found {shard['file']!r}")
        if not isinstance(shard["sha256"], str):
            raise ValueError(f"expected the checksum of shard {i} as a string")
        shards.append(
            ShardSummary(_whole_number(shard, "images", 1), _whole_number(shard, "bytes", 1), shard["sha256"])
        )
    if sum(shard.images for shard in shards) != images:
        raise ValueError(f"expected {images} images in all shards, found {sum(shard.images for shard in shards)}")
    return Manifest(
        id=pack_id,
        images=images,
        skipped=_whole_number(fields, "skipped", 0),
        channels=channels,
        labels=fields["labels"],
        class_names=class_names,
        names_sha256=fields["names_sha256"],
        options=fields["options"],
        source=fields["source"],
        shards=shards,
    )


def _whole_number(fields: dict[str, Any], name: str, low: int) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 63:
        raise ValueError(f"expected {name} to be a whole number of at least {low}, found {value!r}")
    return value
