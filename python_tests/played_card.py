"""A CUDA device played by the host: the CPU kernels behind the CUDA functions' signatures, at host addresses."""

import contextlib
import ctypes

import numpy as np
import torch

from sela_ext import _core
from sela_ext.assign.anderson import accelerated_step
from sela_ext.kernels import PARAMETERS, Augment, device
from sela_ext.kernels.anderson_device import STATE as ANDERSON_STATE
from sela_ext.kernels.augment import effect_options
from sela_ext.kernels.newton_device import STATE


def array_at(address, dtype, *shape):
    """A numpy view of memory that somebody else owns."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:  # the address may be anything
        return np.zeros(shape, dtype)
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


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
    """Anderson's steps between two passes, done by numpy's least squares."""

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
            step = accelerated_step(step, steps[: s["known"]].T.copy(), changes[: s["known"]].T.copy())
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
        outputs["masked"][0] = count
        self.spoil(outputs)

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

    def current(self):
        return contextlib.nullcontext()

    def stream(self):
        return 0

    def synchronize(self):
        pass

    def trouble(self):
        return self.in_trouble

    def refuse_capture(self, what):
        assert not self.capturing
