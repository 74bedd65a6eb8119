"""No module of the package can be made to run what a file says: its calls are read, without importing it."""

import ast
import functools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sela_ext"

# Calls that run code out of data, or out of a text, whatever their arguments.
REFUSED = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pty.spawn",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "pandas.read_pickle",
    "torch.hub.load",
    "torch.jit.load",
    "torch.export.load",
    "torch.package.PackageImporter",
    "torch.serialization.add_safe_globals",
    "torch.serialization.safe_globals",
    "shutil.unpack_archive",
    "tempfile.mktemp",
    "markupsafe.Markup",
    "jinja2.Template",
}
REFUSED_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "codeop", "runpy"}
# Methods by name alone: what they are called on is not known without running the program.
REFUSED_METHODS = {"extract", "extractall", "from_string", "unsafe_load", "full_load"}
# Objects that processes of one run send each other are pickled: said in SECURITY.md.
BETWEEN_RANKS = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv"}
SUBPROCESS = {"run", "Popen", "call", "check_call", "check_output"}
STARTING = re.compile(r"os\.(?:exec|spawn|posix_spawn)\w*")

# file -> {what is found there: why it may be}.
ALLOWED = {
    "__init__.py": {"import_module of a name that is not written there": "the table of public names beside it"},
    "data/csv_file.py": {"csv.writer, which leaves a carriage return bare": "it mends that; all others use it"},
    "data/pickled.py": {"pickle.Unpickler": "a subclass that finds none but five inert classes of its own module"},
    "export/optional.py": {"import_module of a name that is not written there": "packages that the formats name"},
    "kernels/__init__.py": {"import_module of a name that is not written there": "one of two names beside it"},
    "report/page.py": {"markupsafe.Markup": "its own style and program, and pictures in base64"},
    "report/text.py": {"markupsafe.Markup": "JSON in which <, > and & are escapes: see `script_data`"},
    "training/config.py": {"import yaml": "takes texts apart, of which nothing is built: see `yaml` below"},
    "training/launch.py": {
        "pickle.loads": "from processes that it started itself, through files without a name",
        "import cloudpickle": "the same",
    },
    "training/launch_child.py": {"import cloudpickle": "to the process that started it, through a file without a name"},
    "training/ranks.py": {
        "broadcast_object_list": "between the ranks of one run",
        "all_gather_object": "between the ranks of one run",
    },
}


# Script elements of templates: values as JSON by the filter `data`, which are not run, and the report's program.
OF_THE_REPORT = re.compile(
    r'<script type="application/json" id="data-(?:[a-z-]+|{{ id }})">{{ \w+ \| data }}</script>|'
    r"<script>{{ script }}</script>"
)


def spelled(node, aliases):
    """The dotted name of what is called, imports resolved; "" for what has none."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ".".join(["?", *reversed(parts)]) if parts else ""
    return ".".join([aliases.get(node.id, node.id), *reversed(parts)])


def imported(tree):
    """Local name -> full name, of all imports wherever in a module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {
        name: full.replace("numpy", "np", 1) if full.split(".")[0] == "numpy" else full for name, full in found.items()
    }


def keyword(call, name):
    """The constant given for a keyword; "?" for another expression, None where it is not given."""
    for one in call.keywords:
        if one.arg == name:
            return one.value.value if isinstance(one.value, ast.Constant) else "?"
    return None


def faults_of_call(call, name):
    """Why a call is refused; nothing for most."""
    last = name.rpartition(".")[2]
    if name in REFUSED or STARTING.fullmatch(name):
        yield name
    if "." in name and last in REFUSED_METHODS:
        yield f"{last} of an archive, or of a text"
    if last in BETWEEN_RANKS and name != "torch.distributed.recv":  # that one takes a tensor
        yield last
    if name == "torch.load" and keyword(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name == "np.load" and keyword(call, "allow_pickle") is not False:
        yield "np.load without allow_pickle=False"
    if keyword(call, "allow_pickle") not in (None, False):
        yield "allow_pickle"
    if keyword(call, "shell") not in (None, False):
        yield "shell"
    if name.startswith("subprocess.") and last in SUBPROCESS:
        first = call.args[0] if call.args else None
        if not isinstance(first, (ast.List, ast.Tuple)):
            yield "a process whose command is no list written there"
    if last == "import_module" and not (call.args and isinstance(call.args[0], ast.Constant)):
        yield "import_module of a name that is not written there"
    if name == "jinja2.Environment" and keyword(call, "autoescape") is not True:
        yield "templates that do not escape"
    if name.startswith("yaml.") and name != "yaml.compose":
        yield f"{name}: yaml may take a text apart, and build nothing"
    if name == "csv.writer":
        yield "csv.writer, which leaves a carriage return bare"


def faults_in(text):
    """(line, what) of everything in a module that could run what data say."""
    tree = ast.parse(text)
    aliases = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for what in faults_of_call(node, spelled(node.func, aliases)):
                yield node.lineno, what
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                if spelled(base, aliases) in ("pickle.Unpickler", "jinja2.Undefined"):
                    yield node.lineno, spelled(base, aliases)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in REFUSED_MODULES:
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in REFUSED_MODULES:
            yield node.lineno, f"import {node.module}"


@functools.cache
def all_faults():
    """(module, line, what) of the whole package."""
    return [
        (path.relative_to(PACKAGE).as_posix(), line, what)
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in faults_in(path.read_text(encoding="utf-8"))
    ]


def test_nothing_that_a_file_says_is_executed_anywhere():
    found = [
        f"sela_ext/{name}:{line}: {what}" for name, line, what in all_faults() if what not in ALLOWED.get(name, {})
    ]
    assert found == []


def test_every_exception_is_still_needed():
    found = {(name, what) for name, _, what in all_faults()}
    assert {(name, what) for name, reasons in ALLOWED.items() for what in reasons} <= found


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads as read\nread(data)",
        "import pickle as p\nclass Mine(p.Unpickler): pass",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import numpy as np\nnp.load(path)",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "import numpy as np\nnp.lib.format.read_array(file, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "import yaml\nyaml.load(text)",
        "yaml.safe_load(text)",
        "def f():\n    from joblib import load",
        "import os\nos.system('ls')",
        "import os\nos.execvp(name, words)",
        "import subprocess\nsubprocess.run('ls ' + path)",
        "import subprocess\nsubprocess.run(['ls', path], shell=True)",
        "import tarfile\ntarfile.open(path).extractall()",
        "import zipfile\nwith zipfile.ZipFile(path) as archive:\n    archive.extract(name, folder)",
        "import importlib\nimportlib.import_module(options['model'])",
        "import jinja2\njinja2.Environment(loader=x)",
        "import csv\ncsv.writer(file)",
        "import torch.distributed as dist\ndist.broadcast_object_list(box)",
    ],
)
def test_planted_calls_are_found(planted):
    assert list(faults_in(planted))


@pytest.mark.parametrize(
    "harmless",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
        "network.eval()",
        "Augment.eval(224)",
        "import re\nre.compile('x')",
        "import subprocess\nsubprocess.run(['ls', path], check=True)",
        "import importlib\nimportlib.import_module('faiss')",
        "import jinja2\njinja2.Environment(autoescape=True)",
    ],
)
def test_harmless_calls_are_not(harmless):
    assert not list(faults_in(harmless))


def test_templates_mark_nothing_but_constants_as_safe():
    found = []
    for path in sorted(PACKAGE.rglob("*.j2")):
        text = path.read_text(encoding="utf-8")
        found += [
            f"{path.name}: {use}" for use in re.findall(r"(\S+(?:'[^']*')?)\s*\|\s*safe\b", text) if "'" not in use
        ]
        assert "autoescape false" not in text
        scripts = re.findall(r"<script[^\n]*", text, re.IGNORECASE)
        found += [f"{path.name}: {script}" for script in scripts if not OF_THE_REPORT.fullmatch(script)]
    assert found == []
