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
        self.AUGMENT_CUDA_SIDE = _core.AUGMENT_CUDA_SIDE
        self.JpegBatch = HostBatch

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
