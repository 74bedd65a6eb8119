"""Dependencies point one way; this file reads the imports and includes and looks for arrows against the flow.

    csrc/sela -> csrc/cpu, csrc/cuda -> csrc/bindings -> kernels -> assign, data -> training -> doctor -> cli

models, evaluation, report and compat stand beside training: training may use them, they may not use training.
embeddings, inference and finetuning stand between training and cli, export between inference and cli.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each part of sela_ext may import from sela_ext, beside itself. Parts that do not exist (yet) are no trouble.
BASE = {"errors"}
BESIDE_TRAINING = {"models", "evaluation", "report", "compat"}
ALLOWED = {
    "errors": set(),
    "kernels": BASE | {"_core"},
    "assign": BASE | {"kernels"},
    "data": BASE | {"kernels"},
    **{part: BASE | {"kernels", "assign", "data"} | (BESIDE_TRAINING - {part}) for part in BESIDE_TRAINING},
    "training": BASE | {"kernels", "assign", "data"} | BESIDE_TRAINING,
    "embeddings": BASE | {"assign", "data", "evaluation", "models", "training"},
    "inference": BASE | {"kernels", "assign", "data", "training"} | BESIDE_TRAINING,
    "export": BASE | {"kernels", "data", "training", "inference"} | BESIDE_TRAINING,
    "finetuning": BASE | {"kernels", "assign", "data", "training"} | BESIDE_TRAINING,
    "doctor": BASE | {"kernels", "assign", "data", "training"} | BESIDE_TRAINING,
}
TOP = {"cli", "__main__"}  # may import everything but the compiled core
PUBLIC_FROM_ROOT = {"__version__", "build_info"}  # the names of sela_ext/__init__.py that are not another part's

# What each folder of csrc may include: project headers by folder. Only bindings knows Python.
INCLUDES = {
    "sela": {"sela"},
    "cpu": {"sela", "cpu"},
    "cuda": {"sela", "cuda"},
    "simt": {"sela", "cuda", "simt"},
    "fuzz": {"sela", "fuzz"},
    "bindings": {"sela", "cpu", "cuda", "bindings"},
}
# The test-only runner stands in for CUDA in two headers, and has its own module of bindings.
MAY_INCLUDE_SIMT = {"csrc/cuda/gpu.cuh", "csrc/cuda/launch.h", "csrc/bindings/simt.cpp"}
TORCH = re.compile(r"\b(?:torch|ATen|at|c10)(?:/|::|_python\b)|\bTorch\b", re.ASCII)
PYTHON = re.compile(r"<(?:pybind11/|Python\.h)|\bpybind11::")


def imported_names(tree, module, is_package):
    """Yields (line, dotted name) of everything a module imports, wherever in it; relative names are made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def python_faults(root):
    """One line for every import in root/sela_ext against the flow."""
    package = root / "sela_ext"
    parts = {path.stem for path in package.iterdir() if path.suffix in (".py", ".pyi") or path.is_dir()}
    helpers = {
        path.stem for path in package.glob("*.py") if path.stem not in ALLOWED and path.stem not in TOP | {"__init__"}
    }  # single modules beside errors.py: everyone may use them, they use nobody but one another
    faults = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).with_suffix("").parts
        part = inside[0]
        if part == "__init__":
            continue  # collects the public names of all parts, lazily; what it imports at once is checked by test_build
        is_package = inside[-1] == "__init__"
        module = ".".join(["sela_ext", *(inside[:-1] if is_package else inside)])
        if part in TOP:
            allowed = parts - {"_core"}
        elif part in helpers:
            allowed = BASE | helpers
        elif part in ALLOWED:
            allowed = ALLOWED[part] | helpers
        else:
            faults.append(
                f"sela_ext/{part}: has no place in the order of dependencies, add it to {Path(__file__).name}"
            )
            continue
        where = path.relative_to(root).as_posix()
        for line, name in imported_names(ast.parse(path.read_text(encoding="utf-8")), module, is_package):
            names = name.split(".")
            if names[0] != "sela_ext" or (len(names) > 1 and names[1] in PUBLIC_FROM_ROOT):
                continue
            target = names[1] if len(names) > 1 else "__init__"
            if target == part or target in allowed or (target == "__init__" and part in TOP):
                continue
            if target == "__init__" or target not in parts | set(ALLOWED) | TOP:
                faults.append(f"{where}:{line}: {part} imports {name} from the top; name the module it comes from")
            else:
                faults.append(f"{where}:{line}: {part} imports {target}, against the flow")
    return faults


def without_comments(text):
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


def cpp_faults(root):
    """One line for every include in root/csrc against the flow, and for every word of torch or misplaced Python."""
    csrc = root / "csrc"
    faults = []
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".hpp", ".cpp", ".cc", ".cu", ".cuh")):
        folder = path.relative_to(csrc).parts[0]
        where = path.relative_to(root).as_posix()
        text = without_comments(path.read_text(encoding="utf-8"))
        if folder not in INCLUDES:
            faults.append(f"{where}: csrc/{folder} has no place in the order of dependencies")
            continue
        for name in re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', text, flags=re.MULTILINE):
            if (path.parent / name).is_file():
                target = (path.parent / name).resolve().relative_to(csrc.resolve()).parts[0]
            else:
                target = name.split("/")[0] if "/" in name else ""
            allowed = INCLUDES[folder] | ({"simt"} if where in MAY_INCLUDE_SIMT else set())
            if target in INCLUDES and target not in allowed:
                faults.append(f"{where}: csrc/{folder} includes {name}, against the flow")
        if TORCH.search(text):
            faults.append(f"{where}: knows torch ({TORCH.search(text).group()})")
        if folder != "bindings" and PYTHON.search(text):
            faults.append(f"{where}: knows Python, which only csrc/bindings may")
    for path in [root / "CMakeLists.txt", *sorted((root / "cmake").glob("*.cmake"))]:
        if path.exists() and re.search(
            r"torch", re.sub(r"#[^\n]*", "", path.read_text(encoding="utf-8")), re.IGNORECASE
        ):
            faults.append(f"{path.relative_to(root).as_posix()}: the build knows torch")
    return faults


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_python_imports_point_one_way():
    assert python_faults(ROOT) == []


def test_cpp_includes_point_one_way():
    assert cpp_faults(ROOT) == []


GOOD = {
    "sela_ext/__init__.py": "from sela_ext import _core\n",
    "sela_ext/_core.pyi": "",
    "sela_ext/errors.py": "import os\n",
    "sela_ext/kernels/__init__.py": "from sela_ext.kernels import sinkhorn\n",
    "sela_ext/kernels/sinkhorn.py": "from sela_ext import _core\nfrom sela_ext.errors import DataError\n",
    "sela_ext/assign/__init__.py": "from sela_ext import kernels\nfrom .solve import f\n",
    "sela_ext/assign/solve.py": "import numpy\nfrom ..kernels.sinkhorn import x\n",
    "sela_ext/training/__init__.py": "from sela_ext import __version__\nfrom sela_ext.assign.solve import f\n",
    "sela_ext/models/__init__.py": "import torch\n",
    "sela_ext/cli/__init__.py": "import sela_ext\nfrom sela_ext.training import train\n",
    "csrc/sela/a.h": "#pragma once\n#include <cmath>\n",
    "csrc/cpu/a.cpp": '#include "sela/a.h"\n#include "cpu/simd.h"\n// in torch: torch::softmax, see <torch/nn.h>\n',
    "csrc/cuda/a.cu": '#include <cuda_runtime.h>\n#include "sela/a.h"\n',
    "csrc/cuda/gpu.cuh": '#include "simt/simt.h"\n',
    "csrc/bindings/a.cpp": '#include <pybind11/pybind11.h>\n#include "sela/a.h"\n',
    "CMakeLists.txt": "# torch-free\n",
}


def test_the_checker_accepts_a_tree_that_follows_the_flow(tmp_path):
    root = write_tree(tmp_path, GOOD)
    assert python_faults(root) == []
    assert cpp_faults(root) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("sela_ext/kernels/a.py", "from sela_ext.assign import f\n", "kernels imports assign"),
        ("sela_ext/kernels/b/c.py", "from ...data import f\n", "kernels imports data"),
        ("sela_ext/kernels/reference/__init__.py", "from ...assign.solve import f\n", "kernels imports assign"),
        ("sela_ext/assign/b.py", "def f():\n    from sela_ext.training import train\n", "assign imports training"),
        ("sela_ext/assign/b.py", "from sela_ext import _core\n", "assign imports _core"),
        ("sela_ext/assign/b.py", "from .. import _core as c\n", "assign imports _core"),
        ("sela_ext/data/b.py", "import sela_ext._core\n", "data imports _core"),
        ("sela_ext/data/b.py", "from sela_ext import train\n", "data imports sela_ext.train from the top"),
        ("sela_ext/data/b.py", "import sela_ext\n", "data imports sela_ext from the top"),
        ("sela_ext/models/b.py", "if TYPE_CHECKING:\n    from sela_ext.training import x\n", "models imports training"),
        ("sela_ext/report/b.py", "importlib.import_module('sela_ext.cli')\n", "report imports cli"),
        ("sela_ext/training/b.py", "from sela_ext import cli\n", "training imports cli"),
        ("sela_ext/errors.py", "from sela_ext.kernels import x\n", "errors imports kernels"),
        ("sela_ext/words.py", "from sela_ext.data import x\n", "words imports data"),
        ("sela_ext/cli/a.py", "from sela_ext import _core\n", "cli imports _core"),
        ("sela_ext/elsewhere/a.py", "", "sela_ext/elsewhere: has no place"),
    ],
)
def test_the_checker_finds_a_planted_import(tmp_path, file, text, expected):
    faults = python_faults(write_tree(tmp_path, {**GOOD, file: text}))
    assert len(faults) == 1
    assert expected in faults[0]


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("csrc/sela/b.h", '#include "cpu/a.h"\n', "csrc/sela includes cpu/a.h"),
        ("csrc/cpu/b.cpp", '#include "bindings/bindings.h"\n', "csrc/cpu includes bindings/bindings.h"),
        ("csrc/cpu/b.cpp", '#include "../cuda/b.h"\n', None),
        ("csrc/cuda/b.cu", "#include <bindings/bindings.h>\n", "csrc/cuda includes bindings/bindings.h"),
        ("csrc/cuda/b.cuh", '#include "simt/simt.h"\n', "csrc/cuda includes simt/simt.h"),
        ("csrc/bindings/b.cpp", '#include "simt/runner.h"\n', "csrc/bindings includes simt/runner.h"),
        ("csrc/cpu/b.cpp", "#include <pybind11/numpy.h>\n", "knows Python"),
        ("csrc/bindings/b.cpp", "#include <torch/extension.h>\n", "knows torch"),
        ("csrc/cpu/b.cpp", "at::Tensor f();\n", "knows torch"),
        ("csrc/lib/b.cpp", "", "csrc/lib has no place"),
        ("CMakeLists.txt", "find_package(Torch REQUIRED)\n", "the build knows torch"),
    ],
)
def test_the_checker_finds_a_planted_include(tmp_path, file, text, expected):
    root = write_tree(tmp_path, {**GOOD, "csrc/cuda/b.h": "", file: text})
    faults = cpp_faults(root)
    assert len(faults) == 1
    assert (expected or "against the flow") in faults[0]


def test_importing_a_part_does_not_import_what_lies_above_it(tmp_path):
    code = (
        "import importlib, sys\n"
        "for name in ('kernels', 'assign', 'data'):\n"
        "    importlib.import_module('sela_ext.' + name)\n"
        "above = [m for m in sys.modules if m.startswith(('sela_ext.training', 'sela_ext.cli'))]\n"
        "assert not above, above\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
