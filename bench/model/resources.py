"""Registers, shared memory and spills of the kernels, read from the built binaries.

Compilers differ, so the figures are kept as data (bench/results/resources.json) with the versions
that gave them; ``python -m bench --model --resources`` reads the binaries again. A binary that is
not there is recorded with its reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.model.occupancy import ARCHS

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent.parent
PATH = ROOT / "bench" / "results" / "resources.json"
LAUNCH = ROOT / "csrc" / "cuda" / "launch.h"
LIBRARY = ROOT / "pro_kernels" / "lib" / "libpro_kernels_cuda.so"

_TRITON = """
import json, sys
from pro_kernels.backends.triton import aot
for arch in sys.argv[1:]:
    for row in aot.table(arch):
        print(json.dumps(row))
"""
_ON_CHIP = "residual_on_chip_kernel"
_SCRATCH = (_ON_CHIP, "residual_reread_kernel", "logp_kernel")
_KEYS = ("kernel", "config", "arch", "dtype", "threads", "registers", "shared", "spills")


def dynamic_shared(row: dict, vocab: int) -> int:
    """Shared memory that a launch adds to what the binary declares, with clusters (sm_90).

    Of the CUDA kernels of rows of ``vocab`` logits: csrc/cuda/launch.h has the numbers.
    """
    if row["kernel"] not in _SCRATCH:
        return 0
    source = LAUNCH.read_text()
    scratch = int(_only(r"kScratchBytes = (\d+);", source))
    if row["kernel"] != _ON_CHIP:
        return scratch
    size = vocab * (4 if row["config"].startswith("float") else 2)
    table = _only(r"kClusters\[\] = \{(.*?)\};", source)
    for kib, _threads, blocks in re.findall(r"\{(\d+) \* kKiB, (\d+), (\d+)\}", table):
        if size <= int(kib) << 10:
            return scratch + 16 * -(-(size // 16) // int(blocks))
    return 0  # read twice, by the other kernel


def _only(pattern: str, source: str) -> str:
    found = re.search(pattern, source, re.DOTALL)
    assert found is not None, f"{LAUNCH} has no {pattern}"
    return found[1]


def load(path: Path = PATH) -> dict:
    """The committed figures.

    Raises:
        ValueError: not a resources file of this schema.
    """
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a resources file of schema {SCHEMA}")
    return data


def save(data: dict, path: Path = PATH) -> None:
    """Write the figures, a kernel a line."""
    text = json.dumps(data, indent=1)
    path.write_text(re.sub(r"\{\s+(\"kernel\":[^}]*?)\s+\}", _one_line, text) + "\n")


def _one_line(found: re.Match) -> str:
    return "{" + re.sub(r"\n\s+", " ", found[1]) + "}"


def collect(library: Path = LIBRARY) -> dict:
    """Read what is built here: per backend its kernels, or the reason why there are none."""
    return {
        "schema": SCHEMA,
        "versions": {"triton": _version("triton"), "cuda": cuda_version(library)},
        "backends": {"triton": _found(triton), "cuda": _found(lambda: cuda(library))},
    }


def triton() -> list[dict]:
    """Triton's binaries: bf16 rows (fp32 for ranking), no transform, aligned.

    Raises:
        RuntimeError: they cannot be compiled here.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _TRITON, *ARCHS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"Triton's kernels did not compile: {last[:200]}")
    return triton_rows([json.loads(line) for line in done.stdout.splitlines()])


def plain(variant: dict) -> bool:
    """Whether a variant of ``aot`` is one of those that are kept."""
    common = variant["dtype"] == "bf16" or variant["kernel"] == "ranking"
    return common and variant.get("transform", "none") == "none" and variant.get("aligned", True)


def triton_rows(table: list[dict]) -> list[dict]:
    """The plain variants of ``aot.table``, in this module's keys."""
    rows = {}
    for raw in table:
        if not plain(raw):
            continue
        warps = re.search(r"warps=(\d+)", raw["config"])
        row = {
            **{k: raw[k] for k in ("kernel", "config", "arch", "dtype", "spills")},
            "threads": 32 * int(warps[1]) if warps else None,
            "registers": raw["regs"],
            "shared": raw["smem"],
        }
        key = (row["kernel"], row["config"], row["arch"])
        if key not in rows or row["registers"] > rows[key]["registers"]:
            rows[key] = {k: row[k] for k in _KEYS}
    return list(rows.values())


def cuda(library: Path = LIBRARY) -> list[dict]:
    """The CUDA library's kernels, by cuobjdump; ``threads`` from its launch bounds.

    Raises:
        RuntimeError: no library, or no cuobjdump.
    """
    if not library.is_file():
        raise RuntimeError("the CUDA library is not built: python setup.py build_native --inplace")
    tool = _cuobjdump()
    usage = _run([tool, "--dump-resource-usage", str(library)])
    elf = _run([tool, "-elf", str(library)])
    return cuda_rows(usage, elf, _demangle)


def cuda_rows(usage: str, elf: str, demangle=lambda names: names) -> list[dict]:  # noqa: ANN001
    """Kernels from the text of ``cuobjdump --dump-resource-usage`` and ``-elf``."""
    threads, arch, name = {}, "", ""
    lines = iter(elf.splitlines())
    for line in lines:
        if found := re.match(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\.nv\.info\.(\w+)$", line):
            name = found[1]
        elif "EIATTR_MAX_THREADS" in line:
            next(lines)
            value = re.search(r"Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", next(lines))
            assert value is not None, line
            threads[arch, name] = int(value[1], 16) * int(value[2], 16) * int(value[3], 16)
    rows = []
    for line in usage.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\S+):", line):
            name = found[1]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            # From sm_90 on the kilobyte that the driver reserves is in the figure.
            reserved = 1024 if arch != "sm_80" and shared >= 1024 else 0
            rows.append((name, arch, registers, shared - reserved, stack + local))
    names = dict(zip([r[0] for r in rows], demangle([r[0] for r in rows]), strict=True))
    return [
        dict(zip(_KEYS, (*_split(names[n]), a, "", threads.get((a, n)), r, s, x), strict=True))
        for n, a, r, s, x in rows
    ]


def _split(signature: str) -> tuple[str, str]:
    """``(kernel, template arguments)`` of a demangled function."""
    found = re.search(r"(\w+)(?:<([^()]*)>)?\((?!anonymous)", signature)
    return (found[1], found[2] or "") if found else (signature, "")


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    return _run([tool, *names]).splitlines()


def _cuobjdump() -> str:
    """On PATH, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            from triton import knobs

            found = knobs.nvidia.cuobjdump.path
        except (ImportError, AttributeError, RuntimeError) as error:
            raise RuntimeError(f"no cuobjdump: not on PATH, none with Triton ({error})") from None
    return found


def cuda_version(library: Path = LIBRARY) -> str | None:
    """The compiler that build.json says the library is from."""
    try:
        record = json.loads((library.parent / "build.json").read_text())["cuda"]
    except (OSError, KeyError, ValueError):
        return None
    return record.get("version") if isinstance(record, dict) else None


def _found(read) -> dict:  # noqa: ANN001
    try:
        return {"reason": None, "kernels": read()}
    except RuntimeError as error:
        return {"reason": str(error), "kernels": []}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:200]}")
    return done.stdout
