"""`pack`: any source of images into a few large files, checked and mapped into memory when they are read.

Note [What is stored]
    * Image files: their bytes, unchanged, and for a JPEG that the compiled core decodes its checkpoint index.
    * Arrays, IDX files and whatever else has pixels of one known size: the pixels, one image after another.
    * Image files that are all small (at most 104 x 104 pixels), of one size and not turned by EXIF data: their pixels,
      by the documented conversion. They train several times faster so, and take the room of an array.
    * Other sources without files (torch Datasets): the pixels of images of at most 104 x 104, a PNG of larger ones.
    `raw=True` stores pixels of one size in any case, `raw=False` never does; then what has no file becomes a PNG.
    `max_side` reduces larger images, by Pillow's antialiased Lanczos filter, and stores those as JPEG (4:2:0; grey ones
    as grey) with `quality`; an orientation in EXIF is kept, other metadata of such images are not.

Threads share the process: reading files, indexing, decoding and checksums run beside one another. Images are written in
their order, so that the bytes do not depend on how many threads there are.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from PIL import Image, features

from sela_ext.data.decode import HEAD_BYTES, decode_image, sniff
from sela_ext.data.opening import open_source
from sela_ext.data.shard_format import (
    BAD_IMAGES,
    FORMATS,
    JPEG,
    MANIFEST,
    NONE,
    PARTIAL,
    PNG,
    RAW,
    RECORD,
    UNFINISHED,
    VERSION,
    Entry,
    Manifest,
    ShardSummary,
    ShardWriter,
    full_disk,
    open_regular,
    read_shard,
    shard_name,
    sync_folder,
    text_bytes,
    verify_shard,
    write_manifest,
    write_whole,
)
from sela_ext.data.shards import PackReport, open_pack, skipped_images, thread_count
from sela_ext.data.source import Int64Array, Source, UInt8Array, hash_names
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels.jpeg import FORMATS as PILLOW_FORMATS
from sela_ext.kernels.jpeg import MAX_PIXELS, jpeg_header, jpeg_index

SHARD_BYTES = 1 << 30
SMALL_PIXELS = 104 * 104
QUALITY = 90
# Images of one task of the threads: about this many bytes of pixels, where the size is known.
_TASK_BYTES = 1 << 20
_TASK_IMAGES = 8
_TASK_MOST = 1024
# Files whose sizes are looked at to foretell the size of the pack; an index takes about this share of a photograph.
_SAMPLE = 1000
_INDEX_SHARE = 1.09
_ORIENTATION = 0x0112
_EXIF_MARKS = (b"Exif\0\0", b"eXIf", b"EXIF")  # of JPEG, PNG and WebP


@dataclass(frozen=True)
class _Plan:
    """How each image is stored: Note [What is stored].

    Attributes:
        files: Bytes of files as they are.
        raw: All images as pixels.
        small_raw: Images of at most `SMALL_PIXELS` as pixels, others as PNG; neither of these three: all as PNG.
        size: (H, W) that all raw images must have, or None.
        max_side: Longest side, or None.
        quality: Of JPEG.
    """

    files: bool
    raw: bool
    small_raw: bool
    size: tuple[int, int] | None
    max_side: int | None
    quality: int


def pack(
    data: Any,
    out: str | os.PathLike[str],
    *,
    labels: Any = None,
    classes: Any = None,
    raw: Literal["auto"] | bool = "auto",
    max_side: int | None = None,
    quality: int = QUALITY,
    shard_bytes: int | None = None,
    on_bad_image: Literal["raise", "skip"] = "raise",
    max_bad_fraction: float = 0.01,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | Literal["auto"] = "auto",
    progress: bool = False,
) -> PackReport:
    """Pack images into shards, which `open_source`, `Loader` and `train` open like any other data.

    Args:
        data: Anything that `open_source` takes.
        out: Folder of the pack.
        labels: True labels, see `open_source`; they are kept in the pack.
        classes: Names of the classes, see `open_source`.
        raw: Store pixels instead of files: "auto", True or False; see Note [What is stored].
        max_side: Reduce images whose longer side has more pixels than this; default: all bytes unchanged.
        quality: Of the JPEG files that `max_side` makes, 1..100.
        shard_bytes: Bytes of images after which a new shard begins; default 1 GiB, and no limit where all images are
            raw, since only a pack in one shard is one array.
        on_bad_image: "raise", or "skip": the image keeps its number, has no bytes and no label, and is listed in
            bad_images.csv in the pack.
        max_bad_fraction: Share of the images that may be skipped, 0..1, before it is an error after all.
        overwrite: Delete a pack in `out` first, whole or not.
        resume: Go on where an interrupted call with the same data and options stopped; a pack that is whole already is
            left as it is. False: `out` must be empty or absent.
        threads: "auto" = processors that this process may use. The bytes do not depend on it.
        progress: Show a bar on stderr, if that is a terminal.

    Returns:
        What the pack holds.

    Raises:
        OptionError: An option of wrong type or out of range; `out` is not empty and not an unfinished pack of these
            images.
        DataError: See `open_source`; an image that cannot be decoded, or too many of them.
        ResourceError: The disk is full, or too small from the start. Nothing half-made is taken for good: the same call
            goes on after the last whole shard.

    Example:
        >>> import tempfile, sela_ext
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = sela_ext.pack("digits", folder)
        >>> report.images, report.formats
        (1797, {'raw': 1797})
    """
    _check_options(raw, max_side, quality, shard_bytes, on_bad_image, max_bad_fraction)
    workers = thread_count(threads)
    source = open_source(data, labels=labels, classes=classes)
    folder = Path(out)
    if isinstance(data, (str, os.PathLike)) and folder.exists() and Path(data).exists() and folder.samefile(data):
        raise OptionError(f"out: expected another folder than the data, found {folder} for both")
    plan = _make_plan(source, raw, max_side, quality)
    if shard_bytes is None and not plan.raw:
        shard_bytes = SHARD_BYTES
    identity = _identity(source, plan, shard_bytes)
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _claimed(folder, identity, overwrite=overwrite, resume=resume) as finished:
        if not finished:
            packing = _Packing(source, folder, plan, identity, shard_bytes, on_bad_image == "skip", max_bad_fraction)
            with _shown(len(source), progress) as show:
                packing.run(workers, show)
    found = open_pack(folder)
    if found.manifest.skipped and on_bad_image == "raise":  # an earlier call had another policy
        raise DataError(
            f"{found.skipped()[0][2]}; {found.manifest.skipped} images were skipped in {folder}: remove the files and "
            'pack again with overwrite, or use on_bad_image="skip"'
        )
    return found.report()


class _Packing:
    """One call of `pack`: what is needed in several places."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        plan: _Plan,
        identity: dict[str, Any],
        shard_bytes: int | None,
        skip: bool,
        max_bad_fraction: float,
    ) -> None:
        self.source = source
        self.folder = folder
        self.plan = plan
        self.identity = identity
        self.pack_id = _pack_id(identity)
        self.shard_bytes = shard_bytes
        self.skip = skip
        self.max_bad_fraction = max_bad_fraction
        self.shards: list[ShardSummary] = []
        self.bad: list[tuple[int, str, str]] = []
        self.labelled = False  # whether any image has a label

    def run(self, threads: int, show: Callable[[int], None]) -> None:
        """Pack what is not packed yet, and finish."""
        done = self._keep_shards()
        show(done)
        self._check_room(done)
        writer: ShardWriter | None = None
        entries = self._entries(done, threads)
        try:
            for entry in entries:
                if writer is not None and self._full(writer, entry):
                    self.shards.append(writer.close())
                    writer = None
                if writer is None:
                    writer = ShardWriter(self.folder, len(self.shards), done, self.pack_id)
                writer.add(entry)
                done += 1
                show(1)
            if writer is not None:
                self.shards.append(writer.close())
                writer = None
        finally:
            entries.close()  # its threads end before the file goes
            if writer is not None:
                writer.abandon()
        self._finish()

    def _full(self, writer: ShardWriter, entry: Entry) -> bool:
        added = len(entry.data) + len(entry.index)
        return self.shard_bytes is not None and writer.data_bytes + added > self.shard_bytes

    def _keep_shards(self) -> int:
        """Take over the whole shards of an earlier call, remove all others; the images that are done."""
        done = 0
        while (path := self.folder / shard_name(len(self.shards))).exists():
            try:
                shard, table = read_shard(
                    path,
                    number=len(self.shards),
                    first=done,
                    pack_id=self.pack_id,
                    channels=self.source.channels,
                )
            except DataError:
                break
            digest, faults = verify_shard(shard, table)
            bad = skipped_images(shard, table)
            if faults or done + shard.images > len(self.source) or (bad and not self.skip):
                break
            self.shards.append(ShardSummary(shard.images, shard.size, digest))
            self.bad += bad
            self.labelled = self.labelled or bool((table["label"] >= 0).any())
            done += shard.images
        kept = {shard_name(i) for i in range(len(self.shards))}
        for path in _pack_files(self.folder):
            if path.name.endswith(PARTIAL) or (path.name.startswith("shard-") and path.name not in kept):
                path.unlink()
        return done

    def _check_room(self, done: int) -> None:
        """Refuse at the start what cannot end well.

        Raises:
            ResourceError: Less free space than the rest of the pack will need.
        """
        left = len(self.source) - done
        need = _foretell(self.source, self.plan, done)
        if not left or need is None:
            return
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise ResourceError(
                f"{self.folder}: expected room for about {need:,} bytes ({left:,} images), found {free:,} free; make "
                "room, choose another disk, or reduce the images with max_side"
            )

    def _entries(self, start: int, threads: int) -> Generator[Entry, None, None]:
        """The images from `start` on, in order, prepared by several threads."""
        if threads == 1 or not self.source.parallel_reads:
            for rows in self._tasks(start):
                yield from self._prepare_all(rows)
            return
        pending: deque[Future[list[Entry]]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="sela-pack")
        try:
            for rows in self._tasks(start):
                pending.append(pool.submit(self._prepare_all, rows))
                if len(pending) > 2 * threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _tasks(self, start: int) -> Iterator[range]:
        size = self.source.image_size
        step = _TASK_IMAGES
        if size is not None:
            image = size[0] * size[1] * self.source.channels
            step = min(max(_TASK_BYTES // image, _TASK_IMAGES), _TASK_MOST)
        for begin in range(start, len(self.source), step):
            yield range(begin, min(begin + step, len(self.source)))

    def _prepare_all(self, rows: range) -> list[Entry]:
        entries = [self._prepare_one(index) for index in rows]
        good = np.array([i for i, e in zip(rows, entries, strict=True) if e.format != NONE], dtype=np.int64)
        labels = self.source.labels_of(good) if len(good) else None
        if labels is None:
            return entries
        self.labelled = self.labelled or bool((labels >= 0).any())
        known = iter(labels.tolist())
        return [entry if entry.format == NONE else replace(entry, label=next(known)) for entry in entries]

    def _prepare_one(self, index: int) -> Entry:
        name = self.source.name(index)
        try:
            return _prepare(self.source, self.plan, index, name)
        except DataError as error:
            if not self.skip:
                raise DataError(f'{error}; remove the file, or use on_bad_image="skip"') from error
            reason = text_bytes(" ".join(str(error).split()))
        self.bad.append((index, name, reason.decode()))
        if len(self.bad) > self.max_bad_fraction * len(self.source):
            first = "; ".join(reason for _, _, reason in sorted(self.bad)[:3])
            raise DataError(
                f"{len(self.bad)} of {len(self.source)} images cannot be read, more than "
                f"max_bad_fraction={self.max_bad_fraction:g}: {first}"
            )
        return Entry(NONE, b"", b"", 0, 0, text_bytes(name), reason)

    def _finish(self) -> None:
        table = self.folder / BAD_IMAGES
        if self.bad:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["index", "name", "reason"])
            writer.writerows(sorted(self.bad))
            write_whole(table, text_bytes(text.getvalue()))
        else:
            table.unlink(missing_ok=True)
        names = (text_bytes(name).decode() for name in self.source.iter_names())
        class_names = self.source.class_names
        manifest = Manifest(
            id=self.pack_id.hex(),
            images=len(self.source),
            skipped=len(self.bad),
            channels=self.source.channels,
            labels=self.labelled,
            class_names=None if class_names is None else [text_bytes(name).decode() for name in class_names],
            names_sha256=hash_names(names),
            options=self.identity["options"],
            source=self.identity["source"],
            shards=self.shards,
        )
        from sela_ext import __version__

        write_manifest(self.folder, manifest, f"sela_ext {__version__}")


def _prepare(source: Source, plan: _Plan, index: int, name: str) -> Entry:
    """Bytes of one image as the plan says.

    Raises:
        DataError: It cannot be read or decoded.
    """
    text = text_bytes(name)
    orientation = 1
    if source.encoded:
        data = _encoded_bytes(source, index, name)
        if plan.files:
            entry = _as_file(data, plan, name, text)
            if entry is not None:
                return entry
            orientation = _orientation(data)
        pixels = decode_image(data, name)
    else:
        pixels = source.read(index)
    reduced = False
    if plan.max_side is not None and max(pixels.shape[:2]) > plan.max_side:
        pixels, reduced = _reduced(pixels, plan.max_side), True
    height, width = pixels.shape[:2]
    if plan.raw:
        if plan.size is not None and (height, width) != plan.size:
            # No image for a policy of bad images: the wish itself cannot be fulfilled.
            raise OptionError(
                f"raw: expected all images of one size, {plan.size[0]} x {plan.size[1]}, found {height} x {width} in "
                f"{name}; use raw=False, which stores the files"
            )
        return Entry(RAW, pixels.tobytes(), b"", height, width, text)
    if plan.small_raw and height * width <= SMALL_PIXELS:
        return Entry(RAW, pixels.tobytes(), b"", height, width, text)
    if not reduced:
        return Entry(PNG, _png(pixels), b"", height, width, text)
    jpeg = _jpeg(pixels, plan.quality, orientation)
    return Entry(JPEG, jpeg, jpeg_index(jpeg) or b"", height, width, text)


def _as_file(data: bytes, plan: _Plan, name: str, text: bytes) -> Entry | None:
    """An image file as it is; None if it has to be reduced."""
    kind = sniff(data[:HEAD_BYTES])
    header = jpeg_header(data) if kind == "JPEG" else None
    if header is not None and header.height * header.width <= MAX_PIXELS:
        if plan.max_side is not None and max(header.height, header.width) > plan.max_side:
            return None
        index = jpeg_index(data)
        if index is not None:  # all of the file was read: it is sound
            return Entry(JPEG, data, index, header.height, header.width, text)
    height, width = decode_image(data, name).shape[:2]
    if plan.max_side is not None and max(height, width) > plan.max_side:
        return None
    assert kind is not None  # or it could not be decoded
    return Entry(FORMATS.index(kind), data, b"", height, width, text)


def _encoded_bytes(source: Source, index: int, name: str) -> bytes:
    try:
        place = source.locate(index)
        if place.path is None:
            assert place.data is not None  # one of both is set
            if not len(place.data):
                source.read(index)  # knows why
            return bytes(place.data)
        with os.fdopen(open_regular(place.path), "rb", buffering=0) as file:
            data = file.readall()
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    if len(data) >= 1 << 32:
        raise DataError(f"{name}: expected less than 4 GiB, found {len(data):,} bytes")
    return data


def _reduced(pixels: UInt8Array, max_side: int) -> UInt8Array:
    height, width = _after((pixels.shape[0], pixels.shape[1]), max_side)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    small = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    return np.ascontiguousarray(small.reshape(height, width, pixels.shape[2]))


def _png(pixels: UInt8Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _jpeg(pixels: UInt8Array, quality: int, orientation: int) -> bytes:
    grey = pixels.shape[2] == 1 or bool((pixels[..., :1] == pixels).all())
    options: dict[str, Any] = {"quality": quality}
    if not grey:
        options["subsampling"] = "4:2:0"
    if orientation != 1:
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(file, "JPEG", **options)
    return file.getvalue()


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data raise many types; the pixels decide whether the image is good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _make_plan(source: Source, raw: Any, max_side: int | None, quality: int) -> _Plan:
    make = functools.partial(_Plan, max_side=max_side, quality=quality)
    if raw is True:
        return make(files=False, raw=True, small_raw=False, size=_after(_first_size(source), max_side))
    if raw is False:
        return make(files=source.encoded, raw=False, small_raw=False, size=None)
    if source.encoded:
        size = _common_small_size(source)
        if size is None:
            return make(files=True, raw=False, small_raw=False, size=None)
        return make(files=False, raw=True, small_raw=False, size=_after(size, max_side))
    if source.image_size is not None:
        return make(files=False, raw=True, small_raw=False, size=_after(source.image_size, max_side))
    return make(files=False, raw=False, small_raw=True, size=None)


def _after(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Size of a reduced image: the longer side becomes `max_side`, the shorter one follows, rounded, at least 1."""
    longer = max(size)
    if max_side is None or longer <= max_side:
        return size
    height, width = (max(1, (side * max_side * 2 + longer) // (2 * longer)) for side in size)
    return height, width


def _first_size(source: Source) -> tuple[int, int]:
    """(H, W) of the first image that can be read."""
    if source.image_size is not None:
        return source.image_size
    first: DataError | None = None
    for index in range(len(source)):
        try:
            height, width = source.read(index).shape[:2]
            return height, width
        except DataError as error:
            first = first or error
    raise DataError(f"expected at least one image that can be read, found none: {first}")


def _common_small_size(source: Source) -> tuple[int, int] | None:
    """(H, W) where every file is an image of this size and small; found out from headers, given up at the first not."""
    common: tuple[int, int] | None = None
    for index in range(len(source)):
        try:
            data = _encoded_bytes(source, index, "")
            if any(mark in data for mark in _EXIF_MARKS) and _orientation(data) != 1:
                return None  # which pixels alone would lose
            header = jpeg_header(data)
            if header is not None:
                size = header.height, header.width
            else:
                with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                    size = image.height, image.width
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return None
        except Exception:  # left to the policy of bad images; Pillow raises many types
            continue
        if size[0] * size[1] > SMALL_PIXELS or (common is not None and size != common):
            return None
        common = size
    return common


def _foretell(source: Source, plan: _Plan, start: int) -> int | None:
    """Bytes that the images from `start` on will take, about; None if that cannot be said."""
    left = len(source) - start
    if left == 0:
        return 0
    other = left * (RECORD.itemsize + 32)
    if plan.raw and plan.size is not None:
        return left * plan.size[0] * plan.size[1] * source.channels + other
    if not plan.files or plan.max_side is not None:
        return None
    rows = np.unique(np.linspace(start, len(source) - 1, min(left, _SAMPLE)).astype(np.int64))
    total = 0
    for row in rows.tolist():
        place = source.locate(row)
        with contextlib.suppress(OSError):
            total += len(place.data or b"") if place.path is None else os.stat(place.path).st_size
    return int(total * left / len(rows) * _INDEX_SHARE) + other


def _identity(source: Source, plan: _Plan, shard_bytes: int | None) -> dict[str, Any]:
    """Everything that the bytes of the pack depend on, JSON-able."""
    options: dict[str, Any] = {**asdict(plan), "shard_bytes": shard_bytes}
    options["size"] = None if plan.size is None else list(plan.size)
    if plan.max_side is not None or not (plan.files or plan.raw):  # what encodes
        version: Any = features.version
        options["encoder"] = f"Pillow {PIL.__version__}, libjpeg-turbo {version('libjpeg_turbo')}"
    else:
        del options["quality"]
    if source.parallel_reads and source.labels is not None:
        options["labels"] = _digest(source.labels)
    try:
        fingerprint = source.fingerprint()
    except DataError:  # that of a Dataset reads images, of which one is bad: left to the policy of bad images
        fingerprint = Source.fingerprint(source)
    identity = {"version": VERSION, "options": options, "source": fingerprint}
    found: dict[str, Any] = json.loads(json.dumps(identity))  # as it will come back from a file
    return found


def _digest(labels: Int64Array) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def _pack_id(identity: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()[:16]


@contextlib.contextmanager
def _claimed(folder: Path, identity: dict[str, Any], *, overwrite: bool, resume: bool) -> Iterator[bool]:
    """Hold the folder for this process, with packing.json in it; gives whether the pack is there already.

    Raises:
        OptionError: Something else is in the folder, or another process is at work there.
    """
    foreign = _foreign(folder)
    if foreign:
        raise OptionError(
            f"out: expected an empty or absent folder, or a pack, found {len(foreign)} other files in {folder} "
            f"({foreign[0]}); nothing was changed: choose another folder"
        )
    existing = _pack_files(folder)
    path = folder / UNFINISHED
    created = not path.exists()
    with full_disk(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        _lock(handle, folder)
        try:
            finished = False
            if existing and overwrite:
                _remove(folder)
            elif existing:
                finished = _matches(folder, handle, identity, resume)
        except BaseException:
            if created:
                path.unlink(missing_ok=True)
            raise
        if not finished:
            with full_disk(path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(identity, indent=1).encode() + b"\n", 0)
                os.fsync(handle)
                sync_folder(folder)
        yield finished
        path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # another operating system: two processes at once are the user's business there
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise OptionError(f"out: another process is packing into {folder}; wait for it or end it") from error
        # a file system without locks


def _matches(folder: Path, handle: int, identity: dict[str, Any], resume: bool) -> bool:
    """Whether the folder holds this very pack, whole; if it is another one, or no resuming is wanted, an error."""
    if (folder / MANIFEST).exists():
        manifest = open_pack(folder).manifest
        old: Any = {"version": VERSION, "options": manifest.options, "source": manifest.source}
    else:
        try:
            old = json.loads(os.pread(handle, 1 << 26, 0))
        except ValueError:
            old = {}
        if not any(path.name.startswith("shard-") for path in _pack_files(folder)):
            old = identity  # nothing is packed yet
    if not resume:
        raise OptionError(f"out: expected an empty or absent folder, found a pack in {folder}; use resume or overwrite")
    different = _differences(old, identity)
    if different:
        raise OptionError(
            f"out: {folder} holds a pack of other images or with other options: {'; '.join(different[:4])}; choose "
            "another folder, or use overwrite"
        )
    return (folder / MANIFEST).exists()


def _differences(old: Any, new: dict[str, Any]) -> list[str]:
    if not isinstance(old, dict):
        return ["unreadable"]
    found = []
    for part in ("version", "source", "options"):
        before, after = old.get(part), new[part]
        if not (isinstance(before, dict) and isinstance(after, dict)):
            found += [] if before == after else [f"{part} was {before}, is {after}"]
            continue
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                found.append(f"{key} was {before.get(key)}, is {after.get(key)}")
    return found


def _is_pack_file(name: str) -> bool:
    name = name.removesuffix(PARTIAL)
    return name in (MANIFEST, UNFINISHED, BAD_IMAGES) or (
        name.startswith("shard-") and name.endswith(".sela") and name[6:-5].isdigit()
    )


def _pack_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_pack_file(path.name))


def _foreign(folder: Path) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise OptionError(f"out: expected a folder, found {folder}: {error.strerror or error}") from error
    known = {path.name for path in _pack_files(folder)}
    if BAD_IMAGES in known and len(known) == 1:  # of a run, for example
        known.clear()
    return [ascii(name) for name in names if name not in known]


def _remove(folder: Path) -> None:
    """Delete a pack, the manifest first, so that what is left is never taken for a whole one."""
    for path in sorted(_pack_files(folder), key=lambda path: path.name != MANIFEST):
        if path.name != UNFINISHED:
            path.unlink()
            sync_folder(folder)


def _check_options(
    raw: Any, max_side: Any, quality: Any, shard_bytes: Any, on_bad_image: Any, max_bad_fraction: Any
) -> None:
    if raw not in ("auto", True, False):
        raise OptionError(f'raw: expected "auto", True or False, found {raw!r}')
    for name, value, low, high in (
        ("max_side", max_side, 1, 1 << 16),
        ("quality", quality, 1, 100),
        ("shard_bytes", shard_bytes, 1, 1 << 50),
    ):
        if value is None and name != "quality":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise OptionError(f"{name}: expected a whole number {low}..{high}, found {value!r}")
    if on_bad_image not in ("raise", "skip"):
        raise OptionError(f'on_bad_image: expected "raise" or "skip", found {on_bad_image!r}')
    if isinstance(max_bad_fraction, bool) or not isinstance(max_bad_fraction, (int, float)):
        raise OptionError(f"max_bad_fraction: expected a number 0..1, found {max_bad_fraction!r}")
    if not 0 <= max_bad_fraction <= 1:
        raise OptionError(f"max_bad_fraction: expected 0..1, found {max_bad_fraction}")


@contextlib.contextmanager
def _shown(total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar; what it gives is called with the number of images done since."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield lambda count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: Iterable[Any] = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
