"""`pack`: any source of images into a few large files, checked and mapped into memory when they are read.

Threads share the process: reading files, indexing, decoding and checksums run beside one another. Images are written in
their order, so that the bytes do not depend on how many threads there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from PIL import features

from sela_ext.data.csv_file import csv_writer
from sela_ext.data.manifest import BAD_IMAGES, VERSION, Manifest, ShardSummary, shard_name, write_manifest
from sela_ext.data.opening import open_source
from sela_ext.data.pack_folder import claim_folder, pack_files, pack_id_of
from sela_ext.data.pack_plan import Plan, foretell, make_plan, prepare
from sela_ext.data.safe_files import OUT_OF_RESOURCES, PARTIAL, full_disk, write_whole
from sela_ext.data.shard_format import NONE, Entry, ShardWriter, read_shard, text_bytes, verify_shard
from sela_ext.data.shards import PackReport, PackSource, open_pack, skipped_images, thread_count
from sela_ext.data.source import Int64Array, Source, hash_names
from sela_ext.errors import DataError, OptionError, ResourceError

SHARD_BYTES = 1 << 30
QUALITY = 90
# Images of one task of the threads: about this many bytes of pixels, where the size is known.
_TASK_BYTES = 1 << 20
_TASK_IMAGES = 8
_TASK_MOST = 1024
_REMEDY = 'remove the file, or use on_bad_image="skip"'


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
    # As JSON keeps them; numpy's integers are taken as well.
    max_side, shard_bytes = (None if value is None else int(value) for value in (max_side, shard_bytes))
    quality = int(quality)
    workers = thread_count(threads)
    source = open_source(data, labels=labels, classes=classes)
    if source.vectors is not None:
        raise DataError(f"data: expected images, found {source.describe()}; a .npy file of them is mapped as it is")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"out: expected a folder, or a name that nothing has, found a file: {folder}")
    _check_apart(folder, data, source)
    plan = make_plan(source, raw, max_side, quality)
    if shard_bytes is None and not plan.raw:
        shard_bytes = SHARD_BYTES
    identity = _identity(source, plan, shard_bytes)
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with claim_folder(folder, identity, overwrite=overwrite, resume=resume) as finished:
        if not finished:
            packing = _Packing(source, folder, plan, identity, shard_bytes, on_bad_image == "skip", max_bad_fraction)
            with _shown(len(source), progress) as show:
                packing.run(workers, show)
    found = open_pack(folder)
    if found.manifest.skipped and on_bad_image == "raise":  # an earlier call had another policy
        raise DataError(
            f"{found.skipped()[0][2]}; {found.manifest.skipped} images were skipped in {folder} by an earlier call: "
            f"{_REMEDY}, or overwrite"
        )
    return found.report()


def _check_apart(folder: Path, data: Any, source: Any) -> None:
    """The data must not lie in the folder that `overwrite` clears.

    Raises:
        OptionError: They do.
    """
    builtin = isinstance(data, str) and data == "digits"  # whatever else is called so
    places = [Path(data)] if isinstance(data, (str, os.PathLike)) and not builtin else []
    while source is not None:  # a pack may be under labels or a subset
        if isinstance(source, PackSource):
            places.append(source.path)
        source = getattr(source, "_parent", None)
    if any(place.exists() and folder.exists() and folder.samefile(place) for place in places):
        raise OptionError(f"out: expected another folder than that of the data, found {folder} for both")


class _Packing:
    """One call of `pack`: what is needed in several places."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        plan: Plan,
        identity: dict[str, Any],
        shard_bytes: int | None,
        skip: bool,
        max_bad_fraction: float,
    ) -> None:
        self.source = source
        self.folder = folder
        self.plan = plan
        self.identity = identity
        self.pack_id = pack_id_of(identity)
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
            if faults or done + shard.images > len(self.source):
                break
            bad = skipped_images(shard, table)
            if bad and not self.skip:
                raise DataError(f"{bad[0][2]}; it was skipped by an earlier call: {_REMEDY}, or overwrite")
            self.shards.append(ShardSummary(shard.images, shard.size, digest))
            self.bad += bad
            self.labelled = self.labelled or bool((table["label"] >= 0).any())
            done += shard.images
        kept = {shard_name(i) for i in range(len(self.shards))}
        for path in pack_files(self.folder):
            if path.name.endswith(PARTIAL) or (path.name.startswith("shard-") and path.name not in kept):
                path.unlink()
        return done

    def _check_room(self, done: int) -> None:
        """Refuse at the start what cannot end well.

        Raises:
            ResourceError: Less free space than the rest of the pack will need.
        """
        left = len(self.source) - done
        need = foretell(self.source, self.plan, done)
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
            return prepare(self.source, self.plan, index, name)
        except DataError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in OUT_OF_RESOURCES:
                raise ResourceError(f"{error}; raise the limit (ulimit -n, or memory), or use fewer threads") from error
            if not self.skip:
                raise DataError(f"{error}; {_REMEDY}") from error
            reason = text_bytes(" ".join(str(error).split()))
        self.bad.append((index, name, reason.decode()))
        if len(self.bad) > self.max_bad_fraction * len(self.source):
            first = "; ".join(reason for _, _, reason in sorted(self.bad)[:3])
            raise DataError(
                f"{len(self.bad)} of {len(self.source)} images cannot be read, more than "
                f"max_bad_fraction={self.max_bad_fraction:g}: {first}; remove them, or raise max_bad_fraction"
            )
        return Entry(NONE, b"", b"", 0, 0, text_bytes(name), reason)

    def _finish(self) -> None:
        table = self.folder / BAD_IMAGES
        if self.bad:
            text = io.StringIO()
            writer = csv_writer(text)
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


def _identity(source: Source, plan: Plan, shard_bytes: int | None) -> dict[str, Any]:
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


def _check_options(
    raw: Any, max_side: Any, quality: Any, shard_bytes: Any, on_bad_image: Any, max_bad_fraction: Any
) -> None:
    if not isinstance(raw, bool) and not (isinstance(raw, str) and raw == "auto"):
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
