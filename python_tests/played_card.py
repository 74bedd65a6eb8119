"""A CUDA device played by the host: the CPU kernels behind the CUDA functions' signatures, at host addresses."""

import contextlib
import ctypes

import numpy as np
import torch

from sela_ext import _core
from sela_ext.kernels import EFFECTS, PARAMETERS, Augment, device
from sela_ext.kernels.anderson_device import STATE as ANDERSON_STATE
from sela_ext.kernels.augment import effect_options
from sela_ext.kernels.augment_device import CROPS, PLANAR
from sela_ext.kernels.newton_device import STATE
from sela_ext.kernels.reference.anderson import anderson_step


def array_at(address, dtype, *shape):
    """A numpy view of memory that somebody else owns."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:  # the address may be anything
        return np.zeros(shape, dtype)
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def planes_at(record):
    """An image as `_core.augment_planes` takes it, from its record.

    Its planes begin at one place there; here chroma may begin a sample before it, so zeros are put in front of others.
    """
    planes = record["plane"][: record["count"]]
    first, last = planes[0], planes[-1]
    steps = (int(last["step_y"]), int(last["step_x"]))
    smooth = (bool(last["smooth_y"]), bool(last["smooth_x"]))
    top, left = (
        min(int(p[begin] * p[step]) for p in planes) // most * most
        for begin, step, most in (("top", "step_y", max(steps[0], 8)), ("left", "step_x", max(steps[1], 8)))
    )
    arrays = []
    for p in planes:
        rows = np.lib.stride_tricks.as_strided(
            array_at(int(p["data"]), np.uint8, (p["height"] - 1) * p["stride"] + p["width"]),
            (p["height"], p["width"]),
            (p["stride"], 1),
        )
        above, before = p["top"] - top // p["step_y"], p["left"] - left // p["step_x"]
        arrays.append(np.pad(rows, ((above, 0), (before, 0))))
    size = (int(record["height"]), int(record["width"]))
    return (arrays, top, left, *size, steps, smooth, bool(record["rgb"]), int(first["step_y"]))


class PlayedNewton:
    """Newton's method on a device, done by the CPU kernels: every solve ends in its first rounds."""

    NEWTON_TILE_ROWS, NEWTON_VECTORS = _core.NEWTON_TILE_ROWS, _core.NEWTON_VECTORS
    NEWTON_POINT, NEWTON_PER_POINT = _core.NEWTON_POINT, _core.NEWTON_PER_POINT

    def newton_count_cuda(self, rows, plan, level, kept, counts, stream):
        self.calls += 1
        offsets, columns, _, weights, units = arrays_of(rows)
        row, keep = kept_entries(offsets, plan, level)
        lengths = np.bincount(row[keep], minlength=rows[4])
        array_at(kept, np.int64, 2, rows[4])[:] = np.where(lengths > 1, lengths, 0), lengths > 1
        single = keep & (lengths[row] == 1)
        np.add.at(
            array_at(counts, np.int64, rows[5]), columns[single], np.rint(weights[row[single]] * units).astype(np.int64)
        )

    def newton_compact_cuda(self, rows, plan, level, ends, offsets, columns, values, weights, stream):
        self.calls += 1
        before, columns_before, values_before, weights_before, _ = arrays_of(rows)
        entries, several = (int(n) for n in array_at(ends, np.int64, 2, rows[4])[:, -1])
        row, keep = kept_entries(before, plan, level)
        lengths = np.bincount(row[keep], minlength=rows[4])
        keep &= lengths[row] > 1
        array_at(offsets, np.int64, several + 1)[1:] = np.cumsum(lengths[lengths > 1])
        array_at(columns, np.int32, entries)[:] = columns_before[keep]
        array_at(values, np.float32, entries)[:] = values_before[keep]
        if weights:
            array_at(weights, np.float32, several)[:] = weights_before[lengths > 1]

    def newton_sums_cuda(self, rows, ratio, d, sums, stream):
        self.calls += 1
        columns, diagonal, objective, plan = host_rows(rows).sums(ratio, array_at(d, np.float64, rows[5]), 1, "")
        array_at(sums[0], np.int64, 2, rows[5])[:] = np.rint(np.stack([columns, diagonal]) * rows[7])
        totals = array_at(sums[1], np.float64, -(-rows[4] // self.NEWTON_TILE_ROWS))
        totals[:] = 0
        totals[:1] = objective
        array_at(sums[2], np.float32, rows[6])[:] = plan
        self.spoil({"newton_columns": array_at(sums[0], np.int64, 2, rows[5])})

    def newton_product_cuda(self, rows, x, largest, sums, stream):
        self.calls += 1
        units = np.ldexp(rows[7], -(np.frexp(largest)[1] + 2))
        plan = array_at(sums[2], np.float32, rows[6])
        product = host_rows(rows).product(plan, array_at(x, np.float64, rows[5]), 1, "")
        array_at(sums[0], np.int64, rows[5])[:] = np.rint(product * units)

    def newton_rounds_cuda(self, rows, columns, counts, weight, total, *arguments):
        ratio, tolerance, steps, products, clip, reach, want_plan, vectors, state, sums, _, _ = arguments
        self.calls += 1
        cols = rows[5]
        single = array_at(counts, np.int64, cols) / rows[7]
        played = host_rows(rows, single)
        points = array_at(vectors, np.float64, self.NEWTON_VECTORS, cols)[self.NEWTON_POINT :: self.NEWTON_PER_POINT]
        given = [array_at(a, np.float64, cols).copy() if a else None for a in columns[:5]]
        target, defect, offset, low, high = given
        options = (ratio, tolerance, steps, products, clip, reach, 0.0, 1, "")
        found = played.solve(target, defect, points[0].copy(), *options, offset, columns[5], low, high)
        points[0] = found[0]
        if want_plan:
            array_at(sums[2], np.float32, rows[6])[:] = played.sums(ratio, found[0], 1, "")[3]
        end = np.zeros(1, STATE)
        for name, value in zip(("error", "steps", "products", "sums", "stalled"), found[1:], strict=True):
            end[name] = value
        array_at(state, STATE, 1)[:] = end


def arrays_of(rows):
    """Offsets, columns, values and weights (ones where there are none) at the addresses of rows on a device; units."""
    offsets, columns, values, weights, count, _, entries, units = rows
    given = array_at(weights, np.float32, count) if weights else np.ones(count, np.float32)
    return (
        array_at(offsets, np.int64, count + 1),
        array_at(columns, np.int32, entries),
        array_at(values, np.float32, entries),
        given,
        units,
    )


def kept_entries(offsets, plan, level):
    """The row of each entry, and whether it is above exp(-level) in a plan."""
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if not plan:
        return row, np.ones(len(row), bool)
    return row, array_at(plan, np.float32, len(row)) > np.float32(np.exp(-level))


def host_rows(rows, single=None):
    """The same rows for the CPU kernels, with as many more of a single candidate as there are, by their weight."""
    offsets, columns, values, weights, _ = arrays_of(rows)
    more = np.zeros(0, np.int64) if single is None else np.flatnonzero(single)
    return _core.NewtonRows(
        _core.Candidates.of(
            offsets=np.concatenate([offsets, offsets[-1] + 1 + np.arange(len(more))]),
            columns=np.concatenate([columns, more]),
            values=np.concatenate([values, np.zeros(len(more), np.float32)]),
            weights=np.concatenate([weights, np.zeros(0) if single is None else single[more]]),
            cols=rows[5],
            level=16.0,
            limit=2**40,
        )
    )


class PlayedAnderson:
    """Anderson's steps between two passes, done by torch's least squares: of equally good steps the shortest."""

    ANDERSON_MEMORY, ANDERSON_VECTORS = _core.ANDERSON_MEMORY, _core.ANDERSON_VECTORS

    def anderson_step_cuda(self, columns, potential, following, target, vectors, state, cols, unit, *numbers):
        faint, restart, cap, accelerate, rounded, _stream = numbers
        self.calls += 1
        most = self.ANDERSON_MEMORY
        shares, g = array_at(columns, np.int64, cols) * unit, array_at(potential, np.float64, cols)
        b, out = array_at(target, np.float64, cols), array_at(following, np.float64, cols)
        rows = array_at(vectors, np.float64, self.ANDERSON_VECTORS, cols)
        s = array_at(state, ANDERSON_STATE, 1)[0]
        out[:] = g
        if s["ended"] or not (shares >= faint * b).all():
            s["ended"] = 1
            return
        at, residual, best, best_residual = rows[:4]
        steps, changes = rows[4 : 4 + most], rows[4 + most :]
        error, f = float(np.abs(shares - b).sum()), np.log(b) - np.log(shares)
        f -= b @ f
        if s["begun"]:
            steps[s["next"]], changes[s["next"]] = g - at, f - residual
            s["known"], s["next"] = min(s["known"] + 1, most), (s["next"] + 1) % most
        at[:], residual[:] = g, f
        if not s["begun"] or error < s["best"]:
            best[:], best_residual[:], s["best"] = g, f, error
        back = error > restart * s["best"] and not s["plain"]
        s["begun"], s["plain"], s["error"] = 1, back, error
        if back:
            at[:], residual[:], s["known"], s["next"] = best, best_residual, 0, 0
        step = residual.copy()
        if accelerate and s["known"]:
            step = anderson_step(step, steps[: s["known"]].copy(), changes[: s["known"]].copy())
            size, far = np.abs(step - step.mean()).max(), max(cap, 2 * np.abs(residual).max())
            step *= far / size if size > far else 1.0
        to = at + step
        to -= b @ to
        out[:] = to.astype(np.float32) if rounded else to


class HostCore(PlayedNewton, PlayedAnderson):
    """What the compiled module offers for CUDA, done by the CPU kernels; `spoil(outputs)` may change what comes out."""

    __file__ = _core.__file__

    def __init__(self):
        self.spoil = lambda outputs: None
        self.calls = 0
        self.devices = 1
        self.kept = {}  # candidates of passes, by their scratch
        self.AUGMENT_CUDA_SIDE = _core.AUGMENT_CUDA_SIDE
        self.JpegBatch = HostBatch

    def cuda_device_count(self):
        return self.devices

    def sinkhorn_workspace_cuda(self, logits, type, rows, cols, stride, first_row, every, candidates, has_maxima):
        return 2 * max(1, -(-rows // 64)), 8  # so that no two passes have the same scratch

    def sinkhorn_pass_cuda(self, *arguments):
        *shared, totals, masked, scratch, _stream, rows_in_all = arguments[:18]
        first_row, every, level, counts, maxima, maxima_scale = arguments[18:]
        _logits, name, rows, cols = shared[:4]
        columns, lse, labels = shared[-3:]
        self.calls += 1
        kept = _core.Candidates(level=level, limit=2**62) if level else None
        tiles = max(1, -(-rows // 64))
        blocks = -(-rows // 128)
        found = np.zeros((2, blocks))
        before = array_at(columns, np.int64, cols).copy()  # a device adds to what is there
        _, _, count, *_ = _core.sinkhorn_pass_cpu(
            *(*shared, 1, "", every, kept, first_row, rows_in_all, found.ctypes.data, maxima, maxima_scale)
        )
        if kept is not None:
            self.kept[scratch] = kept
            array_at(counts, np.int32, kept.rows)[:] = np.diff(kept.offsets())
        outputs = {
            "totals": array_at(totals, np.float64, 2, tiles),
            "masked": array_at(masked, np.int64, 1),
            "columns": array_at(columns, np.int64, cols),
            "lse": array_at(lse, np.float64 if name == "float64" else np.float32, rows),
            "labels": array_at(labels, np.int32, rows) if labels else None,
            "type": name,
        }
        outputs["totals"][:, :blocks] = found
        outputs["masked"] += count
        outputs["columns"] += before
        self.spoil(outputs)

    def find_candidates_cuda(
        self, logits, name, rows, cols, stride, scale, prices, label_prices, bonus, labels, selected, n, count, *rest
    ):
        slack, floor, tie, columns, values, found, regret, first_row, _stream = rest
        self.calls += 1
        kind = np.float64 if name == "float64" else np.float32
        numbers = [
            None if not at else array_at(at, dtype, cols).astype(np.float64)
            for at, dtype in ((prices, kind), (label_prices, kind), (bonus, np.float32))
        ]
        _core.find_candidates_cpu(
            *(logits, name, rows, cols, stride, scale),
            *(0 if one is None else one.ctypes.data for one in numbers),
            *(labels, selected, n, count, slack, floor, tie, columns, values, found, regret, 1, "", first_row),
        )
        width = 2 * count + 2
        outputs = {
            "columns": array_at(columns, np.int32, n, width),
            "values": array_at(values, np.float32, n, width),
            "found": array_at(found, np.int32, n),
            "regret": array_at(regret, np.float32, n),
        }
        self.spoil(outputs)

    def column_margins_workspace_cuda(self, selected_count, cols):
        return 8

    def column_margins_cuda(
        self, logits, name, rows, cols, stride, scale, prices, labels, selected, n, margins, scratch, stream
    ):
        self.calls += 1
        kind = np.float64 if name == "float64" else np.float32
        chosen = array_at(selected, np.int64, n) if selected else np.arange(n)
        found = _core.column_margins_cpu(
            *(logits, name, rows, cols, stride, scale, array_at(prices, kind, cols).astype(np.float64)),
            *(array_at(labels, np.int32, rows), chosen, 1, ""),
        )
        array_at(margins, np.float32, 4, cols)[...] = found
        self.spoil({"margins": array_at(margins, np.float32, 4, cols)})

    def sinkhorn_candidates_cuda(self, *arguments):
        scratch, _offsets, columns, values, _stream = arguments[-5:]
        self.calls += 1
        kept = self.kept.pop(scratch)
        outputs = {
            "kept columns": array_at(columns, np.int32, kept.entries),
            "kept values": array_at(values, np.float32, kept.entries),
        }
        outputs["kept columns"][:] = kept.columns()
        outputs["kept values"][:] = kept.values()
        self.spoil(outputs)

    def store_logits_cuda(
        self, logits, name, rows, cols, stride, kind, lam, values, values_stride, maxima, saturated, _stream
    ):
        self.calls += 1
        packed = np.empty((rows, cols), np.uint16)
        found = _core.store_logits_cpu(
            *(logits, name, rows, cols, stride, kind, lam, packed.ctypes.data, maxima, 1, "")
        )
        outputs = {"stored": array_at(values, np.uint16, (rows - 1) * values_stride + cols) if rows else packed}
        for row in range(rows):
            outputs["stored"][row * values_stride : row * values_stride + cols] = packed[row]
        array_at(saturated, np.int64, 1)[0] += found
        self.spoil(outputs)

    def sample_parameters_cuda(self, options, height, width, index, count, seed, epoch, view, drawn, stream):
        self.calls += 1
        rows, out = array_at(index, np.int64, count), array_at(drawn, PARAMETERS, count)
        sides = (np.full(count, side, np.int32) for side in (height, width))
        _core.sample_parameters(options, *sides, rows, seed, epoch, view, out)
        self.spoil({"sampled": out})

    def augment_resident_cuda(self, options, images, total, height, width, channels, *arguments):
        index, count, seed, epoch, view, given, drawn, out, dtype, channels_last, _stream = arguments
        self.calls += 1
        source = array_at(images, np.uint8, total, height, width, channels)
        rows = array_at(index, np.int64, count)
        if given:
            params = array_at(given, PARAMETERS, count)
        else:
            params = array_at(drawn, PARAMETERS, count) if drawn else np.empty(count, PARAMETERS)
            sides = (np.full(count, side, np.int32) for side in (height, width))
            _core.sample_parameters(options, *sides, rows, seed, epoch, view, params)
        further = effect_options(Augment.none(1))
        _core.augment_array(options, further, source, rows, params, None, out, dtype, channels_last, 1)
        self.spoil({"params": params, "out": out, "dtype": dtype, "given": bool(given)})

    def decode_jpeg_cuda(self, batch, upload, workspace, planes, status, stream):
        self.calls += 1
        found, words = array_at(planes, np.uint8, batch.plane_bytes), array_at(status, np.int32, batch.image_count)
        for image, request in zip(batch.images(), batch.requests, strict=False):
            if image["status"] != "ok":
                continue
            data, index, box = request
            word, decoded, _ = _core.jpeg_planes(data, *box, 1, index, False, 1 << 40, "")
            words[image["image"]] = word != "ok"
            for place, plane in zip(image["planes"], decoded[1] if word == "ok" else (), strict=False):
                shape, strides = (place["height"], place["width"]), (place["stride"], 1)
                np.lib.stride_tricks.as_strided(found[place["offset"] :], shape, strides)[:] = plane["samples"]
        self.spoil({"planes": found, "status": words})

    def augment_workspace_cuda(self, options, further, channels, height, width, count, needs):
        return 16

    def augment_device_cuda(self, options, further, images, total, crops, planes, exact, *arguments):
        height, width, channels, index, count, _needs, seed, epoch, view, *rest = arguments
        given, given_effects, drawn, _workspace, out, dtype, channels_last, _stream = rest
        self.calls += 1
        ids = array_at(index, np.int64, count) if index else np.arange(count)
        if given:
            params = array_at(given, PARAMETERS, count)
            effects = array_at(given_effects, EFFECTS, count) if given_effects else None
        else:
            params = array_at(drawn, PARAMETERS, count) if drawn else np.empty(count, PARAMETERS)
            effects = np.zeros(count, EFFECTS)
            sides = (np.full(count, side, np.int32) for side in (height, width))
            _core.sample_parameters(options, *sides, ids, seed, epoch, view, params)
            _core.sample_effects(further, ids, seed, epoch, view, effects)
        target = (params, effects, out, dtype, channels_last, 1)
        if planes:
            source = [planes_at(record) for record in array_at(planes, PLANAR, count)]
            _core.augment_planes(options, further, source, exact, channels, *target)
        elif crops:
            records = array_at(crops, CROPS, count)
            source = [array_at(int(r["data"]), np.uint8, r["height"], r["width"], channels) for r in records]
            _core.augment_list(options, further, source, *target)
        else:
            source = array_at(images, np.uint8, total, height, width, channels)
            _core.augment_array(options, further, source, ids, *target)
        self.spoil({"params": params, "out": out, "dtype": dtype, "given": bool(given)})


class HostBatch:
    """A batch of JPEG files that knows what it was asked for."""

    def __init__(self, files, indexes, boxes, *limits):
        self.batch = _core.JpegBatch(files, indexes, boxes, *limits)
        self.requests = list(zip(files, indexes, boxes, strict=True))

    def __getattr__(self, name):
        return getattr(self.batch, name)


class HostCard(device.CudaDevice):
    """A device whose memory is the host's."""

    def __init__(self, core, place="cpu"):
        self.core = core
        self.place = torch.device(place)
        self.name = "Played Card"
        self.capability = (9, 0)
        self.uuid = "GPU-0"
        self.driver = "550.54, CUDA 12.4"
        self.in_trouble = ""
        self.capturing = False
        self.memory = 1 << 30

    def current(self):
        return contextlib.nullcontext()

    def stream(self):
        return 0

    def synchronize(self):
        pass

    def free_memory(self):
        return self.memory

    def mark(self):
        return "mark"

    def follow(self, mark):
        assert mark == "mark"

    def hold(self, *tensors):
        pass

    def trouble(self):
        return self.in_trouble

    def refuse_capture(self, what):
        assert not self.capturing


class OneCard(device.Cards):
    """In place of `sela_ext.kernels.device.cards`: the processor is this card, wherever torch's tensors are asked."""

    def __init__(self, card):
        self.card = card

    def has(self, place):
        return place.type == self.card.place.type

    def count(self):
        return 1

    def open(self, place):
        return self.card
