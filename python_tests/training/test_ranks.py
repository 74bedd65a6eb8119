"""Ranks that meet, die, hang and fail."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sela_ext.errors import DistributedError, OptionError
from sela_ext.training.launch import launch

HERE = Path(__file__).parent
WORK = HERE / "rank_work.py"
IN_TIME = 15


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(HERE))


def run_ranks(what, *, ranks=2, victim=1, when=5, timeout=60, silence=60):
    from rank_work import work

    return launch(work, (what, victim, when, timeout, silence), ranks)


def processes_of(printed):
    return [int(pid) for pid in re.findall(r"is process (\d+)", printed)]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def assert_all_gone(pids, seconds=5):
    assert pids
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)], "orphans"


def failure_of(capfd, what, **options):
    """The error of a run in which `what` happens; its ranks are gone in time, counted from the fault."""
    with pytest.raises(DistributedError) as caught:
        run_ranks(what, **options)
    ended = time.monotonic()
    printed, errors = capfd.readouterr()
    pids = processes_of(printed)
    assert len(pids) == options.get("ranks", 2), (printed, errors)
    assert_all_gone(pids)
    began = float(re.search(r"fault at (\S+)", printed)[1])
    patience = options.get("silence", 0) if what == "stop" else options.get("timeout", 0)
    assert ended - began < IN_TIME + patience
    return str(caught.value), errors


def hear_signals():
    """Those who started the tests in the background may have them ignore SIGINT, which children take over."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def started(*arguments, torchrun=False):
    """A process of rank_work.py, and the processes of its ranks when both are at work."""
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if torchrun else []
    command = [sys.executable, "-P", *runner, str(WORK), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hear_signals
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for_ranks(process):
    pids = []
    while len(pids) < 2:
        line = process.stdout.readline()
        assert line, "ended before its ranks met"
        pids += processes_of(line)
    return pids


def test_ranks_meet_and_exchange_rows_of_any_number():
    assert run_ranks("nothing", ranks=3) == ([1, 2, 3], {"from": 0})


def test_a_killed_rank_ends_the_run_and_is_named(capfd):
    message, errors = failure_of(capfd, "kill", victim=0)
    assert re.match(r"rank 0 of 2 failed: it was killed by SIGKILL .*; continue .* with resume$", message)
    assert "rank 1 of 2" in errors or not errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_rank_killed_while_the_others_compute_is_noticed(capfd):
    message, errors = failure_of(capfd, "busy", ranks=3, victim=2)
    assert message.startswith("rank 2 of 3 failed: it was killed by SIGKILL")
    assert re.search(r"rank 0 of 3: ends because rank 2 failed: it was killed \(process \d+ on .* is gone\)", errors)
    assert re.search(r"rank 1 of 3: ends because rank 2 failed", errors)


def test_a_rank_that_raises_ends_the_run_and_is_named_and_its_traceback_shown(capfd):
    message, errors = failure_of(capfd, "raise")
    assert message.startswith("rank 1 of 2 failed: ValueError: one and one is three")
    assert errors.count("Traceback") == 1
    assert 'raise ValueError("one and one is three")' in errors


@pytest.mark.slow
def test_a_user_error_of_one_rank_keeps_its_words(capfd):
    message, errors = failure_of(capfd, "data")
    assert message.startswith("rank 1 of 2 failed: DataError: image 7: expected a picture, found a poem")
    assert "Traceback" not in errors


def test_an_error_of_all_ranks_is_that_of_the_run():
    with pytest.raises(OptionError, match=r"^lr: expected a number > 0, found -1$"):
        run_ranks("no option")


def test_a_stopped_rank_is_an_error_after_the_silence_that_was_stated(capfd):
    message, _ = failure_of(capfd, "stop", silence=3)
    assert re.match(r"rank 1 of 2 failed: nothing has been heard of it for 3 s \(process \d+ on ", message)


def test_a_rank_that_hangs_while_its_heart_beats_is_named_with_its_line_after_the_collectives_timeout(capfd):
    message, _ = failure_of(capfd, "hang", timeout=4)
    assert re.match(r"rank 0 of 2 failed: .*Timed out.*; rank 1 is at rank_work\.py:\d+", message), message


@pytest.mark.slow
def test_ranks_that_differ_find_out_at_the_start():
    with pytest.raises(DistributedError, match=r"same options on all 2 ranks.*rank 1 has seed: 1, on rank 0 0"):
        run_ranks("differ")


def test_ranks_whose_launcher_is_killed_are_killed():
    with started("hang") as process:
        pids = wait_for_ranks(process)
        process.kill()
        process.wait()
        assert_all_gone(pids)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_to_the_launcher_lets_the_ranks_save_and_is_its_status(number, tmp_path):
    with started("save", tmp_path) as process:
        pids = wait_for_ranks(process)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=10)
        assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), printed
        assert_all_gone(pids)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved by 0", "saved by 1"], printed


@pytest.mark.slow
def test_ranks_that_are_stopped_and_continued_together_go_on(tmp_path):
    with started("save", tmp_path) as process:
        pids = wait_for_ranks(process)
        process.send_signal(signal.SIGTSTP)
        deadline = time.monotonic() + 10
        while {state_of(pid) for pid in (*pids, process.pid)} != {"T"} and time.monotonic() < deadline:
            time.sleep(0.05)
        assert {state_of(pid) for pid in (*pids, process.pid)} == {"T"}
        process.send_signal(signal.SIGCONT)
        while "T" in {state_of(pid) for pid in pids} and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
        assert process.returncode == 143


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_ranks_started_by_torchrun_meet_again_in_a_second_run_and_name_the_one_that_is_killed_in_it():
    with started("kill", 1, torchrun=True) as process:
        printed, _ = process.communicate(timeout=100)
        ended = time.monotonic()
    assert process.returncode == 1, "torchrun's own"
    assert printed.count("result ([1, 2], {'from': 0})") == 2
    assert_all_gone(processes_of(printed))
    assert re.search(r"rank 0 of 2:? ends because rank 1 failed: it was killed", printed), printed
    assert ended - float(re.search(r"fault at (\S+)", printed)[1]) < IN_TIME


@pytest.mark.slow
def test_ranks_started_by_hand_name_the_one_that_is_killed_though_it_keeps_the_store():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", WORK, "kill", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **common, "RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        (printed, _), (_, errors) = [rank.communicate(timeout=100) for rank in ranks]
        ended = time.monotonic()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 6]
    assert re.search(r"rank 1 of 2:? ends because rank 0 failed: it was killed", errors)
    assert ended - float(re.search(r"fault at (\S+)", printed)[1]) < IN_TIME


PLAIN_SCRIPT = """
import os, sys
import numpy as np
from sela_ext.training.launch import launch

print("the script runs", flush=True)

class Shape:
    def __init__(self, side):
        self.side = side
    def area(self):
        return self.side ** 2

def work(array, opened, shape):
    from rank_work import describe
    return (*describe(array, opened, shape), Shape(5))

np.save(sys.argv[1], np.arange(7))
array = np.ones(1001, np.float32)
*found, returned, made = launch(work, (array, np.load(sys.argv[1], mmap_mode="r"), Shape(3)), 2)
print(found, returned[:2].tolist(), type(made) is Shape, made.area(), array[0])
"""


def test_a_plain_script_may_use_what_it_defines_and_is_run_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PLAIN_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "numbers.npy"], capture_output=True, text=True, timeout=100, env=environment
    )
    assert done.stdout == "the script runs\n[1001.0, 'memmap', 3, 9, 0] [2.0, 1.0] True 25 1.0\n", done.stderr
    assert not done.stderr


def test_arguments_that_cannot_be_sent_are_an_error_that_says_so():
    from rank_work import work

    with pytest.raises(OptionError, match=r"^devices: expected data and options that can be sent.*; give a path"):
        launch(work, (generator for generator in "a"), 2)
