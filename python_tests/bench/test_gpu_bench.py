"""bench/gpu.py without a card: the whole script at tiny sizes, and what it says where there is nothing to time."""

import importlib.util
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
        "A solve, ",
        "Loader, 256 images of 32 x 32 x 3",
        "JPEG files to 224 in batches of 8, bfloat16",
        "Training, 256 images of 32 x 32 x 3, 4 epochs",
        "label passes",
    ):
        assert words in done.stdout
    assert results() == before


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
        f"{what}, {name}" for what in ("sums", "product", "solve to 1e-9") for name in ("sela_ext", "torch")
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
