"""Logits in mapped files: the same bits as in memory, little of them resident, and files that are cut off."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext.assign import mapped, sources, storage
from sela_ext.assign.mapped import MappedRows
from sela_ext.assign.sources import logits_pass
from sela_ext.errors import DataError
from sela_ext.kernels import find_candidates


def peaked(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    centres, weight = rng.standard_normal((30, 16)), rng.standard_normal((16, cols)) / 4
    features = centres[rng.integers(30, size=rows)] + 0.3 * rng.standard_normal((rows, 16))
    return (2 * features @ weight).astype(np.float32)


@pytest.fixture
def small_parts(monkeypatch):
    """Files of any size count as large, and are read in parts of 128 rows."""
    monkeypatch.setattr(mapped, "SMALLEST", 1)
    monkeypatch.setattr(mapped, "PART_BYTES", 1)


def on_disk(tmp_path, logits):
    np.save(tmp_path / "logits.npy", logits)
    return np.load(tmp_path / "logits.npy", mmap_mode="r")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("rows", [1, 128, 1001])
def test_a_pass_in_parts_gives_the_bits_of_one_over_everything(rows, dtype, tmp_path, small_parts):
    logits = peaked(rows, 33).astype(dtype)
    found = on_disk(tmp_path, logits)
    g, weights, before = np.linspace(-1, 1, 33), np.linspace(0.1, 2, rows), np.zeros(rows)
    options = {"scale": 25.0, "row_weights": weights, "reference": before, "want_labels": True, "keep": 12.0}
    for every in (1, 3):
        a = logits_pass(found, g, every=every, **options)
        b = logits_pass(logits, g, every=every, **options)
        assert np.array_equal(a.exact, b.exact)
        assert np.array_equal(a.lse, b.lse)
        assert np.array_equal(a.labels, b.labels)
        assert a.objective == b.objective
        assert np.array_equal(a.candidates.offsets(), b.candidates.offsets())
        assert np.array_equal(a.candidates.values(), b.candidates.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"balance": "exact"}, {"method": "anderson"}, {"storage": "fixed16"}, {"relax": 0.1}],
    ids=lambda options: "-".join(options.values() if "relax" not in options else ["relax"]) or "plain",
)
def test_a_solve_of_a_file_is_that_of_the_array(options, tmp_path, small_parts):
    logits = peaked(2001, 20)
    a = sela_ext.assign(on_disk(tmp_path, logits), **options)
    b = sela_ext.assign(logits, **options)
    assert a.converged
    assert np.array_equal(a.labels, b.labels)
    assert np.array_equal(a.potential, b.potential)
    assert a.passes == b.passes


@pytest.mark.parametrize("kind", ["memmap", "view", "plain", "torch", "from_file"])
def test_maps_are_found_behind_any_array(kind, tmp_path, small_parts):
    logits = peaked(500, 20)
    found = on_disk(tmp_path, logits)
    if kind == "from_file":
        logits.tofile(tmp_path / "raw")
        given = torch.from_file(str(tmp_path / "raw"), shared=False, size=500 * 20).view(500, 20)
    else:
        given = {
            "memmap": found,
            "view": found[100:400],
            "plain": np.asarray(found),
            "torch": torch.from_numpy(np.load(tmp_path / "logits.npy", mmap_mode="c")),
        }[kind]
    rows = MappedRows.find(given, "logits")
    assert rows is not None
    assert os.path.basename(rows.path) in ("logits.npy", "raw")
    assert rows.rows == len(given)
    a, b = sela_ext.assign(given), sela_ext.assign(given.clone() if "torch" in str(type(given)) else np.array(given))
    assert np.array_equal(np.asarray(a.labels), np.asarray(b.labels))


def test_arrays_in_memory_are_no_maps(small_parts):
    for array in (peaked(500, 20), torch.zeros(500, 20), np.zeros((1, 1)), torch.zeros(64, 8).share_memory_()):
        rows = MappedRows.find(array, "logits")
        assert rows is None or rows.path.startswith("/dev/shm")


def test_small_files_are_read_as_a_whole(tmp_path):
    assert MappedRows.find(on_disk(tmp_path, peaked(500, 20)), "logits") is None


def test_parts_are_asked_for_ahead_and_given_back(tmp_path, small_parts, monkeypatch):
    logits = on_disk(tmp_path, peaked(500, 64))
    calls = []
    monkeypatch.setattr(MappedRows, "ahead", lambda self, a, b: calls.append(("ahead", a, b)))
    monkeypatch.setattr(MappedRows, "done", lambda self, a, b: calls.append(("done", a, b)))
    read = [(first, len(block)) for first, block in sources.array_parts(logits)]
    assert read == [(0, 128), (128, 128), (256, 128), (384, 116)]
    assert calls[:4] == [("ahead", 128, 256), ("done", 0, 128), ("ahead", 256, 384), ("done", 128, 256)]


def test_advice_never_leaves_the_rows(tmp_path, small_parts, monkeypatch):
    asked = []
    monkeypatch.setattr(mapped, "_madvise", lambda: lambda *given: asked.append(given))
    rows = MappedRows.find(on_disk(tmp_path, peaked(5000, 64)), "logits")
    end = rows.address + 5000 * rows.stride
    for first, last in ((0, 128), (128, 4096), (4900, 9999), (9999, 12_000), (0, 1)):
        rows.ahead(first, last)
        rows.done(first, last)
    assert asked
    for begin, length, _ in asked:
        assert begin % mapped.PAGE == 0
        assert length % mapped.PAGE == 0
        assert rows.address <= begin < begin + length <= end


def test_changes_in_a_private_map_are_kept(tmp_path, small_parts):
    logits = peaked(3000, 64)
    on_disk(tmp_path, logits)
    private = np.load(tmp_path / "logits.npy", mmap_mode="c")
    private[:, 3] += 1.0
    a = sela_ext.assign(private)
    changed = logits.copy()
    changed[:, 3] += 1.0
    assert np.array_equal(private, changed)
    assert np.array_equal(a.labels, sela_ext.assign(changed).labels)


def test_a_file_that_is_cut_off_is_refused_before_it_is_read(tmp_path, small_parts):
    logits = on_disk(tmp_path, peaked(2000, 64))
    os.truncate(tmp_path / "logits.npy", 100_000)
    with pytest.raises(
        DataError, match=r"expected 512,128 bytes in .*logits\.npy for 2,000 rows, found 100,000"
    ) as refusal:
        sela_ext.assign(logits)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_cut_off_between_two_passes_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALLEST", 0)  # a map that one part holds
    logits = on_disk(tmp_path, peaked(2000, 64))

    def cut(entry):
        os.truncate(tmp_path / "logits.npy", 511_000)

    with pytest.raises(DataError, match=r"for 2,000 rows, found 511,000"):
        sela_ext.assign(logits, method="sinkhorn", tol=0, max_passes=3, progress=cut)


def test_a_file_that_is_deleted_meanwhile_lives_on(tmp_path, small_parts):
    logits = peaked(1000, 30)
    found = on_disk(tmp_path, logits)
    os.unlink(tmp_path / "logits.npy")
    assert np.array_equal(sela_ext.assign(found).labels, sela_ext.assign(logits).labels)


def test_auto_takes_a_copy_of_a_file_that_memory_cannot_hold(tmp_path, small_parts, monkeypatch):
    logits = peaked(4000, 100)
    found = on_disk(tmp_path, logits)
    free = {"bytes": 1 << 40}
    monkeypatch.setattr(storage, "available_memory", lambda: free["bytes"])
    assert sela_ext.assign(found).storage == "float32"
    free["bytes"] = logits.nbytes - 1
    a = sela_ext.assign(found)
    assert a.storage == "fixed16"
    assert "a file larger than memory, solved on a 16-bit copy" in a.reason
    assert a.error <= 1e-4
    assert sum("bits" not in entry for entry in a.history) <= 2
    fine = sela_ext.assign(found, tol=1e-6)
    assert fine.storage == "float32"
    assert "tol is below" in fine.reason

    def refuse(plan, available=None):
        if plan.copy:
            raise storage.ResourceError("no room")
        return np.inf

    monkeypatch.setattr(storage, "check_memory", refuse)
    without = sela_ext.assign(found)
    assert without.storage == "float32"
    assert "would not fit" in without.reason


CHILD = """
import resource, sys
import numpy as np
import sela_ext

def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

logits = np.load(sys.argv[1], mmap_mode="r")
sela_ext.assign(np.asarray(logits[:2000]))
open("/proc/self/clear_refs", "w").write("5")
before = resident()
a = sela_ext.assign(logits, threads=2, max_passes=4, method=sys.argv[2])
print(resident() - before, a.passes, int(a.labels.min()))
"""


@pytest.mark.parametrize(
    ("method", "sharpness", "rows", "cols"), [("newton", 1.0, 409_600, 500), ("anderson", 0.1, 102_400, 2000)]
)
def test_little_of_a_file_is_resident(method, sharpness, rows, cols, tmp_path):
    block = (sharpness * peaked(4096, cols)).astype(np.float16)
    path = tmp_path / "logits.npy"
    logits = np.lib.format.open_memmap(path, "w+", np.float16, (rows, cols))
    for first in range(0, rows, 4096):
        logits[first : first + 4096] = block
    size = logits.nbytes
    del logits
    found = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(path), method], capture_output=True, text=True, check=True, timeout=120
    )
    grown, passes, smallest = found.stdout.split()
    assert size > 400e6
    assert int(grown) < 220e6
    assert float(passes) > 2
    assert int(smallest) >= 0


@pytest.mark.parametrize("part", [np.s_[:, 20:], np.s_[1:, 5:], np.s_[:, ::2], np.s_[3:, 1::3], np.s_[::2, 32:]])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_some_columns_of_a_file_are_not_cut_off(part, kind, tmp_path, small_parts):
    logits = peaked(300, 33)
    logits.tofile(tmp_path / "logits")
    found = np.memmap(tmp_path / "logits", np.float32, "r", shape=logits.shape)
    if kind == "torch":
        found = torch.from_file(str(tmp_path / "logits"), size=logits.size).reshape(logits.shape)
    found = found[part]
    assert MappedRows.find(found, "logits") is not None
    g = np.linspace(-1, 1, found.shape[1])
    a = logits_pass(found, g, scale=25.0)
    b = logits_pass(np.ascontiguousarray(logits[part]), g, scale=25.0)
    assert np.array_equal(a.exact, b.exact)
    os.truncate(tmp_path / "logits", logits.nbytes - 4 * 33 * 2)
    with pytest.raises(DataError, match="the file is cut off"):
        MappedRows.find(found, "logits")


@pytest.mark.parametrize(
    ("selected", "read"),
    [(None, 1001), (np.arange(100, 880, 7), 896), (np.arange(300, 310), 128), (np.zeros(0, np.int64), 0)],
)
def test_lists_of_columns_are_made_part_by_part(selected, read, tmp_path, small_parts, monkeypatch):
    logits = peaked(1001, 33)
    prices, labels = np.linspace(-1, 1, 33), np.arange(1001, dtype=np.int32) % 33
    options = {"selected": selected, "scale": 25.0, "count": 4, "tie": 1e-5, "first_row": 256}
    whole = sources.best_columns(logits, prices, labels, **options)
    lengths = []

    def watched(block, *arguments, **given):
        lengths.append(len(block))
        return find_candidates(block, *arguments, **given)

    monkeypatch.setattr(sources, "find_candidates", watched)
    parts = sources.best_columns(on_disk(tmp_path, logits), prices, labels, **options)
    for name in ("columns", "values", "found", "regret"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    assert max(lengths) <= 128
    assert sum(lengths) == read
