"""The memory plan: what it counts, what it refuses, and that solves keep to it."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import sela_ext
from sela_ext import memory_plan
from sela_ext.assign import plan, storage
from sela_ext.assign.plan import WORKSPACE, available_memory, check_memory
from sela_ext.assign.shards import Shard
from sela_ext.assign.ties import break_ties
from sela_ext.errors import OptionError, ResourceError

GIB = 1 << 30
IMAGENET = (1_281_167, 3000)


def test_imagenet_in_sixteen_bits_takes_little_more_than_two_bytes_per_entry():
    assert 2.0 < memory_plan(*IMAGENET, dtype="float16").per_entry < 2.29
    assert 2.0 < memory_plan(*IMAGENET, source="file", storage="fixed16").per_entry < 2.33
    assert memory_plan(*IMAGENET, dtype="float16", method="anderson").per_entry < 2.09
    assert memory_plan(*IMAGENET, source="features").per_entry < 0.25
    assert memory_plan(*IMAGENET, dtype="float16").total < 9e9


def test_everything_is_counted():
    base = memory_plan(10_000, 1000)
    assert base.logits == 4 * 10**7
    assert base.copy == 0
    assert base.total == base.logits + base.extra
    assert memory_plan(10_000, 1000, storage="fixed16").copy == 10_000 * 2004
    assert memory_plan(10_000, 1000, stop="official").copy == 10_000 * 8000
    assert memory_plan(10_000, 1000, balance="exact").extra > base.extra
    assert memory_plan(10_000, 1000, weighted=True).vectors > base.vectors
    assert memory_plan(10_000, 1000, dtype="float64").vectors > base.vectors
    assert memory_plan(10_000, 1000, method="anderson").candidates == 0
    assert base.bounds == 10_000 * 64
    assert memory_plan(10_000, 1000, dtype="float64").bounds == 0
    assert memory_plan(10_000, 1000, dtype="float64", storage="fixed16").bounds == 10_000 * 64
    assert memory_plan(10_000, 1000, stop="official").bounds == 0
    assert memory_plan(10_000, 255).bounds == 0
    assert memory_plan(10_000, 1000, source="file").bounds == 0
    assert memory_plan(10_000, 1000, source="features", storage="float16").bounds == 10_000 * 64
    assert base.candidates < base.candidates_most
    assert memory_plan(10_000, 1000, source="file").logits == 0
    assert "16-bit copy" in memory_plan(10_000, 1000, storage="fixed16").describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"storage": "int8"}, "storage: expected one of"),
        ({"source": "web"}, "source: expected one of"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        memory_plan(10, 10, **options)
    with pytest.raises(OptionError, match="rows, cols: expected numbers >= 1, found 0 and 3"):
        memory_plan(0, 3)


def test_a_solve_that_does_not_fit_is_refused_with_a_remedy():
    large = memory_plan(*IMAGENET, storage="fixed16", balance="exact")
    with pytest.raises(ResourceError, match=r"expected 7.\d+ GiB beside the logits .* found 4.00 GiB") as refusal:
        check_memory(large, 4 * GIB)
    for remedy in ('storage="float32"', 'balance="argmax"', "FeatureLogits"):
        assert remedy in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ResourceError, match='method="anderson" or a machine with more memory'):
        check_memory(memory_plan(*IMAGENET, source="features"), GIB // 8)


def test_candidates_are_limited_by_what_is_left():
    large = memory_plan(*IMAGENET, source="features")
    assert check_memory(large, 100 * GIB) == np.inf
    tight = check_memory(large, int((large.extra + 100_000_000) / 0.95))
    assert 40 < tight < 50
    assert check_memory(memory_plan(100, 10), 1) == np.inf  # too small to look


def test_nobody_is_refused_for_chunk_bounds():
    wanted = memory_plan(*IMAGENET, dtype="float16", method="anderson")
    needed = wanted.extra - wanted.bounds
    assert check_memory(wanted, int(needed / 0.95) + 2) == np.inf
    with pytest.raises(ResourceError):
        check_memory(wanted, int(needed / 0.95) - 2)


def test_assign_asks_before_it_begins(monkeypatch):
    logits = np.broadcast_to(np.float16(0), (2_000_000, 200))
    monkeypatch.setattr(plan, "available_memory", lambda: 1 << 20)
    with pytest.raises(ResourceError, match=r"expected .* beside the logits for 2,000,000 x 200"):
        sela_ext.assign(logits)
    with pytest.raises(ResourceError, match='use storage="float32"'):
        sela_ext.assign(logits, storage="fixed16")


def test_few_candidates_make_newton_give_way(monkeypatch):
    rng = np.random.default_rng(0)
    centres, weight = rng.standard_normal((30, 16)), rng.standard_normal((16, 40)) / 2
    logits = ((centres[rng.integers(30, size=3000)] + 0.5 * rng.standard_normal((3000, 16))) @ weight).astype(
        np.float32
    )
    assert sela_ext.assign(logits).method == "newton"
    monkeypatch.setattr(storage, "check_memory", lambda wanted, available=None: 1.0)
    a = sela_ext.assign(logits, tol=1e-3)
    assert a.converged
    assert a.method == "anderson"
    assert "more than 0.5 of 40 entries" in a.reason


def make(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "proc", folder / "cgroup"


MEMINFO = {"proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 8 * GIB),
        ({}, None),
        (MEMINFO | {"proc/self/cgroup": "0::/\n"}, 8 * GIB),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/a/b\n",
                "cgroup/a/b/memory.max": "max\n",
                "cgroup/a/b/memory.current": "5\n",
                "cgroup/a/memory.max": f"{4 * GIB}\n",
                "cgroup/a/memory.current": f"{3 * GIB}\n",
                "cgroup/a/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file 3\n",
            },
            2 * GIB,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "12:cpu:/x\n5:memory:/x\n",
                "cgroup/memory/x/memory.limit_in_bytes": f"{2 * GIB}\n",
                "cgroup/memory/x/memory.usage_in_bytes": f"{GIB}\n",
                "cgroup/memory/x/memory.stat": f"cache 5\ntotal_inactive_file {GIB // 2}\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            },
            3 * GIB // 2,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/a\n",
                "cgroup/a/memory.max": f"{GIB}\n",
                "cgroup/a/memory.current": f"{2 * GIB}\n",
            },
            0,
        ),
    ],
    ids=["machine", "nothing", "root", "version-2", "version-1", "full"],
)
def test_available_memory_is_the_least_of_machine_and_groups(files, expected, tmp_path):
    assert available_memory(*make(tmp_path, files)) == expected


CHILD = """
import json, sys
import numpy as np
import sela_ext

def high():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

rows, cols, kind, options = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
sela_ext.assign(rng.standard_normal((3000, 50)).astype(np.float16))
open("/proc/self/clear_refs", "w").write("5")
before = high()
centres, weight = rng.standard_normal((300, 16)).astype(np.float32), rng.standard_normal((16, cols)).astype(np.float32)
if kind == "features":
    features = np.empty((rows, 16), np.float16)
else:
    logits = np.empty((rows, cols), np.float16)
for first in range(0, rows, 256):
    n = min(256, rows - first)
    f = centres[rng.integers(300, size=n)] + 0.5 * rng.standard_normal((n, 16)).astype(np.float32)
    if kind == "features":
        features[first : first + n] = f
    else:
        logits[first : first + n] = (0.75 if kind == "peaked" else 0.02) * (f @ weight)
if kind == "features":
    logits = sela_ext.FeatureLogits(features, 0.75 * weight.T)
    logits[:300]
    open("/proc/self/clear_refs", "w").write("5")
    before = high()
a = sela_ext.assign(logits, threads=2, **options)
print(json.dumps([high() - before, a.method, a.converged, a.storage]))
"""


@pytest.mark.parametrize(
    ("kind", "gate", "options"),
    [
        ("peaked", 2.2, {}),
        ("smooth", 2.1, {}),
        ("features", 0.3, {}),
        ("features", 2.2, {"storage": "fixed16"}),
    ],
    ids=["peaked", "smooth", "computed", "computed-once"],
)
def test_a_solve_keeps_to_bytes_per_entry(kind, gate, options):
    rows, cols = 60_000, 2000
    found = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, json.dumps([rows, cols, kind, options])],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    grown, method, converged, stored = json.loads(found.stdout)
    assert converged
    assert method == ("anderson" if kind == "smooth" else "newton")
    planned = memory_plan(
        rows,
        cols,
        dtype="float16" if kind != "features" else "float32",
        source="features" if kind == "features" else "memory",
        storage=options.get("storage", "float32"),
        method=method,
    )
    assert stored == options.get("storage", "float16" if kind != "features" else "float32")
    assert grown <= gate * rows * cols + WORKSPACE  # what does not grow with the rows
    assert grown <= 1.02 * planned.total


def test_ties_take_no_memory_per_entry():
    logits = np.broadcast_to(np.float32(0), (100_000, 64))
    labels, target = np.zeros(100_000, np.int32), np.full(64, 1 / 64)
    tracemalloc.start()
    changed = break_ties(logits, labels, np.zeros(64), 25.0, target, Shard())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.ptp(np.bincount(labels)) <= 1
    assert changed == (labels > 0).sum()
    assert peak < 15e6  # 4 bytes for each entry would be 26 MB
