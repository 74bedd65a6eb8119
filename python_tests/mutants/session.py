"""Plants faults into the CUDA kernels' sources and counts how many the tests on the CPU runner notice.

    python python_tests/mutants/session.py                    the whole session; writes the table in docs/gpu.md
    python python_tests/mutants/session.py --sample 5         five mutants, for a quick look; tests in their own order
    python python_tests/mutants/session.py --again            only those that nothing noticed the last time
    python python_tests/mutants/session.py --list             what would be planted

Each mutant is one edit by one rule (rules.py), applied to a copy of csrc/cuda in build/mutants. Its translation unit is
compiled, linked with the objects of the ordinary test module, and tried by the tests of its kernels: first without
sanitizers, and what survives there under ThreadSanitizer, then AddressSanitizer. Noticed is a failing test, an error of
the runner, a report of a sanitizer, a crash, or a test that runs far beyond its time. A mutant that does not compile
does not count. Mutants that change nothing observable are listed in equivalents.json, each with its reason, found by
rule, function and the lines themselves; they are run too, and a listed one that a test notices is an error, just as an
entry that fits no mutant.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rules import EQUIVALENTS, RULES, Equivalents, Mutant, chosen, mutants

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutants"
TABLE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- mutants:begin -->", "<!-- mutants:end -->"
BUILD = ROOT / "build" / "simt"
TARGETS = {"plain": "_simt", "thread": "_simt_thread", "address": "_simt_address"}
VARIANTS = tuple(TARGETS)


@dataclass(frozen=True)
class Unit:
    """A translation unit, the files of it that get mutants, and the tests that must notice them."""

    name: str
    family: str  # in the table
    files: tuple[str, ...]  # under csrc/cuda; the first is what is compiled
    tests: tuple[str, ...]

    def found(self) -> list[Mutant]:
        return [mutant for file in self.files for mutant in mutants(file, sources()[file])]


UNITS = (
    Unit(
        "anderson",
        "Anderson's method",
        ("anderson.cu", "anderson_kernels.cuh"),
        ("python_tests/simt/test_anderson.py",),
    ),
    Unit("newton", "Newton's method", ("newton.cu", "newton_kernels.cuh"), ("python_tests/simt/test_newton.py",)),
    Unit(
        "sinkhorn",
        "fused pass, candidates",
        (
            "sinkhorn.cu",
            "sinkhorn_kernels.cuh",
            "sinkhorn_wide_kernels.cuh",
            "sinkhorn_reductions.cuh",
            "sinkhorn_candidates_kernels.cuh",
            "row_pieces.cuh",
        ),
        (
            "python_tests/simt/test_sinkhorn.py",
            "python_tests/simt/test_sinkhorn_mutants.py",
            "python_tests/simt/test_candidates.py",
        ),
    ),
    Unit("logits", "conversion to 16 bits", ("logits.cu", "logits_kernels.cuh"), ("python_tests/simt/test_logits.py",)),
    Unit(
        "rounding",
        "exact balance",
        ("rounding.cu", "rounding_kernels.cuh"),
        ("python_tests/simt/test_rounding.py",),
    ),
    Unit(
        "augment",
        "small images",
        ("augment.cu", "augment_kernels.cuh", "augment_pixels.cuh"),
        ("python_tests/simt/test_augment.py", "python_tests/simt/test_augment_mutants.py"),
    ),
    Unit(
        "jpeg",
        "JPEG",
        ("jpeg.cu", "jpeg_kernels.cuh"),
        ("python_tests/simt/test_jpeg.py", "python_tests/simt/test_jpeg_mutants.py"),
    ),
    Unit(
        "large_images",
        "images of any size",
        ("augment_large.cu", "augment_large_kernels.cuh", "augment_large.cuh", "augment_effects_kernels.cuh"),
        ("python_tests/simt/test_augment_large.py",),
    ),
)


@dataclass
class Verdict:
    """What became of one mutant."""

    unit: str
    mutant: Mutant
    outcome: str = ""  # "does not compile", "caught", "survived", "equivalent"
    by: str = ""  # the variant that caught it
    how: str = ""  # "failed", "time-out", "signal 11", ...
    test: str = ""
    why: str = ""
    seconds: float = 0.0
    reason: str = ""  # of equivalence

    @property
    def place(self) -> str:
        """Which mutant it is, as long as its source does not change."""
        return json.dumps([self.unit, self.mutant.file, self.mutant.rule, self.mutant.start, self.mutant.replacement])


# ---- Building: the commands of the ordinary test module, with one source replaced.


@dataclass
class Commands:
    compile: list[str]
    link: list[str]
    object: str
    module: str
    folder: Path


def build_modules(variants: list[str]) -> None:
    """The ordinary test modules, which lend their objects: see csrc/simt/CMakeLists.txt."""
    import pybind11

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(BUILD),
        "-G",
        "Ninja",
        "-Wno-dev",
        "-DSELA_SIMT=ON",
        "-DSELA_CUDA=OFF",
    ]
    python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    targets = [TARGETS[variant] for variant in variants]
    build = ["cmake", "--build", str(BUILD), "--parallel", str(len(os.sched_getaffinity(0))), "--target", *targets]
    for command in ([*configure, *python], build):
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


@lru_cache
def commands(variant: str, source: str) -> Commands:
    """How the ordinary build compiles csrc/cuda/`source` and links the module."""
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    target = TARGETS[variant]
    asked = subprocess.run([ninja, "-t", "commands", target], cwd=BUILD, check=True, capture_output=True, text=True)
    lines = asked.stdout.splitlines()
    (compiling,) = [line for line in lines if f"csrc/cuda/{source} " in f"{line} " and f"{target}_kernels" in line]
    (linking,) = [line for line in lines if " -shared " in line and f"{variant}/_simt" in line]
    compile_words = shlex.split(compiling)
    if Path(compile_words[0]).name in ("ccache", "sccache"):  # nothing here is compiled twice
        compile_words.pop(0)
    link_words = shlex.split(linking.split("&&")[1] if "&&" in linking else linking)  # ": && command && :"
    made, module = (words[words.index("-o") + 1] for words in (compile_words, link_words))
    return Commands(compile_words, link_words, made, module, BUILD)


def build_mutant(how: Commands, place: Path, unit: Unit, optimise: str) -> str | None:
    """The module with the sources under `place`/csrc, into `place`; the first error line where it does not compile."""
    words, skip = [], False
    for word in how.compile:
        if skip or word in ("-MD", "-MMD") or word.startswith(("-O", "-g", "-Werror")):
            skip = False
        elif word in ("-MT", "-MF", "-o"):
            skip = True
        else:
            words.append(
                str(place / "csrc/cuda" / unit.files[0]) if word.endswith(f"csrc/cuda/{unit.files[0]}") else word
            )
    words[1:1] = [f"-I{place / 'csrc'}"]
    target = place / "mutant.o"
    words += [optimise, "-w", "-o", str(target)]
    done = subprocess.run(words, cwd=how.folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        return errors[0] if errors else done.stderr[:300]
    module = place / Path(how.module).name
    link = [str(target) if word == how.object else str(module) if word == how.module else word for word in how.link]
    subprocess.run(link, cwd=how.folder, capture_output=True, text=True, check=True)
    return None


def read_with(unit: Unit) -> list[str]:
    """Names of the sources that a unit is compiled from: its files and what they include, of csrc/cuda."""
    found, left = set(unit.files), list(unit.files)
    while left:
        included = re.findall(r'^#include "cuda/([^"]+)"', sources()[left.pop()], re.MULTILINE)
        new = [name for name in included if name in sources() and name not in found]
        found.update(new)
        left += new
    return sorted(found)


def state(unit: Unit) -> str:
    """Of the kernels of a unit: verdicts hold as long as it stays; tests that came since can only notice more."""
    return hashlib.sha256("".join(sources()[file] for file in read_with(unit)).encode()).hexdigest()


def fingerprint(unit: Unit) -> str:
    """Of the kernels and the tests of a unit: times of tests hold as long as it stays."""
    tests = "".join((ROOT / test).read_text(encoding="utf-8") for test in unit.tests)
    return hashlib.sha256((state(unit) + tests).encode()).hexdigest()


@lru_cache
def sources() -> dict[str, str]:
    """csrc/cuda as it is when the session starts: it may be edited while this runs."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc" / "cuda").iterdir())}


def lay_out(place: Path, mutant: Mutant | None) -> None:
    """Writes csrc/cuda under `place`, with the mutant applied."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "csrc" / "cuda").mkdir(parents=True)
    for name, text in sources().items():
        changed = mutant.apply(text) if mutant is not None and mutant.file == name else text
        (place / "csrc" / "cuda" / name).write_text(changed, encoding="utf-8")


# ---- Running tests.


def sanitizer_environment(variant: str) -> dict[str, str]:
    """What a process needs to load a sanitised module: the sanitizer's own library first, and how it reports."""
    if variant == "plain":
        return {}
    names = {"thread": ["libtsan.so"], "address": ["libasan.so", "libubsan.so"]}[variant]
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    return {
        "LD_PRELOAD": " ".join(found),
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


class Server:
    """A process that runs tests on request (serve.py)."""

    def __init__(self, variant: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        imported = ["numpy", "pytest", *(["torch"] if variant == "plain" else [])]
        given = [f"{name}={value}" for name, value in sanitizer_environment(variant).items()]
        command = ["env", *given, sys.executable, str(Path(__file__).with_name("serve.py")), *imported]
        if variant == "thread" and shutil.which("setarch"):
            # ThreadSanitizer needs its part of the address space free, which randomised addresses may take.
            fixed = ["setarch", "-R"]
            if subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode == 0:
                command = [*fixed, *command]
        self.markers = "not slow" if variant == "plain" else "not slow and not plain_only"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({**request, "markers": self.markers}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the process that runs the tests has ended")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Baseline:
    """The unmutated tests: their times, and how often each has caught a mutant so far."""

    seconds: dict[str, float]
    caught: Counter[str] = field(default_factory=Counter)

    def order(self) -> list[str]:
        """The likely ones first: by mutants caught per second."""
        value = {name: (1 + 3 * self.caught[name]) / (0.05 + seconds) for name, seconds in self.seconds.items()}
        return sorted(value, key=lambda name: -value[name])

    def limits(self, variant: str) -> dict[str, float]:
        """Seconds per test; the sanitizers take 5 to 20 times as long."""
        slower = 8.0 if variant == "plain" else 80.0
        return {name: 10.0 + slower * seconds for name, seconds in self.seconds.items()}

    def total(self) -> float:
        return sum(self.seconds.values())


class Session:
    """Workers that take mutants from one queue."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.options, self.results = options, results
        self.lock = threading.Lock()
        self.measuring = threading.Lock()
        self.baselines: dict[str, Baseline] = {}
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        with self.lock:
            print(f"{time.monotonic() - self.began:6.0f} s  {text}", flush=True)

    def baseline(self, servers: dict[str, Server], unit: Unit) -> Baseline:
        """The tests of a unit on its unmutated sources, built the same way; they must pass. One worker measures."""
        with self.measuring:
            if self.options.sample is not None:  # a quick look takes them as they come
                return self.baselines.setdefault(unit.name, Baseline({}))
            if unit.name not in self.baselines:
                place = WORK / f"{unit.name}-unmutated"
                lay_out(place, None)
                known = Path(f"{place}.json")
                mark = fingerprint(unit) + self.options.optimise
                if known.exists() and (kept := json.loads(known.read_text())).get("state") == mark:
                    return self.baselines.setdefault(unit.name, Baseline(kept["seconds"]))
                error = build_mutant(commands("plain", unit.files[0]), place, unit, self.options.optimise)
                if error:
                    raise SystemExit(f"the unmutated {unit.name} does not compile: {error}")
                log = str(place / "log.txt")
                answer = self.server(servers, "plain").run(
                    build=str(place), tests=unit.tests, order=[], limits={}, limit=1800, stop=False, log=log
                )
                if answer["ended"] != "passed" or not answer["seconds"]:
                    raise SystemExit(f"the unmutated {unit.name} fails: {answer['test']} {answer['why']}, see {log}")
                found = self.baselines[unit.name] = Baseline(answer["seconds"])
                known.write_text(json.dumps({"state": mark, "seconds": found.seconds}))
                self.say(f"{unit.name}: {len(found.seconds)} tests in {found.total():.1f} s unmutated")
            return self.baselines[unit.name]

    def server(self, servers: dict[str, Server], variant: str) -> Server:
        if variant not in servers:
            servers[variant] = Server(variant)
        return servers[variant]

    def judge(self, servers: dict[str, Server], place: Path, unit: Unit, mutant: Mutant, reason: str | None) -> Verdict:
        verdict = Verdict(unit.name, mutant, reason=reason or "")
        baseline = self.baseline(servers, unit)
        began = time.monotonic()
        variants = list(self.options.variants)
        if mutant.rule == "atomic made plain":  # the runner takes blocks one after another: only "thread" can tell
            variants.sort(key=lambda variant: variant != "thread")
        elif reason is not None:
            variants = variants[:1]
        for variant in variants:
            lay_out(place, mutant)
            optimise = self.options.optimise if variant == "plain" else "-O1"
            error = build_mutant(commands(variant, unit.files[0]), place, unit, optimise)
            if error:
                verdict.outcome, verdict.why = "does not compile", error
                break
            with self.lock:
                order = baseline.order()
            answer = self.server(servers, variant).run(
                build=str(place),
                tests=unit.tests,
                order=order,
                limits=baseline.limits(variant),
                limit=120,
                stop=True,
                log=str(place / "log.txt"),
            )
            if answer["ended"] != "passed":
                verdict.outcome, verdict.by, verdict.how = "caught", variant, answer["ended"]
                verdict.test, verdict.why = answer["test"], answer["why"]
                with self.lock:
                    baseline.caught[answer["test"]] += 1
                break
        if not verdict.outcome:
            verdict.outcome = "survived" if reason is None else "equivalent"
        verdict.seconds = round(time.monotonic() - began, 1)
        return verdict

    def run(self, work: list[tuple[Unit, Mutant, str | None]]) -> None:
        todo: queue.SimpleQueue[tuple[Unit, Mutant, str | None]] = queue.SimpleQueue()
        for piece in work:
            todo.put(piece)
        done: list[Verdict] = []
        failures: list[BaseException] = []

        def worker(number: int) -> None:
            servers: dict[str, Server] = {}
            place = WORK / f"worker-{number}"
            try:
                while not failures:
                    try:
                        unit, mutant, reason = todo.get_nowait()
                    except queue.Empty:
                        break
                    verdict = self.judge(servers, place, unit, mutant, reason)
                    done.append(verdict)
                    self.results.add(verdict)
                    told = f"{verdict.outcome} {verdict.by} {verdict.how} {verdict.test.split('::')[-1]}".strip()
                    self.say(f"{len(done)}/{len(work)}  {mutant.name}\n          {told} ({verdict.seconds:.0f} s)")
            except BaseException as error:  # a worker's failure ends the session, not only the worker
                failures.append(error)
            finally:
                for server in servers.values():
                    server.close()

        threads = [threading.Thread(target=worker, args=(k,)) for k in range(self.options.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


# ---- Keeping verdicts, so that a session can be continued.


class Results:
    """The verdicts on the sources as they are, in a file. Those of a unit whose sources changed are dropped."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path = path
        self.states = {unit.name: state(unit) for unit in UNITS}
        self.verdicts: dict[str, Verdict] = {}
        self.lock = threading.Lock()
        if again and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            for record in kept["verdicts"]:
                if kept["states"].get(record["unit"]) == self.states.get(record["unit"]):
                    self.take(Verdict(**{**record, "mutant": Mutant(**record["mutant"])}))

    def take(self, verdict: Verdict) -> None:
        self.verdicts[verdict.place] = verdict

    def known(self, unit: Unit, mutant: Mutant, reason: str | None) -> bool:
        """Whether nothing is left to find out: it was caught, did not compile, or survived and is listed by now."""
        verdict = self.verdicts.get(Verdict(unit.name, mutant).place)
        if verdict is None or (verdict.outcome in ("survived", "equivalent") and reason is None):
            return False
        if verdict.outcome == "survived":
            verdict.outcome, verdict.reason = "equivalent", reason or ""
        return True

    def add(self, verdict: Verdict) -> None:
        with self.lock:
            self.take(verdict)
            record = {"states": self.states, "verdicts": [asdict(verdict) for verdict in self.verdicts.values()]}
            self.path.write_text(json.dumps(record, indent=1), encoding="utf-8")


# ---- Reporting.


def table(verdicts: list[Verdict]) -> str:
    """The markdown between the markers."""
    counted = [v for v in verdicts if v.outcome in ("caught", "survived")]
    caught = [v for v in counted if v.outcome == "caught"]
    equivalent = [v for v in verdicts if v.outcome == "equivalent"]
    share = 100.0 * len(caught) / max(1, len(counted))
    minutes = sum(v.seconds for v in verdicts) / 2 / 60
    lines = [
        f"{len(counted) + len(equivalent)} mutants; {len(equivalent)} change nothing observable, for the "
        f"reasons in `python_tests/mutants/{EQUIVALENTS.name}`; of the other {len(counted)}, "
        f"**{len(caught)} are caught ({share:.1f}%)**, {len(counted) - len(caught)} survive. "
        f"On two cores they took {minutes:.0f} minutes.",
    ]
    lines += rows_of("family", [(unit.family, [v for v in verdicts if v.unit == unit.name]) for unit in UNITS])
    lines += rows_of("rule", [(rule, [v for v in verdicts if v.mutant.rule == rule]) for rule in RULES])
    survivors = [v.mutant for v in verdicts if v.outcome == "survived"]
    if survivors:
        lines += ["", "Survivors:", ""]
    lines += [
        f"- `{m.file}`, {m.function or 'constant'}, {m.rule}: `{m.before}` becomes `{m.after}`" for m in survivors
    ]
    return "\n".join(lines)


def rows_of(title: str, groups: list[tuple[str, list[Verdict]]]) -> list[str]:
    """A markdown table of what became of each group, and of all."""
    lines = [
        "",
        f"| {title} | counted | plain run | ThreadSanitizer | AddressSanitizer | survived | equivalent |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    everything = [verdict for _, group in groups for verdict in group]
    for name, mine in [*groups, ("all", everything)]:
        outcomes = Counter(v.outcome for v in mine)
        by = Counter(v.by for v in mine if v.outcome == "caught")
        cells = [outcomes["caught"] + outcomes["survived"], *(by[variant] for variant in VARIANTS)]
        cells += [outcomes["survived"], outcomes["equivalent"]]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(str(cell) if cell else "" for cell in cells) + " |")
    return lines


def write_table(text: str) -> None:
    page = TABLE.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise SystemExit(f"{TABLE.name}: expected the lines {BEGIN} and {END}, found none")
    head, rest = page.split(BEGIN, 1)
    TABLE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", choices=[unit.name for unit in UNITS], help="only the mutants of this kernel file")
    parser.add_argument("--places", type=int, default=1, help="mutants per rule and file; 0: all (default 1)")
    parser.add_argument("--rule", action="append", help="only this rule; may be repeated")
    parser.add_argument("--function", action="append", help="only in this function; may be repeated")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them, evenly spread")
    parser.add_argument("--again", action="store_true", help="keep the verdicts on mutants caught before")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="builds to try, in order (default: all three)")
    parser.add_argument("--jobs", type=int, default=min(2, len(os.sched_getaffinity(0))), help="workers")
    parser.add_argument(
        "--optimise",
        default="-O0",
        help="of the plain build (default -O0: compiling is most of the work); the sanitised ones take -O1",
    )
    parser.add_argument("--least", type=float, default=95.0, help="percent that must be caught (default 95)")
    given = parser.parse_args(arguments)
    given.variants = given.variants.split(",")
    return given


def main(arguments: list[str]) -> int:
    given = options(arguments)
    began = time.monotonic()
    everything = {unit.name: unit.found() for unit in UNITS}
    listed = Equivalents.read(EQUIVALENTS)
    unmatched = listed.unmatched([mutant for found in everything.values() for mutant in found])
    if unmatched:
        lines = "\n".join("  " + " | ".join(key) for key in unmatched)
        raise SystemExit(f"{EQUIVALENTS.name}: expected entries that fit a mutant, found none for\n{lines}")

    work = []
    for unit in UNITS:
        for mutant in chosen(everything[unit.name], given.places):
            wanted = (given.unit, unit.name), (given.rule, mutant.rule), (given.function, mutant.function)
            if all(choice is None or has == choice or has in choice for choice, has in wanted):
                work.append((unit, mutant, listed.reason(mutant)))
    if given.sample is not None:
        work = [w for w in work if w[2] is None]  # a sample asks whether faults are noticed
        take = min(given.sample, len(work))
        work = [work[(2 * k + 1) * len(work) // (2 * take)] for k in range(take)]
    if given.list:
        for _, mutant, reason in work:
            print(f"{mutant.name}{'   EQUIVALENT: ' + reason if reason else ''}")
        print(f"{len(work)} of {sum(len(found) for found in everything.values())} mutants")
        return 0

    WORK.mkdir(parents=True, exist_ok=True)
    results = Results(WORK / ("results.json" if given.sample is None else "sample.json"), given.again)
    left = [w for w in work if not results.known(*w)]
    # In an order that is spread over the kernels: what an interrupted session found is of all of them.
    left.sort(key=lambda w: hashlib.sha256(Verdict(w[0].name, w[1]).place.encode()).digest())
    if left:
        build_modules(given.variants)
        Session(given, results).run(left)
    verdicts = [results.verdicts[Verdict(unit.name, mutant).place] for unit, mutant, _ in work]
    text = table(verdicts)
    print(f"\n{text}\n\n{results.path}, {time.monotonic() - began:.0f} s")
    whole = not (given.unit or given.rule or given.function or given.sample is not None)
    if whole and given.variants == list(VARIANTS):
        write_table(text)

    wrong = [v for v in verdicts if v.outcome == "caught" and v.reason]
    for v in wrong:
        print(f"listed as equivalent, but {v.test} notices it: {v.mutant.name}")
    counted = [v for v in verdicts if v.outcome in ("caught", "survived") and not v.reason]
    share = 100.0 * sum(v.outcome == "caught" for v in counted) / max(1, len(counted))
    if not counted or share < given.least:
        print(f"expected at least {given.least:g}% caught, found {share:.1f}% of {len(counted)}")
    return 1 if wrong or not counted or share < given.least else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
