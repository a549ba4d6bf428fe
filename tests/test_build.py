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
RECORD = "pro_kernels/lib/build.json"

_SETTINGS = (
    "CXX", "CUDA_HOME", "PRO_KERNELS_BUILD", "PRO_KERNELS_NVCC", "PRO_KERNELS_CUDA_ARCHS",
)  # fmt: skip

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


def _python(tree: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in _SETTINGS}
    return subprocess.run(
        [sys.executable, *args], cwd=tree, env={**clean, **env}, capture_output=True, text=True
    )


def _wheel(tree: Path, **env: str) -> Path:
    out = tree / "dist"
    args = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out), ".")
    done = _python(tree, *args, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def _record(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as z:
        return json.loads(z.read(RECORD))["cpu"]


def _without_compiler(tmp_path: Path) -> str:
    """A PATH with ninja but no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    ninja = shutil.which("ninja")
    if ninja:
        (folder / "ninja").symlink_to(ninja)
    return str(folder)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


@pytest.mark.slow
@needs_compiler
def test_wheel_holds_the_library(tree):
    (tree / LIBRARY).parent.mkdir(exist_ok=True)
    (tree / LIBRARY).write_text("stale")  # of an earlier build in place: must not get in
    wheel = _wheel(tree, PRO_KERNELS_BUILD="1")
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and "any" not in wheel.name
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        assert z.read(LIBRARY)[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
        assert (
            "Root-Is-Purelib: false"
            in z.read(next(n for n in names if n.endswith("/WHEEL"))).decode()
        )
    assert "pro_kernels/backends/cpu.py" in names
    assert not any(n.startswith(("csrc", "tests", "bench")) for n in names)
    record = _record(wheel)
    assert "generic" in record["isas"] and "reason" not in record and record["version"]


@pytest.mark.slow
def test_no_compiler_installs_and_keeps_the_reason(tree, tmp_path):
    wheel = _wheel(tree, PATH=_without_compiler(tmp_path))
    assert wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as z:
        assert LIBRARY not in z.namelist()
    assert "no C++ compiler found" in _record(wheel)["reason"]


@pytest.mark.slow
@needs_compiler
def test_source_distribution_builds(tree):
    done = _python(tree, "setup.py", "-q", "sdist", "-d", "dist", PRO_KERNELS_BUILD="1")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tree / "unpacked")
    (source,) = (tree / "unpacked").iterdir()
    assert not (source / "pro_kernels" / "lib").exists()
    done = _python(source, "setup.py", "build_native", "--inplace", PRO_KERNELS_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert (source / LIBRARY).exists()


def _build_in_place(tree: Path, **env: str) -> subprocess.CompletedProcess:
    return _python(tree, "setup.py", "build_native", "--inplace", **env)


def test_required_build_fails_with_the_reason(tree, tmp_path):
    path = _without_compiler(tmp_path)
    done = _build_in_place(tree, PRO_KERNELS_BUILD="1", PATH=path)
    assert done.returncode != 0
    assert "PRO_KERNELS_BUILD=1" in done.stderr and "no C++ compiler found" in done.stderr
    done = _build_in_place(tree, PRO_KERNELS_BUILD="1", CXX="/nowhere/c++ -O3")
    assert done.returncode != 0 and "CXX=/nowhere/c++" in done.stderr


def test_skipped_build_removes_the_library(tree):
    (tree / LIBRARY).parent.mkdir(exist_ok=True)
    (tree / LIBRARY).write_text("stale")
    done = _build_in_place(tree, PRO_KERNELS_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert not (tree / LIBRARY).exists()
    assert json.loads((tree / RECORD).read_text())["cpu"]["reason"] == "PRO_KERNELS_BUILD=0"
    done = _build_in_place(tree, PRO_KERNELS_BUILD="yes")
    assert done.returncode != 0 and "must be 0, 1 or auto" in done.stderr


@pytest.mark.slow
@needs_compiler
def test_compile_error_is_kept_or_raised(tree):
    with open(tree / "csrc" / "cpu" / "dispatch.cpp", "a") as f:
        f.write("\n#error broken on purpose\n")
    done = _build_in_place(tree)
    assert done.returncode == 0, done.stderr
    assert "broken on purpose" in json.loads((tree / RECORD).read_text())["cpu"]["reason"]
    done = _build_in_place(tree, PRO_KERNELS_BUILD="1")
    assert done.returncode != 0 and "broken on purpose" in done.stderr


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
    return {
        "PRO_KERNELS_NVCC": str(script),
        "CXX": "/nowhere/c++",
        "CALLS": str(tmp_path / "calls"),
    }


CUDA_LIBRARY = LIBRARY.replace("cpu", "cuda")


def _cuda_record(tree: Path) -> dict:
    return json.loads((tree / RECORD).read_text())["cuda"]


def test_cuda_is_built_for_what_nvcc_knows_and_without_the_cpu_library(tree, fake_nvcc):
    done = _build_in_place(tree, **fake_nvcc)
    assert done.returncode == 0, done.stderr
    assert (tree / CUDA_LIBRARY).read_text() == "built\n" and not (tree / LIBRARY).exists()
    record = _cuda_record(tree)
    assert record["targets"] == ["sm_80", "sm_90a"] and "release 12.4" in record["version"]
    *compiled, linked = Path(fake_nvcc["CALLS"]).read_text().splitlines()
    assert len(compiled) == len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    for call in compiled:
        assert "-gencode=arch=compute_80,code=sm_80" in call and "compute_90a,code=sm_90a" in call
    assert "-cudart static" in linked
    assert json.loads((tree / RECORD).read_text())["cpu"]["reason"]


def test_cuda_targets_can_be_chosen(tree, fake_nvcc):
    done = _build_in_place(tree, **fake_nvcc, PRO_KERNELS_CUDA_ARCHS="sm_120 compute_120")
    assert done.returncode == 0, done.stderr
    assert _cuda_record(tree)["targets"] == ["sm_120", "compute_120"]
    assert "-gencode=arch=compute_120,code=compute_120" in Path(fake_nvcc["CALLS"]).read_text()
    done = _build_in_place(tree, **fake_nvcc, PRO_KERNELS_CUDA_ARCHS="hopper")
    assert "'hopper'" in _cuda_record(tree)["reason"] and not (tree / CUDA_LIBRARY).exists()


def test_a_failing_nvcc_is_kept_or_raised(tree, fake_nvcc):
    (tree / "csrc" / "cuda" / "BROKEN.cu").write_text("")
    done = _build_in_place(tree, **fake_nvcc)
    assert done.returncode == 0 and "broken on purpose" in _cuda_record(tree)["reason"]
    missing = {**fake_nvcc, "PRO_KERNELS_NVCC": "/nowhere/nvcc"}
    _build_in_place(tree, **missing)
    assert "PRO_KERNELS_NVCC=/nowhere/nvcc" in _cuda_record(tree)["reason"]


def test_no_nvcc_is_a_reason_and_never_an_error(tree, tmp_path):
    done = _build_in_place(tree, PATH=_without_compiler(tmp_path))
    assert done.returncode == 0, done.stderr
    assert _cuda_record(tree)["reason"].startswith("no CUDA compiler found")


STRICT = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
PORTABLE = ["isa_generic.cpp", "dispatch.cpp", "logits.cpp", "ranking.cpp"]


@needs_compiler
@pytest.mark.parametrize("name", PORTABLE)
def test_portable_sources_compile_without_warnings(name):
    """No instruction set asked for, none compiled in, no OpenMP."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    done = subprocess.run([compiler, *STRICT, str(CPU / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="no aarch64 compiler")
@pytest.mark.parametrize("name", [*PORTABLE, "isa_neon.cpp"])
def test_aarch64_compiles_without_warnings(name):
    command = ["aarch64-linux-gnu-g++", *STRICT, "-DPK_HAVE_NEON", str(CPU / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 objects")
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_instruction_sets_share_no_code(tmp_path):
    """No function of an AVX2 object may stand in for the same one of a generic object."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    target = tmp_path / "isa.o"
    flags = "-std=c++17 -O2 -fno-exceptions -fno-rtti -mavx2 -mfma -mf16c".split()
    source = str(CPU / "isa_avx2.cpp")
    subprocess.run([compiler, *flags, "-c", source, "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True).stdout
    defined = [line.split(maxsplit=2)[1:] for line in symbols.splitlines() if line[0] != " "]
    shared = [name for kind, name in defined if kind.isupper()]
    assert shared == ["pk::kAvx2Isa"], shared


def test_a_backend_that_must_be_tested_and_is_not_there_fails_the_run(tmp_path):
    """So that a broken build is not green (.ci/run requires what a machine can run)."""
    env = {**os.environ, "PRO_KERNELS_REQUIRE": "torch,cuda"}
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_layout.py"), "-q"]
    done = subprocess.run([*command, "-p", "no:xdist"], env=env, capture_output=True, text=True)
    assert done.returncode == 4 and "cuda cannot be tested" in done.stderr
