"""What the report says in words and tables."""

import json
import math

import numpy as np
import pytest

from sela_ext.report import summary
from sela_ext.report.run_folder import read_run


def head(number, clusters, **values):
    common = {"method": "anderson", "error": 0.004, "converged": True, "passes": 9.0, "changed": 0.25}
    return {"head": number, "clusters": clusters, "cross_entropy": 0.1, **common, **values}


def label_pass(number, *heads, **values):
    common = {"step": 10 * number, "epoch": float(number), "masked": 0, "solve_seconds": 0.125}
    return {"event": "label_pass", "pass": number, **common, "heads": list(heads), **values}


END = {"event": "end", "step": 40, "epoch": 4.0, "head": 1, "elapsed_seconds": 75.0}


def make_run(folder, *events, options=None):
    """Write a run of 101 images: head 0 has 3 clusters; head 1 has 5, of which the squares modulo 5 use 3."""
    index = np.arange(101)
    labels = np.stack([index % 3, index * index % 5]).astype(np.int32)
    np.savez(folder / "labels.npz", labels=labels)
    stored = {"options": {"lr": 0.05, "epochs": 7}, "reasons": {"lr": "the batch is small"}, "resolved": {}}
    (folder / "options.json").write_text(json.dumps(stored | (options or {})), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return read_run(folder)


def test_a_sound_run_has_no_notices(tmp_path):
    run = make_run(tmp_path, label_pass(1, head(0, 3), head(1, 5)), END)
    assert summary.notices(run) == []
    assert "The label solver converged in its one label pass." in summary.sentences(run)


def test_a_solver_that_stopped_early_is_a_notice_and_marks_its_pass(tmp_path):
    short = head(1, 5, converged=False, error=0.07)
    run = make_run(tmp_path, label_pass(1, head(0, 3), head(1, 5)), label_pass(2, head(0, 3), short), END)
    assert summary.notices(run) == [
        "In 1 of 2 label passes the label solver stopped before it converged (largest error 0.07)."
    ]
    assert not any("solver" in sentence for sentence in summary.sentences(run))
    assert [(row.converged, row.heads, row.error) for row in summary.pass_rows(run)] == [(2, 2, 0.004), (1, 2, 0.07)]


def test_k_means_is_called_by_its_name(tmp_path):
    sound, short = head(0, 3, method="kmeans"), head(1, 5, method="kmeans", converged=False, error=0.07)
    assert "K-means converged in its one label pass." in summary.sentences(
        make_run(tmp_path, label_pass(1, sound), END)
    )
    (notice,) = summary.notices(make_run(tmp_path, label_pass(1, sound, short), END))
    assert notice == "In the one label pass k-means stopped before it converged (largest error 0.07)."


@pytest.mark.parametrize(("cross_entropy", "said"), [(1.6, True), (1.2, False), (math.nan, False)])
def test_clusters_close_to_guessing_are_a_notice(tmp_path, cross_entropy, said):
    run = make_run(tmp_path, label_pass(1, head(0, 3), head(1, 5, cross_entropy=cross_entropy)), END)
    assert any("hardly tell these clusters apart" in notice for notice in summary.notices(run)) == said


def test_masked_images_are_a_notice(tmp_path):
    run = make_run(tmp_path, label_pass(1, head(1, 5), masked=17), END)
    assert summary.notices(run) == ["Up to 17 images had no usable output in a label pass and got no label there."]


def test_a_run_cut_short_and_a_run_without_log_are_notices(tmp_path):
    (cut,) = summary.notices(make_run(tmp_path, label_pass(1, head(1, 5)), {"event": "step", "epoch": 2.5}))
    assert cut == "The log has no end after epoch 2.5: training was interrupted or is still running."
    (absent,) = summary.notices(make_run(tmp_path))
    assert absent.startswith("The run has no log")


def test_a_label_pass_is_summed_up_over_its_heads(tmp_path):
    run = make_run(tmp_path, label_pass(3, head(0, 3, changed=0.5, method="newton"), head(1, 5, error=0.002)))
    (row,) = summary.pass_rows(run)
    assert (row.number, row.epoch, row.step, row.methods) == (3, 3.0, 30, "anderson, newton")
    assert (row.error, row.reads, row.changed, row.seconds) == (0.004, 18.0, 0.375, 0.125)


def test_heads_of_different_k_are_each_described(tmp_path):
    rows = summary.head_rows(make_run(tmp_path, label_pass(1, head(0, 3), head(1, 5, nmi=0.5)), END))
    assert [(row.clusters, row.used, row.size_min, row.size_max, row.chosen) for row in rows] == [
        (3, 3, 33, 34, False),
        (5, 3, 0, 40, True),
    ]
    assert [row.ln_k for row in rows] == [math.log(3), math.log(5)]
    assert math.isnan(rows[0].nmi)
    assert rows[1].nmi == 0.5


def test_options_with_a_reason_come_first(tmp_path):
    rows = summary.option_rows(make_run(tmp_path))
    assert [(row.name, row.value, row.reason) for row in rows] == [
        ("lr", "0.05", "the batch is small"),
        ("epochs", "7", ""),
    ]


def test_a_reason_without_an_option_takes_its_value_from_the_facts(tmp_path):
    options = {"reasons": {"threads": "processors"}, "resolved": {"threads": 2}}
    first = summary.option_rows(make_run(tmp_path, options=options))[0]
    assert (first.name, first.value, first.reason) == ("threads", "2", "processors")


def test_long_values_are_cut():
    text = summary.value_text(list(range(100_000)))
    assert len(text) < 700
    assert text.endswith("(cut)")
