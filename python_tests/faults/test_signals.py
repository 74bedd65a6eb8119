"""D13: a signal at any moment ends a run in order and soon, and what follows has the bits of a run without it."""

import io
import random
import signal
import sys
import time

import pytest

from sela_ext import cli
from sela_ext.cli import program
from sela_ext.training import machine
from sela_ext.training.faults import PLACES
from sela_ext.training.machine import Interrupt

SMALL = [
    *("--epochs", "2", "--batch-size", "40", "--clusters", "10,10", "--image-size", "16", "--threads", "1"),
    *("--evaluate-every", "1", "--log-every", "1", "--checkpoint-seconds", "1000", "--no-progress"),
]
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
SOON = 10.0


@pytest.fixture(scope="module")
def unbroken(server, command, tmp_path_factory):
    """A run that nothing happens to, and the seconds that it took."""
    out, began = tmp_path_factory.mktemp("unbroken") / "run", time.monotonic()
    status, printed = server.run(*command, "--out", out)
    assert status == 0, printed
    return out, time.monotonic() - began


def stopped(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "T"


def signal_at(server, runs, command, out, fault, *numbers, **how):
    """Have a run stand still at a place, send it signals, and let it go on: how it ended, and what it printed."""
    started = server.start(*command, "--out", out, fault=f"{fault}:stop", **how)
    halted = runs.wait_for(lambda: started.wait(0) is not None or stopped(started.pid))
    assert halted, "it came to no place"
    assert started.known is None, f"it ended before: {started.printed()}"
    for number in numbers:
        started.kill(number)
    began = time.monotonic()
    started.kill(signal.SIGCONT)
    status = started.wait()
    assert status is not None
    assert time.monotonic() - began < SOON
    assert "Traceback" not in started.printed()
    return status, started.printed()


def assert_resumes(server, runs, command, out, unbroken):
    runs.assert_whole(out)
    status, printed = server.run(*command, "--out", out, "--resume")
    assert status == 0, printed
    runs.assert_tidy(out)
    runs.assert_equal_runs(unbroken[0], out)


# A place of each kind: before the run, in its passes, between its steps, in a save, behind its end.
MOMENTS = ["before log is cut:1", "inside label pass:1", "after step:3", "before rename:2", "before labels:1"]


@pytest.mark.parametrize(("fault", "number"), [(f, list(STATUS)[i % 2]) for i, f in enumerate(MOMENTS)])
def test_d13_a_signal_at_a_place_ends_the_run_in_order(server, runs, command, unbroken, tmp_path, fault, number):
    out = tmp_path / "run"
    status, _ = signal_at(server, runs, command, out, fault, number)
    assert status == STATUS[number]
    assert_resumes(server, runs, command, out, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", list(STATUS))
@pytest.mark.parametrize("place", [place for place in PLACES if place != "overwriting"])
def test_d13_either_signal_at_every_place_ends_the_run_in_order(
    server, runs, command, unbroken, tmp_path, place, number
):
    out = tmp_path / "run"
    status, _ = signal_at(server, runs, command, out, f"{place}:1", number)
    assert status == STATUS[number]
    assert_resumes(server, runs, command, out, unbroken)


def test_d13_a_signal_between_steps_is_answered_with_a_checkpoint_of_that_step(server, runs, command, tmp_path):
    out = tmp_path / "run"
    status, printed = signal_at(server, runs, command, out, "after step:3", signal.SIGTERM)
    assert status == 143
    assert "stopped at step 3, checkpoint written; continue with resume" in printed
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000000003.ckpt"]


@pytest.mark.parametrize("fault", ["after step:3", "before rename:3"])
def test_d13_a_second_signal_ends_the_run_at_once_and_the_last_checkpoint_stands(
    server, runs, command, unbroken, tmp_path, fault
):
    every = [*command, "--checkpoint-seconds", "0"]
    for attempt in range(5):  # the first may have been answered before the system delivers the second
        out = tmp_path / f"run{attempt}"
        status, printed = signal_at(server, runs, every, out, fault, signal.SIGINT, signal.SIGTERM, same_signal=-1)
        if status == 143:
            break
    assert status == 143
    assert "stopped; continue from the last checkpoint with resume" in printed
    assert "checkpoint written" not in printed
    runs.assert_tidy(out)
    assert_resumes(server, runs, command, out, unbroken)


@pytest.mark.parametrize("reader", ["gone", "closed"])
def test_d13_nobody_need_read_what_a_stopped_run_prints(server, runs, command, unbroken, tmp_path, reader):
    out = tmp_path / "run"
    status, printed = signal_at(server, runs, command, out, "after step:2", signal.SIGTERM, reader=reader, quick=False)
    assert status == 143
    assert printed == ""
    assert_resumes(server, runs, command, out, unbroken)


def signal_at_random(server, runs, command, unbroken, out, rng):
    """Signals at random moments until a run comes to its end, each of its processes to the end of its interpreter."""
    count = 0
    while True:
        started = server.start(*command, "--out", out, "--resume", quick=False)
        number = rng.choice(list(STATUS))
        if count < 4 and started.wait(rng.uniform(0, unbroken[1])) is None:
            started.kill(number)
        status = started.wait(SOON)
        if status == 0:
            break
        assert status in (STATUS[number], -number), started.printed()  # of the system's: before the program had begun
        assert "Traceback" not in started.printed()
        runs.assert_whole(out)
        count += 1
    runs.assert_tidy(out)
    runs.assert_equal_runs(unbroken[0], out)


def test_d13_signals_at_random_moments_change_no_bit(server, runs, command, unbroken, tmp_path):
    signal_at_random(server, runs, command, unbroken, tmp_path / "run", random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_d13_more_signals_at_random_moments_change_no_bit(server, runs, command, unbroken, tmp_path, seed):
    signal_at_random(server, runs, command, unbroken, tmp_path / "run", random.Random(seed))


def test_d13_sigterm_ends_any_command_with_its_status(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    assert before == signal.SIG_DFL
    monkeypatch.setattr(program, "run", lambda arguments: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_d13_outside_of_steps_a_signal_acts_at_once_and_within_them_when_they_are_over(number, error, monkeypatch):
    monkeypatch.setattr(machine, "_SAME_SIGNAL", -1.0)  # so that the second one is another
    with pytest.raises(error), Interrupt():
        signal.raise_signal(number)
    with Interrupt() as interrupt:
        with interrupt.deferred():
            signal.raise_signal(number)
            assert interrupt.number == number
        with pytest.raises(error), interrupt.at_once():
            pytest.fail("the noted signal was forgotten")
    with Interrupt() as interrupt, interrupt.deferred():
        signal.raise_signal(number)
        with pytest.raises(error):
            signal.raise_signal(number)


def test_d13_handlers_are_put_back_whoever_they_were(monkeypatch):
    before = {number: signal.getsignal(number) for number in STATUS}
    with Interrupt():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number in STATUS} == before
    calls, install = [], signal.signal

    def foreign(number, handler):  # of a library in C: Python cannot name it
        calls.append(handler)
        install(number, handler)

    with monkeypatch.context() as patched:
        patched.setattr(signal, "signal", foreign)
        with Interrupt():
            pass
    for number, handler in before.items():
        signal.signal(number, handler)
    assert len(calls) == 2


def test_d13_a_signal_in_the_middle_of_a_print_ends_the_run_all_the_same(monkeypatch):
    """A stream that is being written to refuses another print, and that must not take the place of the end."""

    class Pipe(io.RawIOBase):
        calls = 0

        def writable(self):
            return True

        def write(self, data):
            self.calls += 1
            if self.calls == 1:
                signal.raise_signal(signal.SIGTERM)
            return len(data)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Pipe())))
        with pytest.raises(SystemExit) as ended, Interrupt():
            print("epoch 1", flush=True)
        assert ended.value.code == 143
