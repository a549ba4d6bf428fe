"""Entropies and log-sum-exps with their gradients: every backend, every tier, both entrances.

The kernels: tests/backends/test_contract_rows.py.
"""

from __future__ import annotations

import pytest
import torch

import pro_kernels as pk
from cases import DTYPES, IDS, Case, assert_no_worse, compare, fp32_sums, upstreams
from pro_kernels.api import linear_token_stats
from subjects import every_case, every_subject_and_dtype

every_tier = pytest.mark.parametrize("tier", ["T1", "T3"])
every_output = pytest.mark.parametrize("output", ["entropy", "lse"])
WITH = {"return_entropy": True}


def floats(case: Case, dtype: torch.dtype = torch.float32):
    """Hidden states, weight and bias, which want gradients, and targets of a case."""
    *tensors, targets, _ = case.tensors()
    return *(None if x is None else x.to(dtype).requires_grad_() for x in tensors), targets


CASES = [
    Case("plain", T=9),
    Case("nothing masked", masked=0.0),
    Case("all masked", masked=1.0),
    Case("single tokens", T=1, n=4, masked=0.2),
    Case("bias", T=9, bias=True),
    Case("bias, softcap", T=9, bias=True, options={"softcap": 5.0, "logit_scale": 0.5}),
    Case("negative scale", T=9, options={"logit_scale": -0.7}),
    Case("logits of 50", T=9, scale=25.0),
    Case("one column", V=1),
    Case("few columns", V=3, T=40, bias=True),  # many tokens of each target
    Case("odd vocabulary", V=1009, T=4),
]


def check(output: str, case: Case, dtype: torch.dtype, alone: bool = False, **options) -> None:
    """``alone``: nothing is made of the log-probs."""
    logps, other = upstreams(case)
    options |= {"upstream": (None if alone else logps, other)}
    options["known"] = rounding_of_lse(case, other) if output == "entropy" else None
    options["shared"] = {f"return_{output}": True}
    compare(case, dtype, "linear_token_logps", **options)


def rounding_of_lse(case: Case, upstream) -> dict[str, float]:
    """Largest norm of what each entropy's gradient gains when its log-sum-exp is rounded to fp32.

    ``log p = z - lse`` then is up to 2^-24 |lse| off, which plain PyTorch's ``(z - max) - log s``
    is not.
    """
    if case.options:
        return {}
    hidden, weight, bias, targets, _ = case.tensors()
    z = torch.nn.functional.linear(hidden, weight, bias)
    off = upstream.abs() * z.logsumexp(-1).abs() * 2.0**-24
    dz = z.softmax(-1) * torch.where(targets < 0, 0.0, off)[..., None]
    h, dz = hidden.flatten(0, -2), dz.flatten(0, -2)
    return {"hidden": (dz @ weight).norm().item(), "weight": (dz.t() @ h.abs()).norm().item()}


@every_output
@every_case(CASES)
def test_every_backend(case, subject, dtype, output, poison):
    check(output, case, dtype, backend=subject.name)


@pytest.mark.parametrize(
    "freeze", [(), ("weight", "bias"), ("hidden",), ("hidden", "weight")], ids=str
)
@every_tier
@every_output
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_every_tier(case, output, tier, freeze, force_tier, poison, monkeypatch):
    force_tier(tier)
    check(output, case, torch.bfloat16, freeze=freeze)
    check(output, case, torch.float32, alone=True, freeze=freeze)
    fp32_sums(monkeypatch)  # a GPU's matmuls
    for head_dtype in ("float32",) if freeze else ("float32", None):
        check(output, case, torch.bfloat16, freeze=freeze, head_dtype=head_dtype)


@every_tier
def test_log_probs_are_those_without_entropy(tier, force_tier):
    """And without gradients, under activation checkpointing, and in a second backward."""
    force_tier(tier)
    hidden, weight, bias, targets = floats(Case("same", T=9, bias=True))
    tensors = (hidden, weight, bias)
    alone = pk.linear_token_logps(hidden, weight, targets, bias=bias)
    both, entropy = pk.linear_token_logps(hidden, weight, targets, bias=bias, **WITH)
    assert torch.equal(alone, both)
    with torch.no_grad():
        again = pk.linear_token_logps(hidden, weight, targets, bias=bias, **WITH)
    torch.testing.assert_close(again, (both.detach(), entropy.detach()))
    up = torch.randn_like(alone)
    found = (torch.autograd.grad(x, tensors, up) for x in (alone, both))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def loss(*tensors):
        logps, entropy = pk.linear_token_logps(*tensors[:2], targets, bias=tensors[2], **WITH)
        return (logps * entropy).sum()

    direct = loss(*tensors)
    first = torch.autograd.grad(direct, tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(direct, tensors)))
    again = torch.utils.checkpoint.checkpoint(loss, *tensors, use_reentrant=False)
    assert all(map(torch.equal, first, torch.autograd.grad(again, tensors)))


@every_tier
@pytest.mark.parametrize("size", [2.0**-20, 2.0**14])
def test_fp16_keeps_small_and_large_upstream_gradients(tier, size, force_tier):
    """A mean over many tokens must not vanish in an fp16 dZ, nor a scaled loss overflow it."""
    force_tier(tier)
    case = Case("range", T=9, V=1009)
    hidden, weight, _, targets, _ = case.tensors()
    tensors = [x.half().float().requires_grad_() for x in (hidden, weight)]
    up = size * upstreams(case).float()
    grads = []
    for function in (pk.linear_token_logps, pk.reference.linear_token_logps):
        with torch.autocast("cpu", torch.float16, enabled=not grads):
            logps, entropy = function(*tensors, targets, **WITH)
        grads.append(torch.autograd.grad((logps * up[0] + entropy * up[1]).sum(), tensors))
    for ours, exact in zip(*grads, strict=True):
        assert (ours - exact).norm() < 4e-3 * exact.norm()


@every_tier
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=[*IDS, "fp64"])
def test_what_policy_gradient_trainers_log(dtype, tier, force_tier):
    force_tier(tier)
    *tensors, targets = floats(Case("extra", T=9, V=61, bias=True), dtype)
    stats = linear_token_stats(
        tensors[0], tensors[1], targets, bias=tensors[2], softcap=4.0, logit_scale=0.5, extra=True
    )
    z = torch.nn.functional.linear(*(x.double() for x in tensors)) * 0.5
    z = 4.0 * torch.tanh(z / 4.0)
    log_p, scored = z.log_softmax(-1), targets >= 0
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    expected = {
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
    }
    for name, value in expected.items():
        got = getattr(stats, name)
        want = torch.where(scored, value, 0.0).to(got.dtype)
        torch.testing.assert_close(got.detach(), want.detach(), **tolerance)
    clear = z.topk(2, -1).values.diff(dim=-1).abs()[..., 0] > 0.1  # no tie after rounding
    want = (z.argmax(-1) == targets) & scored
    assert stats.is_top1.dtype == torch.bool and stats.is_top1[clear].equal(want[clear])


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@every_subject_and_dtype(every_way=False, interpreted=(torch.bfloat16,))
@pytest.mark.parametrize("used", [(1, 1), (1, 0), (0, 1)], ids=["both", "log-probs", "entropy"])
def test_from_logits(subject, used, dtype, inplace, poison):
    logits = torch.randn(6, 301, dtype=torch.float64).mul(4).to(dtype)
    targets, up = torch.tensor([0, 300, 5, -100, 7, 8]), torch.randn(2, 6)
    results = []
    for function, kind, extra in (
        (pk.token_logps, dtype, {"backend": subject.name, "inplace_backward": inplace}),
        (pk.reference.token_logps, dtype, {}),
        (pk.reference.token_logps, torch.float64, {}),
    ):
        leaf = logits.to(kind, copy=True).requires_grad_()
        outputs = function(leaf * 1, targets, **WITH, **extra)
        sum((x * u).sum() for x, u, one in zip(outputs, up, used, strict=True) if one).backward()
        results.append((*(x.detach() for x in outputs), leaf.grad))
    for i, name in enumerate(("log-probs", "entropies", "gradient of logits")):
        assert_no_worse(*(r[i] for r in results), dtype, name, norm=i == 2)
