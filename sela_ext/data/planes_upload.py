"""Images that the processor decodes and a CUDA device makes into views.

Note [What is sent]
    Of JPEG files the decoded samples that the views need, as the file has them, instead of finished views: two fifths
    of the bytes of float32, and the processor saves resampling and colours: a quarter of its work, and two thirds where
    several views are taken. The compiled reader fills an arena of pinned memory with them (Note [Places in an arena] in
    `sela_ext.kernels.reader`); records of the images and of what was drawn follow them, and all goes in one copy. The
    views are made on the consumer's stream when it receives the batch.

    What has no place in the arena is made here, sent as views, and put into its rows on the device: files of other
    formats, damaged ones, and what the arena, which has a fixed size, does not hold any more. Pixels are within 0.01 of
    255 either way; which way an image goes follows from the files and from what is drawn, so that a resumed run, or one
    with another number of threads, has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from sela_ext import kernels
from sela_ext.data.fallback import Drawing, Fallback, Records, Rows, moved_together
from sela_ext.data.reading import EncodedReading, look_at
from sela_ext.data.residency import size
from sela_ext.data.ring import TensorRing
from sela_ext.data.source import Int64Array, Source
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import EFFECTS, PARAMETERS, Augment
from sela_ext.kernels.augment import check_output, output_shape
from sela_ext.kernels.augment_device import PLANAR, given_needs, launch_planes
from sela_ext.kernels.device import CudaDevice, indexed, on_card, usable
from sela_ext.kernels.resident import resident_refusal

Wish = Literal["auto", "planes", "views"]

# Images that are looked at to find how large an arena has to be.
LOOKED_AT = 64
# An arena holds a batch of so many times the mean image; and at most so many bytes per value of its views.
_MARGIN = 1.5
_MOST_BYTES = 8
_ALIGNMENT = 16


@dataclass(frozen=True)
class Sending:
    """What of images is sent to a device, and why.

    Attributes:
        planes: Decoded samples, of which the device makes the views; else finished views.
        reason: In words, with numbers.
        wanted: Bytes of the samples of each image that was looked at.
        most: Bytes that an image may have of an arena, in the mean.
    """

    planes: bool
    reason: str
    wanted: tuple[int, ...] = ()
    most: int = 0

    def room(self, rows: int) -> int:
        """Bytes for the samples of a batch of so many images; 0 where views are sent.

        Half as much again as the mean, and at least four deviations of a batch's sum above it. It depends on nothing
        but the files and the batch, since what has no room is made elsewhere.

        Example:
            >>> Sending(True, "", (1000, 1000, 1000), 9000).room(10)
            15008
        """
        if not self.planes:
            return 0
        mean, deviation = float(np.mean(self.wanted)), float(np.std(self.wanted))
        enough = max(_MARGIN * rows * mean, rows * mean + 4 * deviation * rows**0.5)
        return _up(int(min(enough, rows * self.most)))


def sending_refusal(source: Source, views: tuple[Augment, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a device cannot make the views of a source's images; None where it can.

    Example:
        >>> from sela_ext.data import open_source
        >>> sending_refusal(open_source("digits"), (Augment.none(32),), torch.float32, torch.device("cpu"))
        'batches are made on the CPU'
    """
    if not on_card(device):
        return "batches are made on the CPU"
    if not source.encoded:
        return "images that are not encoded files"
    if source.channels != 3:
        return "images of one channel"
    for view in views:
        problem = resident_refusal((1, view.size, view.size, 3), view, dtype)
        if problem is not None:
            return f"views that CUDA kernels do not make: {problem}"
    if usable(indexed(device)) is None:
        return f"{device}, whose kernels are not used"
    return None


def plan_sending(
    source: Source,
    views: tuple[Augment, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    wish: Wish,
    measure: Callable[[Int64Array], Int64Array],
) -> Sending:
    """Decide what is sent, and how much room it may take.

    Args:
        source: The images.
        views: What is made of each.
        dtype: Of the views.
        device: Where batches are wanted.
        wish: "auto": planes where the device can make the views, unless they are so small that samples would be more
            than is sent now, and decoding is nearly all of the work; "planes": or else it is an error; "views".
        measure: The bytes that each of some images needs, from their numbers; 0 where they are not the reader's.

    Raises:
        OptionError: Planes are wanted, and the device cannot make views of them.
    """
    if wish == "views":
        return Sending(False, "views: send is views")
    problem = sending_refusal(source, views, dtype, device)
    found = np.zeros(0, np.int64)
    if problem is None:
        found = measure(np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(np.int64)))
        if not found.any():
            problem = f"none of {len(found)} images that were looked at is a JPEG file of the compiled reader"
    if problem is not None:
        if wish == "planes":
            raise OptionError(f"send: expected images that the device can make views of, found {problem}")
        return Sending(False, f"views: {problem}")
    most = _MOST_BYTES * 3 * sum(view.size**2 for view in views)
    mean = size(float(found.mean()))
    if wish == "auto" and found.mean() > most:
        return Sending(False, f"views: {mean} of samples per image are more than twice what views take in float32")
    return Sending(
        True, f"planes: the device makes the views; {mean} of samples per image", tuple(found.tolist()), most
    )


def _up(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def records_bytes(rows: int, views: int) -> int:
    """Bytes for the records that follow the samples of a batch."""
    return views * sum(_up(rows * kind.itemsize) for kind in (PLANAR, PARAMETERS, EFFECTS))


@dataclass
class PlaneRows(Rows):
    """A batch in the making, of which a device makes the views.

    Attributes:
        images: One tensor [M, C, S, S] per view, of the rows `finished`, which are made here.
        arena: Memory with the samples of the other rows, and room for records; None where there are none.
        read: What lies there, and where.
        places: int64 [B], the rows of `read`.
        finished: int64 [M], rows.
    """

    arena: torch.Tensor | None = None
    read: kernels.ReadPlanes | None = None
    places: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    finished: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))

    @staticmethod
    def begin(index: Int64Array, keys: Int64Array, epoch: int, views: tuple[Augment, ...]) -> PlaneRows:
        """Rows to be filled."""
        empty = Rows.empty(index, keys, epoch, [], views)
        return PlaneRows(index, keys, epoch, [], empty.params, empty.effects, places=np.arange(len(index)))

    def keep(self, good: npt.NDArray[np.bool_]) -> PlaneRows:
        """Only the rows where `good` is true."""
        late = np.flatnonzero(good[self.finished])
        return PlaneRows(
            self.index[good],
            self.keys[good],
            self.epoch,
            [moved_together(images, late) for images in self.images],
            [params[good] for params in self.params],
            [None if effects is None else effects[good] for effects in self.effects],
            self.arena,
            self.read,
            self.places[good],
            (np.cumsum(good) - 1)[self.finished[late]],
        )


class PlaneReading(EncodedReading):
    """Decodes batches of which a device makes the views.

    Args:
        source: Encoded images.
        drawing: What becomes of them.
        reader: The compiled reader for `drawing`; it stays open.
        fallback: For images that the reader does not take; it stays open.
        others: bool [N], as for `EncodedReading`.
        ring: Lends memory for views that are made here.
        arenas: Lends memory for samples and records, uint8 [1, 1, 1, bytes].
        sending: How much of it is for samples.
    """

    with_bad = True  # places in the arena must not depend on what is known

    def __init__(
        self,
        source: Source,
        drawing: Drawing,
        reader: kernels.Reader,
        fallback: Fallback,
        others: npt.NDArray[np.bool_],
        *,
        ring: TensorRing,
        arenas: TensorRing,
        sending: Sending,
    ) -> None:
        super().__init__(source, drawing, reader, fallback, others, ring=ring)
        self._arenas, self._sending = arenas, sending

    def empty(self, index: Int64Array, keys: Int64Array, epoch: int) -> PlaneRows:
        """See `EncodedReading.empty`."""
        return PlaneRows.begin(index, keys, epoch, self._drawing.views)

    def _submit(self, rows: Rows) -> kernels.Ticket[kernels.ReadPlanes]:
        assert isinstance(rows, PlaneRows)
        count = len(rows.index)
        located = self._source.locate_all(rows.index)
        rows.arena = self._arenas.lend(1)[0].view(-1)
        arena = rows.arena[: self._sending.room(count)].numpy()
        return self._reader.submit_planes(located.items, rows.index, arena, **self._asked(rows, located, count))

    def _after_reader(self, rows: Rows, read: kernels.ReadBatch) -> Callable[[], dict[int, DataError]]:
        assert isinstance(rows, PlaneRows)
        assert isinstance(read, kernels.ReadPlanes)
        rows.read = read
        if not (read.status == kernels.READ_OK).any():
            rows.arena = None
        crowded = read.status == kernels.READ_NO_ROOM
        others = (read.status != kernels.READ_OK) & ~crowded
        return self._finish(rows, np.flatnonzero(crowded), np.flatnonzero(others))

    def _without_reader(self, rows: Rows) -> Callable[[], dict[int, DataError]]:
        assert isinstance(rows, PlaneRows)
        return self._finish(rows, np.zeros(0, np.int64), np.arange(len(rows.index)))

    def _finish(self, rows: PlaneRows, crowded: Int64Array, others: Int64Array) -> Callable[[], dict[int, DataError]]:
        """Make the views of rows here: of those that had no room by the reader, of the others by the fallback."""
        rows.finished = late = np.concatenate([crowded, others])
        if not len(late):
            return dict
        views, count = self._drawing.views, len(crowded)
        made = Rows.empty(rows.index[late], rows.keys[late], rows.epoch, self._ring.lend(len(late)), views)
        rows.images = made.images
        left = np.arange(count, len(late))
        if count:
            read = self._views_of_first(made, count).wait()
            look_at(read, made.index[:count], self._source, self._others)
            _fill(made, np.arange(count), read.params, read.effects)
            left = np.concatenate([np.flatnonzero(read.status != kernels.READ_OK), left])
        done = self._fallback.start(made, left)

        def wait() -> dict[int, DataError]:
            bad = done()
            _fill(rows, late, made.params, made.effects)
            return {int(late[row]): error for row, error in bad.items()}

        return wait


def _fill(rows: Rows, places: Int64Array, params: list[Records], effects: list[Records | None]) -> None:
    for number, drawn in enumerate(params):
        rows.params[number][places] = drawn
        kept = rows.effects[number]
        if kept is not None:
            kept[places] = effects[number]


class PlaneBatch:
    """The views of a batch on their way: what is sent, and what is made of it there.

    Args:
        rows: The batch, finished.
        drawing: What becomes of it.
        device: Where.
        exact: As for `sela_ext.kernels.augment_planes`.
    """

    def __init__(self, rows: PlaneRows, drawing: Drawing, device: torch.device, *, exact: bool) -> None:
        self._drawing, self._exact = drawing, exact
        self._device = indexed(device)
        self._count = len(rows.index)
        self.tensors: list[torch.Tensor] = list(rows.images)
        if rows.images:
            finished = torch.from_numpy(rows.finished)
            self.tensors.append(finished.pin_memory() if device.type == "cuda" else finished)
        self._arena = rows.arena if rows.read is not None else None
        self._made_there = self._arena is not None
        if self._arena is not None:
            assert rows.read is not None
            self._describe(rows, self._arena, rows.read)

    def _describe(self, rows: PlaneRows, arena: torch.Tensor, read: kernels.ReadPlanes) -> None:
        """What the kernels are to know; addresses are still those of the arena."""
        count, views = self._count, self._drawing.views
        here = read.status[rows.places] == kernels.READ_OK
        self._here = here  # rows whose samples are there
        self._images = np.zeros((len(views), count), PLANAR)
        self._params: list[Records] = []
        self._effects: list[Records | None] = []
        self._needs: list[tuple[bool, bool, bool, float]] = []
        self._sides: list[tuple[int, int]] = []
        self._records: list[tuple[int, int, int]] = []
        at = read.used
        for number, view in enumerate(views):
            images = self._images[number]
            images[here] = read.images[number][rows.places[here]]
            params, effects = rows.params[number].copy(), rows.effects[number]
            effects = None if effects is None else effects.copy()
            _fill_in(view, ~here, images, params, effects)
            places = [at, at + _up(images.nbytes), 0]
            at = places[1] + _up(params.nbytes)
            if effects is not None:
                places[2], at = at, at + _up(effects.nbytes)
            self._records.append((places[0], places[1], places[2]))
            self._params.append(params)
            self._effects.append(effects)
            self._needs.append(given_needs(params, effects))
            tall, wide = (images, images) if view.crop == "center" else (params, params)
            self._sides.append((int(tall["height"].max()), int(wide["width"].max())))
        self.tensors.insert(0, arena[:at])

    def addressed(self, there: list[torch.Tensor]) -> None:
        """Complete what is sent, now that it is known where it will lie; `tensors` are let go of."""
        arena, self._arena, self.tensors = self._arena, None, []
        if arena is None:
            return
        room = arena.numpy()
        moved = np.uint64((there[0].data_ptr() - arena.data_ptr()) % (1 << 64))
        data = self._images["plane"]["data"]
        data[:, self._here] += moved
        data[:, ~self._here] = there[0].data_ptr()
        for places, *parts in zip(self._records, self._images, self._params, self._effects, strict=True):
            for place, part in zip(places, parts, strict=True):
                if part is not None:
                    room[place : place + part.nbytes] = part.view(np.uint8).reshape(-1)

    def views(self, there: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The views, made on the current stream from `tensors` on the device."""
        card = usable(self._device)
        assert card is not None
        memory, sent = (there[0], there[1:]) if self._made_there else (None, there)
        return tuple(self._view(card, number, memory, sent) for number in range(len(self._drawing.views)))

    def _view(
        self, card: CudaDevice, number: int, memory: torch.Tensor | None, sent: list[torch.Tensor]
    ) -> torch.Tensor:
        view, dtype, last = self._drawing.views[number], self._drawing.dtype, self._drawing.channels_last
        result = check_output(None, output_shape(view, self._count, 3, dtype), dtype, last, self._device)
        if memory is not None:
            planes, params, effects = (memory.data_ptr() + place for place in self._records[number])
            launch_planes(
                card,
                view,
                result,
                planes=planes,
                records=(params, effects if view.draws_effects else 0),
                needs=self._needs[number],
                sides=self._sides[number],
                exact=self._exact,
                channels_last=last,
            )
        if sent:
            result.index_copy_(0, sent[-1], sent[number])
        return result


def _fill_in(view: Augment, absent: npt.NDArray[np.bool_], images: Any, params: Any, effects: Any) -> None:
    """Rows that others will be written over: one gray sample, as little work as there is."""
    for name in ("height", "width"):
        images[name][absent] = 1
    images["count"][absent] = 1
    plane = images["plane"]
    for name in ("stride", "height", "width", "full_height", "full_width", "step_y", "step_x"):
        plane[name][absent, :] = 1
    params[absent] = np.zeros(1, PARAMETERS)
    for name in ("height", "width"):
        params[name][absent] = view.size if view.crop == "center" else 1
    if effects is not None:
        effects[absent] = np.zeros(1, EFFECTS)
