"""A CUDA device played by the host: the CPU kernels behind the CUDA functions' signatures, at host addresses."""

import contextlib
import ctypes

import numpy as np
import pytest
import torch

from sela_ext import _core
from sela_ext.kernels import device, self_check


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

    def sinkhorn_workspace_cuda(self, rows, cols, type):
        return 2 * max(1, -(-rows // 64)), 0

    def sinkhorn_pass_cuda(self, *arguments):
        *shared, totals, masked, _scratch, _stream = arguments
        _logits, name, rows, cols = shared[:4]
        columns, lse, labels = shared[-3:]
        self.calls += 1
        tiles = max(1, -(-rows // 64))
        objective, weight, count = _core.sinkhorn_pass_cpu(*shared, 1, "")
        outputs = {
            "totals": array_at(totals, np.float64, 2, tiles),
            "masked": array_at(masked, np.int64, 1),
            "columns": array_at(columns, np.int64, cols),
            "lse": array_at(lse, np.float64 if name == "float64" else np.float32, rows),
            "labels": array_at(labels, np.int32, rows) if labels else None,
            "type": name,
        }
        outputs["totals"][:, 0] = objective, weight
        outputs["masked"][0] = count
        self.spoil(outputs)


class HostCard(device.CudaDevice):
    """A device whose memory is the host's."""

    def __init__(self, core, place="cpu"):
        self.core = core
        self.place = torch.device(place)
        self.name = "Played Card"
        self.capability = (9, 0)
        self.uuid = "GPU-0"
        self.driver = "550.54, CUDA 12.4"
        self.is_alive = True
        self.capturing = False

    def current(self):
        return contextlib.nullcontext()

    def stream(self):
        return 0

    def synchronize(self):
        pass

    def alive(self):
        return self.is_alive

    def refuse_capture(self, what):
        assert not self.capturing


@pytest.fixture
def host_core():
    return HostCore()


@pytest.fixture
def host_card(host_core):
    return HostCard(host_core)


@pytest.fixture
def as_cuda(monkeypatch, tmp_path):
    """Makes a card be the device of every torch tensor, so that calls take the CUDA path: `as_cuda(card)`.

    Verdicts of this test are its own: the cache is a fresh folder, nothing is known of any device, and the build says
    that it holds code for architecture 9.0.
    """
    info = {**_core.build_info(), "cuda": True, "cuda_archs": ["80", "90"], "cuda_ptx": ["90"]}
    monkeypatch.setattr(_core, "build_info", lambda: dict(info))
    monkeypatch.setattr(device, "_usable", {})
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setenv("SELA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SELA_SELF_CHECK", raising=False)

    def play(card):
        monkeypatch.setattr(self_check, "open_device", lambda place: card)
        monkeypatch.setattr(
            "sela_ext.kernels.sinkhorn.cuda_place",
            lambda value: card.place if isinstance(value, torch.Tensor) else None,
        )
        return card

    return play
