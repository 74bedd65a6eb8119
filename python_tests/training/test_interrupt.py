"""What signals do to a run."""

import signal

import pytest

from sela_ext.training import machine
from sela_ext.training.machine import Interrupt


def test_a_signal_that_comes_again_at_once_is_the_same(monkeypatch):
    """As where a scheduler sends it to all processes, and torchrun passes it on."""
    now = [100.0]
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])
    with Interrupt() as interrupt, interrupt.deferred():
        signal.raise_signal(signal.SIGTERM)
        now[0] += 0.5
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.number == signal.SIGTERM
        now[0] += 2
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
