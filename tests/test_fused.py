"""The fused path, every backend and tier, against the reference in fp64 (the rule in cases.py)."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import pro_kernels as pk
from cases import (
    CASE_IDS,
    CASES,
    DTYPES,
    IDS,
    Case,
    assert_no_worse,
    run,
    truth,
    usable_backends,
)
from pro_kernels.fused import call, matmul
from pro_kernels.fused.planner import Plan

TIERS = ["T1", "T2", "T3"]


@pytest.fixture
def force_tier(monkeypatch):
    """Make calls that want all gradients run in a given tier, in chunks of a few rows."""
    plan = call.make_plan

    def force(tier: str) -> None:
        def forced(rows, *args, **kwargs):
            chosen = plan(rows, *args, **kwargs)
            if tier == "T1" or chosen.tier != "T1":
                return chosen
            needs = {"need_hidden": chosen.need_hidden, "need_weight": chosen.need_weight}
            prompts = len(kwargs["prompt_tokens"] or ())
            if tier == "T2" and prompts:
                return Plan("T2", rows, prompt_chunks=(1,) * prompts, **needs)
            return Plan("T3", 5, retained=min(7, rows // 2), **needs)

        monkeypatch.setattr(call, "make_plan", forced)

    return force


def compare(case: Case, dtype: torch.dtype, scaled: bool = False, **options) -> None:
    """``scaled``: dW is rounded before it is multiplied by the upstream gradient, and after."""
    exact, plain = truth(case, dtype), run(pk.reference.linear_pro_loss, case, dtype)
    ours = run(pk.linear_pro_loss, case, dtype, **options)
    for name in ("logps", "scores"):
        args = (getattr(r.output, name) for r in (ours, plain, exact))
        assert_no_worse(*args, dtype, name, norm=False)
    assert torch.equal(ours.output.lengths, exact.output.lengths)
    for name, grad in exact.grads.items():
        args = (r.grads[name] for r in (ours, plain, exact))
        known = (grad.to(dtype) - grad).norm().item() if scaled and name == "weight" else 0.0
        assert_no_worse(*args, dtype, f"gradient of {name}", norm=True, known=known)
    for name in ("loss", "sft_loss", "rank_losses"):
        args = (getattr(r.output, name).reshape(-1) for r in (ours, plain, exact))
        assert_no_worse(*args, dtype, name, norm=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_every_backend(case, backend, dtype, poison):
    compare(case, dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tier", ["T2", "T3"])
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_every_tier(case, tier, dtype, force_tier, poison):
    force_tier(tier)
    compare(case, dtype, scaled=tier == "T2")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_fp64_equals_the_reference(case, tier, force_tier):
    force_tier(tier)
    exact, ours = truth(case, torch.float64), run(pk.linear_pro_loss, case, torch.float64)
    for name in ("loss", "sft_loss", "rank_losses", "scores", "logps"):
        a, b = getattr(ours.output, name), getattr(exact.output, name)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for name, grad in exact.grads.items():
        error = (ours.grads[name] - grad).norm()
        assert error <= 1e-11 * grad.norm() + 1e-13


@pytest.mark.parametrize("route", ["native", "fp32"])
@pytest.mark.parametrize("tier", TIERS)
def test_both_matmul_routes(route, tier, force_tier, monkeypatch):
    monkeypatch.setattr(matmul, "_upcasts", lambda dtype, _: route == "fp32" and dtype.itemsize < 4)
    force_tier(tier)
    compare(Case("routes", T=9, H=48, V=333, bias=True), torch.bfloat16)


@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_token_logps_serve_any_upstream_gradient(backend, dtype, poison):
    case = Case("tokens", B=2, n=2, T=11, V=211, bias=True)
    hidden, weight, bias, targets, _ = case.tensors()
    upstream = torch.randn(targets.shape, dtype=torch.float64)
    results = []
    for function, kind, extra in (
        (pk.linear_token_logps, dtype, {"backend": backend}),
        (pk.reference.linear_token_logps, dtype, {}),
        (pk.reference.linear_token_logps, torch.float64, {}),
    ):
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in (hidden, weight, bias)]
        logps = function(leaves[0], leaves[1], targets, bias=leaves[2], **extra)
        (logps * upstream).sum().backward()
        results.append([logps.detach(), *(x.grad for x in leaves)])
    names = ["log-probs", "gradient of hidden", "gradient of weight", "gradient of bias"]
    assert (results[0][0][targets == -100] == 0).all() and (results[0][0] <= 0).all()
    for name, *values in zip(names, *results, strict=True):
        assert_no_worse(*values, dtype, name, norm="gradient" in name)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=[*IDS, "fp64"])
@pytest.mark.parametrize("backend", usable_backends())
def test_logits_in(backend, dtype, inplace, poison):
    if backend != "torch" and dtype == torch.float64:
        with pytest.raises(ValueError, match="takes float32"):
            pk.token_logps(torch.zeros(1, 2, dtype=dtype), torch.zeros(1).long(), backend=backend)
        return
    logits = torch.randn(2, 3, 5, 301, dtype=torch.float64).mul(4).to(dtype)
    targets = torch.randint(0, 301, (2, 3, 5)).masked_fill(torch.rand(2, 3, 5) < 0.4, -100)
    rewards = torch.randn(2, 3)
    results = []
    for function, kind, extra in (
        (pk.pro_loss, dtype, {"backend": backend, "inplace_backward": inplace}),
        (pk.reference.pro_loss, dtype, {}),
        (pk.reference.pro_loss, torch.float64, {}),
    ):
        x = logits.to(kind).clone().requires_grad_()
        out = function(x * 1.0, targets, rewards, softcap=30.0, **extra)
        (0.3 * out.loss).backward()
        results.append((out.logps, x.grad, out.loss.reshape(1)))
    assert (results[0][1][targets == -100] == 0).all()
    for i, name in enumerate(("log-probs", "gradient", "loss")):
        assert_no_worse(*(r[i] for r in results), dtype, name, norm=i > 0)


@pytest.mark.parametrize("backend", usable_backends())
def test_logits_changed_in_place_are_not_used_again_unnoticed(backend):
    x = torch.randn(4, 50, requires_grad=True)
    logits = x * 1.0
    other = logits.square().sum()  # saves the logits
    logps = pk.token_logps(
        logits, torch.randint(0, 50, (4,)), backend=backend, inplace_backward=True
    )
    torch.autograd.grad(logps.sum(), x, retain_graph=True)
    for output in (logps.sum(), other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(output, x)


def test_fp32_logits_of_bf16_inputs_are_more_exact():
    hidden = torch.randn(300, 64).bfloat16()
    weight = torch.randn(999, 64).bfloat16()
    targets = torch.randint(0, 999, (300,))
    exact = pk.reference.linear_token_logps(hidden.double(), weight.double(), targets)
    errors = [
        (pk.linear_token_logps(hidden, weight, targets, logits_dtype=kind) - exact).abs().max()
        for kind in (None, torch.float32)
    ]
    assert errors[1] < 1e-5 < errors[0]


def test_fp32_logits_have_gradients_too(force_tier):
    for tier in ("T1", "T3"):
        force_tier(tier)
        compare(Case("wide", V=101), torch.bfloat16, logits_dtype=torch.float32)


@pytest.mark.parametrize("freeze", [("hidden",), ("weight",), ("hidden", "weight"), ("bias",)])
@pytest.mark.parametrize("tier", TIERS)
def test_gradients_only_where_required(freeze, tier, force_tier):
    force_tier(tier)
    case = Case("frozen", bias=True)
    exact = truth(case, torch.float32)
    ours = run(pk.linear_pro_loss, case, torch.float32, freeze=freeze)
    assert set(ours.grads) == {"hidden", "weight", "bias"} - set(freeze)
    for name, grad in ours.grads.items():
        torch.testing.assert_close(grad.double(), exact.grads[name], rtol=1e-4, atol=1e-6)


def test_no_grad_scores_only():
    case = Case("score")
    hidden, weight, _, targets, rewards = case.tensors()
    with torch.no_grad():
        out = pk.linear_pro_loss(hidden.requires_grad_(), weight, targets, rewards)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, truth(case, torch.float64).output.loss.detach())


@pytest.mark.parametrize("tier", TIERS)
def test_retain_graph_and_double_use(tier, force_tier):
    force_tier(tier)
    hidden, weight, _, targets, rewards = Case("twice").tensors()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = pk.linear_pro_loss(hidden, weight, targets, rewards).loss
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3 * a, b)
    twice = torch.autograd.grad(loss + loss * loss, (hidden, weight))
    for a, b in zip(first, twice, strict=True):
        torch.testing.assert_close((1 + 2 * loss.detach()) * a, b)


@pytest.mark.parametrize("tier", TIERS)
def test_unscored_rows_never_reach_the_head(tier, force_tier):
    case = Case("nan rows", T=8)
    hidden, weight, _, targets, rewards = case.tensors()
    clean = pk.linear_pro_loss(hidden, weight, targets, rewards).loss
    hidden = hidden.masked_fill((targets == -100)[..., None], float("nan")).requires_grad_()
    force_tier(tier)
    weight.requires_grad_()
    loss = pk.linear_pro_loss(hidden, weight, targets, rewards).loss
    loss.backward()
    torch.testing.assert_close(loss, clean, rtol=1e-12, atol=0)
    assert weight.grad.isfinite().all() and (hidden.grad[targets == -100] == 0).all()


def test_tied_weights_add_both_gradients():
    embedding = torch.randn(29, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 29, (2, 3, 5))
    rewards = torch.randn(2, 3)

    def loss(function):
        hidden = torch.tanh(embedding[ids])
        return function(hidden, embedding, ids, rewards, shift=True).loss

    ours = torch.autograd.grad(loss(pk.linear_pro_loss), embedding)[0]
    expected = torch.autograd.grad(loss(pk.reference.linear_pro_loss), embedding)[0]
    torch.testing.assert_close(ours, expected)


def test_non_contiguous_and_transposed_inputs():
    hidden, weight, _, targets, rewards = Case("strides").tensors()
    expected = pk.linear_pro_loss(hidden, weight, targets, rewards)
    strange = (
        hidden.transpose(0, 2).contiguous().transpose(0, 2),
        weight.t().contiguous().t(),
        targets.flip(2).contiguous().flip(2),
        torch.stack([rewards, rewards], 2)[..., 0],
    )
    assert not strange[0].is_contiguous() and not strange[1].is_contiguous()
    out = pk.linear_pro_loss(*strange)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    logits = hidden @ weight.t()
    turned = logits.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    loss = pk.pro_loss(turned, targets, rewards).loss
    torch.testing.assert_close(loss, expected.loss, rtol=1e-12, atol=0)
    loss.backward()
    assert turned.grad.shape == turned.shape


def test_autocast_takes_fp32_parameters_and_returns_fp32_gradients():
    hidden, weight, _, targets, rewards = Case("autocast", V=64).tensors()
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = pk.linear_pro_loss(hidden, weight, targets, rewards)
    out.loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    rounded = run(pk.linear_pro_loss, Case("autocast", V=64), torch.bfloat16, upstream=1.0)
    torch.testing.assert_close(out.loss, rounded.output.loss)
    error = (weight.grad - rounded.grads["weight"].float()).norm() / weight.grad.norm()
    assert error < 4e-3


@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("tier", TIERS)
def test_bitwise_repeatable(backend, tier, force_tier):
    force_tier(tier)
    case = Case("repeat", T=9, V=515)
    a, b = (run(pk.linear_pro_loss, case, torch.bfloat16, backend=backend) for _ in range(2))
    assert torch.equal(a.output.loss, b.output.loss)
    for name in a.grads:
        assert torch.equal(a.grads[name], b.grads[name])


@pytest.mark.parametrize("backend", usable_backends())
def test_a_row_does_not_depend_on_its_neighbours(backend):
    logits, targets = torch.randn(40, 777).bfloat16(), torch.randint(0, 777, (40,))
    together = pk.token_logps(logits, targets, backend=backend)
    alone = torch.cat(
        [pk.token_logps(logits[i : i + 1], targets[i : i + 1], backend=backend) for i in range(40)]
    )
    assert torch.equal(together, alone)


@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("tier", TIERS)
def test_a_row_does_not_depend_on_where_it_stands(backend, tier, force_tier):
    force_tier(tier)
    hidden = torch.randn(1, 8).bfloat16().repeat(24, 1).view(2, 2, 6, 8).requires_grad_()
    weight = torch.randn(777, 8).bfloat16()
    logps = pk.linear_token_logps(
        hidden, weight, torch.full((2, 2, 6), 5), logits_dtype=torch.float32, backend=backend
    )
    assert logps.unique().numel() == 1
    logps.sum().backward()
    assert hidden.grad.view(24, 8).unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("backend", usable_backends())
def test_bad_rows_stay_to_themselves(backend):
    logits, targets = torch.randn(6, 50), torch.randint(1, 50, (6,))
    clean = pk.token_logps(logits, targets, backend=backend)
    logits[1] = float("nan")
    logits[3, 0] = float("inf")
    logits[4, 0] = -float("inf")
    out = pk.token_logps(logits, targets, backend=backend)
    assert out[1].isnan() and not out[3].isfinite() and out[4].isfinite()
    assert torch.equal(out[[0, 2, 5]], clean[[0, 2, 5]])


def test_candidates_are_equivariant_and_unsorted_rewards_are_sorted():
    hidden, weight, _, targets, rewards = Case("permuted", n=5, masked=0.3).tensors()
    base = pk.linear_pro_loss(hidden, weight, targets, rewards)
    p = torch.randperm(5)
    out = pk.linear_pro_loss(hidden[:, p], weight, targets[:, p], rewards[:, p])
    torch.testing.assert_close(out.loss, base.loss)
    torch.testing.assert_close(out.scores, base.scores[:, p])


FORMS = ["padded", "logits", "compact", "unknown", "dense"]


@pytest.mark.parametrize(
    ("form", "backend"),
    [*itertools.product(FORMS, [*usable_backends(), "reference"]), ("compiled", "torch")],
)
def test_a_candidate_outside_the_mask_is_never_read(form, backend):
    """Its tokens never reach the head; NaN there changes nothing and gets the gradient 0."""
    hidden, weight, _, targets, rewards = Case("absent", n=4, masked=0.2).tensors()
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = False
    hidden[~mask] = float("nan")
    if form == "logits":
        hidden = hidden @ weight.T
    hidden, weight = hidden.float(), weight.float()

    def run(**changes):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        args = {"targets": targets, "rewards": rewards, **changes}
        api, more = (pk, {"backend": backend}) if backend != "reference" else (pk.reference, {})
        if form == "logits":
            out = api.pro_loss(x, **args, **more)
            return out, *torch.autograd.grad(out.loss, x)
        rows = x.flatten(0, 2) if "layout" in args else x
        out = api.linear_pro_loss(rows, w, **args, **more)
        return out, *torch.autograd.grad(out.loss, (x, w))

    gone = targets.masked_fill(~mask[..., None], -100)
    expected = run(targets=gone)
    changes = {"candidate_mask": mask, "rewards": rewards.masked_fill(~mask, float("nan"))}
    if form in ("compact", "unknown"):
        changes |= {"targets": None, "layout": pk.Layout.from_padded(targets)}
    if form == "dense":
        changes |= {"targets": None, "layout": pk.Layout.dense(targets)}
    if form == "unknown":  # as of a mask on a GPU
        changes["layout"] = dataclasses.replace(changes["layout"], candidate_tokens=None)
    if form == "compiled":
        torch._dynamo.reset()
        run = torch.compile(run, backend="eager")
    found = run(**changes)
    torch.testing.assert_close(found[0][:-1], expected[0][:-1])
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b)
    assert (found[1][~mask] == 0).all() and (found[0].lengths[~mask] == 0).all()


def test_rows_that_a_present_candidate_shares_with_an_absent_one_are_read():
    weight, rewards, mask = torch.randn(9, 8), torch.rand(1, 3), torch.tensor([[True, False, True]])
    rows, targets = torch.tensor([0, 1, 0, 2, 0, 3]), torch.arange(6)
    layout = pk.Layout.from_rows(rows, targets, torch.tensor([0, 2, 4, 6]), 3, num_rows=4)
    unknown = dataclasses.replace(layout, candidate_tokens=None)
    keep = [0, 1, 4, 5]
    two = pk.Layout.from_rows(rows[keep], targets[keep], torch.tensor([0, 2, 4]), 2, num_rows=4)
    grads = []
    for of, given, there in ((two, rewards[mask][None], None), (layout, rewards, mask),
                             (unknown, rewards, mask)):  # fmt: skip
        hidden = torch.ones(4, 8).cumsum(0).requires_grad_()
        out = pk.linear_pro_loss(hidden, weight, None, given, layout=of, candidate_mask=there)
        grads.append(torch.autograd.grad(out.loss, hidden)[0])
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


def test_prompt_weights_and_empty_prompts():
    hidden, weight, _, targets, rewards = Case("weights", B=3, masked=0.2).tensors()
    losses = [
        pk.linear_pro_loss(hidden[i : i + 1], weight, targets[i : i + 1], rewards[i : i + 1]).loss
        for i in range(3)
    ]
    w = torch.tensor([1.0, 0.0, 3.0])
    out = pk.linear_pro_loss(hidden, weight, targets, rewards, prompt_weights=w)
    torch.testing.assert_close(out.loss, (losses[0] + 3 * losses[2]) / 4)
    targets[1] = -100  # nothing scored: the mean is over the other two
    out = pk.linear_pro_loss(hidden, weight, targets, rewards)
    torch.testing.assert_close(out.loss, (losses[0] + losses[2]) / 2)


@pytest.mark.parametrize("backend", usable_backends())
def test_empty_batch_has_zero_loss_and_gradients(backend):
    for shape in ((0, 3, 4), (2, 3, 0)):
        hidden = torch.randn(*shape, 8, requires_grad=True)
        weight = torch.randn(11, 8, requires_grad=True)
        targets = torch.zeros(shape, dtype=torch.long)
        out = pk.linear_pro_loss(hidden, weight, targets, torch.zeros(shape[:2]), backend=backend)
        out.loss.backward()
        assert out.loss == 0 and (weight.grad == 0).all() and hidden.grad.shape == hidden.shape
        logits = torch.randn(*shape, 11, requires_grad=True)
        assert pk.pro_loss(logits, targets, torch.zeros(shape[:2]), backend=backend).loss == 0


@pytest.mark.parametrize("backend", usable_backends())
def test_prompts_without_any_sequence_have_zero_loss_and_gradients(backend):
    none = torch.zeros(0, dtype=torch.long)
    layout = pk.Layout.from_rows(none, none, torch.tensor([0]), [0, 0], num_rows=3)
    hidden = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    out = pk.linear_pro_loss(hidden, weight, None, None, layout=layout, backend=backend)
    out.loss.backward()
    assert out.loss == 0 and (out.lengths == 0).all() and out.scores.shape == layout.shape
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()
