"""The page on comparability is what the recorded rows give, and the comparison can fail."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench" / "comparability.py"


@pytest.fixture(scope="module")
def comparability():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module("comparability")
    finally:
        sys.path.remove(str(ROOT / "bench"))


def run(*options):
    return subprocess.run([sys.executable, str(BENCH), *options], capture_output=True, text=True, check=False)


def test_the_table_is_what_the_recorded_rows_give(comparability):
    text = comparability.DOCUMENT.read_text(encoding="utf-8")
    assert comparability.document(text) == text
    assert comparability.document(text.replace("scikit-learn", "someone")) != text.replace("scikit-learn", "someone")


def test_all_recorded_rows_agree_and_name_the_peers(comparability):
    import json

    lines = (ROOT / "bench/results/comparability.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {"authors' protocol", "scikit-learn", "faiss", "lightly", "scipy"} <= {row["peer"] for row in rows}
    assert all(abs(row["ours"] - row["theirs"]) <= row["allowed"] for row in rows)


def test_the_peers_protocols_agree_on_drawn_features_and_notice_a_wrong_sigma(comparability, monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 12)).astype(np.float32)
    classes = [rng.integers(0, 5, n) for n in (200, 101)]
    rows = [centres[c] + rng.standard_normal((len(c), 12)).astype(np.float32) for c in classes]
    features = rows[0], classes[0], rows[1], classes[1]
    ours = {k: comparability.knn_scores(*features, k=k, sigma=0.1)[k]["top1"] for k in (7, 50)}
    for k, expected in ours.items():
        assert comparability.by_authors(features, k) == expected
        assert comparability.by_scikit_learn(features, k) == expected
    assert abs(comparability.logistic(features) - comparability.linear_probe(*features)) <= 0.01
    monkeypatch.setattr(comparability, "SIGMA", 100.0)
    assert any(comparability.by_authors(features, k) != expected for k, expected in ours.items())


@pytest.mark.slow
def test_a_quick_run_agrees():
    found = run("--quick", "--threads", "1", "--no-record")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "agree" in found.stdout.splitlines()[-1]
