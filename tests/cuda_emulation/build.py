"""Build the CUDA backend for the host: the kernels of csrc/cuda, compiled by the C++ compiler.

The library has the C ABI of csrc/cuda/pro_kernels_cuda.h with host pointers (streams are ignored),
and what exports.cpp sets.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
FLAGS = (
    "-std=c++17 -O2 -fPIC -shared -fvisibility=hidden -pthread -U_FORTIFY_SOURCE -Wall -Wextra "
    "-Wno-unknown-pragmas"
).split()


class NoCompiler(RuntimeError):
    """There is no C++ compiler on this machine: the only good reason to skip a test."""


@functools.cache
def library() -> Path:
    """Path of the library, built once for each state of the sources.

    Raises:
        NoCompiler: there is no C++ compiler.
        RuntimeError: it fails; the message has its output.
    """
    compiler = _compiler()
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "exports.cpp"]
    headers = [*(CSRC / "cuda").glob("*.*h"), *(CSRC / "include").glob("*.h"), *HERE.glob("*.h")]
    state = hashlib.sha256(" ".join([*compiler, *FLAGS]).encode())
    for path in sorted({*sources, *headers, CSRC / "cpu" / "dtype.h"}):
        state.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"libpro_kernels_cuda_{state.hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second test process waits for the first
        if not target.exists():
            _compile(compiler, sources, target)
            for old in set(folder.glob("*.so")) - {target}:
                old.unlink()
    return target


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise NoCompiler(f"no C++ compiler found ({chosen or 'tried c++, g++, clang++'})")


def _compile(compiler: list[str], sources: list[Path], target: Path) -> None:
    partial = target.with_suffix(".partial")
    includes = [f"-I{folder}" for folder in (CSRC / "cuda", CSRC / "include", HERE)]
    command = [*compiler, *FLAGS, '-DPK_CUDA_TARGETS="emulated"', *includes]
    command += ["-x", "c++", *map(str, sources), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(compiler)} failed: {done.stderr[:3000]}")
    partial.rename(target)
