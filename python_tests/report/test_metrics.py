import json

import numpy as np
import pytest

from sela_ext.errors import DataError
from sela_ext.report import columns, read_metrics
from sela_ext.report.metrics import head_columns


def test_a_missing_log_is_a_run_without_events(tmp_path):
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert (metrics.events, metrics.unreadable) == ([], 0)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_cut_by_a_kill_is_left_out_without_complaint(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"event": "step", "loss": 1.5})
    path.write_text(f"{line}\n{line}\n{line[:-cut]}", encoding="utf-8")
    metrics = read_metrics(path)
    assert len(metrics.of("step")) == 2
    assert metrics.unreadable == 0


def test_a_whole_last_line_without_a_line_end_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step"}\n{"event": "end"}', encoding="utf-8")
    assert [event["event"] for event in read_metrics(path).events] == ["step", "end"]


def test_damaged_lines_inside_are_left_out_and_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "step"}\n{"event"\n[1, 2]\n{"no": 1}\n\n\xff\xfe\n{"event": "end"}\n')
    metrics = read_metrics(path)
    assert [event["event"] for event in metrics.events] == ["step", "end"]
    assert metrics.unreadable == 4


def test_the_last_event_of_several_kinds_is_the_newest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "end", "a": 1}\n{"event": "evaluation", "a": 2}\n{"event": "step"}\n', encoding="utf-8")
    found = read_metrics(path).last("evaluation", "end")
    assert found is not None
    assert found["a"] == 2


def test_a_log_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match="expected a readable log"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_columns_hold_nan_where_there_is_no_number():
    found = columns([{"a": 1, "b": "x"}, {"a": None}, {"a": True, "b": 2.5}, {"a": 10**400}], "a", "b")
    np.testing.assert_array_equal(found["a"], [1, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found["b"], [np.nan, np.nan, 2.5, np.nan])


def test_heads_that_take_turns_have_their_own_epochs():
    passes = [
        {"epoch": 0.0, "heads": [{"head": 0, "changed": 1.0}, {"head": 1, "changed": 0.9}]},
        {"epoch": 1.0, "heads": [{"head": 1, "changed": 0.5}]},
        {"epoch": 2.0, "heads": "none"},
    ]
    curves = head_columns(passes, "changed")
    assert {head: (x.tolist(), y.tolist()) for head, (x, y) in curves.items()} == {
        0: ([0.0], [1.0]),
        1: ([0.0, 1.0], [0.9, 0.5]),
    }
