"""The blocked fp32 matmuls against fp64, and their choice."""

from __future__ import annotations

import pytest
import torch

from pro_kernels import matmul

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "fp32"])
def route(request, monkeypatch):
    monkeypatch.setattr(
        matmul, "_upcasts", lambda dtype, _: request.param == "fp32" and dtype.itemsize == 2
    )
    # Blocks of 64 columns: several of them at these sizes, the last one short.
    monkeypatch.setattr(matmul, "WORKSPACE", 1)
    return request.param


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_three_matmuls(route, dtype):
    x, w = torch.randn(9, 21).to(dtype), torch.randn(150, 21).to(dtype)
    bias = torch.randn(150).to(dtype)
    eps = 2 * torch.finfo(dtype).eps
    out = matmul.logits_into(torch.full((9, 150), float("nan"), dtype=dtype), x, w, bias)
    exact = x.double() @ w.double().t() + bias.double()
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=eps * 20)

    dz = torch.randn(9, 150).to(dtype)
    hidden = matmul.hidden_grad(dz, w).double()
    exact = dz.double() @ w.double()
    assert (hidden - exact).norm() <= eps * exact.norm()

    exact = dz.double().t() @ x.double()
    weight = matmul.weight_grad(dz, x, torch.empty(150, 21, dtype=dtype), accumulate=False)
    assert (weight.double() - exact).norm() <= eps * exact.norm()
    acc = torch.ones(150, 21, dtype=torch.promote_types(dtype, torch.float32))
    matmul.weight_grad(dz, x, acc, accumulate=True)
    assert (acc.double() - 1 - exact).norm() <= eps * exact.norm()


@pytest.mark.parametrize("dtype", LOW)
def test_fp32_logits_of_low_inputs(route, dtype):
    x, w = torch.randn(9, 21).to(dtype), torch.randn(150, 21).to(dtype)
    out = matmul.logits_into(torch.empty(9, 150), x, w, None)
    torch.testing.assert_close(out.double(), x.double() @ w.double().t(), rtol=1e-5, atol=1e-5)


def test_the_blocked_route_rounds_once(monkeypatch):
    """Summed over columns in fp32: no more error than rounding the exact result."""
    monkeypatch.setattr(matmul, "_upcasts", lambda dtype, _: True)
    monkeypatch.setattr(matmul, "WORKSPACE", 1)
    dz, w = torch.randn(4, 640).bfloat16(), torch.randn(640, 8).bfloat16()
    exact = dz.double() @ w.double()
    assert (matmul.hidden_grad(dz, w).double() - exact).norm() < 1e-6 * exact.norm()


def test_choice(monkeypatch):
    matmul._upcasts.cache_clear()
    assert not matmul.upcasts(torch.float32, "cpu")
    assert not matmul.upcasts(torch.bfloat16, "cuda")
    for value, expected in (("fp32", True), ("native", False)):
        matmul._upcasts.cache_clear()
        monkeypatch.setenv("PRO_KERNELS_MATMUL", value)
        assert matmul.upcasts(torch.bfloat16, "cpu") is expected
    matmul._upcasts.cache_clear()
    monkeypatch.setenv("PRO_KERNELS_MATMUL", "fast")
    with pytest.raises(ValueError, match="PRO_KERNELS_MATMUL must be auto, native or fp32"):
        matmul.upcasts(torch.bfloat16, "cpu")
    monkeypatch.undo()
    matmul._upcasts.cache_clear()


def test_workspace_holds():
    for rows, hidden, vocab in ((920, 1024, 32000), (32768, 896, 151936), (1, 1, 1)):
        block = matmul.column_block(rows, hidden, vocab)
        assert 1 <= block
        tile = min(rows, matmul.TILE_ROWS)
        assert block <= 64 or 4 * block * (tile + hidden) <= matmul.WORKSPACE
