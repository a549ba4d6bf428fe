"""The blocked fp32 matmuls against fp64, and their choice."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pro_kernels as pk
from cases import Case, compare, fp32_sums
from pro_kernels.fused import matmul
from pro_kernels.selfcheck import env

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "fp32", "gpu"])
def route(request, monkeypatch):
    monkeypatch.setattr(
        matmul, "_upcasts", lambda dtype, _: request.param == "fp32" and dtype.itemsize == 2
    )
    if request.param == "gpu":
        fp32_sums(monkeypatch)
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
    if dtype in LOW:  # and not rounded to it
        out = matmul.logits_into(torch.full((9, 150), torch.nan), x, w, None)
        exact = x.double() @ w.double().t()
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)

    dz = torch.randn(9, 150).to(dtype)
    hidden = matmul.hidden_grad(dz, w).double()
    exact = dz.double() @ w.double()
    sums = route != "native" and dtype in LOW  # unrounded, over all blocks
    assert (hidden - exact).norm() <= (1e-6 if sums else eps) * exact.norm()

    exact = dz.double().t() @ x.double()
    weight = matmul.weight_grad(dz, x, torch.empty(150, 21, dtype=dtype), accumulate=False)
    assert (weight.double() - exact).norm() <= eps * exact.norm()
    acc = torch.ones(150, 21, dtype=torch.promote_types(dtype, torch.float32))
    matmul.weight_grad(dz, x, acc, accumulate=True)
    assert (acc.double() - 1 - exact).norm() <= eps * exact.norm()


@pytest.mark.parametrize(
    ("amd", "has", "bf16", "fp16"),
    [
        (False, {"_is_avx512_bf16_supported"}, True, True),
        (True, {"_is_avx512_bf16_supported"}, False, True),
        (True, set(), True, True),
        (False, {"_is_avx512_bf16_supported", "_is_amx_tile_supported"}, False, True),
        (False, {"_is_amx_tile_supported", "_is_amx_fp16_supported"}, False, False),
    ],
    ids=["Intel dot products", "AMD dot products", "neither", "AMX", "AMX with fp16"],
)
def test_choice_by_processor(monkeypatch, amd, has, bf16, fp16):
    monkeypatch.delenv("PRO_KERNELS_MATMUL", raising=False)
    monkeypatch.setattr(matmul.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(matmul, "_is_amd", lambda: amd)
    monkeypatch.setattr(matmul, "_has", lambda check: check in has)
    for dtype, expected in ((torch.bfloat16, bf16), (torch.float16, fp16), (torch.float32, False)):
        assert matmul._upcasts.__wrapped__(dtype, "cpu") is expected


def test_choice(monkeypatch):
    upcasts = matmul._upcasts.__wrapped__  # without its cache
    assert not upcasts(torch.float32, "cpu")
    assert not upcasts(torch.bfloat16, "cuda")
    for value, expected in (("fp32", True), ("native", False)):
        monkeypatch.setenv("PRO_KERNELS_MATMUL", value)
        assert upcasts(torch.bfloat16, "cpu") is expected
    monkeypatch.setenv("PRO_KERNELS_MATMUL", "fast")
    with pytest.raises(ValueError, match="PRO_KERNELS_MATMUL must be one of auto, native, fp32"):
        upcasts(torch.bfloat16, "cpu")


def test_env_says_how_the_matmuls_of_each_dtype_run(monkeypatch):
    monkeypatch.setattr(matmul, "_upcasts", lambda dtype, device: dtype == torch.float16)
    assert env.report()["devices"]["cpu"]["matmuls"] == {"bf16": "native", "fp16": "fp32 by blocks"}


def test_workspace_holds():
    for rows, hidden, vocab in ((920, 1024, 32000), (32768, 896, 151936), (1, 1, 1)):
        block = matmul.column_block(rows, hidden, vocab)
        assert 1 <= block
        tile = min(rows, matmul.TILE_ROWS)
        assert block <= 64 or 4 * block * (tile + hidden) <= matmul.WORKSPACE


def test_fp32_sums_of_16_bit_operands_take_no_pass_after_the_matmul(monkeypatch):
    """On a GPU each of the three is one call of ATen's, checked on CUDA tensors without data."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.is_view or func.namespace == "prim":
                return func(*args, **(kwargs or {}))
            names.append(str(func))
            return kwargs["out"]  # what it computes is not the question here

    names: list[str] = []
    monkeypatch.setattr(matmul, "_ampere_or_newer", lambda: True)
    with FakeTensorMode():
        x, w = (torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in ((9, 21), (150, 21)))
        dz = torch.empty(9, 150, device="cuda", dtype=torch.bfloat16)
        logits, d_weight, side = (
            torch.empty(s, device="cuda") for s in ((9, 150), (150, 21), (9, 21))
        )
        with Calls():
            matmul.logits_into(logits, x, w, None)
            matmul.hidden_grad(dz, w, side)
            matmul.weight_grad(dz, x, d_weight, accumulate=False)
            matmul.weight_grad(dz, x, d_weight, accumulate=True)
    assert names == ["aten.mm.dtype_out"] * 3 + ["aten.addmm.dtype_out"]


def test_autocast_rounds_no_more_than_a_16_bit_dz_with_fp32_sums(route):
    """DHidden and dW of fp32 tensors at unit scale: as near fp64 as where X, W and w dZ0 are bf16.

    That is what TRL's chunked log-probs do: two roundings in each product.
    """
    n, vocab = 256, 2000
    hidden, weight = torch.randn(1, n, 64), torch.randn(vocab, 64) / 8
    targets, upstream = torch.randint(0, vocab, (1, n)), torch.randn(n)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps = pk.linear_token_logps(hidden, weight, targets)
    ours = torch.autograd.grad(logps[0], (hidden, weight), upstream)

    def gradients(x, w, low):
        """With ``low`` rounding what the matmuls read."""
        x, w = low(x.detach()[0]), low(w.detach())
        dz = -torch.softmax(low(x @ w.t()), 1)
        dz[torch.arange(n), targets[0]] += 1
        dz = low(dz * upstream.to(dz.dtype)[:, None])
        return (dz @ w)[None], dz.t() @ x

    theirs = gradients(hidden, weight, lambda x: x.bfloat16().float())
    exact = gradients(hidden.double(), weight.double(), lambda x: x)
    for name, a, b, want in zip(("hidden", "weight"), ours, theirs, exact, strict=True):
        found, plain = ((x.double() - want).norm() / want.norm() for x in (a, b))
        assert found < 1.1 * plain, f"d {name}: {found:.2e} against {plain:.2e}"


BATCHES = [
    Case("bias", B=3, n=4, T=12, H=96, V=515, bias=True),
    Case("logits of 50", B=3, n=4, T=12, H=96, V=515, scale=25.0),
]


@pytest.mark.parametrize("case", BATCHES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tier", ["T1", "T2", "T3"])
def test_every_tier_on_every_route(case, dtype, tier, route, force_tier):
    """DHidden as exact as plain PyTorch's; dW within the one rounding of w X more."""
    force_tier(tier, chunk=20, retained=30)
    compare(case, dtype, backend="torch")


@pytest.mark.parametrize(
    ("hip", "cards", "expected"),
    [(None, [(9, 0)], True), (None, [(8, 0), (7, 5)], False), ("7.0", [(9, 4)], False)],
)
def test_which_cards_leave_their_sums(hip, cards, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: cards[i])
    matmul._ampere_or_newer.cache_clear()
    assert matmul.leaves_sums(torch.bfloat16, "cuda") is expected
    assert not matmul.leaves_sums(torch.float32, "cuda")
    assert not matmul.leaves_sums(torch.bfloat16, "cpu")
    matmul._ampere_or_newer.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """A card that is not here answers by the host's tensors; filled with what it was asked."""
    zeros, questions = torch.zeros, []

    def answer(a, b, out, accumulate):
        questions.append(accumulate)
        assert type(out) is torch.Tensor  # no fake one
        if refuses["addmm" if accumulate else "mm"] is not None:
            raise refuses["addmm" if accumulate else "mm"]
        return out

    refuses: dict[str, Exception | None] = {"mm": None, "addmm": None}
    monkeypatch.setattr(matmul, "_ampere_or_newer", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **rest: zeros(*size, **rest))
    monkeypatch.setattr(matmul, "_mm_fp32", answer)
    matmul._refused.cache_clear()
    yield refuses, questions
    matmul._refused.cache_clear()


def test_a_card_is_asked_once_for_its_fp32_sums(asked):
    _, questions = asked
    with FakeTensorMode():  # as the compiler asks
        assert matmul.leaves_sums(torch.bfloat16, "cuda")
    assert matmul.sums_dtype(torch.float16, "cuda") == torch.float32
    assert questions == [False]


def test_a_pytorch_that_refuses_does_without(asked):
    """But to have no memory is no refusal."""
    refuses, _ = asked
    refuses["mm"] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        matmul.leaves_sums(torch.bfloat16, "cuda")
    for error in (None, RuntimeError("expected out_dtype"), TypeError("out_dtype")):
        refuses["mm"] = error
        matmul._refused.cache_clear()
        assert matmul.leaves_sums(torch.bfloat16, "cuda") is (error is None)
        sums = torch.float32 if error is None else torch.bfloat16
        assert matmul.sums_dtype(torch.bfloat16, "cuda") == sums


def test_where_addmm_is_refused_sums_are_added_by_blocks(asked, monkeypatch):
    refuses, _ = asked
    refuses["addmm"] = RuntimeError("addmm.dtype_out: self must be bf16")
    mm, heights = torch.mm, []

    def fp32_mm(a, b, out_dtype):
        heights.append(a.shape[0])
        return mm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", fp32_mm)
    monkeypatch.setattr(matmul, "WORKSPACE", 1)
    a, b = torch.randn(150, 9).bfloat16(), torch.randn(9, 21).bfloat16()
    out = torch.ones(150, 21)
    assert matmul.mm_fp32(a, b, out, accumulate=True) is out
    torch.testing.assert_close(out, 1 + a.float() @ b.float())
    assert heights == [64, 64, 22]


@pytest.mark.parametrize("options", [{}, {"budget": 1}], ids=str)
@pytest.mark.parametrize("head_dtype", [None, "float32"], ids=["same", "fp32"])
def test_no_matmul_has_nan_between_the_rows_of_its_operands(
    monkeypatch, poison, options, head_dtype
):
    seen = []

    def looked_at(name):
        run = getattr(matmul, name)

        def wrapped(*operands, **given):
            for x in operands[1:3] if name == "logits_into" else operands[:2]:
                rows, columns = x.shape
                gap = min(64 // x.itemsize, x.stride(0) - columns)
                if x.dtype == torch.bfloat16 and gap > 0:
                    behind = x.as_strided((rows - 1, columns + gap), x.stride(), x.storage_offset())
                    assert not behind[:, columns:].isnan().any()
                    seen.append(name)
            return run(*operands, **given)

        monkeypatch.setattr(matmul, name, wrapped)

    for name in ("logits_into", "hidden_grad", "weight_grad"):
        looked_at(name)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, 16, generator=g).bfloat16().requires_grad_()
    weight = (3 * torch.randn(301, 16, generator=g)).bfloat16().requires_grad_()
    targets = torch.randint(0, 301, (2, 3, 8), generator=g)
    out = pk.linear_pro_loss(
        hidden, weight, targets, torch.randn(2, 3, generator=g), head_dtype=head_dtype,
        **options,
    )  # fmt: skip
    out.loss.backward()
    assert {"hidden_grad", "weight_grad"} & set(seen)
