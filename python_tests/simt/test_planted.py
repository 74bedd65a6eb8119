"""The checker is checked: every planted bug (csrc/simt/planted.cu) is found by the layer that should find it.

A bug that breaks a rule is an error of the runner. Other bugs show in the values: some schedule's differ from those of
the kernel without the bug. The sanitizers find the rest, and name the line.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "simt" / "planted.cu"

# What the runner says, in the variants that do not find the bug earlier and in another way.
ERRORS = {
    "barrier_in_a_branch": "barrier divergence: .* 16 of 64 threads, thread .* has left the kernel",
    "two_barriers": "barrier divergence: waits at __syncthreads here, thread .* at csrc/simt/planted.cu:",
    "past_shared": "wrote outside of shared memory, next to values",
    "before_shared": "wrote outside of shared memory, next to dynamic shared memory",
    "past_array": r"index 64 is outside of 'float \[64\]'",
    "past_dynamic_shared": "wrote outside of shared memory, next to dynamic shared memory",
    "wrong_mask": r"lane \d+ is not in its own mask 0x0000ffff of __shfl_xor_sync",
    "lanes_disagree": r"lanes disagree: lane \d+ waits at __shfl_xor_sync .* at __shfl_down_sync",
    "lanes_left": "names lane 16, which has left the kernel",
    "deadlock": "deadlock: __syncwarp .* names lane 16, which waits at __syncthreads",
    "misaligned_copy": "copy_async16: expected addresses that are multiples of 16",
    "misaligned_load": "a misaligned access: .*float4.* multiple of 16",
    "misaligned_shared": "a misaligned access: .*float4.* multiple of 16",
}

# Errors that are noticed at the next wait of the thread, or at one of two lines.
NOTICED_LATER = {"past_shared", "before_shared", "past_dynamic_shared", "two_barriers"}

# Values that show the bug without a sanitizer, in at least one of the schedules.
WRONG_VALUES = [
    *("missing_barrier", "missing_barrier_before_reuse", "warp_race", "missing_warp_barrier", "block_order"),
    *("unwritten_shared", "inactive_lane", "early_read", "copy_race"),
]

# What a sanitizer prints, and of which line; the process ends. AddressSanitizer sees nothing of the 7 bytes before an
# object: the runner does.
RACE = "WARNING: ThreadSanitizer: data race"
REPORTS = {
    "thread": {
        "missing_barrier": RACE,
        "missing_barrier_before_reuse": RACE,
        "warp_race": RACE,
        "missing_warp_barrier": RACE,
        "shuffle_for_a_barrier": RACE,
        "plain_add": RACE,
        "block_order": RACE,
        "copy_race": RACE,
    },
    "address": {
        "one_too_many": "ERROR: AddressSanitizer: heap-buffer-overflow",
        "write_past_the_end": "ERROR: AddressSanitizer: heap-buffer-overflow",
        "past_shared": "ERROR: AddressSanitizer: use-after-poison",
        "past_dynamic_shared": "ERROR: AddressSanitizer: use-after-poison",
        "past_array": "runtime error: index 64 out of bounds",
        "misaligned_load": "runtime error: .*misaligned address",
        "misaligned_shared": "runtime error: .*misaligned address",
    },
}
BUGS = sorted({*ERRORS, *WRONG_VALUES, *REPORTS["thread"], *REPORTS["address"]})

# In a sanitised variant the sanitizer comes first.
VARIANT = Path(os.environ.get("SELA_SIMT_BUILD", "plain")).name
BY_SANITIZER = REPORTS.get(VARIANT, {})
BY_RUNNER = [bug for bug in ERRORS if bug not in BY_SANITIZER]
BY_VALUES = [bug for bug in WRONG_VALUES if bug not in BY_SANITIZER]

RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_simt", sys.argv[1])
simt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simt)
simt.set_schedule(int(sys.argv[3]))
simt.planted(sys.argv[2], with_bug=False)
simt.planted(sys.argv[2])
"""


def line_of(bug):
    """The line of the source that ends in "BUG <bug>"."""
    lines = [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if line.endswith(f"BUG {bug}")]
    assert len(lines) == 1, f"expected one line of {SOURCE.name} that ends in BUG {bug}, found {lines}"
    return lines[0]


def test_every_planted_bug_is_found_in_some_way(simt):
    assert sorted(simt.planted_names()) == BUGS


def test_the_folder_of_a_variant_holds_that_variant(simt):
    assert simt.variant == VARIANT


@pytest.mark.parametrize("bug", BUGS)
def test_a_kernel_without_its_bug_gives_the_same_values_in_every_order(simt, bug):
    values = []
    for seed in range(4):
        simt.set_schedule(seed)
        values.append(np.array(simt.planted(bug, with_bug=False)))
    simt.set_schedule(0)
    assert np.isfinite(values[0]).all()
    for other in values[1:]:
        np.testing.assert_array_equal(other, values[0])


@pytest.mark.parametrize("bug", BY_RUNNER)
def test_the_runner_names_the_error_and_its_line(simt, schedule, bug):
    with pytest.raises(simt.SimtError, match=ERRORS[bug]) as caught:
        simt.planted(bug)
    file, line, rest = str(caught.value).split(":", 2)
    assert file.startswith("csrc/simt/")
    assert f" {bug}, block (" in rest
    if bug not in NOTICED_LATER:
        assert (file, int(line)) == ("csrc/simt/planted.cu", line_of(bug))


@pytest.mark.parametrize("bug", BY_VALUES)
def test_a_race_changes_the_values_in_some_order(simt, bug):
    right = np.array(simt.planted(bug, with_bug=False))
    found = []
    for seed in range(8):
        simt.set_schedule(seed)
        found.append(np.array_equal(simt.planted(bug), right, equal_nan=True))
    simt.set_schedule(0)
    assert not all(found)


@pytest.mark.skipif(VARIANT == "plain", reason="`nox -s simt` runs this with the sanitizers")
@pytest.mark.parametrize("bug", BY_SANITIZER)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_sanitizer_names_the_bug_and_its_line(simt, bug, seed):
    done = subprocess.run(
        [sys.executable, "-c", RUN, simt.__file__, bug, str(seed)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    report = done.stdout + done.stderr
    assert re.search(BY_SANITIZER[bug], report), report
    assert re.search(rf"csrc/simt/planted\.cu:{line_of(bug)}\b", report), report
