"""Ranks that meet, die, hang and fail."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORK = Path(__file__).with_name("rank_work.py")
IN_TIME = 15


def start(what, *, ranks=2, victim=1, when=5, timeout=60, silence=60, torchrun=False):
    program = [str(WORK), *map(str, (ranks, what, victim, when, timeout, silence))]
    command = [sys.executable, "-P", *program]
    if torchrun:
        command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += program
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def processes_of(printed):
    return [int(pid) for pid in re.findall(r"is process (\d+)", printed)]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def ended(process, what, seconds=60):
    """Status, error lines, and seconds it took; nobody is left."""
    began = time.monotonic()
    printed, errors = process.communicate(timeout=seconds)
    taken = time.monotonic() - began
    pids = processes_of(printed)
    assert len(pids) >= 2, (what, printed, errors)
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if is_running(pid)], "orphans"
    return process.returncode, errors, taken


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_meet_and_exchange_rows_of_any_number(ranks):
    printed, errors = start("nothing", ranks=ranks).communicate(timeout=60)
    assert f"result ({list(range(1, ranks + 1))}, {float(ranks)}, {{'from': 0}})" in printed, errors


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_is_named(victim):
    status, errors, taken = ended(start("kill", victim=victim), "kill")
    assert status == 6
    assert re.search(rf"DistributedError: .*rank {victim} ", errors)
    assert "killed" in errors
    assert taken < IN_TIME


def test_a_rank_killed_while_the_others_compute_is_noticed():
    status, errors, taken = ended(start("busy", ranks=3, victim=2), "busy")
    assert status == 6
    assert "rank 2" in errors
    assert taken < IN_TIME


@pytest.mark.parametrize(("what", "cause"), [("raise", "one and one is three"), ("data", "found a poem")])
def test_a_rank_that_raises_ends_the_run_and_its_error_is_the_one_shown(what, cause):
    status, errors, taken = ended(start(what, ranks=3), what)
    assert status == 6
    assert re.search(rf"DistributedError: rank 1 of 3.*{cause}", errors)
    assert taken < IN_TIME


def test_a_stopped_rank_is_an_error_after_the_silence_that_was_stated():
    process = start("stop", silence=4)
    status, errors, taken = ended(process, "stop")
    assert status == 6
    assert re.search(r"rank 1 .*nothing has been heard of it for 4 s", errors)
    assert taken < IN_TIME + 4


def test_a_rank_that_hangs_while_its_heart_beats_is_an_error_after_the_collectives_timeout():
    status, errors, taken = ended(start("hang", timeout=4, silence=60), "hang")
    assert status == 6
    assert "DistributedError" in errors
    assert taken < IN_TIME + 4


def test_ranks_that_differ_find_out_at_the_start():
    status, errors, _ = ended(start("differ"), "differ")
    assert status == 6
    assert re.search(r"expected the same options on all 2 ranks.*rank 1 has seed: 1, on rank 0 0", errors)


def test_ranks_whose_launcher_is_killed_end_by_themselves():
    process = start("hang", timeout=60)
    pids = []
    for line in process.stdout:
        pids += processes_of(line)
        if len(pids) == 2:
            break
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    began = time.monotonic()
    while any(map(is_running, pids)) and time.monotonic() - began < IN_TIME:
        time.sleep(0.2)
    assert not [pid for pid in pids if is_running(pid)]


def test_ranks_started_by_torchrun_name_the_one_that_was_killed():
    status, errors, taken = ended(start("kill", torchrun=True), "torchrun")
    assert status != 0
    assert re.search(r"rank 0 of 2.* ends because rank 1 failed: it was killed", errors)
    assert taken < IN_TIME + 10


def test_ranks_started_by_torchrun_meet():
    printed, errors = start("nothing", torchrun=True).communicate(timeout=60)
    assert printed.count("result ([1, 2], 2.0, {'from': 0})") == 2, errors
