"""The fused path, every backend and tier, against the reference in fp64 (the rule in cases.py)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pro_kernels as pk
from cases import CASE_IDS, CASES, Case, assert_no_worse, compare, run, truth, upstreams
from subjects import every_case, every_subject, every_subject_and_dtype

TIERS = ["T1", "T2", "T3"]
BUDGET = Case("budget", T=9, H=48, V=333, bias=True)
LARGE = Case("large", B=4, n=4, T=32, H=128, V=1009, bias=True)
every_tier = pytest.mark.parametrize("tier", TIERS)
every_backend = every_subject(every_way=False)
every_backend_and_dtype = every_subject_and_dtype(every_way=False)


@every_case(CASES)
def test_every_backend(case, subject, dtype, poison):
    compare(case, dtype, backend=subject.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tier", ["T2", "T3"])
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_every_tier(case, tier, dtype, force_tier, poison):
    force_tier(tier)
    compare(case, dtype, known=twice_rounded(case, tier, dtype))


def twice_rounded(case: Case, tier: str, dtype: torch.dtype) -> dict[str, float]:
    """T2 rounds dW before it is multiplied by the upstream gradient, and after."""
    grad = truth(case, dtype).grads.get("weight") if tier == "T2" else None
    return {} if grad is None else {"weight": (grad.to(dtype) - grad).norm().item()}


@every_tier
@every_subject_and_dtype(every_way=False, interpreted=(torch.bfloat16,))
def test_every_backend_in_every_tier(subject, dtype, tier, force_tier, poison):
    """Again, to the same bits."""
    if subject.device == "cpu":
        force_tier(tier)
        case = dataclasses.replace(BUDGET, T=3) if subject.interpreted else BUDGET
    else:
        force_tier(tier, chunk=50, retained=100)
        case = LARGE
    known = twice_rounded(case, tier, dtype)
    a, b = (compare(case, dtype, known=known, backend=subject.name) for _ in range(2))
    assert torch.equal(a.output.loss, b.output.loss)
    assert all(torch.equal(a.grads[name], b.grads[name]) for name in a.grads)


@every_subject_and_dtype(every_way=False, interpreted=(torch.float16,))
def test_the_least_budget(subject, dtype, poison):
    compare(BUDGET, dtype, backend=subject.name, budget=1)


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


@every_backend_and_dtype
def test_token_logps_serve_any_upstream_gradient(subject, dtype, poison):
    case = Case("tokens", B=2, n=2, T=11, V=211, bias=True)
    up = upstreams(case)
    ours = compare(case, dtype, "linear_token_logps", upstream=up, backend=subject.name)
    dead = case.tensors()[3].to(ours.output.device) == -100
    assert (ours.output[dead] == 0).all() and (ours.output <= 0).all()


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@every_backend_and_dtype
def test_logits_in(subject, dtype, inplace, poison):
    logits = torch.randn(2, 3, 5, 301, dtype=torch.float64).mul(4).to(dtype)
    targets = torch.randint(0, 301, (2, 3, 5)).masked_fill(torch.rand(2, 3, 5) < 0.4, -100)
    rewards = torch.randn(2, 3)
    results = []
    for function, kind, extra in (
        (pk.pro_loss, dtype, {"backend": subject.name, "inplace_backward": inplace}),
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


@every_backend
def test_fp64_logits_are_taken_by_plain_pytorch_alone(subject):
    logits, targets = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 6, 3])
    if subject.name != "torch":
        with pytest.raises(ValueError, match="takes float32"):
            pk.token_logps(logits, targets, backend=subject.name)
        return
    want = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(pk.token_logps(logits, targets, backend="torch"), want)


@every_backend
def test_logits_changed_in_place_are_not_used_again_unnoticed(subject):
    x = torch.randn(4, 50, requires_grad=True)
    logits = x * 1.0
    other = logits.square().sum()  # saves the logits
    logps = pk.token_logps(
        logits, torch.randint(0, 50, (4,)), backend=subject.name, inplace_backward=True
    )
    torch.autograd.grad(logps.sum(), x, retain_graph=True)
    for output in (logps.sum(), other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(output, x)


LEAVES = ("hidden", "weight", "bias")


@pytest.mark.parametrize(
    "freeze", [LEAVES[:1], LEAVES[1:2], LEAVES[:2], LEAVES[2:], LEAVES], ids=str
)
@every_tier
def test_gradients_only_where_required(freeze, tier, force_tier):
    force_tier(tier)
    case = Case("frozen", bias=True)
    exact = truth(case, torch.float32)
    ours = run(pk.linear_pro_loss, case, torch.float32, freeze=freeze)
    torch.testing.assert_close(ours.output.loss.double(), exact.output.loss)
    assert set(ours.grads) == set(LEAVES) - set(freeze)
    assert ours.output.loss.requires_grad == bool(ours.grads)
    for name, grad in ours.grads.items():
        torch.testing.assert_close(grad.double(), exact.grads[name], rtol=1e-4, atol=1e-6)


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


@every_backend
@every_tier
def test_a_row_does_not_depend_on_where_it_stands(subject, tier, force_tier):
    force_tier(tier)
    hidden = torch.randn(1, 8).bfloat16().repeat(24, 1).view(2, 2, 6, 8).requires_grad_()
    weight = torch.randn(777, 8).bfloat16()
    logps = pk.linear_token_logps(
        hidden, weight, torch.full((2, 2, 6), 5), head_dtype="float32", backend=subject.name
    )
    assert logps.unique().numel() == 1
    logps.sum().backward()
    assert hidden.grad.view(24, 8).unique(dim=0).shape[0] == 1


@every_backend
def test_prompts_run_once_share_a_row(subject):
    """The first tokens of all candidates read one row of hidden states: it gets their sum."""
    rows = torch.tensor([0, 1, 0, 2, 0, 3, 4, 5, 4, 6, 4, 7])
    targets, rewards = torch.randint(0, 50, (12,)), torch.randn(2, 3)
    layout = pk.Layout.from_rows(rows, targets, torch.arange(0, 13, 2), 3, num_rows=8)
    hidden, weight = torch.randn(8, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    grads = []
    for backend in (subject.name, "torch"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = pk.linear_pro_loss(*leaves, None, rewards, layout=layout, backend=backend)
        grads.append(torch.autograd.grad(out.loss, leaves))
    torch.testing.assert_close(*grads, rtol=2**-7, atol=2**-9)


def test_candidates_are_equivariant_and_unsorted_rewards_are_sorted():
    hidden, weight, _, targets, rewards = Case("permuted", n=5, masked=0.3).tensors()
    base = pk.linear_pro_loss(hidden, weight, targets, rewards)
    p = torch.randperm(5)
    out = pk.linear_pro_loss(hidden[:, p], weight, targets[:, p], rewards[:, p])
    torch.testing.assert_close(out.loss, base.loss)
    torch.testing.assert_close(out.scores, base.scores[:, p])


FORMS = ["padded", "logits", "compact", "unknown", "dense"]


@pytest.mark.parametrize("form", FORMS)
@every_backend
def test_a_candidate_outside_the_mask_is_never_read(subject, form):
    """Its tokens never reach the head; NaN there changes nothing and gets the gradient 0."""
    check_mask(form, pk, backend=subject.name)


@pytest.mark.parametrize("form", FORMS)
def test_nor_by_the_reference(form):
    check_mask(form, pk.reference)


def test_nor_in_a_compiled_call():
    torch._dynamo.reset()
    check_mask("padded", pk, lambda run: torch.compile(run, backend="eager"), backend="torch")


def check_mask(form, api, compiled=lambda run: run, **more) -> None:
    tensors = Case("absent", n=4, masked=0.2).tensors()
    hidden, weight, _, targets, rewards = (
        x if x is None else x.to(torch.get_default_device()) for x in tensors
    )
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = False
    hidden[~mask] = float("nan")
    if form == "logits":
        hidden = hidden @ weight.T
    hidden, weight = hidden.float(), weight.float()

    def run(**changes):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        args = {"targets": targets, "rewards": rewards, **changes}
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
    found = compiled(run)(**changes)
    torch.testing.assert_close(found[0][:-1], expected[0][:-1])
    torch.testing.assert_close(found[1:], expected[1:])
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


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 3)], ids=str)
def test_nothing_to_score_is_no_loss_and_gives_no_gradient(subject, shape):
    """No prompts, no tokens; no candidates, which only a layout can say."""
    ours = {"backend": subject.name}
    hidden = torch.randn(*(shape if shape[1] else (3,)), 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    targets, rewards = torch.zeros(shape, dtype=torch.long), torch.zeros(shape[:2])
    if shape[1]:
        out = pk.linear_pro_loss(hidden, weight, targets, rewards, **ours)
        logits = torch.randn(*shape, 11, requires_grad=True)
        assert pk.pro_loss(logits, targets, rewards, **ours).loss == 0
    else:
        none = targets.view(-1)
        layout = pk.Layout.from_rows(none, none, torch.tensor([0]), [0, 0], num_rows=3)
        out = pk.linear_pro_loss(hidden, weight, None, None, layout=layout, **ours)
        assert (out.lengths == 0).all() and out.scores.shape == layout.shape
    out.loss.backward()
    assert out.loss == 0 and (weight.grad == 0).all()
    assert hidden.grad.shape == hidden.shape and (hidden.grad == 0).all()
