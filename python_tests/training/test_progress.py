import io
import re

import pytest
from rich.console import Console

from sela_ext.training import progress as module
from sela_ext.training.progress import RunProgress, no_stage


@pytest.fixture
def terminal(monkeypatch):
    """Makes a terminal of 80 columns out of what RunProgress writes to; returns the text so far."""
    file = io.StringIO()
    make = lambda **options: Console(file=file, force_terminal=True, width=80, **options)  # noqa: E731
    monkeypatch.setattr(module, "_Console", make)
    return file


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_terminal_shows_share_text_time_to_come_and_the_line_below(terminal):
    with RunProgress(True) as bar:
        bar.update(0.37, "epoch 12.3  loss 1.234/4.85  4,403 img/s  wait 2%", note="label pass 12", remaining=3725)
        bar._bar.refresh()
    shown = plain(terminal.getvalue())
    line = next(line for line in shown.splitlines() if "37%" in line)
    assert "epoch 12.3  loss 1.234/4.85" in line
    assert "1:02:05" in line
    assert "label pass 12" in shown


def test_a_stage_stands_below_the_bar_and_goes_again(terminal):
    with RunProgress(True) as bar:
        bar.update(0.5, "epoch 1", note="label pass 3: 4% changed")
        with bar.stage("looking at all images", 60_000) as advance:
            advance(12_800)
            bar._bar.refresh()
            assert "looking at all images: 12,800 of 60,000" in plain(terminal.getvalue())
        assert bar._bar.note == "label pass 3: 4% changed"


def test_a_stage_of_unknown_length_has_a_name_alone(terminal):
    with RunProgress(True) as bar, bar.stage("writing the report", 0) as advance:
        advance(0)
        assert bar._bar.note == "writing the report"


def test_without_a_terminal_quick_things_say_nothing(capsys):
    with RunProgress(True, quiet_seconds=100.0) as bar:
        for step in range(50):
            bar.update(step / 50, "epoch 1")
            with bar.stage("evaluating", 100) as advance:
                for done in range(100):
                    advance(done)
    assert capsys.readouterr().out == ""


def test_without_a_terminal_long_things_say_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with RunProgress(True, quiet_seconds=10.0) as bar:
        with bar.stage("evaluating", 100) as advance:
            for done in range(100):
                now[0] += 0.25
                advance(done)
        now[0] += 9
        bar.update(0.5, "epoch 3.0  loss 2.000/2.30", note="label pass 3: converged", remaining=420.0)
    assert capsys.readouterr().out.splitlines() == [
        "      evaluating: 39 of 100",
        "      evaluating: 79 of 100",
        " 50%  epoch 3.0  loss 2.000/2.30  label pass 3: converged  7 min to go",
    ]


def test_nothing_is_shown_when_it_is_off(capsys):
    with RunProgress(False, quiet_seconds=0.0) as bar:
        bar.say("hello")
        bar.update(0.1, "epoch")
        with bar.stage("evaluating", 3) as advance:
            advance(1)
    assert capsys.readouterr().out == ""


def test_where_nothing_is_shown_a_stage_takes_numbers_all_the_same():
    with no_stage("evaluating", 3) as advance:
        assert advance(1) is None


def test_a_stage_that_fails_gives_the_line_back(terminal):
    with RunProgress(True) as bar:
        bar.update(0.1, "epoch 1", note="before")
        with pytest.raises(ValueError, match="no"), bar.stage("evaluating", 3):
            raise ValueError("no")
        assert bar._bar.note == "before"
