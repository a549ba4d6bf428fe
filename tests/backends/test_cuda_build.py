"""The CUDA library as nvcc built it here: targets, registers, shared memory, spills, exports."""

from __future__ import annotations

import shutil
import subprocess

import cuda_resources
import pytest

from pro_kernels.backends import cuda

if not cuda.library_path().exists():
    pytest.skip(cuda.build_info().get("reason", "not built"), allow_module_level=True)

TARGETS = {"sm_80", "sm_90a", "sm_100"}


@pytest.fixture(scope="module")
def kernels():
    try:
        return cuda_resources.cuda(cuda.library_path())
    except RuntimeError as error:
        pytest.skip(str(error))


def test_every_kernel_is_there_for_every_target(kernels):
    variants = {}
    for row in kernels:
        variants.setdefault((row["kernel"], row["config"]), set()).add(row["arch"])
    chosen = set(cuda.build_info()["targets"]) & TARGETS
    assert all(archs == chosen for archs in variants.values())
    assert {name for name, _ in variants} == {
        "logp_kernel", "residual_on_chip_kernel", "residual_reread_kernel", "logits_grad_kernel",
        "ranking_kernel", "gather_kernel", "scatter_kernel", "target_logits_kernel", "probe_kernel",
    }  # fmt: skip


def test_nothing_spills_and_blocks_fit_an_sm(kernels):
    """64 K registers an SM; three blocks of the on-chip kernel live on one at a time."""
    for row in kernels:
        assert row["spills"] == 0, row
        assert row["shared"] <= 48 * 1024, row
        blocks = 3 if row["kernel"] == "residual_on_chip_kernel" else 1
        allocated = -(-row["registers"] // 8) * 8
        assert allocated * (row["threads"] or 256) * blocks <= 1 << 16, row


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_only_the_abi_is_exported():
    command = ["nm", "-D", "--defined-only", str(cuda.library_path())]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = {line.split()[-1].split("@")[0] for line in text.splitlines()}
    assert {n for n in names if not n.startswith("_")} == {
        f"pk_cuda_{n}" for n in ("layout", *cuda._SIGNATURES)
    }


def test_ptx_is_there_for_later_cards():
    if "compute_100" not in cuda.build_info()["targets"]:
        pytest.skip("built without compute_100")
    listed = cuda_resources._run([cuda_resources._cuobjdump(), "-lptx", str(cuda.library_path())])
    assert "sm_100.ptx" in listed
