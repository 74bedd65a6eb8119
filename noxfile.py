"""How this project is checked, one session per question: `nox -s lint types tests`, or `nox -l` for the list.

Environments are kept between runs (torch is large); `nox -R` also skips the installation. With SELA_PYTHON set to an
interpreter that has the packages already, `types`, `security`, `sanitize`, `simt` and `mutants` use that one and
install only their tools.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2024.3"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

# pytest without the source tree on the path, as the command `pytest` starts it.
RUN_PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def requirements(group: str, *names: str) -> list[str]:
    """Requirements of one group in pyproject.toml ("build", "test" or "dev"), all or only the named ones."""
    if group == "build":
        found = PROJECT["build-system"]["requires"]
    else:
        found = PROJECT["project"]["optional-dependencies"][group]
    by_name = {re.split(r"[<>=~! ]", line, maxsplit=1)[0]: line for line in found}
    return [by_name[name] for name in names] if names else list(found)


def cpp_files() -> list[str]:
    return sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def named_and_options(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first option, and the others."""
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def prepared_python(session: nox.Session, *needed: str) -> str:
    """The interpreter whose packages a session uses: SELA_PYTHON as it is, or the session's own after installation."""
    given = os.environ.get("SELA_PYTHON")
    if given:
        return given
    session.install(*needed)
    return str(Path(session.bin) / "python")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff (check and format) and clang-format; changes nothing."""
    session.install(*requirements("dev", "ruff", "clang-format"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("clang-format", "--dry-run", "-Werror", *cpp_files())


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    session.install(*requirements("dev", "mypy"))
    python = prepared_python(session, ".")
    session.run("mypy", f"--python-executable={python}", "-p", "sela_ext")


@nox.session
def tests(session: nox.Session) -> None:
    """The fast suite: what the README's second command runs."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests marked slow: large data, whole builds."""
    session.install(".[test]")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as pages, in build/site; warnings, dead links among them, are errors. `-- serve` shows it."""
    session.install(*requirements("docs"))
    env = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    if "serve" in session.posargs:
        session.run("mkdocs", "serve", env=env)
        return
    session.run("mkdocs", "build", "--strict", "--quiet", *session.posargs, env=env)


@nox.session
def build(session: nox.Session) -> None:
    """Wheels and the source archive: built with and without CUDA, looked into, imported. Needs no torch."""
    session.install(*requirements("test", "pytest", "pytest-timeout"), *requirements("dev", "build"), "numpy")
    session.run("pytest", "-m", "slow or not slow", "--noconftest", "python_tests/test_wheel.py", *session.posargs)


@nox.session
def stubs(session: nox.Session) -> None:
    """Write sela_ext/_core.pyi anew from the compiled module."""
    session.install(*requirements("test", "pybind11-stubgen"))
    session.install("--no-deps", ".")
    folder = Path(session.create_tmp()).resolve()
    session.chdir(folder)  # away from the source tree, which would shadow the installed package
    session.run("pybind11-stubgen", "sela_ext._core", "--output-dir", str(folder), "--exit-code")
    shutil.copyfile(folder / "sela_ext" / "_core.pyi", ROOT / "sela_ext" / "_core.pyi")


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks in their quick form; `nox -s bench -- solver` runs only the named ones, extra options too."""
    session.install(".[test]")
    named, options = named_and_options(session.posargs)
    for name in named or ["solver", "images", "training"]:
        script = Path("bench") / f"{name}.py"
        if not script.exists():
            session.warn(f"{script} does not exist, skipped")
            continue
        session.run("python", str(script), "--quick", *options)


@nox.session
def performance(session: nox.Session) -> None:
    """The whole benchmarks with their competitors, and docs/performance.md from their rows; wants a quiet machine.

    `nox -s performance -- images --only sela` runs one of them, with options; `-- --check` only compares the document
    with the recorded rows.
    """
    if "--check" not in session.posargs:
        session.install(".[peers]")
        named, options = named_and_options(session.posargs)
        for name in named or ["solver", "images"]:
            session.run("python", f"bench/{name}.py", *options)
    session.run("python", "bench/performance.py", *(word for word in session.posargs if word == "--check"))


@nox.session
def security(session: nox.Session) -> None:
    """A bill of materials in build/sbom.json (CycloneDX), and the dependencies' known weaknesses (pip-audit).

    `-- bill` writes the bill alone: once its tools are installed, that needs no network. The audit asks pypi.org; where
    that cannot be reached it says so, and fails.
    """
    python = prepared_python(session, ".")
    tools = ROOT / "build" / "security-tools"  # apart from what is looked at
    if not (tools / "bin" / "pip-audit").exists():
        session.run("python", "-m", "venv", "--clear", str(tools))
        wanted = ("pip-audit>=2.7", "cyclonedx-bom>=4.4")
        session.run(str(tools / "bin" / "pip"), "install", "--quiet", *wanted, external=True)
    steps = {"bill": "cyclonedx-py", "audit": "pip-audit"}
    for step in session.posargs or steps:
        tool = str(tools / "bin" / steps[step])
        session.run("python", "python_tests/security/session.py", step, python, tool)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The compiled code under AddressSanitizer and UBSan, without CUDA: the kernel tests on the preset `sanitize`."""
    session.install(*requirements("build"))
    python = prepared_python(session, *requirements("test"), *PROJECT["project"]["dependencies"])
    headers = str(session.run("pybind11-config", "--cmakedir", silent=True)).strip()
    session.run(
        "cmake", "--preset", "sanitize", f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={headers}", "-Wno-dev"
    )
    session.run("cmake", "--build", "--preset", "sanitize", "--parallel", str(len(os.sched_getaffinity(0))))

    # The package is laid out by hand, so that the instrumented core never ends up in an ordinary installation.
    built = ROOT / "build" / "sanitize"
    package = built / "package"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "sela_ext", package / "sela_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for core in built.glob("_core*.so"):
        shutil.copy2(core, package / "sela_ext")
    # The sanitizers' own libraries must be the first ones in the process, before Python itself.
    libraries = [
        str(session.run("g++", f"-print-file-name={name}", silent=True, external=True)).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        "PYTHONPATH": str(package),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # the interpreter itself leaks by design
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    named = [name for name in ("python_tests/kernels", "python_tests/test_build.py") if Path(name).exists()]
    session.run(python, "-c", RUN_PYTEST, *(session.posargs or named), env=env, external=True)


@nox.session
def fuzz(session: nox.Session) -> None:
    """The JPEG decoder and the reader on mutated files under sanitizers; `-- 10000000` sets the number of runs.

    With CXX=clang++ by libFuzzer, in build/fuzz-clang. Otherwise by csrc/fuzz/driver.cpp: an input that fails is in
    build/fuzz/crash.jpg, and run again by `build/fuzz/csrc/fuzz/fuzz_jpeg 0 0 again.jpg build/fuzz/crash.jpg`, or
    fuzz_reader, whichever was at work. The reader takes a tenth of the runs, which cost it ten times as much.
    """
    clang = "clang" in os.environ.get("CXX", "")
    session.install(*requirements("build"))
    python = prepared_python(session, "numpy", "scipy")
    headers = str(session.run("pybind11-config", "--cmakedir", silent=True)).strip()
    built = ROOT / "build" / ("fuzz-clang" if clang else "fuzz")  # CMake keeps the compiler of a folder
    session.run(
        "cmake", "-S", ".", "-B", str(built), "-G", "Ninja", "-DSELA_FUZZ=ON", "-DSELA_CUDA=OFF",
        f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={headers}", "-Wno-dev",
    )  # fmt: skip
    session.run("cmake", "--build", str(built), "--target", "fuzz_jpeg", "fuzz_reader")
    seeds = built / "seeds"
    session.run(python, "python_tests/kernels/jpeg_writer.py", str(seeds), external=True)
    files = [str(path) for path in sorted(seeds.iterdir())]
    runs = int(session.posargs[0]) if session.posargs else 200000
    for target, share in (("fuzz_jpeg", runs), ("fuzz_reader", -(-runs // 10))):
        program = str(built / "csrc" / "fuzz" / target)
        if clang:
            session.run(program, f"-runs={share}", f"-artifact_prefix={built}/", str(seeds), external=True)
        else:
            session.run(program, str(share), "1", str(built / "crash.jpg"), *files, external=True)


def may_fix_addresses() -> bool:
    """Whether addresses can be kept from being randomised, which may take what ThreadSanitizer needs for itself."""
    if not shutil.which("setarch"):
        return False
    return subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode == 0


@nox.session
def simt(session: nox.Session) -> None:
    """The CUDA kernels executed on the CPU, plainly and sanitised; posargs: plain, thread, address.

    Builds all three (preset `simt`), then runs python_tests/simt once per variant; pytest options may follow the names.
    """
    session.install(*requirements("build"))
    python = prepared_python(session, ".[test]")
    headers = str(session.run("pybind11-config", "--cmakedir", silent=True)).strip()
    session.run("cmake", "--preset", "simt", f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={headers}")
    session.run("cmake", "--build", "--preset", "simt", "--parallel", str(len(os.sched_getaffinity(0))))

    sanitizers = {  # what must be the first in the process, before Python itself; the interpreter leaks by design
        "plain": ([], {}),
        "thread": (["libtsan.so"], {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}),
        "address": (
            ["libasan.so", "libubsan.so"],
            {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
        ),
    }
    variants = [word for word in session.posargs if word in sanitizers] or list(sanitizers)
    options = [word for word in session.posargs if word not in sanitizers]
    if not any(Path(word.split("::")[0]).exists() for word in options):
        options.append("python_tests/simt")
    for variant in variants:
        libraries, env = sanitizers[variant]
        paths = [
            str(session.run("g++", f"-print-file-name={name}", silent=True, external=True)).strip()
            for name in libraries
        ]
        env = {**env, "SELA_SIMT_BUILD": str(ROOT / "build" / "simt" / variant)}
        command = ["env", f"LD_PRELOAD={' '.join(paths)}", python, "-c", RUN_PYTEST]
        if paths:  # a sanitizer writes its report past pytest's capture, and ends the process
            command += ["-m", "not slow and not plain_only", "--capture=sys"]
        if variant == "thread" and may_fix_addresses():
            command = ["setarch", "-R", *command]
        session.log(f"variant {variant}")
        session.run(*command, *options, env=env, external=True)


@nox.session
def mutants(session: nox.Session) -> None:
    """Faults planted into the CUDA kernels: how many the tests on the CPU runner notice; `-- --sample 5` tries five."""
    python = prepared_python(session, ".[test]")
    session.run(python, "python_tests/mutants/session.py", *session.posargs, external=True)


@nox.session
def gpu_static(session: nox.Session) -> None:
    """The CUDA kernels' machine code held to its budgets, and docs/gpu.md's tables to the code; needs nvcc.

    Compiles all of it (minutes), unless `-- --check --core FILE` names a built extension module (seconds).
    """
    if not shutil.which("nvcc"):
        session.skip("no nvcc on the PATH")
    session.install(*requirements("build"), *requirements("inspect"))
    session.run("python", "bench/gpu_static.py", *(session.posargs or ["--check"]))
