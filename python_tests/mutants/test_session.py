"""What a session of mutants makes of its verdicts."""

import importlib
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture
def session(monkeypatch):
    """The script as a module, with its neighbour `rules`; neither name stays behind."""
    monkeypatch.syspath_prepend(str(HERE))
    yield importlib.import_module("session")
    for name in ("session", "rules"):
        del sys.modules[name]


def verdicts(session, *outcomes):
    unit = session.UNITS[0]
    found = unit.found()[: len(outcomes)]
    return [
        session.Verdict(unit.name, mutant, outcome, "plain" if outcome == "caught" else "", reason=reason)
        for mutant, (outcome, reason) in zip(found, outcomes, strict=True)
    ]


def test_the_share_counts_neither_equivalents_nor_what_does_not_compile(session):
    outcomes = [("caught", ""), ("caught", ""), ("survived", ""), ("equivalent", "same sum"), ("does not compile", "")]
    text = session.table(verdicts(session, *outcomes))
    assert "4 mutants; 1 change nothing observable" in text
    assert "**2 are caught (66.7%)**, 1 survive" in text
    assert len(re.findall(r"^\| all \| 3 \| 2 \|  \|  \| 1 \| 1 \|$", text, re.MULTILINE)) == 2  # by family, by rule
    survivors = text.split("Survivors:")[1]
    assert survivors.count("becomes") == 1


def test_a_session_goes_on_where_it_was(session, tmp_path):
    path = tmp_path / "results.json"
    caught, survived, listed = verdicts(session, ("caught", ""), ("survived", ""), ("survived", ""))
    first = session.Results(path, again=False)
    for verdict in (caught, survived, listed):
        first.add(verdict)
    again = session.Results(path, again=True)
    unit = session.UNITS[0]
    assert again.known(unit, caught.mutant, None)
    assert not again.known(unit, survived.mutant, None)
    assert again.known(unit, listed.mutant, "the same for every input")
    assert again.verdicts[listed.place].outcome == "equivalent"
    assert not session.Results(path, again=False).known(unit, caught.mutant, None)


@pytest.mark.parametrize(("changed", "known"), [("anderson_kernels.cuh", False), ("gpu.cuh", False), ("jpeg.cu", True)])
def test_verdicts_are_forgotten_where_what_a_unit_is_compiled_from_changed(
    session, tmp_path, monkeypatch, changed, known
):
    path = tmp_path / "results.json"
    (caught,) = verdicts(session, ("caught", ""))
    assert session.UNITS[0].name == "anderson"
    session.Results(path, again=False).add(caught)
    texts = {**session.sources(), changed: "// another"}
    monkeypatch.setattr(session, "sources", lambda: texts)
    assert session.Results(path, again=True).known(session.UNITS[0], caught.mutant, None) == known


def test_a_mutant_is_written_into_a_copy_of_the_sources(session, tmp_path):
    mutant = session.UNITS[0].found()[0]
    session.lay_out(tmp_path, mutant)
    for name, text in session.sources().items():
        written = (tmp_path / "csrc" / "cuda" / name).read_text(encoding="utf-8")
        assert written == (mutant.apply(text) if name == mutant.file else text)
