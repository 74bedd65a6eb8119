import os
import subprocess
import sys
from pathlib import Path

import pytest

import sela_ext
from sela_ext import _core

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_python(tmp_path):
    """Runs code in a new interpreter, away from the source tree; environment variables as keywords."""

    def run(code, cwd=tmp_path, **env):
        env = {**os.environ, **env}
        return subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
        )

    return run


def test_build_info_names_the_build():
    info = sela_ext.build_info()
    assert info["version"] == sela_ext.__version__
    assert info["cpu_isa"] in ("generic", "avx2", "avx512")
    assert isinstance(info["cuda"], bool)
    assert bool(info["cuda_archs"] or info["cuda_ptx"]) == info["cuda"]
    assert (info["cuda_version"] is not None) == info["cuda"]
    assert all(arch.rstrip("af").isdigit() for arch in info["cuda_archs"] + info["cuda_ptx"])
    assert info["compiler"].split()[1][0].isdigit()


def test_build_info_is_a_copy_that_the_caller_may_change():
    sela_ext.build_info().clear()
    assert "version" in sela_ext.build_info()


def test_the_version_is_the_one_of_the_project():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert f'version = "{sela_ext.__version__}"' in lines


def test_importing_the_package_imports_none_of_the_large_packages(run_python):
    large = "{'torch', 'torchvision', 'scipy', 'sklearn', 'matplotlib', 'PIL', 'tensorboard'}"
    done = run_python(f"import sys, sela_ext; found = {large} & set(sys.modules); assert not found, found")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_prints_nothing_and_warns_of_nothing(run_python):
    done = run_python("import sela_ext", PYTHONWARNINGS="error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(os.name != "posix", reason="closes a stream by way of the shell")
def test_the_package_can_be_imported_with_closed_streams(tmp_path):
    code = "import sela_ext; assert sela_ext.build_info()['version']"
    command = ["sh", "-c", f'exec "$0" -c "{code}" <&- >&- 2>&-', sys.executable]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0


def test_the_instruction_set_can_be_lowered_but_not_invented(run_python):
    code = "import sela_ext; print(sela_ext.build_info()['cpu_isa'])"
    assert run_python(code, SELA_CPU_ISA="generic").stdout.strip() == "generic"
    assert "expected generic, avx2 or avx512" in run_python(code, SELA_CPU_ISA="sse9").stderr


def test_without_a_device_the_answer_is_zero_devices_and_no_error(run_python):
    code = "from sela_ext import _core; print(_core.cuda_device_count())"
    done = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_the_device_count_is_a_number():
    assert _core.cuda_device_count() >= 0


def test_the_source_folder_in_place_of_the_installed_package_gives_an_error_with_the_remedy(run_python, tmp_path):
    package = tmp_path / "tree" / "sela_ext"
    package.mkdir(parents=True)
    for source in (ROOT / "sela_ext").glob("*.py"):
        (package / source.name).write_bytes(source.read_bytes())
    done = run_python("import sela_ext", cwd=package.parent)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: sela_ext: the compiled core (sela_ext._core) cannot be loaded")
    assert str(package) in message
    assert "pip install ." in message
    assert "start Python from another folder" in message


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = sela_ext.no_such_name


def test_every_public_name_can_be_found():
    missing = [name for name in sela_ext.__all__ if name not in dir(sela_ext)]
    assert missing == []
