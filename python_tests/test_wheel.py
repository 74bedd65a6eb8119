"""Whole builds, looked into and imported: `nox -s build`. Each takes seconds to a minute and asks package indexes."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")
needs_binutils = pytest.mark.skipif(not (shutil.which("objdump") and shutil.which("nm")), reason="no objdump and nm")


def run(*command, cwd, **env):
    """Runs a command in a folder that is not the source tree; SELA_* variables only as given here."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SELA_", "PYTHONPATH"))}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def try_wheel(folder, *options, source=ROOT, **env):
    """Builds a wheel as pip does, with a build folder of its own: folder/build; the wheel lies in folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", folder),
        *(f"--config-settings=build-dir={folder / 'build'}", *options, source),
        cwd=folder,
        **env,
    )


def build_wheel(folder, *options, source=ROOT, **env):
    done = try_wheel(folder, *options, source=source, **env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel):
    package = wheel.parent / "package"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(package)
    return package


def ask_build_info(package, cwd, **env):
    """What an import of an unpacked wheel says; numpy is the only other package that it may need."""
    code = (
        "import json, sela_ext, sela_ext._core as c; print(json.dumps([sela_ext.build_info(), c.cuda_device_count()]))"
    )
    done = run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=str(package), **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def path_without_nvcc(folder):
    """A PATH on which everything is found but nvcc."""
    parts = []
    for number, part in enumerate(os.environ["PATH"].split(os.pathsep)):
        if not (Path(part) / "nvcc").exists():
            parts.append(part)
            continue
        twin = folder / f"bin{number}"
        twin.mkdir(parents=True)
        for program in Path(part).iterdir():
            if program.name != "nvcc":
                (twin / program.name).symlink_to(program)
        parts.append(str(twin))
    return os.pathsep.join(parts)


def shipped_architectures():
    (line,) = re.findall(r"^set\(SELA_SHIPPED_ARCHS (.+)\)$", (ROOT / "cmake/SelaCuda.cmake").read_text(), re.MULTILINE)
    return [word.removesuffix("-real") for word in line.split()]


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("plain"), SELA_CUDA="OFF")


@pytest.fixture(scope="module")
def cuda_wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("cuda"))


def test_without_cuda_the_wheel_imports_alone(plain_wheel, tmp_path):
    info, devices = ask_build_info(unpack(plain_wheel), tmp_path)
    assert info["cuda"] is False
    assert info["cuda_version"] is None
    assert info["cuda_archs"] == info["cuda_ptx"] == []
    assert devices == 0


def test_the_wheel_holds_the_package_and_nothing_else(plain_wheel):
    with zipfile.ZipFile(plain_wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    version = plain_wheel.name.split("-")[1]
    info = f"sela_ext-{version}.dist-info"
    assert {name.split("/")[0] for name in names} == {"sela_ext", info}
    assert {f"{info}/METADATA", f"{info}/entry_points.txt", f"{info}/licenses/LICENSE"} <= set(names)
    assert {"sela_ext/__init__.py", "sela_ext/_core.pyi", "sela_ext/py.typed"} <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert [name for name in names if name.endswith((".h", ".cpp", ".cu", ".o", ".pyc", ".cmake"))] == []
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sela_ext").rglob("*.py")}
    assert tracked == {name for name in names if name.endswith(".py")}


def test_the_metadata_say_which_python_and_which_command(plain_wheel):
    package = unpack(plain_wheel)
    (info,) = package.glob("*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert "\nRequires-Dist: torch>=" in metadata
    assert "sela = sela_ext.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")


@needs_binutils
def test_without_cuda_only_the_c_library_and_its_kin_are_linked(plain_wheel):
    assert needed_libraries(plain_wheel) <= ORDINARY


ORDINARY = {"libc", "libm", "libstdc++", "libgcc_s", "libpthread", "libdl", "librt", "ld-linux-x86-64"}


def needed_libraries(wheel):
    (core,) = (unpack(wheel) / "sela_ext").glob("_core*.so")
    text = run("objdump", "-p", core, cwd=wheel.parent).stdout
    return {name.split(".so")[0] for name in re.findall(r"NEEDED\s+(\S+)", text)}


@needs_nvcc
def test_the_default_wheel_reports_every_shipped_architecture_and_imports_without_a_device(cuda_wheel, tmp_path):
    info, devices = ask_build_info(unpack(cuda_wheel), tmp_path, CUDA_VISIBLE_DEVICES="")
    assert info["cuda"] is True
    assert info["cuda_archs"] == shipped_architectures()
    assert info["cuda_ptx"] == shipped_architectures()[-1:]
    assert devices == 0


@needs_nvcc
def test_the_wheel_with_all_architectures_is_small(cuda_wheel):
    assert cuda_wheel.stat().st_size < 25e6


@needs_nvcc
@needs_binutils
def test_the_cuda_runtime_is_linked_into_the_core_and_no_driver_is_needed_to_load_it(cuda_wheel):
    assert needed_libraries(cuda_wheel) <= ORDINARY


@pytest.fixture(scope="module")
def cuobjdump(tmp_path_factory):
    beside_nvcc = Path(NVCC).resolve().parent if NVCC else Path()
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside_nvcc))
    if found:
        return found
    folder = tmp_path_factory.mktemp("cuobjdump")
    done = run(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, "nvidia-cuda-cuobjdump>=13,<14"),
        cwd=folder,
    )
    tools = [path for path in folder.rglob("cuobjdump") if path.is_file()]
    if done.returncode != 0 or not tools:
        pytest.skip(f"no cuobjdump: {done.stderr.strip()[-200:]}")
    tools[0].chmod(0o755)
    return str(tools[0])


@needs_nvcc
def test_the_default_wheel_holds_machine_code_for_every_shipped_architecture_and_ptx_of_the_newest(
    cuda_wheel, cuobjdump
):
    (core,) = (unpack(cuda_wheel) / "sela_ext").glob("_core*.so")
    machine_code = run(cuobjdump, "--list-elf", core, cwd=cuda_wheel.parent)
    ptx = run(cuobjdump, "--list-ptx", core, cwd=cuda_wheel.parent)
    print(machine_code.stdout, ptx.stdout, sep="")
    assert set(re.findall(r"\.sm_(\d+)[af]?\.cubin", machine_code.stdout)) == set(shipped_architectures())
    assert set(re.findall(r"\.sm_(\d+)[af]?\.ptx", ptx.stdout)) == set(shipped_architectures()[-1:])


@needs_nvcc
def test_fewer_architectures_can_be_asked_for(tmp_path):
    wheel = build_wheel(tmp_path, SELA_CUDA="ON", SELA_CUDA_ARCHS="80-real, 90")
    info, _ = ask_build_info(unpack(wheel), tmp_path)
    assert (info["cuda_archs"], info["cuda_ptx"]) == (["80", "90"], ["90"])


@needs_nvcc
def test_a_wrong_architecture_is_refused(tmp_path):
    done = try_wheel(tmp_path, SELA_CUDA_ARCHS="hopper")
    assert done.returncode != 0
    output = " ".join((done.stdout + done.stderr).split())
    assert 'SELA_CUDA_ARCHS: expected architectures such as "80;90"' in output
    assert 'found "hopper"' in output


def test_a_wrong_value_of_sela_cuda_is_refused(tmp_path):
    done = try_wheel(tmp_path, SELA_CUDA="bogus")
    assert done.returncode != 0
    assert 'SELA_CUDA: expected AUTO, ON or OFF, found "bogus"' in done.stdout + done.stderr


def test_cuda_without_nvcc_is_refused_with_the_remedy(tmp_path):
    done = try_wheel(tmp_path, SELA_CUDA="ON", PATH=path_without_nvcc(tmp_path))
    assert done.returncode != 0
    output = " ".join((done.stdout + done.stderr).split())
    assert "SELA_CUDA=ON, but no CUDA compiler was found" in output
    assert "Put nvcc on the PATH" in output


def test_auto_without_nvcc_builds_for_the_cpu_and_finds_nvcc_later(tmp_path):
    folder = tmp_path / "wheels"
    wheel = build_wheel(folder, PATH=path_without_nvcc(tmp_path))
    info, _ = ask_build_info(unpack(wheel), tmp_path)
    assert info["cuda"] is False
    if NVCC:  # the same build folder, now with nvcc
        shutil.rmtree(folder / "package")
        wheel.unlink()
        info, _ = ask_build_info(unpack(build_wheel(folder, SELA_CUDA_ARCHS="90")), tmp_path)
        assert (info["cuda"], info["cuda_archs"]) == (True, ["90"])


def objects_by_isa(build):
    """{instruction set: object files} of a build folder; what is not a loop body counts as generic."""
    found = {"generic": [], "avx2": [], "avx512": []}
    for path in build.rglob("*.cpp.o"):
        isa = re.search(r"sela_loops_(\w+)\.dir", path.as_posix())
        found[isa.group(1) if isa else "generic"].append(path)
    return found


@needs_binutils
def test_generic_code_holds_no_avx_instruction(plain_wheel):
    objects = objects_by_isa(plain_wheel.parent / "build")["generic"]
    assert {"dispatch.cpp.o", "parallel.cpp.o", "module.cpp.o"} <= {path.name for path in objects}
    for path in objects:
        code = run("objdump", "-d", "--no-show-raw-insn", path, cwd=plain_wheel.parent).stdout
        assert "\tret" in code
        assert not re.findall(r".*%[yz]mm\d+.*|.*\tv(?:mov|add|mul|fma|xor|pxor|cvt)\w+ .*", code)[:3], path


@needs_binutils
def test_no_function_of_an_avx_build_can_be_linked_into_generic_code(plain_wheel):
    """The linker keeps one of several equal inline functions: one that was compiled for AVX-512 would be taken for all.

    So an object of the AVX builds may offer no function but those of its own namespace.
    """
    objects = objects_by_isa(plain_wheel.parent / "build")
    for isa in ("avx2", "avx512"):
        for path in objects[isa]:
            text = run("nm", "-C", "--defined-only", "--extern-only", path, cwd=plain_wheel.parent).stdout
            symbols = [line.split(maxsplit=2)[1:] for line in text.splitlines()]
            assert any(f"::{isa}::" in name for _, name in symbols), path
            shared = [name for kind, name in symbols if kind in "TW" and f"::{isa}::" not in name]
            assert shared == [], path


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory):
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("sdist")
    done = run(
        sys.executable,
        "-P" if sys.version_info >= (3, 11) else "-s",
        "-m",
        "build",
        "--sdist",
        "--outdir",
        folder,
        ROOT,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_the_source_archive_holds_what_a_build_and_the_tests_need_and_no_junk(source_archive):
    with tarfile.open(source_archive) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
    names = {member.name.split("/", 1)[1] for member in members}
    for needed in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "cmake/SelaCuda.cmake"):
        assert needed in names
    for folder, pattern in (("csrc", "*.[hc]*"), ("sela_ext", "*.py"), ("python_tests", "*.py")):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)} <= names
    junk = re.compile(r"(^|/)(build|dist|runs|\.git|\.nox|\.venv|__pycache__|\.\w+_cache)/|\.(so|o|whl|pyc|pt|npz)$")
    assert [name for name in names if junk.search(name)] == []
    assert sum(member.size for member in members) < 8e6


def test_the_source_archive_builds(source_archive, tmp_path):
    with tarfile.open(source_archive) as archive:
        archive.extractall(tmp_path / "source", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (tmp_path / "source").iterdir()
    wheel = build_wheel(tmp_path / "wheels", source=source, SELA_CUDA="OFF")
    info, _ = ask_build_info(unpack(wheel), tmp_path)
    assert wheel.name.startswith(f"sela_ext-{info['version']}-")


def test_building_twice_in_one_folder_with_fresh_build_environments_works(tmp_path):
    """pip installs cmake, ninja and pybind11 somewhere else each time, and the build folder remembers where."""
    build_wheel(tmp_path, SELA_CUDA="OFF").unlink()
    assert build_wheel(tmp_path, SELA_CUDA="OFF").exists()


BESIDE_CPU_TORCH = """
import importlib.util, json, sys
import sela_ext
assert "torch" not in sys.modules
seen = {"torch": None, "cuda": sela_ext.build_info()["cuda"], "assign": None}
import torch
seen["torch"] = torch.__version__
seen["torch_cuda"] = torch.version.cuda
if "assign" in sela_ext.__all__:
    logits = torch.randn(301, 7, generator=torch.Generator().manual_seed(0))
    for given in (logits, logits.numpy()):
        result = sela_ext.assign(given, lam=10.0)
        sizes = torch.bincount(torch.as_tensor(result.labels).long(), minlength=7)
        assert len(result.labels) == 301 and int(sizes.sum()) == 301 and bool(result.converged)
    seen["assign"] = sizes.tolist()
print(json.dumps(seen))
"""


def test_the_default_wheel_works_beside_a_cpu_only_torch_without_torchvision(tmp_path):
    """The build knows no torch, so any torch will do; torchvision is imported only where it is used."""
    wheel = build_wheel(tmp_path / "wheels")
    python = tmp_path / "venv" / "bin" / "python"
    assert run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path).returncode == 0
    pip = (python, "-m", "pip", "install", "--quiet")
    done = run(*pip, "torch==2.13.0", "numpy", "scipy", "scikit-learn", "Pillow", cwd=tmp_path)
    if done.returncode != 0:
        pytest.skip(f"torch 2.13.0 cannot be had here: {done.stderr.strip()[-300:]}")
    assert run(*pip, "--no-deps", wheel, cwd=tmp_path).returncode == 0
    done = run(python, "-c", BESIDE_CPU_TORCH, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    seen = json.loads(done.stdout)
    if seen["torch_cuda"] is not None:
        pytest.skip(f"the package index gave torch {seen['torch']} with CUDA; import and assign worked beside it")
    assert seen["torch"].startswith("2.13.0")
