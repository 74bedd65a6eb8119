"""What is common to all that runs on a card: its stream, its device, graphs in the making, launches that fail.

The card is played by the host, and knows at every launch whether it is the current one and which stream was given.
"""

import contextlib

import numpy as np
import pytest
import torch

from sela_ext import kernels
from sela_ext.errors import ResourceError
from sela_ext.kernels import Augment, device, jpeg_cuda, ops
from sela_ext.kernels.anderson_device import AndersonDevice
from sela_ext.kernels.augment_device import put_images, put_planes, run_uploaded
from sela_ext.kernels.check_jpeg import encoded
from sela_ext.kernels.newton_device import device_rows
from sela_ext.kernels.sinkhorn import DevicePass

STREAM, CAPTURED = 0x5E1A, "expected a stream that is not being captured"


class Watched:
    """A core that asks, at every launch, whether its card is current and which stream it is given."""

    def __init__(self, card):
        self.card, self.inner, self.launches, self.broken = card, card.core, [], None

    def __getattr__(self, name):
        found = getattr(self.inner, name)
        if not name.endswith("_cuda") or "workspace" in name:
            return found

        def launch(*arguments):
            assert self.card.depth > 0, f"{name} while another device is the current one"
            assert STREAM in [a for a in arguments if isinstance(a, int)], f"{name} on another stream"
            self.launches.append(name)
            if self.broken is not None:
                raise self.broken
            return found(*arguments)

        return launch


@pytest.fixture
def card(as_cuda, host_card, monkeypatch):
    """A played card that is not the current device until a call makes it so."""
    played, host_card.depth, host_card.full = as_cuda(host_card), 0, False
    device._usable[played.place] = played
    played.core = Watched(played)

    @contextlib.contextmanager
    def current():
        if played.full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        played.depth += 1
        try:
            yield
        finally:
            played.depth -= 1

    def refuse(what):
        if played.capturing:
            raise ResourceError(f"{what}: {CAPTURED}")

    monkeypatch.setattr(played, "current", current)
    monkeypatch.setattr(played, "stream", lambda: STREAM)
    monkeypatch.setattr(played, "refuse_capture", refuse)
    return played


def logits_of(rows=33, cols=7):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))


def candidates_of():
    return kernels.sinkhorn_pass(logits_of(), torch.zeros(7), keep=16.0).candidates


def search(function):
    return lambda: function(logits_of(), np.zeros(7), np.zeros(33, np.int32))


def resident(side, size, preset=Augment.cifar):
    images = torch.zeros(5, side, side, 3, dtype=torch.uint8)
    return lambda: kernels.augment_resident(images, [4, 0, 4], preset(size), seed=1, epoch=2)


def uploaded(card, planar):
    sides = [(40, 50), (9, 70)]
    arrays = [np.zeros((*side, 3), np.uint8) for side in sides]
    grey = [kernels.Planes((array[..., 0].copy(),), *side) for array, side in zip(arrays, sides, strict=True)]
    batch = put_planes(card, card.place, grey) if planar else put_images(card, card.place, arrays, 3)
    augment = Augment.sela(8)
    drawn = kernels.sample_parameters(augment, batch.heights, batch.widths, [0, 1], seed=0, epoch=0)
    return lambda: run_uploaded(card, batch, drawn, augment, None, False, None, None, False)


def newton(method):
    rows = device_rows(candidates_of())
    plan = rows.sums(1.0, np.zeros(7))[3]
    return {
        "sums": lambda: rows.sums(1.0, np.zeros(7)),
        "product": lambda: rows.product(plan, np.ones(7)),
        "prune": lambda: rows.prune(plan, 9.0),
    }[method]


def anderson(card, method):
    passes, shares, zero = DevicePass(card, logits_of()), np.full(7, 1 / 7), np.zeros(7)
    stages = AndersonDevice(
        passes, target=shares, weight=33.0, unit=1e-9, potential=zero, residual=zero, error=1.0, faint=1e-12,
        restart=3.0, cap=9.0, accelerate=True, steps=np.zeros((7, 0)), changes=np.zeros((7, 0)),
    )  # fmt: skip
    if method == "run":
        return lambda: stages.run(zero, None, scale=1.0, count=2, want_labels=False)
    return lambda: stages.follow(np.full(7, 33 * 10**9 // 7), zero)


def decoded(card):
    files = [encoded(np.full((40, 50, 3), 90, np.uint8), 2)]
    return lambda: jpeg_cuda.run_cuda(card, files, [None], [None])


# What makes the call, the launches that it must make, and whether it refuses a graph in the making.
CALLS = {
    "sinkhorn_pass": (
        lambda card: lambda: kernels.sinkhorn_pass(logits_of(), torch.zeros(7)),
        ["sinkhorn_pass_cuda"],
        "sinkhorn_pass",
    ),
    "a pass that keeps": (lambda card: candidates_of, ["sinkhorn_pass_cuda", "sinkhorn_candidates_cuda"], "sinkhorn"),
    "store_logits": (
        lambda card: lambda: kernels.store_logits(logits_of()),
        ["store_logits_cuda"],
        "store_logits",
    ),
    "sela::store_logits": (lambda card: lambda: ops.store_logits(logits_of()), ["store_logits_cuda"], None),
    "find_candidates": (
        lambda card: search(kernels.find_candidates),
        ["find_candidates_cuda"],
        "find_candidates",
    ),
    "column_margins": (lambda card: search(kernels.column_margins), ["column_margins_cuda"], "column_margins"),
    "newton_rows": (
        lambda card: (lambda found: lambda: device_rows(found))(candidates_of()),
        ["newton_count_cuda", "newton_compact_cuda"],
        "newton_rows",
    ),
    "newton_sums": (lambda card: newton("sums"), ["newton_sums_cuda"], "newton_sums"),
    "newton_product": (lambda card: newton("product"), ["newton_product_cuda"], "newton_product"),
    "newton_prune": (
        lambda card: newton("prune"),
        ["newton_count_cuda", "newton_compact_cuda"],
        "newton_prune",
    ),
    "a stage of passes": (
        lambda card: anderson(card, "run"),
        ["sinkhorn_pass_cuda", "anderson_step_cuda"] * 2,
        "anderson_step",
    ),
    "a step": (lambda card: anderson(card, "follow"), ["anderson_step_cuda"], "anderson_step"),
    "decode_planes_cuda": (decoded, ["decode_jpeg_cuda"], "decode_planes_cuda"),
    "small resident images": (lambda card: resident(32, 31), ["augment_resident_cuda"], None),
    "large resident images": (lambda card: resident(65, 33), ["augment_device_cuda"], None),
    "resident images with effects": (
        lambda card: resident(31, 8, Augment.aug_plus_more),
        ["augment_device_cuda"],
        None,
    ),
    "uploaded images": (lambda card: uploaded(card, False), ["augment_device_cuda"], None),
    "uploaded planes": (lambda card: uploaded(card, True), ["augment_device_cuda"], None),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_are_made_on_the_stream_of_their_device_whichever_is_current(card, name):
    make, launches, _ = CALLS[name]
    call = make(card)
    card.core.launches.clear()
    call()
    assert card.core.launches == launches
    assert card.depth == 0


@pytest.mark.parametrize("name", CALLS)
def test_what_reads_back_refuses_a_graph_in_the_making_before_any_launch(card, name):
    make, launches, refusal = CALLS[name]
    call = make(card)
    card.core.launches.clear()
    card.capturing = True
    if refusal is None:
        call()
        assert card.core.launches == launches
        return
    with pytest.raises(ResourceError, match=f"^{refusal}.*: {CAPTURED}"):
        call()
    assert card.core.launches == []


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_that_fails_is_an_error_of_one_line_and_leaves_the_device_as_it_was(card, name):
    call = CALLS[name][0](card)
    card.core.broken = RuntimeError("some_kernel: launch failed: too many resources requested\nstack\nof frames")
    with pytest.raises(ResourceError, match=r"^some_kernel: launch failed: too many resources requested$"):
        call()
    assert card.depth == 0


@pytest.mark.parametrize("name", CALLS)
def test_what_torch_cannot_allocate_stays_its_own_error(card, name):
    call = CALLS[name][0](card)
    card.full = True
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB"):
        call()


class TorchDevices:
    """Some of torch.cuda with two devices: which is current, and which stream is being captured."""

    def __init__(self, monkeypatch, captured):
        self.now, self.asked = 0, []
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.now == captured)

    @contextlib.contextmanager
    def device(self, place):
        before, self.now = self.now, torch.device(place).index
        yield
        self.now = before

    def current_stream(self, place=None):
        self.asked.append(place)
        return type("Stream", (), {"cuda_stream": 100 + (self.now if place is None else torch.device(place).index)})


def device_one():
    card = device.CudaDevice.__new__(device.CudaDevice)
    card.place = torch.device("cuda:1")
    return card


def test_a_device_gives_its_own_stream_while_another_one_is_current(monkeypatch):
    devices, card = TorchDevices(monkeypatch, None), device_one()
    assert card.stream() == 101
    with card.current():
        assert devices.now == 1
        assert card.stream() == 101
    assert devices.now == 0


@pytest.mark.parametrize("captured", [None, 0, 1])
def test_a_device_asks_its_own_stream_whether_a_graph_is_in_the_making(monkeypatch, captured):
    devices, card = TorchDevices(monkeypatch, captured), device_one()
    if captured == 1:
        with pytest.raises(ResourceError, match="store_logits: expected a stream that is not being captured, found"):
            card.refuse_capture("store_logits")
    else:
        card.refuse_capture("store_logits")
    assert devices.now == 0
