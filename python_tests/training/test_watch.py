import csv
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import sela_ext
from sela_ext.errors import OptionError, ResourceError
from sela_ext.training.clock import Clock
from sela_ext.training.outputs import COLUMNS, CsvTable, flat, markdown_table
from sela_ext.training.progress import RunProgress
from sela_ext.training.run_folder import RunFolder
from sela_ext.training.symptoms import Facts
from sela_ext.training.watch import Watcher, callbacks_of, chance_level, wandb_project

TINY = {
    "epochs": 3, "batch_size": 64, "clusters": 4, "heads": 2, "projection": 16, "threads": 1, "progress": False,
}  # fmt: skip


def images(count=192):
    """A bright quadrant, by class, in noise."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, 80, (count, 16, 16, 3), dtype=np.uint8)
    for i in range(count):
        y, x = divmod(i % 4, 2)
        found[i, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] += 150
    return found


def events(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def table(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def of_the_clock(name):
    return any(word in name for word in ("seconds", "per_second", "wait"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sela_ext.train(images(), out=tmp_path_factory.mktemp("watch") / "run", labels=np.arange(192) % 4, **TINY)


def test_metrics_csv_has_a_row_per_event_with_the_same_columns(run):
    rows, told = table(run.out), events(run.out)
    assert [row["event"] for row in rows] == [event["event"] for event in told]
    assert list(rows[0])[: len(COLUMNS)] == list(COLUMNS)
    assert all(None not in row and None not in row.values() for row in rows)
    for row, event in zip(rows, told, strict=True):
        for name, value in event.items():
            if isinstance(value, float):
                assert float(row[name]) == value
    passes = [row for row in rows if row["event"] == "label_pass"]
    first = next(event for event in told if event["event"] == "label_pass")
    assert float(passes[0]["changed_1"]) == first["heads"][1]["changed"]
    assert float(passes[0]["changed"]) == pytest.approx(np.mean([head["changed"] for head in first["heads"]]))
    assert float(passes[0]["cross_entropy"]) == min(head["cross_entropy"] for head in first["heads"])


def test_a_step_tells_the_level_of_guessing_and_how_fast_it_is_now(run):
    steps = [event for event in events(run.out) if event["event"] == "step"]
    assert steps
    for event in steps:
        assert event["ln_k"] == pytest.approx(math.log(4))
        assert min(event["images_per_second"], event["run_images_per_second"]) > 0
        assert 0 <= event["data_wait_share"] <= 1
    # The same images in less time: label passes and the start do not count. Later, steps may be slower than before.
    assert steps[0]["images_per_second"] > steps[0]["run_images_per_second"]


def test_the_end_tells_where_the_time_went(run):
    end = events(run.out)[-1]
    parts = {
        name: end[f"{name}_seconds"] for name in ("start", "train", "wait", "label_pass", "evaluation", "checkpoint")
    }
    assert all(value >= 0 for value in parts.values())
    assert min(parts["train"], parts["label_pass"], parts["evaluation"], parts["checkpoint"]) > 0
    assert end["warnings"] == []


def test_tensorboard_has_curves_per_head_and_the_options(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.out / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"step/loss", "label_pass/head0/changed", "label_pass/head1/cross_entropy"} <= set(tags["scalars"])
    (text,) = board.Tensors("options/text_summary")
    assert b"| batch_size | 64 |" in text.tensor_proto.string_val[0]


def test_resume_cuts_the_table_back_to_the_checkpoint(tmp_path, run):
    """A run that a callback breaks off, then resumed, has the table of an unbroken one."""

    def fail(event, info):
        if event["event"] == "step" and event["step"] >= 4:
            raise ValueError("enough")

    options = {**TINY, "labels": np.arange(192) % 4, "log_every": 1, "checkpoint_seconds": 0.0}
    whole = sela_ext.train(images(), out=tmp_path / "whole", **options)
    with pytest.raises(OptionError, match=r"fail raised ValueError: enough at step 4 \(step\).*checkpoint.*intact"):
        sela_ext.train(images(), out=tmp_path / "broken", callbacks=fail, **options)
    with open(tmp_path / "broken" / "metrics.csv", "a") as file:
        file.write("half a li")
    again = sela_ext.train(images(), out=tmp_path / "broken", resume=True, **options)
    kept = [
        [{n: v for n, v in row.items() if not of_the_clock(n)} for row in table(out)] for out in (whole.out, again.out)
    ]
    assert kept[0] == kept[1]


def test_callbacks_are_told_every_event_and_where_the_run_is(tmp_path):
    seen = []

    def note(event, info):
        event["event"] += " changed by me"
        event.get("heads", []).clear()
        seen.append((event, info))

    def other(event, info):
        seen.append((event, info))

    result = sela_ext.train(images(), out=tmp_path / "run", callbacks=[note, other], **TINY)
    told = events(result.out)
    assert [event for event, _ in seen[1::2]] == told
    infos = [info for _, info in seen]
    assert all(info.out == result.out and info.images == 192 for info in infos)
    assert infos[0].options["clusters"] == [4, 4]
    assert [info.share for info in infos] == sorted(info.share for info in infos)
    assert infos[-1].share == 1.0
    assert infos[-1].epoch == 3.0


@pytest.mark.parametrize("answer", [False, "stop"])
def test_a_callback_ends_a_run_in_order(tmp_path, answer):
    def enough(event, info):
        return answer if event["event"] == "step" and info.epoch >= 1 else None

    options = {**TINY, "epochs": 50, "callbacks": enough}
    result = sela_ext.train(images(), out=tmp_path / "run", **options)
    end = events(result.out)[-1]
    assert end["event"] == "end"
    assert end["epoch"] <= 2
    assert (result.labels >= 0).all()
    assert result.report.is_file()
    assert "enough ends the run" in (result.out / "train.log").read_text()
    # It is over: resume gives the same result again.
    again = sela_ext.train(images(), out=tmp_path / "run", resume=True, **{**options, "callbacks": None})
    assert np.array_equal(again.labels, result.labels)


def test_other_answers_of_a_callback_change_nothing(tmp_path):
    answers = [lambda event, info, answer=answer: answer for answer in (None, True, 0, "", "go on", np.zeros(2))]
    result = sela_ext.train(images(96), out=tmp_path / "run", callbacks=answers, **{**TINY, "epochs": 1})
    assert events(result.out)[-1]["epoch"] == 1


@pytest.mark.parametrize("value", ["mine.py", 3, [print, "mine"]])
def test_callbacks_that_cannot_be_called_are_an_error_before_anything_is_made(tmp_path, value):
    with pytest.raises(OptionError, match=r"callbacks: expected a function, or a list"):
        sela_ext.train(images(), out=tmp_path / "run", callbacks=value, **TINY)
    assert not (tmp_path / "run").exists()


def test_the_option_callbacks_is_one_function_or_several():
    assert callbacks_of(None) == []
    assert callbacks_of(print) == [print]
    assert callbacks_of((print, len)) == [print, len]


def test_one_callback_that_ends_the_run_keeps_no_event_from_the_others(tmp_path):
    told = {"first": [], "last": []}

    def first(event, info):
        told["first"].append(event)
        return "stop" if event["event"] == "step" else None

    def last(event, info):
        told["last"].append(event)

    result = sela_ext.train(images(), out=tmp_path / "run", callbacks=[first, last], **{**TINY, "log_every": 1})
    assert told["first"] == told["last"] == events(result.out)
    assert [event["event"] for event in told["last"] if event["event"] in ("step", "end")] == ["step", "end"]


def test_a_batch_of_one_that_is_passed_over_logs_no_step_again(tmp_path):
    options = {**TINY, "batch_size": 2, "log_every": 8, "epochs": 1, "clusters": 2}
    result = sela_ext.train(images(17), out=tmp_path / "run", **options)
    steps = [event for event in events(result.out) if event["event"] == "step"]
    assert [event["step"] for event in steps] == [8]
    assert steps[0]["loss"] > 0


class StandIn(types.ModuleType):
    """What the package wandb offers, as far as it is used; keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.metrics, self.finished = [], [], [], []
        self.summary = {}
        self.__file__ = "wandb.py"

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, values):
        self.logged.append(values)

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    found = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def test_weights_and_biases_gets_options_curves_and_summary(tmp_path, wandb):
    result = sela_ext.train(images(), out=tmp_path / "run", wandb="photos", **TINY)
    (init,) = wandb.inits
    assert (init["project"], init["name"], init["resume"]) == ("photos", "run", "allow")
    assert init["config"]["batch_size"] == 64
    assert ("*", "step") in wandb.metrics
    told = events(result.out)
    assert [entry["step"] for entry in wandb.logged] == [event["step"] for event in told]
    assert wandb.logged[1].keys() >= {"step/loss", "step/ln_k"} or "label_pass/head0/changed" in wandb.logged[1]
    assert wandb.summary["cross_entropy"] == told[-1]["cross_entropy"]
    assert wandb.finished == [0]
    # A resumed run goes on with the same one; a new run in the same folder is another.
    sela_ext.train(images(), out=tmp_path / "run", wandb="photos", resume=True, **TINY)
    sela_ext.train(images(), out=tmp_path / "run", wandb=True, overwrite=True, **TINY)
    assert [init["id"] == wandb.inits[0]["id"] for init in wandb.inits] == [True, True, False]
    assert wandb.inits[2]["project"] == "sela"


def test_weights_and_biases_hears_of_a_run_that_failed(tmp_path, wandb):
    def fail(event, info):
        raise ValueError

    with pytest.raises(OptionError, match=r"callbacks: .*fail raised ValueError at step"):
        sela_ext.train(images(), out=tmp_path / "run", wandb=True, callbacks=fail, **TINY)
    assert wandb.finished == [1]


def test_a_service_that_refuses_the_run_is_an_error_with_a_remedy(tmp_path, wandb, monkeypatch):
    def refuse(**options):
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(OptionError, match=r"api_key not configured \(no-tty\); run `wandb login`, set WANDB_MODE"):
        sela_ext.train(images(96), out=tmp_path / "run", wandb=True, **TINY)


def test_wandb_without_the_package_names_the_extra_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OptionError, match=r"pip install 'sela_ext\[wandb\]'"):
        sela_ext.train(images(), out=tmp_path / "run", wandb=True, **TINY)
    assert not (tmp_path / "run").exists()
    sela_ext.train(images(96), out=tmp_path / "run", wandb=False, **{**TINY, "epochs": 1})


def test_the_option_wandb_is_a_project_or_yes_or_no():
    assert [wandb_project(value) for value in (None, False, "off")] == [None] * 3
    assert [wandb_project(value) for value in (True, "true", "photos")] == ["sela", "sela", "photos"]
    for value in (3, "", " "):
        with pytest.raises(OptionError, match="wandb: expected True or the name of a project"):
            wandb_project(value)


def test_a_value_without_a_column_gets_one_and_the_table_stays_even(tmp_path):
    out = CsvTable(tmp_path / "metrics.csv", heads=1)
    out.open([])
    out.record({"event": "step", "step": 1, "loss": 2.0})
    out.record({"event": "step", "step": 2, "rotation_loss": 0.5, "loss": None})
    out.record({"event": "step", "step": 3, "loss": 1.0})
    out.close()
    rows = table(tmp_path)
    assert [row["rotation_loss"] for row in rows] == ["", "0.5", ""]
    assert [row["loss"] for row in rows] == ["2.0", "", "1.0"]
    again = CsvTable(tmp_path / "again.csv", heads=1)
    again.open([{"event": "step", "step": 1, "loss": 2.0}, {"event": "step", "step": 2, "rotation_loss": 0.5}])
    again.record({"event": "step", "step": 3, "loss": 1.0})
    again.close()
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "metrics.csv").read_text()


FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, a disk without space")


@needs_full
def test_a_full_disk_ends_the_table_with_an_error_that_names_it(tmp_path):
    out = CsvTable(tmp_path / "metrics.csv", heads=1)
    out.open([])
    out.close()
    out._file = open(FULL, "w")  # noqa: SIM115 - the table closes it
    with pytest.raises(ResourceError, match=r"metrics\.csv: No space left.*then resume"):
        out.record({"event": "step", "step": 1, "loss": 2.0})
    out.close()


@needs_full
@pytest.mark.parametrize(("name", "attribute"), [("metrics.jsonl", "_metrics"), ("train.log", "_log")])
def test_a_full_disk_ends_the_logs_with_an_error_that_names_them(tmp_path, name, attribute):
    folder = RunFolder(tmp_path)
    folder.open_logs()
    getattr(folder, attribute).close()
    setattr(folder, attribute, open(FULL, "w"))  # noqa: SIM115 - the folder closes it
    with pytest.raises(ResourceError, match=rf"{name}: No space left.*the last checkpoint is intact"):
        folder.record({"event": "step"}) if name == "metrics.jsonl" else folder.log("a line")
    folder.close()


def test_a_log_that_lost_its_end_goes_on_in_a_line_of_its_own(tmp_path):
    """After a crash of the machine the file may be shorter than the checkpoint says, or damaged within."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "step", "step": 1}\n\x00\x00\x00\n{"event": "step", "step": 3}\n{"event": "st')
    folder = RunFolder(tmp_path)
    folder.open_logs(10_000)
    folder.record({"event": "step", "step": 4})
    assert [event["step"] for event in folder.recorded()] == [1, 3, 4]
    folder.close()
    assert "lines that cannot be read: 1" in (tmp_path / "train.log").read_text()
    folder.open_logs(29)
    assert [event["step"] for event in folder.recorded()] == [1]
    folder.close()


def test_a_label_pass_in_a_row_says_whether_all_heads_converged():
    heads = [{"head": h, "converged": h == 0, "error": 0.1 * h, "cross_entropy": None} for h in range(2)]
    row = flat({"event": "label_pass", "pass": 1, "heads": heads})
    assert row == {"event": "label_pass", "pass": 1, "error": 0.1, "converged": 0}


def test_options_with_bars_and_line_ends_stay_in_their_cell():
    text = markdown_table({"model": "a|b\nc"}, {"model": "because"})
    assert text.splitlines()[2:] == ["| model | a\\|b c | because |"]


def make_watcher(tmp_path, facts, callbacks=()):
    return Watcher(RunFolder(tmp_path), RunProgress(True), facts, epochs=20, clock=Clock(), callbacks=callbacks)


def test_a_warning_is_said_once_on_screen_in_the_log_and_at_the_end(tmp_path, capsys):
    def end_of(watcher):
        watcher.record({"event": "end", "step": 9, "epoch": 20.0, "heads": []}, 1.0)
        watcher.close()
        watcher._folder.close()

    watcher = make_watcher(tmp_path, Facts(images=100, clusters=(50,)))
    watcher.open(0, 0, 0.0, {})
    for e in range(3):
        watcher.record({"event": "step", "step": e, "epoch": float(e), "loss": 1.0, "ln_k": 4.0}, e / 20)
    length = (tmp_path / "metrics.jsonl").stat().st_size
    end_of(watcher)
    assert capsys.readouterr().out.count("warning: K too large") == 1
    assert (tmp_path / "train.log").read_text().count("K too large") == 1
    assert len(events(tmp_path)[-1]["warnings"]) == 1
    assert [line for line in watcher.closing_lines() if line.startswith("warning: K too large")]
    # A resumed run knows what was said, and does not say it again.
    resumed = make_watcher(tmp_path, Facts(images=100, clusters=(50,)))
    resumed.open(length, 2, 0.1, {})
    end_of(resumed)
    assert "K too large" not in capsys.readouterr().out
    assert len(events(tmp_path)[-1]["warnings"]) == 1


def test_warnings_stand_in_the_report(tmp_path):
    data = images(48)
    result = sela_ext.train(data, out=tmp_path / "run", **{**TINY, "clusters": 24, "epochs": 1})
    assert "K too large" in (result.out / "metrics.jsonl").read_text()
    assert "K too large: 24 clusters for 48 images" in result.report.read_text()


def test_long_silent_stretches_are_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sela_ext.training.loop.RunProgress", lambda enabled: RunProgress(enabled, quiet_seconds=0.0))
    options = {**TINY, "epochs": 1, "progress": True, "labels": np.arange(192) % 4, "holdout": 32}
    sela_ext.train(images(), out=tmp_path / "run", **options)
    shown = capsys.readouterr().out
    for stretch in (
        "looking at all images: 160 of 160",
        "placing prototypes by k-means, heads: 1 of 2",
        "solving for labels, heads: 1 of 2",
        "evaluating training images: 160 of 160",
        "evaluating held-out images: 32 of 32",
        "nearest neighbours and linear probe",
        "writing the report",
    ):
        assert stretch in shown


def test_the_summary_says_where_the_time_went(tmp_path, capsys):
    sela_ext.train(images(96), out=tmp_path / "run", **{**TINY, "epochs": 1, "progress": True})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time: ")]
    shares = [int(word[:-1]) for word in line.split() if word.endswith("%")]
    assert 95 <= sum(shares) <= 105


@pytest.mark.parametrize(("loss", "expected"), [("mean", math.log(10 * 40) / 2), ("sum", math.log(10 * 40))])
def test_the_level_of_guessing_is_that_of_the_loss(loss, expected):
    from sela_ext.training.options import Options

    assert chance_level(Options(clusters=[10, 40], loss=loss)) == pytest.approx(expected)
