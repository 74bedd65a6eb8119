"""The heartbeat of one rank, with the others played by the test."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from sela_ext.errors import DataError, DistributedError
from sela_ext.training import heartbeat
from sela_ext.training.heartbeat import Heartbeat, first_cause, machine, started, status_of

PATIENCE = 30


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "_PERIOD", 0.02)
    monkeypatch.setattr(heartbeat, "_GRACE", 0.0)
    monkeypatch.setattr(heartbeat, "_SIGNAL_GRACE", 0.0)
    monkeypatch.setattr(heartbeat, "_KEEP", 0.0)
    monkeypatch.setattr(heartbeat, "_DYING", 0.1)
    monkeypatch.setattr(heartbeat, "_KEEP_FAILED", 0.0)


class Watcher:
    """Rank 0 of some, whose process is not ended when it should be."""

    def __init__(self, world_size, silence=PATIENCE, store=None):
        self.store = store or dist.HashStore()
        self.left = threading.Event()
        self.said, self.status = [], None
        self.heart = Heartbeat(self.store, 0, world_size, silence=silence, say=self.said.append, leave=self._note)

    def _note(self, status):
        self.status = status
        self.left.set()

    def neighbour(self, rank, pid, start):
        self.store.append(f"neighbours/{machine()}", json.dumps([rank, pid, start]) + "\n")

    def line(self):
        assert self.left.wait(PATIENCE)
        return self.said[0]


@pytest.fixture
def watch():
    made = []

    def make(*arguments, **options):
        made.append(Watcher(*arguments, **options))
        return made[-1]

    yield make
    for one in reversed(made):  # handlers of signals are put back in turn
        one.heart.close()


def beats(store, rank, stop):
    count = 0
    while not stop.wait(0.01):
        count += 1
        store.set(f"beat/{rank}", f"{count} somewhere.py:1")


@pytest.fixture
def alive():
    """`alive(store, rank)`: another rank that goes on beating."""
    stop, threads = threading.Event(), []

    def begin(store, rank):
        threads.append(threading.Thread(target=beats, args=(store, rank, stop)))
        threads[-1].start()

    yield begin
    stop.set()
    for thread in threads:
        thread.join()


def test_a_neighbour_whose_process_is_gone_is_named_with_its_process(watch, alive):
    rank = watch(2)
    alive(rank.store, 1)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    rank.neighbour(1, gone.pid, "1")
    where = f"process {gone.pid} on {socket.gethostname()} is gone"
    assert rank.line() == f"sela: error: rank 0 of 2: ends because rank 1 failed: it was killed ({where})"
    assert rank.status == 6


def test_a_process_of_the_same_number_that_began_later_is_not_the_neighbour(watch, alive):
    rank = watch(2)
    alive(rank.store, 1)
    rank.neighbour(1, os.getpid(), "long ago")
    assert "rank 1 failed: it was killed" in rank.line()


def test_a_neighbour_that_ended_as_it_should_is_not_missed(watch, alive):
    rank = watch(3)
    rank.store.set("done/1", "1")
    rank.neighbour(1, os.getpid(), "long ago")
    alive(rank.store, 2)
    assert not rank.left.wait(0.5)


def test_the_next_rank_that_has_not_ended_is_listened_to(watch):
    rank = watch(3, silence=0.3)
    rank.store.set("done/1", "1")
    rank.store.set("home/2", "process 7 on far")
    rank.store.set("beat/2", "1 loop.py:3")
    assert rank.line().endswith(
        "rank 2 failed: nothing has been heard of it for 0.3 s (process 7 on far): killed, stopped, or its machine is "
        "lost"
    )


def test_a_neighbour_that_is_silent_is_killed_since_it_may_be_stopped(watch):
    silent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        silent.send_signal(signal.SIGSTOP)
        rank = watch(2, silence=0.3)
        rank.neighbour(1, silent.pid, started(silent.pid))
        rank.store.set("home/1", f"process {silent.pid} on here")
        rank.store.set("beat/1", "1 loop.py:3")
        assert "rank 1 failed: nothing has been heard of it" in rank.line()
        assert silent.wait(PATIENCE) == -signal.SIGKILL
    finally:
        silent.kill()
        silent.wait()


def test_a_rank_that_never_began_to_beat_is_missed_too(watch):
    assert "rank 1 failed: nothing has been heard of it for 0.2 s: killed" in watch(2, silence=0.2).line()


def test_time_in_which_this_process_was_stopped_does_not_count_as_silence():
    """A process that is stopped for longer than the silence, and continued, finds the other still beating."""
    code = """
import threading, sys
import torch.distributed as dist
from sela_ext.training import heartbeat
heartbeat._PERIOD, heartbeat._KEEP = 0.05, 0.0
store, stop = dist.HashStore(), threading.Event()
def beat():
    count = 0
    while not stop.wait(0.3):
        count += 1
        store.set("beat/1", f"{count} x.py:1")
other = threading.Thread(target=beat)
heart = heartbeat.Heartbeat(store, 0, 2, silence=1.5)
other.start()
print("beating", flush=True)
sys.stdin.readline()
stop.wait(1.0)
stop.set()
other.join()
heart.close()
print("alive", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "beating\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)  # how long it is stopped is the point
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "alive\n"


def test_the_first_cause_is_everybodys(watch, alive):
    rank = watch(3)
    for other in (1, 2):
        alive(rank.store, other)
    rank.store.compare_set("first cause", "", "rank 2 failed: DataError: no picture")
    rank.store.compare_set("first cause", "", "rank 1 failed: because of rank 2")
    assert rank.line().endswith("ends because rank 2 failed: DataError: no picture")


def test_a_lost_launcher_ends_the_rank(watch, alive, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    rank = watch(2)
    alive(rank.store, 1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert "rank 0 failed: its launcher (process" in rank.line()


class BrokenStore:
    """A store that stops answering."""

    def __init__(self):
        self._store, self.broken = dist.HashStore(), False

    def __getattr__(self, name):
        if self.broken:
            raise dist.DistNetworkError("connection reset")
        return getattr(self._store, name)


def test_a_lost_store_is_blamed_on_the_neighbour_that_is_gone_or_on_who_keeps_it(watch, alive, monkeypatch):
    one, other = watch(2, store=BrokenStore()), watch(2, store=BrokenStore())
    one.store.broken = True
    assert one.line().endswith(
        "the store that rank 0 keeps for the ranks does not answer (DistNetworkError: connection reset)"
    )
    other.neighbour(1, os.getpid(), "long ago")
    other.heart._neighbours[1] = os.getpid(), "long ago"
    other.store.broken = True
    assert "rank 1 failed: it was killed" in other.line()


def test_an_error_of_this_rank_is_written_down_and_keeps_its_words(watch, alive):
    rank = watch(2)
    alive(rank.store, 1)
    error = DataError("image 7: expected a picture, found a poem")
    assert rank.heart.verdict(error) is None
    assert str(error) == "rank 0 of 2: image 7: expected a picture, found a poem"
    assert rank.store.get("first cause") == b"rank 0 failed: DataError: image 7: expected a picture, found a poem"


def test_a_collective_that_failed_because_of_another_rank_names_it(watch, alive):
    rank = watch(2)
    alive(rank.store, 1)
    rank.store.compare_set("first cause", "", "rank 1 failed: ValueError: no")
    found = rank.heart.verdict(RuntimeError("Connection closed by peer [127.0.0.1]:1"))
    assert isinstance(found, DistributedError)
    assert str(found) == "rank 0 of 2 ends because rank 1 failed: ValueError: no"


def test_a_collective_that_failed_inside_a_solve_names_it_too(watch, alive):
    rank = watch(2)
    alive(rank.store, 1)
    rank.neighbour(1, os.getpid(), "long ago")
    error = DistributedError("group: rank 0 of 2 cannot reach the others")
    error.__cause__ = RuntimeError("[gloo] Connection closed by peer")
    assert "rank 0 of 2 ends because rank 1 failed: it was killed" in str(rank.heart.verdict(error))


def test_sigterm_after_a_neighbour_died_is_the_neighbours_failure(watch, alive):
    rank = watch(2)
    alive(rank.store, 1)
    rank.neighbour(1, os.getpid(), "long ago")
    found = rank.heart.verdict(SystemExit(143))
    assert "rank 0 of 2 ends because rank 1 failed: it was killed" in str(found)


@pytest.mark.parametrize(
    ("error", "status", "name"), [(SystemExit(143), 143, "SIGTERM"), (KeyboardInterrupt(), 130, "SIGINT")]
)
def test_a_signal_ends_all_ranks_with_its_status(watch, alive, error, status, name):
    one = watch(2)
    alive(one.store, 1)
    assert one.heart.verdict(error) is None
    cause = one.store.get("first cause").decode()
    assert cause == f"rank 0 was stopped by {name}"
    assert status_of(cause) == status
    other = watch(2)
    alive(other.store, 1)
    other.store.compare_set("first cause", "", f"rank 1 was stopped by {name}")
    found = other.heart.verdict(RuntimeError("Connection closed by peer"))
    assert type(found) is type(error)
    assert not isinstance(found, SystemExit) or found.code == status


def test_sigterm_raises_while_the_heart_beats_and_is_as_before_afterwards(watch):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    rank = watch(1)
    with pytest.raises(SystemExit) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    rank.heart.verdict(caught.value)
    os.kill(os.getpid(), signal.SIGTERM)  # a rank that is ending is not disturbed
    rank.heart.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_processes_are_told_apart_by_their_start():
    assert started(os.getpid()).isdigit()
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert child.wait() == 0
    assert started(child.pid) == ""


def test_a_launcher_reads_the_first_cause_from_its_own_store(monkeypatch):
    monkeypatch.setattr(heartbeat, "_runs", 0)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    assert first_cause(store) is None
    heartbeat.connect("127.0.0.1", store.port).compare_set("first cause", "", "rank 1 failed: x")
    assert first_cause(store) == "rank 1 failed: x"
