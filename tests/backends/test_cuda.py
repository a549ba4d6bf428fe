"""What is the CUDA library's own: rows by the room for them, its launches, when it may serve.

The kernels of csrc/cuda are compiled for the host (tests/cuda_emulation); their bodies and the
launch code are the shipped ones. What emulation cannot show: the memory model (what another thread
sees without a barrier, cache and L2 behaviour), races between warps inside one stretch between
barriers beyond two orders of execution, how clusters are scheduled, the PTX in
csrc/cuda/device.cuh, the accuracy of the hardware's ex2 and reciprocal, register and occupancy
limits, speed. It does abort on misaligned vector accesses, on barriers that not all threads reach,
on writes past a block's shared memory, on reads of the shared memory of a finished block, and it
delivers asynchronous copies only when they are waited for.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from contract import PLAIN, check, rows_of
from test_contract_ranking import check as check_ranking
from test_contract_ranking import prompts_of, rank

import pro_kernels as pk
from cases import CPU
from cuda_emulation import emulation
from pro_kernels import backends
from pro_kernels.backends import cuda, native
from pro_kernels.backends.protocol import Rows
from subjects import Subject

GPU = torch.device("cuda", 0)
emulated = pytest.mark.parametrize(
    "subject", [Subject("cuda", "emulated sm_90")], ids=str, indirect=True
)


# Rows for clusters of 2, 4 and 8, for one block alone on its SM, and beyond what fits.
@emulated
@pytest.mark.parametrize(
    ("dtype", "v"),
    [
        (torch.bfloat16, 50_001),
        (torch.bfloat16, 128_256),
        (torch.float16, 262_144),
        (torch.float32, 151_936),
        (torch.float32, 450_001),
    ],
    ids=["2 blocks", "4 blocks", "8 blocks", "8 large blocks", "reread"],
)
def test_wide_rows(subject, dtype, v, poison):
    rows = rows_of(3, v, dtype)
    rows.targets[:] = torch.tensor([v // 2, -1, v - 1])
    shifted = torch.full((3 * (v + 5),), torch.nan, dtype=dtype).as_strided((3, v), (v + 5, 1), 3)
    shifted.copy_(rows.logits)
    for major in (8, 9, 10, 12):
        with emulation.machine(major=major):
            check(subject, rows)
            if major < 10:
                check(subject, replace(rows, logits=shifted))


@emulated
@pytest.mark.parametrize("max_cluster", [1, 2, 4])
def test_rows_are_read_twice_where_a_cluster_finds_no_room(subject, max_cluster, poison):
    with emulation.machine(max_cluster=max_cluster):
        check(subject, rows_of(3, 128_256, torch.float32))


@emulated
def test_more_sequences_than_a_marking_block_takes(subject):
    sequences = 40_000
    batch = prompts_of([6, 3], [4], 0, 1.0, 1.0, False)
    batch[0] = -torch.rand(sequences)
    batch[1], batch[2] = torch.arange(sequences + 1), torch.ones(sequences, dtype=torch.int64)
    batch[3] = torch.where(batch[3] >= 0, batch[3] * 3600 + 7, -1)
    check_ranking(subject, batch)


@emulated
def test_what_cannot_be_launched_is_refused(subject):
    logits, targets = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"out must be \(4, 6\) torch.float32 like logits, got"):
        rows = Rows(logits, targets, PLAIN)
        cuda.logits_grad(rows, torch.zeros(4), None, out=torch.empty(4, 5))
    wide = torch.empty(1).expand(1, cuda._MAX_COLUMNS + 1)
    with pytest.raises(ValueError, match=rf"at most {cuda._MAX_COLUMNS} columns, got"):
        cuda.logp(Rows(wide, targets[:1], PLAIN))
    for rows in (native.Rows(rows=1, columns=1 << 31), native.Rows(dtype=3)):
        with pytest.raises(RuntimeError, match=r"pk_cuda_logp failed: invalid argument \(1\)"):
            cuda._call("logp", logits, rows, native.in_c(PLAIN))
    with pytest.raises(RuntimeError, match="pk_cuda_ranking failed: invalid argument"):
        rank(cuda, prompts_of([1025], [1], 0, 1.0, 1.0, False))
    refused = backends.refusal("cuda", CPU, torch.float32, 1025)
    assert refused == "1025 candidates a prompt; it takes at most 1024"
    hidden, targets = torch.randn(1, 1025, 1, 4), torch.zeros(1, 1025, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call: 1025 candidates"):
        pk.linear_pro_loss(hidden, torch.randn(5, 4), targets, None, backend="cuda")


@emulated
def test_the_library_says_what_it_is(subject):
    library = emulation.library()
    assert library.targets() == b"emulated" and library.ready() == 0
    assert library.error(0) == b"no error"
    assert cuda.details()["targets"] == "emulated"


def test_refusals_tell_why(monkeypatch):
    """Of the library: test_native.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unusable(GPU) == "no CUDA device is available"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert cuda.unusable(GPU) == "this PyTorch is built for ROCm"


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
def test_a_device_needs_code_for_its_capability(capability, monkeypatch):
    class Library:
        ready = staticmethod(lambda: 209 if capability == (12, 0) else 0)
        error = staticmethod(lambda code: b"no kernel image is available")
        targets = staticmethod(lambda: b"sm_90a")

    monkeypatch.setattr(cuda.library, "_loaded", (Library(), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    cuda._no_code.cache_clear()
    try:
        said = cuda.unusable(GPU)
    finally:
        cuda._no_code.cache_clear()
    assert (
        said
        == {
            (7, 5): "compute capability is 7.5; it needs 8.0 or newer",
            (9, 0): None,
            (12, 0): "the library has no code for compute capability 12.0 (no kernel image is "
            "available); built for sm_90a",
        }[capability]
    )


def test_a_card_is_known_by_its_architecture(monkeypatch):
    backends.get("torch")  # loaded, its name hides the library's in the package
    assert backends._arch(torch.device("cpu")) is None
    monkeypatch.setattr(backends, "is_available", lambda: False)
    assert backends._arch(GPU) is None
    monkeypatch.setattr(backends, "is_available", lambda: True)
    monkeypatch.setattr(backends, "get_device_capability", lambda device: (8, device.index))
    assert backends._arch(torch.device("cuda", 1)) == "sm_81"
    monkeypatch.setattr(backends, "hip", "7.0")
    assert backends._arch(GPU) is None


def test_auto_passes_over_kernels_that_never_ran_on_a_gpu(monkeypatch):
    monkeypatch.delenv("PRO_KERNELS_UNVERIFIED", raising=False)
    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends.get(name), "unusable", lambda device: None)
        monkeypatch.setattr(backends.get(name), "VERIFIED", {})
    assert backends.resolve("auto", GPU, torch.bfloat16) == "torch"
    assert "never ran on a GPU" in backends.passed_over("cuda", GPU, torch.bfloat16)
    assert backends.resolve("cuda", GPU, torch.bfloat16) == "cuda"
    monkeypatch.setattr(backends.get("triton"), "VERIFIED", {"sm_90": "a card"})
    monkeypatch.setattr(backends, "_arch", lambda device: "sm_90")
    assert backends.resolve("auto", GPU, torch.bfloat16) == "triton"
    monkeypatch.setattr(backends, "_arch", lambda device: "sm_80")
    assert backends.resolve("auto", GPU, torch.bfloat16) == "torch"
    assert "never ran on a GPU of sm_80" in backends.passed_over("triton", GPU, torch.bfloat16)
    monkeypatch.setenv("PRO_KERNELS_UNVERIFIED", "1")
    assert backends.resolve("auto", GPU, torch.bfloat16) == "cuda"
    monkeypatch.setenv("PRO_KERNELS_UNVERIFIED", "yes")
    with pytest.raises(ValueError, match="PRO_KERNELS_UNVERIFIED must be one of 0, 1, got 'yes'"):
        backends.resolve("auto", GPU, torch.bfloat16)
