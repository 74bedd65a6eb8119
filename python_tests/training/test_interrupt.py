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


def test_a_signal_that_comes_while_ranks_agree_is_not_lost():
    def totals(numbers):
        signal.raise_signal(signal.SIGTERM)
        return list(numbers)

    with Interrupt() as interrupt, interrupt.deferred():
        assert interrupt.agree(totals, [3.0]) == (0, [3.0])
        assert interrupt.number == signal.SIGTERM
        assert interrupt.agree(lambda numbers: list(numbers), []) == (signal.SIGTERM, [])


def test_a_signal_that_another_rank_told_of_is_the_same_when_it_comes_itself():
    with Interrupt() as interrupt, interrupt.deferred():
        assert interrupt.agree(lambda numbers: [1.0, 1.0], []) == (signal.SIGTERM, [])
        signal.raise_signal(signal.SIGTERM)  # must not end the run in the middle of its checkpoint
        assert interrupt.number == signal.SIGTERM
