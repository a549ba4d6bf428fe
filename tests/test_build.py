"""The build: what is in a wheel, what happens without a compiler, clean compiles elsewhere."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
LIBRARY = "pro_kernels/lib/libpro_kernels_cpu.so"
CUDA_LIBRARY = LIBRARY.replace("cpu", "cuda")
RECORD = "pro_kernels/lib/build.json"
SETTINGS = "CXX CUDA_HOME PRO_KERNELS_BUILD PRO_KERNELS_NVCC PRO_KERNELS_CUDA_ARCHS".split()
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that nothing is written into the checkout."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
        else:
            (copy / name).touch()
    for name in ("csrc", "pro_kernels", "python"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _python(tree: Path, *args: str, fails: bool = False, **env: str) -> str:
    """What Python says on stderr, run in a tree with these settings alone."""
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    done = subprocess.run(
        [sys.executable, *args], cwd=tree, env={**clean, **env}, capture_output=True, text=True
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr


def _built(tree: Path, **env: str) -> dict:
    """The record of a build in place."""
    _python(tree, "setup.py", "build_native", "--inplace", **env)
    return json.loads((tree / RECORD).read_text())


def _fails(tree: Path, **env: str) -> str:
    """What a build in place says that must fail."""
    return _python(tree, "setup.py", "build_native", "--inplace", fails=True, **env)


def _wheel(tree: Path, **env: str) -> tuple[str, zipfile.ZipFile, dict]:
    """A wheel's name, its files and the record of its CPU library."""
    args = "-m pip wheel --no-deps --no-build-isolation -q -w dist .".split()
    _python(tree, *args, **env)
    (wheel,) = (tree / "dist").glob("*.whl")
    files = zipfile.ZipFile(wheel)
    return wheel.name, files, json.loads(files.read(RECORD))["cpu"]


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """A PATH with ninja but no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if ninja := shutil.which("ninja"):
        (folder / "ninja").symlink_to(ninja)
    return {"PATH": str(folder)}


def _stale(tree: Path) -> None:
    """The library of an earlier build in place."""
    (tree / LIBRARY).parent.mkdir(exist_ok=True)
    (tree / LIBRARY).write_text("stale")


@pytest.mark.slow
@needs_compiler
def test_wheel_holds_the_library(tree):
    _stale(tree)
    name, files, record = _wheel(tree, PRO_KERNELS_BUILD="1")
    assert name.split("-")[2:4] == ["py3", "none"] and "any" not in name
    assert files.read(LIBRARY)[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
    names = files.namelist()
    (tags,) = (files.read(n) for n in names if n.endswith("/WHEEL"))
    assert b"Root-Is-Purelib: false" in tags
    assert {"pro_kernels/backends/cpu.py", "pro_kernels/py.typed"} <= set(names)
    assert not any(n.startswith(("csrc", "tests", "bench")) for n in names)
    assert "generic" in record["isas"] and "reason" not in record and record["version"]


@pytest.mark.slow
def test_no_compiler_installs_and_keeps_the_reason(tree, no_compiler):
    name, files, record = _wheel(tree, **no_compiler)
    assert name.endswith("py3-none-any.whl") and LIBRARY not in files.namelist()
    assert "no C++ compiler found" in record["reason"]


@pytest.mark.slow
@needs_compiler
def test_source_distribution_builds(tree):
    _python(tree, "setup.py", "-q", "sdist", "-d", "dist", PRO_KERNELS_BUILD="1")
    (archive,) = (tree / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tree / "unpacked")
    (source,) = (tree / "unpacked").iterdir()
    assert not (source / "pro_kernels" / "lib").exists()
    _built(source, PRO_KERNELS_BUILD="1")
    assert (source / LIBRARY).exists()


def test_required_build_fails_with_the_reason(tree, no_compiler):
    said = _fails(tree, PRO_KERNELS_BUILD="1", **no_compiler)
    assert "PRO_KERNELS_BUILD=1" in said and "no C++ compiler found" in said
    assert "CXX=/nowhere/c++" in _fails(tree, PRO_KERNELS_BUILD="1", CXX="/nowhere/c++ -O3")


def test_skipped_build_removes_the_library(tree):
    _stale(tree)
    assert _built(tree, PRO_KERNELS_BUILD="0")["cpu"]["reason"] == "PRO_KERNELS_BUILD=0"
    assert not (tree / LIBRARY).exists()
    assert "must be 0, 1 or auto" in _fails(tree, PRO_KERNELS_BUILD="yes")


@pytest.mark.slow
@needs_compiler
def test_compile_error_is_kept_or_raised(tree):
    with open(tree / "csrc" / "cpu" / "dispatch.cpp", "a") as f:
        f.write("\n#error broken on purpose\n")
    assert "broken on purpose" in _built(tree)["cpu"]["reason"]
    assert "broken on purpose" in _fails(tree, PRO_KERNELS_BUILD="1")


FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.1" ;;
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
  --list-gpu-code) echo sm_80; echo sm_90 ;;
  *BROKEN*) echo "broken on purpose"; exit 1 ;;
  *) echo "$*" >> "$CALLS"; while [ "$1" != -o ]; do shift; done; echo built > "$2" ;;
esac
"""


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> dict[str, str]:
    """Settings under which no C++ compiler is found and nvcc only writes down how it was called."""
    if not shutil.which("ninja"):
        pytest.skip("no ninja on PATH")
    script = tmp_path / "my nvcc"
    script.write_text(FAKE_NVCC)
    script.chmod(0o755)
    settings = {"PRO_KERNELS_NVCC": script, "CXX": "/nowhere/c++", "CALLS": tmp_path / "calls"}
    return {name: str(value) for name, value in settings.items()}


def test_cuda_is_built_for_what_nvcc_knows_and_without_the_cpu_library(tree, fake_nvcc):
    record = _built(tree, **fake_nvcc)
    assert (tree / CUDA_LIBRARY).read_text() == "built\n" and not (tree / LIBRARY).exists()
    assert record["cuda"]["targets"] == ["sm_80", "sm_90a"] and record["cpu"]["reason"]
    assert "release 12.4" in record["cuda"]["version"]
    *compiled, linked = Path(fake_nvcc["CALLS"]).read_text().splitlines()
    assert len(compiled) == len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    for call in compiled:
        assert "-gencode=arch=compute_80,code=sm_80" in call and "compute_90a,code=sm_90a" in call
    assert "-cudart static" in linked


def test_cuda_targets_can_be_chosen(tree, fake_nvcc):
    record = _built(tree, **fake_nvcc, PRO_KERNELS_CUDA_ARCHS="sm_120 compute_120")
    assert record["cuda"]["targets"] == ["sm_120", "compute_120"]
    assert "-gencode=arch=compute_120,code=compute_120" in Path(fake_nvcc["CALLS"]).read_text()
    record = _built(tree, **fake_nvcc, PRO_KERNELS_CUDA_ARCHS="hopper")
    assert "'hopper'" in record["cuda"]["reason"] and not (tree / CUDA_LIBRARY).exists()


def test_no_nvcc_or_a_failing_one_is_a_reason_and_never_an_error(tree, fake_nvcc, no_compiler):
    (tree / "csrc" / "cuda" / "BROKEN.cu").write_text("")
    for settings, reason in (
        (fake_nvcc, "broken on purpose"),
        ({**fake_nvcc, "PRO_KERNELS_NVCC": "/nowhere/nvcc"}, "PRO_KERNELS_NVCC=/nowhere/nvcc"),
        ({**fake_nvcc, "PRO_KERNELS_NVCC": "env false"}, "env false"),  # with words behind it
        (no_compiler, "no CUDA compiler found"),
    ):
        assert reason in _built(tree, **settings)["cuda"]["reason"]


STRICT = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
AARCH64 = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.parametrize("compiler", [COMPILER, AARCH64], ids=["here", "aarch64"])
@pytest.mark.parametrize("name", ["isa.cpp", "dispatch.cpp", "logits.cpp", "ranking.cpp"])
def test_portable_sources_compile_without_warnings(compiler, name):
    """No instruction set asked for, none compiled in, no OpenMP; and for aarch64."""
    if compiler is None:
        pytest.skip("no such C++ compiler")
    subprocess.run([compiler, *STRICT, str(CPU / name)], check=True)
    if compiler == AARCH64:
        neon = ["-DPK_ISA=neon", "-DPK_ISAS(F)=F(neon) F(generic)"]
        subprocess.run([compiler, *STRICT, *neon, str(CPU / name)], check=True)


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 objects")
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_instruction_sets_share_no_code(tmp_path):
    """No function of an AVX2 object may stand in for the same one of a generic object."""
    target = tmp_path / "isa.o"
    flags = "-std=c++17 -O2 -fno-exceptions -fno-rtti -DPK_ISA=avx2 -mavx2 -mfma -mf16c".split()
    source = str(CPU / "isa.cpp")
    subprocess.run([COMPILER, *flags, "-c", source, "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True).stdout
    defined = [line.split(maxsplit=2)[1:] for line in symbols.splitlines() if line[0] != " "]
    shared = [name for kind, name in defined if kind.isupper()]
    assert shared == ["pk::isa_avx2"], shared


def test_a_backend_that_must_be_tested_and_is_not_there_fails_the_run(request, monkeypatch):
    """So that a broken build is not green (.ci/run requires what a machine can run)."""
    monkeypatch.setenv("PRO_KERNELS_REQUIRE", "torch,cuda")
    hooks = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    with pytest.raises(pytest.UsageError, match="cuda cannot be tested"):
        hooks.pytest_configure(request.config)
