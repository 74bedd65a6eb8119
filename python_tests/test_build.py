import subprocess
import sys

import sela_ext


def test_build_info_names_the_build():
    info = sela_ext.build_info()
    assert info["version"] == sela_ext.__version__
    assert info["cpu_isa"] in ("generic", "avx2", "avx512")
    assert isinstance(info["cuda"], bool)
    assert bool(info["cuda_archs"]) == info["cuda"]


def run_python(code, **env):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


def test_importing_the_package_does_not_import_torch():
    done = run_python("import sys, sela_ext; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_instruction_set_can_be_lowered_but_not_invented():
    code = "import sela_ext; print(sela_ext.build_info()['cpu_isa'])"
    assert run_python(code, SELA_CPU_ISA="generic").stdout.strip() == "generic"
    assert "expected generic, avx2 or avx512" in run_python(code, SELA_CPU_ISA="sse9").stderr
