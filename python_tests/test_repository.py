"""What the repository says about itself holds together: files, documents, build and checks."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = {".py", ".pyi", ".h", ".cpp", ".cu", ".md", ".toml", ".json", ".cmake", ".txt", ".yaml", ".yml", ".html", ".css"}
BUILT = {"build", "dist", "runs", "__pycache__"}

# Folders that exist on one machine only. Written as alternatives, so that this file does not name them either.
MACHINE_PATH = re.compile(r"(?<![\w.>*~])/(?:work|opt|root|home|tmp|Users|mnt)/")


def text_files():
    """Tracked text files; in a folder without git (an unpacked source archive): all but what a build leaves."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        names = [name for name in done.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if not any(p in BUILT or p.startswith(".") for p in name.split("/")[:-1])]
    paths = [ROOT / name for name in names]
    return [path for path in paths if path.is_file() and (path.suffix in TEXT or not path.suffix)]


def shipped_architectures():
    (line,) = re.findall(r"^set\(SELA_SHIPPED_ARCHS (.+)\)$", (ROOT / "cmake/SelaCuda.cmake").read_text(), re.MULTILINE)
    return [word.removesuffix("-real") for word in line.split()]


def architecture_lists(text):
    """Every list of three or more architectures that begins with 75, such as `75 80 86` or "75, 80 and 86"."""
    return [re.findall(r"\d+", found) for found in re.findall(r"\b75(?:(?:-real)?(?:[;,\s]|and)+\d{2,3}\b){2,}", text)]


def test_no_tracked_file_names_a_folder_of_one_machine():
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT).as_posix()}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("see " + "/work" + "/main/x", True),
        ('path = "' + "/tmp" + '/x"', True),
        ("cd ~" + "/work" + "/x", False),
        ("../work/x", False),
        ("https://example.org/home/x", False),
    ],
)
def test_a_planted_machine_path_is_found(text, named):
    assert bool(MACHINE_PATH.search(text)) == named


def test_text_files_end_with_one_newline_and_have_no_trailing_blanks():
    found = []
    for path in text_files():
        text = path.read_text(encoding="utf-8")
        if path.name != "LICENSE" and text and (not text.endswith("\n") or text.endswith("\n\n") or " \n" in text):
            found.append(path.relative_to(ROOT).as_posix())
    assert found == []


def test_documents_and_checks_name_the_architectures_that_the_build_ships():
    shipped = shipped_architectures()
    assert len(shipped) >= 6
    places = set()
    for path in [path for path in text_files() if path.suffix == ".md" or path.name == "run"]:
        for named in architecture_lists(path.read_text(encoding="utf-8")):
            assert named == shipped, path.relative_to(ROOT).as_posix()
            places.add(path.relative_to(ROOT).as_posix())
    assert {"docs/gpu.md", ".ci/run"} <= places


def test_architecture_lists_are_recognised_however_they_are_separated():
    for text in ("75 80 86 90", "75;80;86;90", "75, 80, 86 and 90", "75-real 80 86 90"):
        assert architecture_lists(f"for {text}.") == [["75", "80", "86", "90"]]
    assert architecture_lists("75 of 80 tests") == []


def test_the_last_architecture_is_shipped_as_ptx_too():
    text = (ROOT / "cmake/SelaCuda.cmake").read_text()
    assert re.search(r"^set\(SELA_SHIPPED_ARCHS (\d+-real )+\d+\)$", text, re.MULTILINE)


def test_the_ci_script_runs_the_test_command_of_the_readme():
    (command,) = re.findall(r"^(pip install '\.\[test\]'.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    parts = command.split(" && ")
    assert parts == ["pip install '.[test]'", "pytest"]
    lines = (ROOT / ".ci/run").read_text().splitlines()
    places = [lines.index(part) for part in parts]
    assert places == sorted(places)
    assert lines[-1] == parts[-1], "the test runner's closing line comes last"


def test_the_readme_trains_on_the_built_in_digits_with_one_command():
    commands = re.findall(r"^pip install \..*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert "pip install . && sela train --data digits --out runs/digits" in commands


def test_the_ci_script_stops_at_the_first_error_and_is_executable():
    script = ROOT / ".ci/run"
    assert "\nset -euo pipefail\n" in script.read_text()
    assert script.stat().st_mode & 0o100


def test_hooks_are_local():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"^\s*- repo: *(.*)$", text, re.MULTILINE) == ["local"]
    assert set(re.findall(r"^\s*language: *(.*)$", text, re.MULTILINE)) == {"system"}


def test_the_changelog_has_a_place_for_what_comes_and_names_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "\n## [Unreleased]\n" in text
    assert re.search(r"^### Added$", text, re.MULTILINE)


def test_decision_notes_are_numbered_without_gaps():
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs/design").glob("[0-9][0-9][0-9][0-9]-*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers
