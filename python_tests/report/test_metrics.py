"""The reader of metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from sela_ext.errors import DataError
from sela_ext.report import columns, read_metrics
from sela_ext.report.metrics import head_columns, heads_of


def _write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    return path


def test_events_come_in_order_and_by_kind(tmp_path: Path) -> None:
    lines = ['{"event": "step", "step": 1}', '{"event": "end"}', "", '{"event": "step", "step": 2}']
    metrics = read_metrics(_write(tmp_path / "m", "\n".join(lines) + "\n"))
    assert [event["event"] for event in metrics.events] == ["step", "end", "step"]
    assert [event["step"] for event in metrics.of("step")] == [1, 2]
    last = metrics.last("step", "end")
    assert last is not None
    assert last["step"] == 2
    assert metrics.last("evaluation") is None
    assert metrics.unreadable == 0


def test_a_missing_file_is_a_run_without_events(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none").events == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a readable log"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("cut", range(1, 28, 3))
def test_a_last_line_cut_anywhere_is_left_out_silently(tmp_path: Path, cut: int) -> None:
    line = '{"event": "step", "name": "ö"}'
    path = tmp_path / "m"
    path.write_bytes((line + "\n" + line).encode()[: len((line + "\n").encode()) + cut])
    metrics = read_metrics(path)
    assert len(metrics.events) == 1
    assert metrics.unreadable == 0


def test_a_complete_last_line_without_line_end_counts(tmp_path: Path) -> None:
    assert len(read_metrics(_write(tmp_path / "m", '{"event": "step"}\n{"event": "end"}')).events) == 2


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"step": 1}', '{"event": 1}', "\udcff\udcfe", "[" * 100_000])
def test_a_broken_line_in_the_middle_is_counted(tmp_path: Path, line: str) -> None:
    metrics = read_metrics(_write(tmp_path / "m", f'{{"event": "step"}}\n{line}\n{{"event": "end"}}\n'))
    assert [event["event"] for event in metrics.events] == ["step", "end"]
    assert metrics.unreadable == 1


def test_columns_have_nan_where_there_is_no_number() -> None:
    events = [{"a": 1, "b": True}, {"a": "2"}, {"a": math.inf}, {"a": 10**400, "b": 0.5}]
    found = columns(events, "a", "b", "c")
    np.testing.assert_array_equal(found["a"], [1, np.nan, np.inf, np.nan])
    np.testing.assert_array_equal(found["b"], [np.nan, np.nan, np.nan, 0.5])
    assert np.isnan(found["c"]).all()
    assert columns([], "a")["a"].shape == (0,)


def test_heads_that_take_turns_have_their_own_curves() -> None:
    events = [
        {"epoch": 1, "heads": [{"head": 1, "nmi": 0.25}, {"head": 0, "nmi": 0.5}]},
        {"epoch": 2, "heads": [{"head": 1, "nmi": 0.75}, {"nmi": 1.0}, "odd"]},
        {"epoch": 3, "heads": None},
    ]
    curves = head_columns(events, "nmi")
    assert {head: (x.tolist(), y.tolist()) for head, (x, y) in curves.items()} == {
        0: ([1.0], [0.5]),
        1: ([1.0, 2.0], [0.25, 0.75]),
    }
    assert [entry["head"] for entry in heads_of(events[1])] == [1]
