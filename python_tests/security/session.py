"""What `nox -s security` does: the bill of materials of an installation, and its audit against known advisories.

    python python_tests/security/session.py bill PYTHON CYCLONEDX        writes build/sbom.json; needs no network
    python python_tests/security/session.py audit PYTHON PIP_AUDIT       asks the index of advisories about each package

PYTHON is the interpreter whose packages are meant, the others the two tools. Exit status of the audit: 0 no advisory is
known, 1 there are some, 2 the index could not be asked, or did not answer for every package.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BILL = ROOT / "build" / "sbom.json"
OURS = "sela_ext"
# Without these the bill is not that of an installation of ours.
NEEDED = ("torch", "torchvision", "numpy", "scipy", "pillow")
LICENSED = ("torch", "numpy", "scipy", "pillow")  # torchvision does not say its own in a form that tools read
_LIST = (
    "import importlib.metadata as m, json; "
    "print(json.dumps(sorted({(d.metadata['Name'], d.version) for d in m.distributions() if d.metadata['Name']})))"
)


def normal(name: str) -> str:
    """A name as package indexes compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


def pinned(packages: list[list[str]]) -> list[str]:
    """Requirements of just these versions, for the audit.

    Our own package is in no index; a local version, as torch's 2.6.0+cpu, is one that the index calls 2.6.0.

    Example:
        >>> pinned([["sela-ext", "0.1"], ["torch", "2.6.0+cpu"]])
        ['torch==2.6.0']
    """
    return [f"{name}=={version.split('+')[0]}" for name, version in packages if normal(name) != normal(OURS)]


def make_bill(python: str, cyclonedx: str, bill: Path = BILL) -> list[str]:
    """Write the bill of materials, with our package as what it is of.

    Returns:
        What is wrong with it, in words; empty for a good one.
    """
    bill.parent.mkdir(parents=True, exist_ok=True)
    words = ["environment", python, "--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "library"]
    words += ["--output-reproducible", "--output-format", "JSON", "--output-file", str(bill)]
    subprocess.run([cyclonedx, *words], check=True)
    return faults_of_bill(json.loads(bill.read_text(encoding="utf-8")))


def faults_of_bill(bill: Any) -> list[str]:
    """What a bill lacks: our package, those that it cannot do without, versions, and licences of most."""
    if (
        not isinstance(bill, dict)
        or bill.get("bomFormat") != "CycloneDX"
        or not isinstance(bill.get("components"), list)
    ):
        return ["it is no CycloneDX document"]
    own = bill.get("metadata", {}).get("component", {})
    faults = []
    if normal(own.get("name", "")) != normal(OURS) or not own.get("version") or not own.get("licenses"):
        faults.append(f"it is not that of {OURS}, with version and licence")
    parts = {normal(part["name"]): part for part in bill["components"]}
    faults += [f"{name} is missing" for name in NEEDED if name not in parts]
    faults += [f"{name} has no version" for name, part in parts.items() if not part.get("version")]
    faults += [f"{name} has no licence" for name in LICENSED if name in parts and not parts[name].get("licenses")]
    return faults


def audit(python: str, pip_audit: str) -> tuple[int, list[str]]:
    """Ask the index of advisories.

    Returns:
        The exit status, and what to say.
    """
    listed = subprocess.run([python, "-c", _LIST], check=True, capture_output=True, text=True, cwd=ROOT / "build")
    wanted = pinned(json.loads(listed.stdout))
    with tempfile.TemporaryDirectory() as folder:
        requirements, found = Path(folder) / "requirements.txt", Path(folder) / "audit.json"
        requirements.write_text("\n".join(wanted) + "\n")
        words = ["--requirement", str(requirements), "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        words += ["--format", "json", "--output", str(found)]
        done = subprocess.run([pip_audit, *words], check=False, capture_output=True, text=True)
        try:
            answers = json.loads(found.read_text(encoding="utf-8"))["dependencies"]
        except (OSError, ValueError, KeyError, TypeError):
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
            return 2, [
                f"the index of advisories could not be asked ({last}); nothing was audited: run it again where "
                "pypi.org can be reached"
            ]
    return judged(wanted, answers)


def judged(wanted: list[str], answers: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Exit status and words for what the index answered."""
    known = {normal(one["name"]): one for one in answers if "vulns" in one}
    lines = [
        f"{name} {one['version']}: {one_found['id']}, mended in {', '.join(one_found.get('fix_versions') or ['none'])}"
        for name, one in sorted(known.items())
        for one_found in one["vulns"]
    ]
    silent = sorted(line for line in wanted if normal(line.split("==")[0]) not in known)
    if silent:
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        lines.append(f"the index of advisories did not answer for {len(silent)} of {len(wanted)} packages: {shown}")
    if any(one["vulns"] for one in known.values()):
        return 1, lines
    return (2, lines) if silent else (0, [f"no advisory is known for the {len(wanted)} packages"])


def main(words: list[str]) -> int:
    """Run one of the two; see the top of this file."""
    if len(words) != 3 or words[0] not in ("bill", "audit"):
        print(__doc__, file=sys.stderr)
        return 2
    if words[0] == "audit":
        status, lines = audit(words[1], words[2])
        print("\n".join(lines), file=sys.stderr if status else sys.stdout)
        return status
    faults = make_bill(words[1], words[2])
    print("\n".join(f"{BILL}: {fault}" for fault in faults) or f"bill of materials: {BILL}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
