"""Out of memory in the middle of a chunk: the error names the budget; nothing of it is left."""

from __future__ import annotations

import pytest
import torch

import pro_kernels as pk
from cases import Case, run
from pro_kernels import backends
from pro_kernels.fused import matmul

CASE = Case("out of memory", B=2, n=3, T=8, bias=True)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
]
WORDS = [
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("pk_cuda_residual failed: out of memory (2)"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("std::bad_alloc"),
    MemoryError("a shape of 10**12 numbers"),
    RuntimeError("something else"),  # stays as it is
]


def fail_at(monkeypatch, module, name: str, call: int, error: RuntimeError) -> None:
    """The call number ``call`` of ``module.name`` does half its work, then raises ``error``."""
    function, calls_so_far = getattr(module, name), [0]

    def failing(*args, **kwargs):
        calls_so_far[0] += 1
        out = function(*args, **kwargs)
        if calls_so_far[0] == call:
            raise error
        return out

    monkeypatch.setattr(module, name, failing)


def leaves_of(tier: str, force_tier) -> list[torch.Tensor]:
    """Of a call that will be of that tier."""
    force_tier(tier)
    return [x.float().requires_grad_() for x in CASE.tensors()[:3]]


def loss(leaves, budget=123456) -> torch.Tensor:
    *_, targets, rewards = CASE.tensors()
    options = {"bias": leaves[2], "backend": "torch", "budget": budget}
    return 1.7 * pk.linear_pro_loss(*leaves[:2], targets, rewards, **options).loss


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
@pytest.mark.parametrize(
    ("tier", "where", "call", "op"),
    [
        ("T1", "logits_into", 1, "head_forward"),
        ("T1", "weight_grad", 1, "head_backward"),
        ("T2", "logits_into", 2, "linear_pro"),
        ("T2", "weight_grad", 2, "linear_pro"),
        ("T3", "logits_into", 2, "head_forward"),
        ("T3", "weight_grad", 1, "head_backward"),
    ],
)
def test_the_error_names_the_budget_and_a_smaller_one_is_right(
    tier, where, call, op, error, monkeypatch, force_tier
):
    error = type(error)(*error.args)
    expected = run(pk.linear_pro_loss, CASE, torch.float32, backend="torch")
    leaves = leaves_of(tier, force_tier)
    before = [x.detach().clone() for x in leaves]
    with monkeypatch.context() as patch:
        fail_at(patch, matmul, where, call, error)
        with pytest.raises(RuntimeError, match="budget of 123456 bytes") as raised:
            loss(leaves).backward()
    assert type(raised.value) is type(error)
    for text in (f"pro_kernels::{op}", "budget=", "PRO_KERNELS_BUDGET", "memory"):
        assert text in str(raised.value)
    for x, was in zip(leaves, before, strict=True):
        assert torch.equal(x, was) and x.grad is None

    loss(leaves, budget=4000).backward()
    for x, grad in zip(leaves, expected.grads.values(), strict=True):
        torch.testing.assert_close(x.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("where", "op"),
    [("logits_into", "head_forward"), ("weight_grad", "head_backward")],
)
def test_with_an_entropy_too(where, op, monkeypatch, force_tier):
    leaves = leaves_of("T3", force_tier)[:2]
    fail_at(monkeypatch, matmul, where, 1, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError, match=f"{op} ran with a budget of 123456"):
        targets = CASE.tensors()[3]
        options = {"return_entropy": True, "budget": 123456}
        sum(pk.linear_token_logps(*leaves, targets, **options)).sum().backward()
    assert all(x.grad is None for x in leaves)


@pytest.mark.parametrize("error", WORDS, ids=str)
def test_whoever_has_no_memory_is_understood(error, monkeypatch):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(backends.get("torch"), "logp", failing)
    hidden, weight, targets = torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2).long()
    match = "^something else$" if "something" in str(error) else "budget of 4000 bytes"
    with pytest.raises(type(error), match=match):
        pk.linear_token_logps(hidden, weight, targets, backend="torch", budget=4000)


def test_scaling_the_gradients_of_the_forward_names_the_budget_too(monkeypatch, force_tier):
    value = loss(leaves_of("T2", force_tier))
    fail_at(monkeypatch, torch, "empty_like", 1, RuntimeError("can't allocate memory"))
    with pytest.raises(RuntimeError, match="scaled ran with a budget of 123456 bytes"):
        value.backward()


def test_a_real_allocation_that_fails():
    """The CPU allocator's own words are known: a chunk no machine holds."""
    hidden, weight = torch.randn(2, 4), torch.randn(1, 4).expand(1 << 44, 4)
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="budget of 1152921504606846976 bytes"):
        pk.linear_token_logps(hidden, weight, targets, budget=1 << 60, backend="torch")
