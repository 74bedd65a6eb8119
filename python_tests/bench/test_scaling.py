"""The cost model of label steps on many ranks, its tables, and the run that compares it with two ranks here."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sela_ext.assign import plan

ROOT = Path(__file__).resolve().parents[2]


def loaded(name):
    if str(ROOT / "bench") not in sys.path:
        sys.path.insert(0, str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


model = loaded("scaling_model")
scaling = loaded("scaling")


def test_a_pass_costs_what_its_parts_say():
    parameters = {name: parameter.value for name, parameter in model.PARAMETERS.items()}
    cost = model.stored_pass(10**8, 3000, 64)
    rows = 128 * math.ceil(math.ceil(10**8 / 128) / 64)
    assert cost.read == pytest.approx(rows * 6012 / parameters["B"])
    hops = 2 * 3 * parameters["a1"] + 2 * 3 * parameters["a2"]
    moved = 2 * 8 * 3014 * (7 / 8 / parameters["b1"] + 7 / 8 / parameters["b2"])
    assert cost.message == pytest.approx(hops + moved)
    assert cost.host == pytest.approx(parameters["h"] + math.ceil(rows / 64) * (16 / 2e10 + parameters["s"]))
    assert cost.seconds == pytest.approx(cost.read + cost.message + cost.host)


def test_one_rank_exchanges_nothing():
    assert model.all_reduce_seconds(1e6, 1) == model.gather_seconds(1e9, 1) == 0.0
    assert model.rows_per_rank(1_281_167, 1) == 1_281_167


def test_more_ranks_take_less_of_everything_but_messages():
    costs = [model.stored_pass(10**10, 3000, ranks) for ranks in (1, 8, 64, 512, 4096)]
    assert [c.read for c in costs] == sorted((c.read for c in costs), reverse=True)
    assert [c.message for c in costs] == sorted(c.message for c in costs)


def test_reading_and_computing_logits_break_even_where_the_document_says():
    parameters = model.PARAMETERS
    assert parameters["F"].value / parameters["B"].value == pytest.approx(200)
    ratio = model.computed_pass(10**9, 3000, 8).read / model.stored_pass(10**9, 3000, 8).read
    assert ratio == pytest.approx(2.6, abs=0.05)
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert "from D = F / B = 200 on" in text
    assert "at D = 512 by 2.6 times" in text


def test_spread_products_break_even_where_both_take_as_long():
    rows = model.break_even_rows(3000, 64)
    gathered = model.replicated_seconds(rows) + model.candidate_seconds(rows, 64)
    assert gathered == pytest.approx(model.spread_seconds(rows, 3000, 64), rel=1e-6)


def test_candidates_go_from_each_card_to_all_hosts_and_to_every_card():
    size = 10**6 * (4 + 6 * model.P["c"])
    told = size / 8 / model.P["p"] + size / model.P["p"]
    assert model.candidate_seconds(10**6, 8) == pytest.approx(told + model.gather_seconds(size, 8))
    assert model.candidate_seconds(10**6, 1) == 0.0


def test_room_for_candidates_and_the_cost_of_a_product_are_those_of_the_package_and_of_its_notes():
    assert model.candidate_bytes(1, device=True) == plan.PER_ROW_OF_ENTRIES + plan.PER_ENTRY * plan.USUAL_ENTRIES
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "| one 64-bit addition per entry in the second-level cache | about 50 us: the floor |" in text
    assert "H100, 1,281,167 rows with 6 candidates" in text
    assert model.P["e"] == pytest.approx(50e-6 / (6 * 1_281_167), rel=0.01)
    assert "one block, a few reductions: 5 to 10 us" in text
    assert model.P["u"] == 10e-6


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (model.seconds_words(0.00041234), "412 us"),
        (model.seconds_words(0.0026), "2.6 ms"),
        (model.seconds_words(111), "111 s"),
        (model.bytes_words(6.012e12), "6.0 TB"),
        (model.bytes_words(16_200_000), "16 MB"),
        (model.count_words(10**10), "10 B"),
        (model.count_words(10**6), "1 M"),
        (model.count_words(201_400), "201 k"),
    ],
)
def test_numbers_are_written_with_two_digits_and_a_unit(words, expected):
    assert words == expected


def test_what_does_not_fit_is_computed_from_features_or_left_out():
    assert model.pass_cell(10**10, 3000, 8) == "-"
    assert re.fullmatch(r"\*\d+ ms\*", model.pass_cell(10**10, 3000, 512))
    assert re.fullmatch(r"[\d.]+ ms", model.pass_cell(10**10, 3000, 4096))


def test_the_tables_in_the_document_are_up_to_date():
    assert scaling.main(["--check"]) == 0


def test_tables_out_of_date_are_told(tmp_path, monkeypatch, capsys):
    text = scaling.DOCUMENT.read_text()
    path = tmp_path / "scaling.md"
    path.write_text(text.replace("| 1 B |", "| 2 B |"))
    monkeypatch.setattr(scaling, "DOCUMENT", path)
    assert scaling.main(["--check"]) == 1
    assert "run python bench/scaling.py --tables" in capsys.readouterr().out
    assert scaling.main(["--tables"]) == 0
    assert path.read_text() == text


def test_recorded_rows_become_a_table(tmp_path, monkeypatch):
    one = {"step": 0.02, "seconds": 0.5, "pass": 0.018, "passes": 12.0}
    two = {
        "step": 0.0102, "seconds": 0.31, "pass": 0.009, "passes": 12.0, "message": 1e-3, "calls": 20,
        "gathered": 10**6, "bandwidth": 1e9, "waiting": 0.03,
    }  # fmt: skip
    row = scaling.compared(one, two, "dense", 12_800, 1000)
    assert row["step_2_model"] == pytest.approx(0.02 - 0.009 + 1e-3)
    assert row["solve_2_model"] == pytest.approx(0.5 - 12 * 0.009 + 20e-3 + 1e-3)
    monkeypatch.setattr(scaling.common, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "RESULTS", tmp_path / "scaling.jsonl")
    assert "nothing is recorded yet" in scaling.measured_table()
    scaling.common.record("scaling", [row], {"cpu": "Some CPU", "cores": 2})
    table = scaling.measured_table()
    assert "**Measured** on Some CPU, 2 cores" in table
    assert "| dense, 12,800 x 1,000, a pass and its step | 20 ms | 10 ms | 12 ms | 0.85 | 1.96 |" in table


@pytest.mark.slow
def test_one_rank_and_two_are_compared_here():
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "scaling.py"), "--quick", "--no-record"],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "one rank and two end with the same bits" in done.stdout
