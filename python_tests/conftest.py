"""Fixtures of several folders. Nothing heavy is imported here: some tests do without torch."""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Property tests draw the same examples in every run, so that a failure says something about the change at hand.
# `pytest --hypothesis-profile=default` looks further.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@functools.cache
def played_card():
    """The module played_card.py beside this file."""
    spec = importlib.util.spec_from_file_location("played_card", Path(__file__).with_name("played_card.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that what it defines can be sent to other processes
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host_core():
    """What the compiled module offers for CUDA, done by the CPU kernels."""
    return played_card().HostCore()


@pytest.fixture
def host_card(host_core):
    """A device whose memory is the host's."""
    return played_card().HostCard(host_core)


@pytest.fixture
def as_cuda(monkeypatch, tmp_path):
    """Makes a card be the device of every torch tensor, so that calls take the CUDA path: `as_cuda(card)`.

    Verdicts of this test are its own: the cache is a fresh folder, nothing is known of any device, and the build says
    that it holds code for architecture 9.0.
    """
    import torch

    from sela_ext import _core
    from sela_ext.kernels import device, self_check

    callers = [
        importlib.import_module(f"sela_ext.kernels.{n}")
        for n in ("sinkhorn", "logits", "rounding", "augment", "augment_resident")
    ]

    info = {**_core.build_info(), "cuda": True, "cuda_archs": ["80", "90"], "cuda_ptx": ["90"]}
    monkeypatch.setattr(_core, "build_info", lambda: dict(info))
    monkeypatch.setattr(device, "_usable", {})
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setenv("SELA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SELA_SELF_CHECK", raising=False)

    def play(card):
        monkeypatch.setattr(self_check, "open_device", lambda place: card)
        for module in callers:
            monkeypatch.setattr(
                module, "cuda_place", lambda value: card.place if isinstance(value, torch.Tensor) else None
            )
        return card

    return play
