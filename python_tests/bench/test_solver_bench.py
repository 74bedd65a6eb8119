"""bench/solver.py in parts: cases are what they say, the truth is true, the documents are what the rows give."""

import importlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import sela_ext

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def cases():
    return importlib.import_module("solver_cases")


@pytest.fixture
def peers():
    return importlib.import_module("solver_peers")


@pytest.fixture
def targets():
    return importlib.import_module("solver_targets")


@pytest.fixture
def child():
    return importlib.import_module("solver_child")


@pytest.fixture
def performance():
    return importlib.import_module("performance")


@pytest.fixture
def solver():
    return importlib.import_module("solver")


@pytest.fixture
def few_images(cases, monkeypatch, tmp_path):
    """A hundred images instead of 60,000, and a cache folder of its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 49), np.uint8)
    monkeypatch.setattr(cases, "images", lambda: (pixels, np.arange(100) % 3, "noise"))
    monkeypatch.setenv("SELA_CACHE_DIR", str(tmp_path))
    return pixels


# ---------------------------------------------------------------- cases


def test_stored_logits_are_those_of_features_and_head(cases):
    case = cases.clustered_case(1001, 33, 2.0, "x")
    exact = case.features.astype(np.float64) @ case.weight.T + case.bias
    assert np.abs(case.logits() - exact).max() < 1e-4
    assert case.logits(np.float16).dtype == np.float16


def test_chunks_cover_all_rows_once(cases, monkeypatch):
    monkeypatch.setattr(cases, "CHUNK", 100)
    rows = [i for part in cases.chunks(1001, 33) for i in range(part.start, part.stop)]
    assert rows == list(range(1001))


def test_clustered_rows_are_sorted_by_class_of_unequal_size(cases):
    case = cases.clustered_case(3000, 31, 1.0, "x")
    jumps = np.abs(np.diff(case.features, axis=0)).max(1)
    assert np.median(np.linalg.norm(case.features[1:] - case.features[:-1], axis=1)) < 10
    assert len(jumps) == 2999
    assert cases.clustered_case(300, 31, 1.0, "x").features.shape == (300, 64)


def test_sharper_heads_leave_fewer_live_entries(cases):
    live = []
    for sharpness in (0.3, 3.0):
        logits = cases.clustered_case(1500, 64, sharpness, "x").logits()
        live.append(cases.truth(logits, sela_ext.assign(logits, threads=1).potential).live)
    assert live[0] > 3 * live[1]
    assert live[1] < 4


def test_the_hard_case_has_about_one_live_entry_and_a_wide_span(cases):
    case = cases.peaked_case(3000, 100)
    logits = case.logits()
    exact = cases.truth(logits, sela_ext.assign(logits, threads=1).potential)
    assert 1 <= exact.live < 1.5
    assert cases.span(logits) > 300


def test_dense_logits_have_hundreds_of_live_entries(cases):
    logits = cases.dense_logits(500, 1000)
    assert abs(float(logits.std()) - 0.1) < 1e-3
    assert cases.truth(logits, np.zeros(1000)).live > 300


@pytest.mark.parametrize("name", ["easy", "peaked", "first round"])
def test_large_logits_are_filled_in_chunks_and_the_same_for_any_number_of_threads(cases, few_images, monkeypatch, name):
    monkeypatch.setattr(cases, "CHUNK", 100_000)
    one, two = np.full((2, 4001, 300), np.nan, np.float16)
    cases.LARGE[name](one, 1)
    tracemalloc.start()
    cases.LARGE[name](two, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(one).all()
    assert one.tobytes() == two.tobytes()
    assert len(np.unique(one[:, 0])) > 100
    assert peak < 4001 * 300 * 4, "as much memory as all of the matrix in float32"


def test_a_network_is_trained_once_and_then_kept(cases, few_images, monkeypatch):
    trained = cases.network_arrays(7, 1)[0]
    assert trained["features"].shape == (100, 256)
    assert trained["weight"].shape == (7, 256)
    assert cases.is_kept(7, 1)
    assert not cases.is_kept(7, 0)
    monkeypatch.setattr(cases, "train", lambda *_: pytest.fail("trained again"))
    again = cases.network_arrays(7, 1)[0]
    assert all(np.array_equal(trained[name], again[name]) for name in trained)


def test_training_sharpens_the_logits(cases, few_images):
    first, later = (cases.network_case(7, passes) for passes in (0, 3))
    assert first.name == "first-round 60k x 7"
    assert later.name == "trained 60k x 7"
    assert cases.span(later.logits()) > 2 * cases.span(first.logits())


def test_the_folded_network_gives_the_features_of_the_network(cases, few_images):
    arrays = cases.network_arrays(7, 1)[0]
    x = cases.prepared(few_images)
    for layer in "12":
        x = np.maximum(x @ arrays[f"w{layer}"] + arrays[f"b{layer}"], 0)
    assert np.abs(x - arrays["features"]).max() < 1e-4


def test_without_fashion_mnist_the_images_are_shifted_digits(cases, monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "FASHION", tmp_path)
    pixels, classes, name = cases.images()
    assert name == "digits"
    assert np.bincount(classes).min() > 5000
    assert pixels.shape == (60_000, 144)
    assert pixels.dtype == np.uint8
    assert len(np.unique(pixels[:2000], axis=0)) == 2000


# ---------------------------------------------------------------- the truth


def test_the_true_error_of_a_known_plan(cases):
    found = cases.truth(np.zeros((5, 2), np.float32), np.log([3.0, 1.0]))
    assert found.l1 == pytest.approx(0.5)
    assert found.columns == pytest.approx([0.75, 0.25])
    assert found.labels.tolist() == [0] * 5
    assert found.live == 2


def test_the_truth_scales_logits_by_lambda_and_sums_over_all_chunks(cases, monkeypatch):
    monkeypatch.setattr(cases, "CHUNK", 7)
    logits = np.random.default_rng(0).standard_normal((31, 3)).astype(np.float32)
    g = np.array([0.3, -1.0, 2.0])
    p = torch.softmax(2.0 * torch.from_numpy(logits).double() + torch.from_numpy(g), 1).numpy()
    found = cases.truth(logits, g, lam=2.0)
    assert found.columns == pytest.approx(p.mean(0), rel=1e-12)
    assert found.labels.tolist() == p.argmax(1).tolist()
    assert found.live == pytest.approx((p > 1e-4).sum() / 31)


def test_a_potential_that_is_not_finite_has_an_infinite_error(cases):
    found = cases.truth(np.zeros((5, 2), np.float32), [0.0, np.nan])
    assert found.l1 == np.inf
    assert found.labels is None


# ---------------------------------------------------------------- competitors

NAMES = ("torch logsumexp", "torch softmax + sum", "official float64, numpy", "official float64, torch")


@pytest.mark.parametrize("name", NAMES)
def test_an_iteration_of_every_form_tells_the_true_columns(cases, peers, solver, name):
    logits = cases.clustered_case(301, 33, 0.5, "x").logits()
    g = sela_ext.assign(logits, tol=0, max_passes=3, method="sinkhorn", threads=1).potential
    columns = solver.implied_columns(peers.STEPPERS[name](torch.from_numpy(logits)), np.asarray(g))
    assert solver.column_distance(columns, cases.truth(logits, g)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_is_reached_at_the_first_iterate_whose_true_error_is_below(cases, peers, name):
    logits = cases.clustered_case(1001, 33, 0.5, "x").logits()
    x = torch.from_numpy(logits)
    found = peers.step_until(peers.STEPPERS[name](x), x, (1e-1, 1e-3), 20.0)
    assert [r.reached for r in found] == [True, True]
    assert found[0].iterations < found[1].iterations
    assert found[0].seconds < found[1].seconds
    again = peers.STEPPERS[name](x)
    errors = []
    for _ in range(found[1].iterations):
        again.step()
        errors.append(cases.truth(logits, again.potential(), labels=False).l1)
    for r in found:
        assert r.l1 == pytest.approx(errors[r.iterations - 1], rel=1e-6)
        assert r.l1 <= r.threshold
        assert r.iterations == 1 or errors[r.iterations - 2] > r.threshold


def test_a_competitor_is_stopped_when_its_time_is_over(cases, peers):
    logits = cases.peaked_case(2000, 50).logits()
    x = torch.from_numpy(logits)
    found = peers.step_until(peers.SoftmaxSum(x), x, (1e-1, 1e-9), 0.2)
    assert not found[-1].reached
    assert found[-1].note == "time"
    assert found[-1].l1 > 1e-9
    assert 0.2 <= found[-1].seconds < 5


def test_a_competitor_that_leaves_the_finite_numbers_is_said_to(cases, peers):
    class Broken(peers.SoftmaxSum):
        def step(self):
            super().step()
            self.count = getattr(self, "count", 0) + 1
            if self.count == 3:
                self.g = self.g * float("nan")

    x = torch.from_numpy(cases.clustered_case(500, 33, 1.0, "x").logits())
    found = peers.step_until(Broken(x), x, (1e-8,), 5.0)
    assert [(r.reached, r.note, r.iterations) for r in found] == [(False, "not finite", 2)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
def test_pot_makes_the_iterations_of_the_authors_form(cases, peers, method):
    pytest.importorskip("ot")
    x = torch.from_numpy(cases.clustered_case(1001, 33, 0.5, "x").logits())
    official = peers.step_until(peers.Official(x), x, (1e-1, 1e-3), 20.0)
    found = peers.pot(x, method, (1e-1, 1e-3), [r.iterations for r in official], 20.0)
    assert [r.reached for r in found] == [True, True]
    assert [r.l1 for r in found] == pytest.approx([r.l1 for r in official], rel=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["plain", "momentum 1.5", "Anderson 5"])
def test_ott_reaches_the_true_error(cases, peers, variant):
    pytest.importorskip("ott")
    x = torch.from_numpy(cases.clustered_case(501, 33, 0.3, "x").logits())
    found = peers.ott(x, variant, (1e-1, 1e-3), 5.0, 1)
    assert [r.reached for r in found] == [True, True]
    assert all(r.l1 <= r.threshold for r in found)


# ---------------------------------------------------------------- the script


@pytest.fixture
def tiny(cases, monkeypatch):
    monkeypatch.setitem(cases.CASES, "tiny", lambda: cases.clustered_case(2000, 40, 1.0, "tiny 2k x 40"))


def test_a_case_gives_rows_for_every_competitor_that_there_is(solver, tiny, capsys):
    run = solver.Run(1, True, "quick")
    solver.solve_case(run, "tiny", (1e-1, 1e-3))
    solver.iteration_case(run, "dense", np.ascontiguousarray(solver.cases.dense_logits(600, 50)), 1)
    names = {row["what"] for row in run.rows if row["question"] == "solve"}
    assert {"assign auto", "assign newton", "assign anderson", "assign sinkhorn", *NAMES[:3]} <= names
    for row in run.rows:
        assert row["threads"] == 1
        assert json.loads(json.dumps(row)) == row
    reached = [row for row in run.rows if row.get("reached")]
    assert all(row["true_l1"] <= row["threshold"] and row["labels"] > 0.9 for row in reached)
    shown = capsys.readouterr().out
    assert "Whole solves, tiny 2k x 40" in shown
    assert "One iteration, dense: 600 x 50" in shown


def test_what_this_version_lacks_is_skipped_with_its_reason_once(solver, tiny, capsys, monkeypatch):
    def refuse(logits, storage="auto", **options):
        if storage == "fixed16":
            raise sela_ext.errors.OptionError("storage: not on this machine")
        return real(logits, **options)

    real = sela_ext.assign
    monkeypatch.setattr(solver.sela_ext, "assign", refuse)
    run = solver.Run(1, True, "quick")
    solver.solve_case(run, "tiny", (1e-1,))
    assert capsys.readouterr().out.count("assign auto, fixed16: skipped, storage: not on this machine") == 1
    assert "assign auto, fixed16" not in {row["what"] for row in run.rows}


def test_nothing_is_timed_without_agreement(solver, monkeypatch):
    class Wrong(solver.Fused):
        def __call__(self, g):
            return super().__call__(g) + np.arange(50)

    monkeypatch.setattr(solver, "Fused", Wrong)
    with pytest.raises(SystemExit, match="no agreement, dense: columns of fused float32"):
        solver.iteration_case(solver.Run(1, True, "quick"), "dense", solver.cases.dense_logits(600, 50), 1)


def test_a_run_of_one_part_prints_its_table_and_the_targets(solver, monkeypatch, capsys):
    monkeypatch.setattr(solver, "BALANCED", (620, 10))
    monkeypatch.setattr(sys, "argv", ["solver.py", "--only", "balance", "--threads", "1", "--no-record"])
    before = torch.get_num_threads()
    try:
        solver.main()
    finally:
        torch.set_num_threads(before)
    shown = capsys.readouterr().out
    lines = [found for found in shown.splitlines() if "62..62" in found]
    assert len(lines) == 7, "every case is balanced"
    assert "Targets, from the rows of this run" in shown
    assert "rows appended" not in shown


def test_a_part_that_fails_is_named_and_the_others_go_on(solver, monkeypatch, capsys):
    def broken(run):
        raise ValueError("no such thing")

    monkeypatch.setattr(solver, "balance", broken)
    monkeypatch.setattr(solver, "accuracy", lambda run: run.add("accuracy", "x", "y", true_l1=1e-8, span=1.0))
    monkeypatch.setattr(sys, "argv", ["solver.py", "--only", "balance", "accuracy", "--threads", "1", "--no-record"])
    with pytest.raises(SystemExit, match="failed: balance"):
        solver.main()
    shown = capsys.readouterr().out
    assert "balance: failed, ValueError: no such thing" in shown
    assert "1.0e-08" in shown


def test_an_unknown_part_is_named(solver):
    with pytest.raises(SystemExit, match=r"expected one of dense, peaked, .* found moon"):
        solver.parts_of(type("Options", (), {"only": ["moon"], "quick": False}))


def test_a_large_case_runs_in_a_process_of_its_own(child):
    task = {"question": "large", "case": "easy", "tols": [1e-2, 1e-4], "threads": 1, "shape": [4001, 300]}
    found = list(child.answers(child.start(task)))
    assert [row["tol"] for row in found] == [1e-2, 1e-4]
    for row in found:
        assert row["true_l1"] <= 1.01 * row["tol"]
        assert 2 * 4001 * 300 < row["resident_gb"] * 1e9 < 1e9
    assert found[-1]["live"] > 10


def test_a_large_case_can_be_recomputed_in_every_read(child):
    task = {"question": "large", "case": "peaked", "tols": [1e-3], "threads": 1, "shape": [4001, 300]}
    (found,) = child.answers(child.start({**task, "recomputed": True}))
    assert found["true_l1"] <= 1.1e-3
    assert found["method"] == "newton"
    assert found["seconds_per_read"] is None


def test_a_process_that_fails_says_why(child):
    task = {"question": "large", "case": "no such case", "tols": [1e-2], "threads": 1}
    assert list(child.answers(child.start(task))) == [{"failed": "KeyError: 'no such case'"}]


def test_a_large_case_without_memory_is_skipped_with_the_figures(solver, child, monkeypatch, capsys):
    monkeypatch.setattr(child, "available", lambda: 1e9)
    monkeypatch.setattr(child, "start", lambda task: pytest.fail("started"))
    run = solver.Run(1, False, "full")
    solver.large(run, "large-easy")
    assert run.rows == []
    assert "large-easy: skipped, 1.0 GB of memory are available, 9.6 needed" in capsys.readouterr().out


# ---------------------------------------------------------------- targets and the document

STAMP = {"mode": "full", "threads": 2}


def solve_row(case, what, threshold, seconds, reached=True, **values):
    row = {"question": "solve", "case": case, "what": what, "threshold": threshold, "seconds": seconds}
    row |= {"reached": reached, "true_l1": threshold if reached else 0.04, "reads": 5.0, "method": "newton"}
    return {**STAMP, **row, "labels": 1.0, "live": 1.2, "shape": [60_000, 128], "note": "", **values}


def iteration_row(case, what, seconds, share=None):
    row = {"question": "iteration", "case": case, "what": what, "seconds": seconds, "share_of_bandwidth": share}
    row |= {"rows": 60_000, "cols": 1000, "live": 300.0, "span": 16.0, "ratio": seconds / 0.008, "columns_l1": 1e-8}
    return {**STAMP, **row, "bandwidth_gb_s": 45.0, "labels": None if share is None else 0.99998}


ROWS = [
    iteration_row("dense", "fused float32", 0.008, 0.5),
    iteration_row("dense", "fused fixed16", 0.004, 0.4),
    iteration_row("dense", "fused bfloat16", 0.001, 0.4),
    iteration_row("dense", "torch logsumexp", 0.2),
    solve_row("trained 60k x 128", "assign auto", 1e-3, 0.1),
    solve_row("trained 60k x 128", "assign auto", 1e-6, 0.2, reads=6.5),
    solve_row("trained 60k x 128", "official float64, numpy", 1e-1, 0.5),
    solve_row("trained 60k x 128", "official float64, numpy", 1e-3, 4.0, reached=False),
    solve_row("trained 60k x 128", "assign auto, fixed16", 1e-1, 0.1, labels=0.9),
    solve_row("trained 60k x 128", "assign auto, fixed16", 1e-3, 0.1, labels=0.99995),
    {**STAMP, "question": "bits", "case": "x", "what": "threads", "numbers": "1, 2 threads", "equal": False},
]


def line(targets, rows, measure):
    return next(found for found in targets.lines(rows) if found[0] == measure)[1:]


def test_targets_are_read_off_the_rows(targets):
    assert line(targets, ROWS, "dense iteration, float32, against logsumexp") == (
        "18x",
        "28x",
        "25x",
        "gate",
        "float32",
    )
    found = line(targets, ROWS, "dense iteration, 16 bits, against logsumexp")
    assert found[2:] == ("50x", "stretch", "fixed16"), "bfloat16 keeps fewer labels and does not count"
    assert line(targets, ROWS, "share of the read bandwidth, dense float32")[2:4] == ("50%", "gate")
    assert line(targets, ROWS, "reads to L1 1e-6, trained 60k x 128")[2:] == ("6.5", "stretch", "newton")
    found = line(targets, ROWS, "labels as converged float64, fixed16 and float16")
    assert found[2:4] == ("99.9950%", "gate")
    assert line(targets, ROWS, "the same bits for any number of threads") == (
        "equal",
        "-",
        "differ",
        "not met",
        "1, 2 threads",
    )


def test_a_competitor_that_did_not_arrive_gives_a_lower_bound(targets):
    found = line(targets, ROWS, "time against official float64, trained 60k x 128 to 1e-3")
    assert found[2:] == ("> 40x", "gate", "official at 4.0e-02 after 4 s")
    rows = [row | {"seconds": 1.0} if row["what"] == "assign auto" else row for row in ROWS if "threshold" in row]
    found = line(targets, rows, "time against official float64, trained 60k x 128 to 1e-3")
    assert found[2:4] == ("> 4x", "open"), "neither met nor missed"


def test_what_we_did_not_reach_is_not_met(targets):
    rows = [solve_row("trained 60k x 128", "assign auto", 1e-6, 9.0, reached=False)]
    assert line(targets, rows, "reads to L1 1e-6, trained 60k x 128")[2:4] == ("not reached", "not met")
    rows = [{**STAMP, "question": "large", "case": "easy", "tol": 1e-4, "recomputed": False, "seconds": 1.0}]
    rows[0] |= {"true_l1": 3e-4, "reads": 3.0, "resident_gb": 9.5, "bytes_per_entry": 2.4}
    assert line(targets, rows, "ImageNet's size, easy first round to 1e-4")[2:4] == ("not reached", "not met")
    assert line(targets, rows, "ImageNet's size, resident in all")[2:4] == ("9.5 GB", "not met")


def test_targets_without_rows_are_not_in_the_run(targets):
    found = targets.lines([])
    assert len(found) == len(targets.TARGETS) > 20
    assert {words[4] for words in found} == {"not in this run"}


def document(performance):
    return "\n".join(
        f"<!-- {name}:begin -->\n<!-- {name}:end -->"
        for name in (*performance.SOLVER, *performance.IMAGES, *performance.TRAINING)
    )


def kept(folder, *runs):
    machine = {"cpu": "A processor", "cores": 2, "memory_gib": 23.5, "sela_ext": "0.1.0", "isa": "avx2", "torch": "2"}
    machine |= {"compiler": "GNU", "numpy": "2", "POT": None, "python": "3.11", "blas": "openblas", "load": 0.0}
    with (folder / "solver.jsonl").open("w") as file:
        for time, mode, rows in runs:
            for row in rows:
                file.write(json.dumps({"time": time, "machine": machine, **row, "mode": mode}) + "\n")


def test_the_document_shows_the_latest_full_run(performance, tmp_path):
    other = [{**ROWS[0], "seconds": 0.123}]
    runs = [("2026-01-01", "full", other), ("2026-01-02", "full", ROWS), ("2026-01-03", "quick", other)]
    kept(tmp_path, *runs)
    text = performance.filled(document(performance), tmp_path)
    assert "A processor with 2 cores and 23.5 GiB, 2 threads" in text
    assert "Not installed: POT." in text
    assert "| fused float32 | 8.0 | 1.00 | 50% | 1.0e-08 | 99.9980% |" in text
    assert "| assign auto | - | 0.1 | 0.2 | 6.5 |" in text
    assert "| official float64, numpy | 0.5 | > 4 | - |" in text
    assert "| assign auto, fixed16 | 0.1 | 0.1 | - | 5 | 20 | 1.0e-03 | 99.9950% | 1 |" in text
    assert "123" not in text
    assert performance.filled(text, tmp_path) == text, "filling twice changes nothing"


def test_a_part_that_was_run_again_alone_takes_the_place_of_the_full_runs(performance, tmp_path):
    again = [{**ROWS[0], "ratio": 1.25}]
    kept(tmp_path, ("2026-01-01", "only", again), ("2026-01-02", "full", ROWS))
    before = performance.filled(document(performance), tmp_path)
    assert "1.25" not in before, "it was before the full run"
    kept(tmp_path, ("2026-01-02", "full", ROWS), ("2026-01-03", "only", again))
    text = performance.filled(document(performance), tmp_path)
    assert "1.25" in text
    assert "| assign auto | - | 0.1 | 0.2 | 6.5 |" in text, "other parts stay"


def test_rows_of_every_question_are_shown(performance, tmp_path):
    rows = [
        {"question": "large", "case": "easy", "what": "float16", "tol": 1e-4, "seconds": 1.45, "reads": 2.98},
        {"question": "memory", "case": "trained-1000", "what": "float16", "bytes_per_entry": 2.31, "peak_gb": 0.139},
        {"question": "accuracy", "case": "hard", "what": "assign auto", "span": 1717.0, "reads": 8.2, "true_l1": 5e-8},
        {"question": "balance", "case": "peaked", "what": "balance exact", "error_before": 1e-4, "seconds": 0.04},
    ]
    rows[0] |= {
        "seconds_per_read": 0.4,
        "method": "anderson",
        "resident_gb": 8.2,
        "bytes_per_entry": 2.1,
        "live": 640.0,
    }
    rows[1] |= {"tol": 1e-6}
    rows[3] |= {"sizes_before": [58, 66], "misplaced": 0.013, "dense_passes": 4.6, "reads": 2.0, "gap": 1e-4}
    kept(tmp_path, ("2026-01-01", "full", [{**STAMP, **row} for row in rows]))
    text = performance.filled(document(performance), tmp_path)
    assert "| easy, float16, to 0.0001 | 1.45 | 2.98 | 0.40 | - | anderson | 640 | 8.20 | 2.10 |" in text
    assert "| trained-1000, float16 | 2.31 | 0.139 | 1e-06 |" in text
    assert "| hard | 1,717 | 8.2 | 5.0e-08 |" in text
    assert "| peaked | 1.0e-04 | 58..66 | 1.3% | 40 | 4.6 | 2.0 | 1.0e-04 |" in text


@pytest.mark.parametrize("damage", ["missing", "doubled", "unknown"])
def test_markers_are_each_there_once(performance, tmp_path, damage):
    text = document(performance)
    first = "<!-- machine:begin -->\n<!-- machine:end -->\n"
    text = {
        "missing": text.replace("<!-- machine:end -->\n", ""),
        "doubled": text + "\n" + first,
        "unknown": text + "\n" + first.replace("machine", "moon"),
    }[damage]
    with pytest.raises(ValueError, match="expected each of machine, targets"):
        performance.filled(text, tmp_path)


def test_docs_performance_is_what_the_recorded_rows_give():
    done = subprocess.run(
        [sys.executable, str(BENCH / "performance.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
