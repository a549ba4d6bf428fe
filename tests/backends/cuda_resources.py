"""Registers, shared memory and spills of the CUDA kernels, read from the built library."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

KEYS = ("kernel", "config", "arch", "threads", "registers", "shared", "spills")


def cuda(library: Path) -> list[dict]:
    """Its kernels, by cuobjdump; ``threads`` from their launch bounds.

    Raises:
        RuntimeError: no cuobjdump.
    """
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
        dict(zip(KEYS, (*_split(names[n]), a, threads.get((a, n)), r, s, x), strict=True))
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


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:200]}")
    return done.stdout
