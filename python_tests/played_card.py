"""A CUDA device played by the host: the CPU kernels behind the CUDA functions' signatures, at host addresses."""

import contextlib
import ctypes

import numpy as np
import torch

from sela_ext import _core
from sela_ext.kernels import PARAMETERS, Augment, device
from sela_ext.kernels.augment import effect_options


def array_at(address, dtype, *shape):
    """A numpy view of memory that somebody else owns."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class HostCore:
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
