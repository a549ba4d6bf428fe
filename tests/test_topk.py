"""``return_topk``: the likeliest tokens of each row, by every backend and with every output."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import pro_kernels as pk
from cases import CPU, DTYPES, Case, assert_no_worse, same_compiled, upstreams
from pro_kernels import backends
from subjects import every_case, every_subject

CASES = [
    Case("plain", T=9),
    Case("all masked", masked=1.0),
    Case("softcap, bias", T=9, bias=True, options={"softcap": 5.0, "logit_scale": 0.5}),
    Case("negative scale", T=9, options={"logit_scale": -0.7}),
    Case("logits of 50", T=9, scale=25.0),
    Case("odd vocabulary", V=1009, T=4),
    Case("two columns", V=2),
]
# Beside the k: what else a call may ask for, and how it runs.
MORE = [
    {},
    {"return_lse": True, "return_entropy": True},
    {"return_lse": True},
    {"head_dtype": "float32"},
    {"grad_filter": 0.3, "return_dropped": True},
    {"budget": 1},
    {"logit_scale": "rows"},
    {"logit_scale": "rows", "head_dtype": "float32"},
]


def check(case: Case, dtype: torch.dtype, k: int, grad: bool = True, **more) -> None:
    """Against fp64: log-probs of the ids that were found, and that no likelier ones were not."""
    here = torch.get_default_device()
    hidden, weight, bias, targets, _ = (None if x is None else x.to(here) for x in case.tensors())
    rounded = [None if x is None else x.to(dtype) for x in (hidden, weight, bias)]
    options = {**case.options, **more}
    if options.get("logit_scale") == "rows":
        options["logit_scale"] = torch.linspace(0.4, 2, targets.numel()).view(targets.shape)
    of_head = ("softcap", "logit_scale", "head_dtype")
    plain, exact = (
        torch.stack([
            pk.reference.linear_token_logps(
                h, w, torch.full_like(targets, v), bias=b,
                **{name: options[name] for name in of_head if name in options},
            )
            for v in range(case.V)
        ], -1)
        for h, w, b in (rounded, [None if x is None else x.double() for x in rounded])
    )  # fmt: skip
    leaves = [None if x is None else x.clone().requires_grad_(grad) for x in rounded]
    logps, *others = pk.linear_token_logps(
        *leaves[:2], targets, bias=leaves[2], return_topk=k, **options
    )
    (top,) = (x for x in others if isinstance(x, pk.output.TopK))
    assert len(others) == 1 + sum(name.startswith("return_") for name in more)
    assert top.ids.shape == top.logps.shape == (*targets.shape, k)
    assert not top.logps.requires_grad and top.ids.dtype == torch.int64
    scored = targets >= 0
    assert (top.ids[~scored] == -1).all() and (top.logps[~scored] == 0).all()
    found, ids = top.logps[scored], top.ids[scored]
    plain, exact, logps = plain[scored], exact[scored], logps[scored].detach()
    rounding = torch.finfo(dtype if "head_dtype" not in more else torch.float32).eps
    rounding = rounding * (1 + exact.abs().amax(-1, keepdim=True))
    assert ids.sort().values.diff().gt(0).all() and (found.diff() <= rounding).all()
    at_ids = (found, plain.gather(-1, ids), exact.gather(-1, ids))
    assert_no_worse(*(x.detach() for x in at_ids), dtype, "log-probs", norm=False)
    least = exact.topk(k).values[..., -1:]
    assert (exact.gather(-1, ids) >= least - 4 * rounding).all()
    hit = ids == targets[scored][:, None]  # a target is as likely here as there
    same = logps[:, None].expand_as(found)[hit]
    torch.testing.assert_close(found[hit], same, rtol=1e-6, atol=1e-5, check_dtype=False)


@every_case(CASES)
def test_every_backend(case, subject, dtype, poison):
    for k in (1, 2):
        check(case, dtype, k, backend=subject.name)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("more", MORE, ids=str)
@pytest.mark.parametrize("tier", ["T1", "T3"])
def test_whatever_else_is_asked_for(more, dtype, grad, tier, force_tier, poison):
    if dtype == torch.float64 and "head_dtype" in more:
        pytest.skip("there is no fp32 head in fp64")
    force_tier(tier)
    for k in (1, 5, 37):
        check(Case("more", T=9), dtype, k, grad, **more)


def test_where_logits_would_not_be_written(monkeypatch):
    """The kernel that scores without them leaves such a call alone."""
    if reason := backends.get("triton").unusable(CPU):
        pytest.skip(reason)
    monkeypatch.setenv("PRO_KERNELS_SCORE", "fused")
    check(CASES[0], torch.float32, 3, grad=False, backend="triton")


@pytest.mark.parametrize("tier", ["T1", "T3"])
def test_nothing_else_changes(tier, force_tier):
    """Neither log-probs nor gradients, by a bit."""
    force_tier(tier)
    case, results = Case("same", T=9, bias=True), []
    *tensors, targets, _ = case.tensors()
    for more in ({}, {"return_topk": 4}):
        leaves = [x.bfloat16().requires_grad_() for x in tensors]
        found = pk.linear_token_logps(*leaves[:2], targets, bias=leaves[2], **more)
        logps = found[0] if more else found
        results.append([logps, *torch.autograd.grad((logps * upstreams(case)[0]).sum(), leaves)])
    assert all(map(torch.equal, *results))


@every_subject(every_way=False)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_of_ties_the_first_is_the_most_likely(scale, subject):
    hidden, weight = torch.zeros(3, 8).bfloat16(), torch.randn(37, 8).bfloat16()
    _, top = pk.linear_token_logps(
        hidden, weight, torch.arange(3), return_topk=1, logit_scale=scale, backend=subject.name
    )
    assert (top.ids == 0).all()
    torch.testing.assert_close(top.logps, -torch.tensor(37.0).log().expand(3, 1))


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.10 traces floats as tensors here")
@pytest.mark.parametrize("dense", [False, True], ids=["", "dense"])
def test_compiled_whole(dense):
    hidden, weight, _, targets, _ = Case("compiled", T=9).tensors()

    def loss(h, w):
        logps, lse, top = pk.linear_token_logps(h, w, targets, return_lse=True, return_topk=3)
        return (logps * top.logps.exp().sum(-1)).sum() + lse.sum(), top.ids

    same_compiled(loss, tuple(x.float().requires_grad_() for x in (hidden, weight)), dynamic=dense)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, r"return_topk must lie in \[1, 37\], got 0"),
        (38, ValueError, r"return_topk must lie in \[1, 37\], got 38"),
        (True, TypeError, "return_topk must be None or an integer, got True"),
        (2.0, TypeError, "return_topk must be None or an integer, got 2.0"),
    ],
)
def test_bad_input(k, error, message):
    hidden, weight, _, targets, _ = Case("bad").tensors()
    with pytest.raises(error, match=message):
        pk.linear_token_logps(hidden, weight, targets, return_topk=k)
    with pytest.raises(ValueError, match="return_topk cannot be had with a process_group, got 2"):
        pk.linear_token_logps(hidden, weight, targets, return_topk=2, process_group=object())


def test_distillation_as_the_docs_have_it():
    """The code of docs/logprobs.md itself, against whole logits in fp64."""
    text = (Path(__file__).parents[1] / "docs/logprobs.md").read_text()
    names = {"pk": pk, "torch": torch}
    exec(re.search(r"```python\n(def student_logps.*?)```", text, re.DOTALL)[1], names)
    hidden, weight, _, targets, _ = Case("student", T=9).tensors()
    teacher = torch.randn_like(hidden), torch.randn_like(weight) / 2
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        if dtype == torch.float32:
            others = (x.to(dtype) for x in teacher)
            loss = names["distillation_loss"](*leaves, targets, *others, 4)
        else:
            p, ids = (teacher[0] @ teacher[1].t()).softmax(-1).topk(4)
            q = (leaves[0] @ leaves[1].t()).log_softmax(-1).gather(-1, ids)
            loss = (p * (p.log() - q)).sum(-1)[targets >= 0].mean()
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
