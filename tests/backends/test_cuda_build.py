"""The CUDA library as nvcc built it here: targets, registers, shared memory, spills, exports."""

from __future__ import annotations

import math
import re
import shutil
import subprocess

import pytest

from pro_kernels.backends import cuda

TARGETS = {"sm_80", "sm_90a", "sm_100"}


def cuda_rows(usage: str, elf: str) -> list[dict]:
    """Kernels from the text of ``cuobjdump --dump-resource-usage`` and ``-elf``.

    ``threads`` are from their launch bounds.
    """
    threads, rows, arch, name = {}, [], "", ""
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
            threads[arch, name] = math.prod(int(x, 16) for x in value.groups())
    for line in usage.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\S+):", line):
            name = found[1]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            # From sm_90 on the kilobyte that the driver reserves is in the figure.
            shared -= 1024 if arch != "sm_80" and shared >= 1024 else 0
            row = {"name": name, "arch": arch, "threads": threads.get((arch, name), 256)}
            row["kernel"] = re.search(r"\d([a-z_]+_kernel)", name)[1]
            rows.append(row | {"regs": registers, "shared": shared, "spills": stack + local})
    return rows


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def library() -> str:
    if not cuda.library.path.exists():
        pytest.skip(cuda.library.info.get("reason", "not built"))
    return str(cuda.library.path)


@pytest.fixture(scope="module")
def tool(library) -> str:
    """On PATH, or the one in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    pytest.importorskip("triton", reason="no cuobjdump: not on PATH, and none with Triton")
    from triton import knobs

    return knobs.nvidia.cuobjdump.path


@pytest.fixture(scope="module")
def kernels(tool, library) -> list[dict]:
    usage = _run([tool, "--dump-resource-usage", library])
    return cuda_rows(usage, _run([tool, "-elf", library]))


def test_every_kernel_is_there_for_every_target(kernels):
    variants = {}
    for row in kernels:
        variants.setdefault(row["name"], set()).add(row["arch"])
    chosen = set(cuda.library.info["targets"]) & TARGETS
    assert all(archs == chosen for archs in variants.values())
    assert {row["kernel"] for row in kernels} == {
        "logp_kernel", "residual_on_chip_kernel", "residual_reread_kernel", "logits_grad_kernel",
        "ranking_kernel", "gather_kernel", "scatter_kernel", "target_logits_kernel", "probe_kernel",
    }  # fmt: skip


def test_nothing_spills_and_blocks_fit_an_sm(kernels):
    """64 K registers an SM; three blocks of the on-chip kernel live on one at a time."""
    for row in kernels:
        assert row["spills"] == 0, row
        assert row["shared"] <= 48 * 1024, row
        blocks = 3 if row["kernel"] == "residual_on_chip_kernel" else 1
        allocated = -(-row["regs"] // 8) * 8
        assert allocated * row["threads"] * blocks <= 1 << 16, row


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_only_the_abi_is_exported(library):
    text = _run(["nm", "-D", "--defined-only", library])
    names = {line.split()[-1].split("@")[0] for line in text.splitlines()}
    assert {n for n in names if not n.startswith("_")} == {
        f"pk_cuda_{n}" for n in ("layout", *cuda.library.functions)
    }


def test_ptx_is_there_for_later_cards(tool, library):
    if "compute_100" not in cuda.library.info["targets"]:
        pytest.skip("built without compute_100")
    assert "sm_100.ptx" in _run([tool, "-lptx", library])
