"""The session `nox -s security`: its bill of materials, and what it makes of an index that does not answer."""

import importlib.util
import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location("security_session", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


session = load(Path(__file__).with_name("session.py"))


def part(called, **changes):
    return {"name": called, "version": "1.0", "licenses": [{"license": {"id": "MIT"}}], **changes}


def bill(**changes):
    parts = [part(name, **changes.get(name, {})) for name in session.NEEDED if changes.get(name, {}) is not None]
    own = part("sela_ext", **changes.get("own", {}))
    return {"bomFormat": "CycloneDX", "metadata": {"component": own}, "components": parts}


def test_a_whole_bill_has_no_fault():
    assert session.faults_of_bill(bill()) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"torch": None}, "torch is missing"),
        ({"numpy": {"version": ""}}, "numpy has no version"),
        ({"numpy": {"licenses": []}}, "numpy has no licence"),
        ({"own": {"name": "another"}}, "not that of sela_ext"),
        ({"own": {"version": None}}, "not that of sela_ext"),
        ({"own": {"licenses": None}}, "not that of sela_ext"),
    ],
)
def test_what_a_bill_lacks_is_said(changes, fault):
    (found,) = session.faults_of_bill(bill(**changes))
    assert fault in found


@pytest.mark.parametrize("document", [[], {}, {"bomFormat": "CycloneDX"}, {"bomFormat": "other", "components": []}])
def test_other_documents_are_no_bill(document):
    assert session.faults_of_bill(document) == ["it is no CycloneDX document"]


def cyclonedx():
    """The tool, where the session has installed it, or anybody else has."""
    own = ROOT / "build" / "security-tools" / "bin" / "cyclonedx-py"
    return str(own) if own.exists() else shutil.which("cyclonedx-py")


@pytest.mark.slow
@pytest.mark.skipif(cyclonedx() is None, reason="needs cyclonedx-py, which `nox -s security` installs")
def test_the_bill_of_this_installation_lists_what_it_stands_on(tmp_path):
    assert session.make_bill(sys.executable, cyclonedx(), tmp_path / "sbom.json") == []
    found = json.loads((tmp_path / "sbom.json").read_text(encoding="utf-8"))
    parts = {session.normal(one["name"]): one for one in found["components"]}
    for name in ("torch", "numpy"):
        assert parts[name]["version"] == version(name)
        assert parts[name]["licenses"]
    own = found["metadata"]["component"]
    assert (own["name"], own["version"]) == ("sela_ext", version("sela_ext"))
    assert own["licenses"][0]["license"]["id"] == "Apache-2.0"
    assert str(ROOT) not in json.dumps(found)


def fake(tmp_path, text):
    """A pip-audit that writes what it is told, and ends with the status that the real one has then."""
    tool = tmp_path / "pip-audit"
    tool.write_text(f"#!{sys.executable}\nimport json, pathlib, sys\nwords = sys.argv\n{text}\n")
    tool.chmod(0o755)
    return str(tool)


ANSWER = """
asked = pathlib.Path(words[words.index("--requirement") + 1]).read_text().split()
found = [dict(zip(("name", "version"), line.split("=="))) | {"vulns": vulns(line)} for line in asked if answers(line)]
pathlib.Path(words[words.index("--output") + 1]).write_text(json.dumps({"dependencies": found}))
"""


def python_with(tmp_path, packages):
    """An interpreter that says these packages are installed."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nprint({json.dumps(packages)!r})\n")
    path.chmod(0o755)
    (ROOT / "build").mkdir(exist_ok=True)
    return str(path)


PACKAGES = [["numpy", "2.0"], ["sela_ext", "0.1"], ["torch", "2.6.0+cpu"]]


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("vulns = lambda line: []\nanswers = lambda line: True" + ANSWER, 0, "no advisory is known for the 2 packages"),
        (
            "vulns = lambda line: [{'id': 'X-1', 'fix_versions': ['3']}] if 'torch' in line else []\n"
            "answers = lambda line: True" + ANSWER,
            1,
            "torch 2.6.0: X-1, mended in 3",
        ),
        (
            "vulns = lambda line: []\nanswers = lambda line: 'torch' in line" + ANSWER,
            2,
            "did not answer for 1 of 2 packages: numpy==2.0",
        ),
        ("sys.exit('no route to pypi.org')", 2, r"could not be asked (no route to pypi.org); nothing was audited"),
        ("pathlib.Path(words[-1]).write_text('half')", 2, "could not be asked (no reason given)"),
    ],
)
def test_an_audit_passes_only_where_the_index_answered_for_every_package(tmp_path, capsys, text, status, said):
    python = python_with(tmp_path, PACKAGES)
    assert session.main(["audit", python, fake(tmp_path, text)]) == status
    out = capsys.readouterr()
    assert said in (out.err if status else out.out)
    assert "sela" not in out.err


def test_the_session_of_nox_runs_both():
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert "python_tests/security/session.py" in text
    assert os.path.basename(session.BILL) == "sbom.json"
    assert "build/sbom.json" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
