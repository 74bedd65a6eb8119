"""D23: whole runs of two ranks in which one is killed, stopped, or fails: all end, and say who it was."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

IN_TIME = 15
SILENCE = 4
OPTIONS = (
    "--data digits --clusters 10,10 --epochs 2 --label-passes 2 --batch-size 128 --threads 1 --no-progress "
    f"--rank-silence {SILENCE}"
).split()
LONG = ("--epochs", "1000")  # it will not come to its end


def state_of(pid):
    """Letter of the state; Z for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def hear_signals():
    """Those who started the tests in the background may have them ignore SIGINT, which children take over."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Observed:
    """A run of two ranks by torchrun or `devices=2`, found again by a word in the environment of its processes."""

    def __init__(self, out, torchrun=False, fault="", more=()):
        self.word = uuid.uuid4().hex
        self.log = out.parent / f"said {self.word}.txt"
        runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if torchrun else []
        more = [*more, *([] if torchrun else ["--devices", "2"])]
        command = [sys.executable, "-P", *runner, "-m", "sela_ext", "train", "--out", str(out), *OPTIONS, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SELA_TEST_WORD": self.word, "SELA_FAULT": fault}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=out.parent, preexec_fn=hear_signals
            )

    def processes(self):
        """All that live, by their rank; None for the launcher."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and state_of(entry.name) != "Z":
                try:
                    words = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if f"SELA_TEST_WORD={self.word}".encode() in words:
                    rank = [word[5:].decode() for word in words if word.startswith(b"RANK=")]
                    found[int(entry.name)] = int(rank[0]) if rank else None
        return found

    def wait_for(self, what, seconds):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def rank(self, number):
        """The process of a rank, when both are there."""
        found = {}

        def both():
            found.update({rank: pid for pid, rank in self.processes().items()})
            return {0, 1} <= {*found} or self.process.poll() is not None

        self.wait_for(both, 120)
        return found[number]

    def said(self):
        return self.log.read_text(errors="replace")

    def end(self):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(**options):
        runs.append(Observed(tmp_path / "run", **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def ends_in_time(start, place, count, what, victim, torchrun):
    """The run in which this happens ends in time after it, its ranks with it, and says so."""
    run = start(torchrun=torchrun, fault=f"{place}:{count}:{what}:{victim}")
    pid = run.rank(victim)
    if what == "raise":
        run.wait_for(lambda: "planted" in run.said(), 120)
    else:
        run.wait_for(lambda: state_of(pid) in ("T" if what == "stop" else "ZX"), 120)
    run.wait_for(lambda: not run.processes(), IN_TIME + (SILENCE if what == "stop" else 0))
    status, said = run.process.wait(5), run.said()
    assert status == (1 if torchrun else 6), said  # torchrun has a status of its own
    cause = {
        "kill": "it was killed",
        "stop": f"nothing has been heard of it for {SILENCE} s",
        "raise": f"RuntimeError: a fault planted {place}",
    }[what]
    if torchrun:  # the other rank speaks for itself
        expected = rf"^sela: error: rank {1 - victim} of 2:? ends because rank {victim} failed: {cause}"
    else:
        expected = rf"^sela: error: rank {victim} of 2 failed: {cause}"
    assert re.search(expected, said, re.M), said


def test_d23_a_rank_killed_inside_a_label_pass_ends_the_run(start):
    ends_in_time(start, "inside label pass", 1, "kill", 1, torchrun=False)


def test_d23_a_rank_killed_between_steps_ends_the_run_under_torchrun(start):
    ends_in_time(start, "after step", 8, "kill", 1, torchrun=True)


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.parametrize("what", ["kill", "stop", "raise"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("place", "count"), [("after step", 8), ("inside label pass", 1), ("inside evaluation", 1)])
def test_d23_a_rank_that_goes_missing_anywhere_ends_the_run(start, place, count, what, victim, torchrun):
    ends_in_time(start, place, count, what, victim, torchrun)


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.parametrize("place", ["before labels", "before report"])
@pytest.mark.parametrize("what", ["kill", "stop", "raise"])
def test_d23_the_first_rank_going_missing_while_the_others_wait_for_it_ends_the_run(start, place, what, torchrun):
    ends_in_time(start, place, 1, what, 0, torchrun)


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_with_resume(start, number, torchrun, tmp_path):
    run = start(torchrun=torchrun, more=LONG)
    metrics = tmp_path / "run" / "metrics.jsonl"
    run.wait_for(lambda: metrics.exists() and '"label_pass"' in metrics.read_text(), 120)
    run.process.send_signal(number)
    run.wait_for(lambda: set(run.processes().values()) <= {None}, 10)
    if not torchrun:
        assert run.process.wait(5) == 128 + number
    assert "checkpoint written; continue with resume" in run.said()
    assert any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_a_launcher_that_is_killed_takes_its_ranks_along(start, torchrun, tmp_path):
    run = start(torchrun=torchrun, more=LONG)
    run.wait_for((tmp_path / "run" / ".lock").exists, 120)
    run.process.kill()
    run.wait_for(lambda: not run.processes(), IN_TIME)


@pytest.mark.slow
def test_a_second_run_in_the_folder_of_the_first_is_refused(start, tmp_path):
    run = start(more=LONG)
    lock = tmp_path / "run" / ".lock"
    run.wait_for(lambda: lock.exists() and lock.read_text(), 120)
    other = Observed(tmp_path / "run", more=["--overwrite"])
    try:
        other.process.wait(120)
        assert other.process.returncode == 2
        assert (
            f"sela: error: out: expected a folder that no run is using, found {tmp_path / 'run'} in use by process "
            in other.said()
        )
        assert str(run.rank(0)) in other.said()
    finally:
        other.end()
