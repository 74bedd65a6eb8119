"""The machine code of the CUDA kernels and the programs that read it: compile, extract, disassemble, name."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpu_budgets as budgets

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_static"
JOBS = 2


class InspectionError(RuntimeError):
    """Something that the inspection needs is missing; the message says what to do."""


# ---- Programs.


def find_program(name: str) -> str:
    """Cuobjdump or nvdisasm: on the PATH, beside nvcc, or in a Python package of this interpreter.

    Raises:
        InspectionError: it is in none of these places.
    """
    found = shutil.which(name)
    if found:
        return found
    places = []
    nvcc = shutil.which("nvcc")
    if nvcc:
        places.append(Path(nvcc).resolve().parent)
        places += [Path(word).parent for word in re.findall(r"/\S*/bin/nvcc", read_start(nvcc))]  # a wrapper script
    for package, inside in (
        ("nvidia", ("cu13/bin", "cuda_cuobjdump/bin", "cuda_nvdisasm/bin")),
        ("triton", ("backends/nvidia/bin",)),
    ):
        spec = importlib.util.find_spec(package)
        for base in (spec.submodule_search_locations or []) if spec else []:
            places += [Path(base) / folder for folder in inside]
    for place in places:
        if (place / name).is_file():
            return executable(place / name)
    raise InspectionError(
        f"expected {name} on the PATH, beside nvcc, or in a Python package, found none: "
        f"pip install 'nvidia-cuda-cuobjdump>=13' 'nvidia-cuda-nvdisasm>=13' (or triton), or install the CUDA toolkit"
    )


def read_start(path: str) -> str:
    with open(path, "rb") as file:
        start = file.read(2000)
    return start.decode(errors="replace") if start.startswith(b"#!") else ""


def executable(program: Path) -> str:
    """The program itself, or a copy that may be run: pip does not always keep the permission."""
    if os.access(program, os.X_OK):
        return str(program)
    BUILD.mkdir(parents=True, exist_ok=True)
    copy = BUILD / program.name
    shutil.copyfile(program, copy)
    copy.chmod(0o755)
    return str(copy)


def output(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InspectionError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def nvcc_version() -> str:
    if not shutil.which("nvcc"):
        return ""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", output("nvcc", "--version"))
    return found[1] if found else ""


def shipped_architectures() -> list[str]:
    """As in cmake/SelaCuda.cmake, without the suffix -real."""
    text = (ROOT / "cmake" / "SelaCuda.cmake").read_text()
    (line,) = re.findall(r"^set\(SELA_SHIPPED_ARCHS (.+)\)$", text, re.MULTILINE)
    return [word.removesuffix("-real") for word in line.split()]


# ---- Machine code.


def compile_kernels() -> list[Path]:
    """The object files of csrc/cuda/*.cu, built by the project's own CMake in build/gpu_static, where ninja keeps them.

    Raises:
        InspectionError: no nvcc, cmake or pybind11, or the build fails.
    """
    if not shutil.which("nvcc"):
        raise InspectionError("expected nvcc on the PATH, found none: install the CUDA toolkit, or give --core FILE")
    if not (shutil.which("cmake") and shutil.which("ninja")):
        raise InspectionError("expected cmake and ninja on the PATH, found not both: pip install cmake ninja")
    if importlib.util.find_spec("pybind11") is None:
        raise InspectionError("expected the package pybind11, found none: pip install pybind11")
    headers = output(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    output(
        *("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-Wno-dev", "-DSELA_CUDA=ON", "-DSELA_CUDA_ARCHS="),
        *("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_CUDA_FLAGS=--threads=2"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={headers}"),
    )
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    objects = [BUILD / entry["output"] for entry in commands if entry["file"].endswith(".cu")]  # either may be absolute
    output("ninja", "-C", BUILD, "-j", str(JOBS), *(path.relative_to(BUILD) for path in objects))
    return objects


def cubins(binaries: Iterable[Path], folder: Path) -> dict[str, list[Path]]:
    """The machine code in object files or libraries, by architecture."""
    found: dict[str, list[Path]] = {}
    for number, binary in enumerate(binaries):
        inside = folder / str(number)
        inside.mkdir()
        output(find_program("cuobjdump"), "-xelf", "all", binary.resolve(), cwd=inside)
        for path in sorted(inside.glob("*.cubin")):
            arch = re.search(r"sm_(\d+)[af]?\.cubin$", path.name)
            if arch:
                found.setdefault(arch[1], []).append(path)
    return found


_FUNCTION = re.compile(r"^ *Function (\S+):\s*\n\s*(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What ptxas has given a kernel: registers per thread, bytes of stack per thread, of shared memory per block."""

    registers: int
    stack: int
    shared: int


def resources(text: str, arch: str) -> dict[str, Resources]:
    """By mangled name, from the output of `cuobjdump -res-usage`, the report that ptxas leaves in its output."""
    found = {}
    for name, line in _FUNCTION.findall(text):
        values = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        shared = values["SHARED"] - budgets.MULTIPROCESSORS[arch].reported
        found[name] = Resources(values["REG"], values["STACK"] + values.get("LOCAL", 0), max(0, shared))
    return found


# ---- Names.


@dataclass(frozen=True)
class Kernel:
    """A kernel's name and its template arguments by parameter: {"T": "half", "kAligned": "true", ...}."""

    name: str
    arguments: dict[str, str]

    def __str__(self) -> str:
        words = [
            name.removeprefix("k").lower() if value == "true" else value
            for name, value in self.arguments.items()
            if value != "false"
        ]
        return f"{self.name}<{', '.join(words)}>" if words else self.name


def template_parameters(text: str) -> dict[str, list[str]]:
    """{kernel: names of its template parameters} of all `__global__` functions in C++ text."""
    found = {}
    text = re.sub(r"//[^\n]*|^#.*$", "", text, flags=re.MULTILINE)
    pattern = r"(?:template\s*<((?:[^<>]|<[^<>]*>)*)>\s*)?__global__\s([^{;]*)\{"
    for head, function in re.findall(pattern, text):
        name = re.search(r"(\w+)\s*\([^()]*\)\s*$", function)
        parameters = re.sub(r"template\s*<[^>]*>", "", head)
        if name:
            found[name[1]] = [word.split()[-1] for word in parameters.split(",") if word.strip()]
    return found


def demangle(names: Sequence[str]) -> list[str]:
    program = shutil.which("c++filt")
    if not program:
        raise InspectionError("expected c++filt on the PATH, found none: install binutils")
    done = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def kernel_of(demangled: str, parameters: dict[str, list[str]]) -> Kernel:
    """From `void sela::fused_kernel<__half, true>(Arguments)`; type names lose namespaces and underscores."""
    found = re.match(r"(?:void )?(?:[\w:]|\(anonymous namespace\)::)*?(\w+)(?:<(.*)>)?\(", demangled)
    if not found:
        return Kernel(demangled, {})
    values = []
    for word in (found[2] or "").split(","):
        word = word.strip()
        if word:
            values.append(re.sub(r"<.*", "", word).split("::")[-1].removeprefix("__").removeprefix("nv_"))
    names = parameters.get(found[1], [])
    if len(names) != len(values):
        names = [f"argument {i}" for i in range(len(values))]
    return Kernel(found[1], dict(zip(names, values, strict=True)))
