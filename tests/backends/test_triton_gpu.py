"""The Triton kernels compiled and run on a card, against fp64; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pro_kernels import backends  # noqa: E402
from pro_kernels.options import LogitOptions  # noqa: E402

triton_backend = backends.get("triton")
reference = backends.get("torch")
U = 2.0**-24
STORE = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", triton_backend.DTYPES, ids=str)


def sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


@every_dtype
@pytest.mark.parametrize("columns", [1000, 16384, 50257, 128256])
@pytest.mark.parametrize("share", [0.5, 5.3])
def test_rows_below_and_above_the_number_of_sms(share, columns, dtype):
    rows = int(share * sms())
    logits = (4 * torch.randn(rows, columns, device="cuda")).to(dtype)
    targets = torch.randint(0, columns, (rows,), device="cuda")
    targets[::3] = -100
    logits[1] = torch.nan  # scored; row 0 is not, and is never read
    logits[0] = torch.nan
    options = LogitOptions()
    good = torch.arange(rows, device="cuda") != 1
    logps, lse, _ = triton_backend.logp(logits, targets, options=options)
    raw = logits.clone()
    again = triton_backend.residual_(raw, targets, options=options)
    grad = triton_backend.logits_grad(logits, lse, targets, None, options=options)
    assert logps[1].isnan() and raw[1].isnan().any()
    for i in range(0, rows, 64):  # fp64 rows a few at a time
        at = slice(i, i + 64)
        wide, t, ok = logits[at].double(), targets[at], good[at]
        want = reference.logp(wide, t, options=options)
        for found in ((logps, lse), again):  # in tiles of other sizes
            for got, truth in zip(found, want[:2], strict=True):
                bound = U * (24 + columns / 1024 + 4 * truth.abs())
                assert ((got[at] - truth).abs() <= bound)[ok].all()
        truth = reference.logits_grad(wide, want[1], t, None, options=options)
        for got in (raw[at], grad[at]):
            error = (got - truth)[ok].norm(dim=1)
            assert (error <= (STORE[dtype] + 256 * U) * truth[ok].norm(dim=1) + 1e-6).all()
    few = slice(2, 5)
    part = triton_backend.logp(logits[few], targets[few], options=options)
    assert torch.equal(part[0], logps[few]) and torch.equal(part[1], lse[few])


@every_dtype
@pytest.mark.parametrize("shape", [(37, 100, 1003), (513, 1024, 32000)], ids=str)
@pytest.mark.parametrize("options", [LogitOptions(), LogitOptions(2.0, 0.25)], ids=["", "softcap"])
def test_score_and_sides(options, shape, dtype):
    rows, hidden, vocab = shape
    x = torch.randn(rows, hidden, device="cuda").to(dtype)
    weight = (torch.randn(vocab, hidden, device="cuda") / hidden**0.5).to(dtype)
    bias = torch.randn(vocab, device="cuda").to(dtype)
    targets = torch.randint(0, vocab, (rows,), device="cuda")
    targets[1] = -100
    raw = x.double() @ weight.double().t() + bias.double()
    want = reference.logp(raw, targets, options=options)
    found = triton_backend.score(x, weight, bias, targets, options=options)
    for got, truth in zip(found, want[:2], strict=True):
        assert ((got - truth).abs() <= 64 * U * (1 + truth.abs())).all()
    few = triton_backend.score(x[:9], weight, bias, targets[:9], options=options)
    assert torch.equal(few[0], found[0][:9])

    index = torch.randint(0, rows // 2, (rows,), device="cuda")
    weights = torch.randn(rows, device="cuda")
    taken = triton_backend.gather_rows(x, index, weights, dtype)
    want = x.double()[index] * weights.double()[:, None]
    tiny = 2.0**-25 if dtype == torch.float16 else 0.0  # subnormal results
    assert ((taken - want).abs() <= (STORE[dtype] + 4 * U) * want.abs() + tiny).all()
    out = torch.zeros_like(x)
    triton_backend.scatter_rows(x, weights, index, out, True)
    terms = x.double() * weights.double()[:, None]
    want = torch.zeros_like(terms).index_add_(0, index, terms)
    size = torch.zeros_like(terms).index_add_(0, index, terms.abs())
    assert ((out - want).abs() <= STORE[dtype] * want.abs() + 16 * U * size + tiny).all()
