"""bench/gpu.py without a card: the whole script at tiny sizes, and what it says where there is nothing to time."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sela_ext.errors import ResourceError
from sela_ext.kernels import Augment, Verdict

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def script(monkeypatch):
    """bench/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def results():
    path = BENCH / "results" / "gpu.jsonl"
    return path.read_bytes() if path.exists() else None


def test_a_dry_run_goes_through_everything_and_records_nothing(tmp_path):
    before = results()
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--dry-run", "--quick", "--threads", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "card: none (dry run)",
        "bandwidth measured: copy",
        "One pass, 600 x 3000 float16; columns agree with the float64 twin to",
        "torch logsumexp, alternating",
        "torch softmax + sum",
        "sela_ext, float16, batch 256",
        "torchvision v2",
        "JPEG files to planes",
        "paper's set: sela_ext, uploaded planes",
        "Aug++: sela_ext, resident",
        "gradients: sela_ext, uploaded crops",
        "tones, 256 px: sela_ext, resident",
        "Anderson's step, 31 columns",
        "Margins of columns, 600 x 3000",
        "What is drawn for 2000 images",
        "0 rows failed, 0 left out",
        "A solve, ",
        "Loader, 256 images of 32 x 32 x 3",
        "JPEG files to 224 in batches of 8, bfloat16",
        "Training, 256 images of 32 x 32 x 3, 4 epochs",
        "label passes",
    ):
        assert words in done.stdout
    assert results() == before


# Rows of `plan` that `test_rows_hold_what_a_later_reader_needs` measures.
MEASURED_THERE = ("pass", "Newton", "16-bit", "augmentation to 32", "a solve", "Loader", "training")


def test_every_other_row_runs_on_a_card(script, as_cuda, host_card, host_core, monkeypatch, capsys):
    """Rows of the plan on the card that the CPU kernels play. What cannot be played is what only a card has: CUDA's
    events and its memory (`Card.seconds`, `Card.free`, `card_facts` without `dry`), tested below with torch's replaced.
    """
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    card = script.Card(as_cuda(host_card).place, host_card, 500, torch.empty(8))
    rows = [row for row in script.plan(card, 10.0, True, 1) if not row.name.startswith(MEASURED_THERE)]
    assert len(rows) == 9
    for row in rows:
        calls = host_core.calls
        outcome = script.measure_rows(card, [row])
        assert (outcome.failed, outcome.left_out) == ([], [])
        assert host_core.calls > calls, row.name
        assert all(found["seconds"] > 0 for found in outcome.recorded)
        ours = [found for found in outcome.recorded if found["what"].startswith("sela_ext, kernel")]
        for found in ours:
            assert found["share_of_copy"] == pytest.approx(found["bytes"] / 1e9 / found["seconds"] / 10.0)
    assert "FAILED" not in capsys.readouterr().out


def test_every_kernel_of_the_page_is_timed_by_a_row(script):
    card = script.Card(torch.device("cpu"), None, 500, torch.empty(8))
    page = (BENCH.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    table = page.split("| Kernel | What it does | Source |")[1].split("\n\n")[0]
    listed = {name for line in table.splitlines() for name in re.findall(r"`(\w+_kernel)`", line)}
    assert len(listed) > 20
    for quick in (True, False):
        timed = {name for row in script.plan(card, 1.0, quick, 1) for name in row.kernels}
        assert timed == listed


class Rows:
    """A card with so much memory, and rows that do as they are told."""

    def __init__(self, script, free=8e9):
        self.row, self.memory, self.lost = script.Row, free, False
        self.place = torch.device("cuda", 0)

    def free(self):
        return self.memory

    def wait(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore words")

    def fails(self, error):
        def measure():
            raise error

        return measure

    def breaks(self):
        self.lost = True
        return []


def test_a_row_that_fails_leaves_the_others(script, capsys):
    card = Rows(script)
    rows = [
        script.Row("typo", card.fails(NameError("name 'x' is not defined"))),
        script.Row("differs", card.fails(SystemExit("no agreement: column 3; nothing is timed"))),
        script.Row("too large", card.fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))),
        script.Row("larger than the card", card.fails(AssertionError("never called")), needs=7.5e9),
        script.Row("good", lambda: [{"what": "good"}], needs=1e9),
    ]
    outcome = script.measure_rows(card, rows)
    assert outcome.recorded == [{"what": "good"}]
    assert outcome.failed == [
        ("typo", "NameError: name 'x' is not defined"),
        ("differs", "no agreement: column 3; nothing is timed"),
    ]
    assert [name for name, _ in outcome.left_out] == ["too large", "larger than the card"]
    assert outcome.left_out[1][1] == "it needs 8.0 GiB of the card, 7.5 are free"
    said = script.summary(outcome)
    assert "1 measurements, 2 rows failed, 2 left out" in said
    assert said.count("FAILED") == 2
    assert "FAILED: differs: no agreement" in capsys.readouterr().out


def test_a_lost_device_ends_the_measurements(script):
    card = Rows(script)
    rows = [
        script.Row("fine", lambda: [{"what": "fine"}]),
        script.Row("breaks", card.breaks),
        script.Row("later", list),
    ]
    outcome = script.measure_rows(card, rows)
    assert outcome.recorded == [{"what": "fine"}]
    assert [name for name, _ in outcome.failed] == ["breaks", "later"]
    assert "illegal memory access" in outcome.failed[1][1]
    assert "lost after breaks" in outcome.failed[1][1]


def test_status_1_when_a_row_failed_and_the_others_are_recorded(script, monkeypatch):
    outcome = script.Outcome([{"what": "good"}], [("typo", "NameError: x")], [])
    monkeypatch.setattr(script, "run", lambda quick, dry: (outcome, {}))
    kept = []
    monkeypatch.setattr(script.common, "record", lambda bench, rows, facts: kept.extend(rows))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--threads", "1"])
    with pytest.raises(SystemExit) as status:
        script.main()
    assert status.value.code == 1
    assert kept == [{"what": "good"}, {"case": "failed", "what": "typo", "reason": "NameError: x"}]


def test_times_are_those_between_the_events_and_facts_those_of_the_card(script, host_card, monkeypatch):
    """What a played card cannot do, with torch's own calls replaced."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, other):
            return 2.5

    class Properties:
        name, major, minor, multi_processor_count, total_memory, L2_cache_size = (
            "Some Card",
            9,
            0,
            132,
            80 << 30,
            50 << 20,
        )

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: order.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (3 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: Properties)
    monkeypatch.setattr(script, "driver_version", lambda: "550.54, CUDA 12.4")
    card = script.Card(torch.device("cuda", 0), host_card, 1, torch.empty(25 << 18))
    assert not card.dry
    assert card.seconds(lambda: order.append("work")) == 2.5e-3
    assert order == ["sleep", "event", "work", "event", "wait"]
    assert card.medians({"one": lambda: None, "two": lambda: None}, 3) == {"one": 2.5e-3, "two": 2.5e-3}
    assert card.free() == 3 << 30
    facts = script.card_facts(card)
    assert (facts["card"], facts["architecture"], facts["driver"]) == ("Some Card", "9.0", "550.54, CUDA 12.4")
    assert facts["l2_mib"] == 12.5
    assert {"torch", "torchvision", "torch_cuda", "cuda", "sela_ext", "multiprocessors"} <= set(facts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card_there_is_one_line_and_status_7(tmp_path):
    before = results()
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py")], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 7
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "expected a CUDA device, found none" in done.stderr
    assert results() == before


def test_rows_hold_what_a_later_reader_needs(script, as_cuda, host_card, host_core, monkeypatch):
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    card = script.Card(as_cuda(host_card).place, host_card, 500, torch.empty(8))
    rows = script.solver_case(card, 300_000, 31, torch.float16, copy=10.0, rounds=2)
    assert [row["what"] for row in rows] == [
        "sela_ext, kernel alone",
        "sela_ext",
        "sela_ext, kernel alone, labels",
        "sela_ext, labels",
        "sela_ext, candidates",
        "torch logsumexp, alternating",
        "torch softmax + sum",
    ]
    assert host_core.calls > 8
    for row in rows:
        assert (row["rows"], row["cols"], row["type"]) == (600, 31, "float16")
        assert row["bytes"] == 600 * 31 * 2 + 600 * 12
        assert row["seconds"] > 0
        if row["what"].startswith("sela_ext"):
            assert row["share_of_copy"] == pytest.approx(row["bytes"] / 1e9 / row["seconds"] / 10.0)
    stored = script.stored_case(card, 300_000, 40, copy=10.0, rounds=1)
    assert [row["what"].split()[0] for row in stored] == ["store", "pass"] * 3
    assert all(row["seconds"] > 0 and row["share_of_copy"] > 0 for row in stored)
    images = script.images_case(card, copy=10.0, rounds=1)
    assert {row["case"] for row in images} == {"augment 32 px"}
    for row in images:
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"])
    newton = script.newton_case(card, copy=10.0, rounds=1)
    assert [row["what"] for row in newton] == [
        f"{what}, {name}"
        for what in ("rows counted and packed", "sums", "product", "solve to 1e-9")
        for name in ("sela_ext", "torch")
    ]
    assert all(row["entries"] == 6 * row["rows"] and row["seconds"] > 0 for row in newton)
    (loose, tight) = script.solve_case(card, copy=10.0)
    assert (loose["tol"], tight["tol"]) == (1e-2, 1e-4)
    assert tight["passes"] >= loose["passes"]
    assert loose["backend"] == "cuda"
    loaded = script.loader_case(card, 1)
    assert [row["what"] for row in loaded] == ["kept on the card", "sent"]
    for row in loaded:
        assert row["images_per_second"] == pytest.approx(256 / row["seconds"])
    files = script.photographs_case(card, 1)
    assert [row["what"] for row in files] == ["planes", "views"]
    for row in files:
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"])
        assert row["processor_seconds"] > 0
    trained = script.training_case(card)
    assert [row["what"] for row in trained] == ["kept on the card", "sent"]
    for row in trained:
        assert row["steps_seconds"] > 0
        assert row["label_passes_seconds"] > 0
        assert row["evaluation_seconds"] > 0


def test_samples_are_counted_as_they_are_sent(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_planes", BENCH / "planes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = module.cases.generated(tmp_path, 3)
    found = module.measure(files, [Augment.none(375)], 1, exact=False)
    assert found["sent"] == 375 * 500 + 2 * 188 * 250 + 4  # 4:2:0, and a multiple of 16
    assert found["float32"] == 4 * 3 * 375 * 375
    assert found["views"] > 0
    assert found["samples"] > 0


def test_nothing_is_timed_where_results_differ(script, as_cuda, host_card, host_core, monkeypatch):
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    card = script.Card(as_cuda(host_card).place, host_card, 500, torch.empty(8))

    def spoil(outputs):
        if "newton_columns" in outputs:
            outputs["newton_columns"][0, 0] += np.abs(outputs["newton_columns"]).sum() // 100
        elif "columns" in outputs:
            outputs["columns"][0] += np.abs(outputs["columns"]).sum() // 100
        else:
            outputs["params"]["flip"][5] ^= 1

    host_core.spoil = spoil
    with pytest.raises(SystemExit, match=r"no agreement: .*columns differ by .*nothing is timed"):
        script.solver_case(card, 300_000, 31, torch.float16, copy=10.0, rounds=2)
    with pytest.raises(SystemExit, match="no agreement: Newton's method, sela_ext: column sum 0"):
        script.newton_case(card, copy=10.0, rounds=1)
    with pytest.raises(SystemExit, match="no agreement: parameters differ"):
        script.images_case(card, copy=10.0, rounds=1)


def test_a_refused_card_is_not_timed(script, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    refused = Verdict("failed", "column sum 3: expected 1, found 2", "cuda:0", "Some Card")
    monkeypatch.setattr(script.kernels, "device_verdict", lambda: refused)
    with pytest.raises(ResourceError, match=r"Some Card.*column sum 3.*nothing is timed"):
        script.open_card(dry=False)
