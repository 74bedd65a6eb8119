"""A CUDA device played by the host: the CPU kernels behind the CUDA functions' signatures, at host addresses."""

import contextlib
import ctypes

import numpy as np
import torch

from sela_ext import _core
from sela_ext.kernels import EFFECTS, PARAMETERS, Augment, device
from sela_ext.kernels.augment import effect_options
from sela_ext.kernels.augment_device import CROPS


def array_at(address, dtype, *shape):
    """A numpy view of memory that somebody else owns."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


_PLANE = [
    *(("data", np.int64), ("stride", np.int64)),
    *((name, np.int32) for name in ("top", "left", "height", "width", "full_height", "full_width", "step_y", "step_x")),
    *(("smooth_y", np.bool_), ("smooth_x", np.bool_), ("room", np.uint8, (6,))),
]
PLANAR_IMAGE = np.dtype(
    [
        *(("plane", _PLANE, (3,)), ("count", np.int32), ("rgb", np.bool_), ("room", np.uint8, (3,))),
        *(("height", np.int32), ("width", np.int32)),
    ]
)
"""One record of `_core.plane_records`, as csrc/sela/planes.h lays it out."""


def planes_at(record):
    """An image as `_core.augment_planes` takes it, from its record."""
    planes = record["plane"][: record["count"]]
    arrays = [array_at(int(p["data"]), np.uint8, p["height"], p["width"]) for p in planes]
    first, last = planes[0], planes[-1]
    steps = (int(last["step_y"]), int(last["step_x"]))
    smooth = (bool(last["smooth_y"]), bool(last["smooth_x"]))
    top, left = int(first["top"] * first["step_y"]), int(first["left"] * first["step_x"])
    size = (int(record["height"]), int(record["width"]))
    return (arrays, top, left, *size, steps, smooth, bool(record["rgb"]), int(first["step_y"]))


class HostCore:
    """What the compiled module offers for CUDA, done by the CPU kernels; `spoil(outputs)` may change what comes out."""

    __file__ = _core.__file__

    def __init__(self):
        self.spoil = lambda outputs: None
        self.calls = 0
        self.devices = 1
        self.AUGMENT_CUDA_SIDE = _core.AUGMENT_CUDA_SIDE

    def cuda_device_count(self):
        return self.devices

    def sinkhorn_workspace_cuda(self, rows, cols, type):
        return 2 * max(1, -(-rows // 64)), 0

    def sinkhorn_pass_cuda(self, *arguments):
        *shared, totals, masked, _scratch, _stream, rows_in_all = arguments
        _logits, name, rows, cols = shared[:4]
        columns, lse, labels = shared[-3:]
        self.calls += 1
        tiles = max(1, -(-rows // 64))
        blocks = -(-rows // 128)
        found = np.zeros((2, blocks))
        _, _, count, *_ = _core.sinkhorn_pass_cpu(*shared, 1, "", rows_in_all=rows_in_all, totals=found.ctypes.data)
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
            source = [planes_at(record) for record in array_at(planes, PLANAR_IMAGE, count)]
            _core.augment_planes(options, further, source, exact, channels, *target)
        elif crops:
            records = array_at(crops, CROPS, count)
            source = [array_at(int(r["data"]), np.uint8, r["height"], r["width"], channels) for r in records]
            _core.augment_list(options, further, source, *target)
        else:
            source = array_at(images, np.uint8, total, height, width, channels)
            _core.augment_array(options, further, source, ids, *target)
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
