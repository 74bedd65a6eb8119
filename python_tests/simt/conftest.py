"""The module `_simt`: the CUDA kernels' own source, executed thread by thread on the CPU (csrc/simt).

A test asks for the fixture `simt` and calls `simt.sinkhorn_pass_cuda(...)` and its kin with addresses of host memory,
such as `array.ctypes.data`. With the fixture `schedule` it runs once per order of the threads; results must not differ.
A kernel that does what CUDA forbids raises `simt.SimtError`, whose message starts with the kernel's file and line.

The same tests run under ThreadSanitizer and AddressSanitizer: `nox -s simt` builds the variants `plain`, `thread` and
`address`, and starts pytest once per variant, with SELA_SIMT_BUILD naming the folder of the variant's module and the
sanitizer's library loaded into Python first. So a test here
  - takes its data from numpy, to the element: AddressSanitizer watches what lies behind an array;
  - says `torch = pytest.importorskip("torch")` inside itself where it cannot do without, and carries the marker
    `plain_only`: sanitised runs leave it out, since torch starts threads that no sanitizer has been told of;
  - keeps grids small: ThreadSanitizer takes 5 to 10 times as long;
  - ends the whole run when the sanitizer finds something; the report is in pytest's output, -s shows it at once.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "simt"


def cuda_headers():
    """Whether CUDA's headers can be expected: with nvcc, or from the PyPI package."""
    return shutil.which("nvcc") or list(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include/cuda_bf16.h"))


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


def build_plain_variant():
    if not shutil.which("g++"):
        pytest.skip("no g++ on the PATH, which compiles the SIMT runner")
    if not cuda_headers():
        pytest.skip("no CUDA headers, which the SIMT runner takes half and bfloat16 from: no nvcc on the PATH")
    pybind11 = pytest.importorskip("pybind11")
    tools = Path(sys.executable).parent
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(tools))
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(tools))
    if not (cmake and ninja):
        pytest.skip("no cmake and ninja, which build the SIMT runner: pip install cmake ninja")
    run(
        *(cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *("-DSELA_SIMT=ON", "-DSELA_CUDA=OFF"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    )
    run(cmake, "--build", BUILD, "--target", "_simt", "--parallel", len(os.sched_getaffinity(0)))
    return BUILD / "plain"


def load():
    """The module of the variant in SELA_SIMT_BUILD, or the plain one, built first if it is not up to date."""
    if "_simt" in sys.modules:  # a process can load it once, and tests of other folders use it too
        return sys.modules["_simt"]
    folder = Path(os.environ.get("SELA_SIMT_BUILD") or build_plain_variant())
    found = sorted(folder.glob("_simt*.so"))
    assert len(found) == 1, f"expected one _simt*.so in {folder}, found {[path.name for path in found]}"
    spec = importlib.util.spec_from_file_location("_simt", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["_simt"] = module
    return module


@pytest.fixture(scope="session")
def simt():
    """The module `_simt`; see `load`."""
    return load()


@pytest.fixture(params=[0, 1, 2], ids=["in order", "shuffled 1", "shuffled 2"])
def schedule(simt, request):
    """Threads, warps and blocks in order, then in two shuffled orders; the seed."""
    simt.set_schedule(request.param)
    yield request.param
    simt.set_schedule(0)
