"""The Slurm script, with programs in the place of Slurm's that note what they are asked."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "sela.sbatch"
PROGRAMS = {
    # Runs what it is given, in the background as Slurm's daemon does, and notes the process that scancel means.
    "srun": 'shift; "$@" & echo $! > "$NOTES/step.new"; mv "$NOTES/step.new" "$NOTES/step"; wait $!',
    "torchrun": 'echo "torchrun $*" >> "$NOTES/calls"; '
    'trap "echo saved >> $NOTES/calls; exit 143" TERM; touch "$NOTES/ready"; '
    'while [ ! -e "$NOTES/finish" ]; do sleep 0.05; done; exit "$(cat "$NOTES/finish")"',
    "scancel": 'echo "scancel $*" >> "$NOTES/calls"; kill -TERM "$(cat "$NOTES/step")"',
    "scontrol": 'echo "scontrol $*" >> "$NOTES/calls"; [ "$1" = show ] && printf "far01\\nfar02\\n"; true',
}


@pytest.fixture
def job(tmp_path):
    """Starts the script as a job of two machines."""
    for name, body in PROGRAMS.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    jobs = []

    def begin(**environment):
        slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "far[01-02]", "SLURM_JOB_NUM_NODES": "2"}
        given = {"DATA": "/data/my photos", "OUT": str(tmp_path / "run"), "SLURM_GPUS_ON_NODE": "8", **environment}
        path = f"{tmp_path}:{os.environ['PATH']}"
        jobs.append(
            subprocess.Popen(
                ["bash", SCRIPT],
                env={**slurm, **given, "PATH": path, "NOTES": str(tmp_path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return jobs[-1]

    yield begin
    (tmp_path / "finish").write_text("1")
    for one in jobs:
        one.communicate(timeout=30)


def wait_for(path, seconds=30):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def calls(folder):
    return (folder / "calls").read_text().splitlines()


def test_each_machine_runs_torchrun_which_meets_the_others_at_the_first(job, tmp_path):
    (tmp_path / "finish").write_text("0")
    assert job(SELA_OPTIONS="--clusters 3000 --epochs 7").wait(30) == 0
    assert calls(tmp_path) == [
        "scontrol show hostnames far[01-02]",
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint far01:21234 --rdzv-id 41234-0 "
        f"--max-restarts 0 -m sela_ext train --data /data/my photos --out {tmp_path}/run --resume --no-progress "
        "--clusters 3000 --epochs 7",
    ]


def test_before_the_time_limit_the_run_saves_and_the_job_is_requeued(job, tmp_path):
    process = job()
    wait_for(tmp_path / "ready")
    wait_for(tmp_path / "step")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 0
    assert calls(tmp_path)[2:] == ["scancel --signal=TERM 41234", "saved", "scontrol requeue 41234"]


def test_a_run_that_fails_fails_the_job_and_is_not_requeued(job, tmp_path):
    (tmp_path / "finish").write_text("6")
    assert job().wait(30) == 6
    assert not any("requeue" in call for call in calls(tmp_path))


@pytest.mark.parametrize(("restarts", "left"), [("0", True), ("1", False)])
def test_only_a_requeued_job_takes_away_what_it_held_itself(job, tmp_path, restarts, left):
    (tmp_path / "finish").write_text("0")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock.held").touch()
    assert job(SLURM_RESTART_COUNT=restarts).wait(30) == 0
    assert (tmp_path / "run" / ".lock.held").exists() == left


def test_a_job_without_data_says_how_to_name_it(job):
    process = job(DATA="")
    assert process.wait(30) != 0
    assert "DATA: name the images" in process.stdout.read()
