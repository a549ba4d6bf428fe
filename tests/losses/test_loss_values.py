"""Every loss against the naive high-precision oracle, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from loss_oracles import NEEDS_REF, ORACLES, average, expected, pairs_of, random_batch
from mpmath import exp, log, mpf

from pro_kernels.losses import LOSSES, get_loss
from pro_kernels.losses.orpo import log1mexp

CASES = [
    *((name, {}) for name in LOSSES),
    ("pro", {"sft_weight": 0.3, "sft_reduction": "mean", "reward_scale": 2.5}),
    ("pro", {"length_normalize": False, "reward_scale": 0.01, "eps": 1e-10}),
    ("pro", {"eps": 0.3, "ties": "skip"}),
    ("pro", {"temperature": 0.7, "ties": "skip", "top_k": 2}),
    ("pro", {"temperature": 2.0, "sft_weight": 0.0}),
    ("plackett_luce", {"length_normalize": False}),
    ("plackett_luce", {"top_k": 1}),
    ("plackett_luce", {"top_k": 3}),
    ("dpo_pl", {"beta": 0.5}),
    ("s_dpo", {"beta": 0.2}),
    ("dpo", {"beta": 0.4, "label_smoothing": 0.2, "pairs": "best"}),
    ("ipo", {"beta": 0.3, "length_normalize": False}),
    ("ipo", {"beta": 0.05, "pairs": "best"}),
    ("simpo", {"beta": 1.3, "gamma": 1.7, "pairs": "best"}),
    ("cpo", {"beta": 0.02, "cpo_alpha": 0.3, "sft_reduction": "sum", "pairs": "best"}),
    ("orpo", {"beta": 0.7, "sft_reduction": "sum", "pairs": "best"}),
    ("rrhf", {"sft_weight": 0.2, "sft_reduction": "mean"}),
    ("slic", {"delta": 20.0, "pairs": "best"}),
    ("slic", {"length_normalize": True, "sft_weight": 0.0, "sft_reduction": "mean"}),
    ("listnet", {"length_normalize": False, "reward_temperature": 0.4}),
    ("lipo_lambda", {"beta": 0.3, "gain": "linear"}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CASES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_rewards_are_compared_before_they_are_rounded(name, dtype):
    logps = torch.tensor([[-1.0, -2.5, -0.5], [-3.0, -1.0, -2.0]])
    gaps = torch.tensor([[1, 2, 0], [1, 0, 0]])
    options = {"gain": "linear"} if name == "lipo_lambda" else {}
    options["ref_logps"] = logps / 2 if name in NEEDS_REF else None

    def value(rewards):
        return LOSSES[name](logps, torch.ones(2, 3), rewards=rewards, **options)[0].item()

    assert value((2**40 + gaps).to(dtype)) == pytest.approx(value(gaps.float()), rel=1e-6)


@pytest.mark.parametrize("rewards", ["distinct", "tied", None])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_values_and_gradients(name, options, rewards):
    """By the oracle and numerically; absent places are poisoned and get no gradient."""
    if name == "listnet" and rewards is None:
        pytest.skip("listnet needs rewards")
    changes = {**options, **({"equal_rewards": "keep"} if name == "pro" else {})}

    def loss_of(logps, batch, **inputs):
        return LOSSES[name](logps, batch.lengths, **batch.inputs(**inputs), **changes)

    for seed in range(3):
        batch = random_batch(seed, rewards=rewards)
        logps = batch.logps.clone().requires_grad_()
        loss, metrics = loss_of(logps, batch)
        value, sft = expected(name, batch, **options)
        assert loss.dtype == torch.float64 and loss.shape == ()
        assert loss.item() == pytest.approx(value, rel=1e-11, abs=1e-12)
        if "sft_loss" in metrics:
            assert metrics["sft_loss"].item() == pytest.approx(sft, rel=1e-6)
        loss.backward()
        absent = ~batch.mask | (batch.lengths == 0)
        assert torch.isfinite(logps.grad).all() and (logps.grad[absent] == 0).all()
        if not options:  # something must flow
            assert (logps.grad[0] != 0).any()
    if name not in NEEDS_REF:
        loss, _ = loss_of(logps, batch, ref_logps=None)
        value, _ = expected(name, batch, use_ref=False, **options)
        assert loss.item() == pytest.approx(value, rel=1e-11, abs=1e-12)

    small = random_batch(11, prompts=4, n=4, rewards=rewards)
    logps = small.logps.masked_fill(~small.mask | (small.lengths == 0), -1.0).requires_grad_()
    scaled = lambda x: -2.7 * loss_of(x, small)[0]  # noqa: E731
    assert torch.autograd.gradcheck(scaled, (logps,), atol=1e-7, rtol=1e-5)


def test_every_loss_has_an_oracle_and_a_name():
    assert set(LOSSES) == set(ORACLES)
    assert all(get_loss(name) is loss for name, loss in LOSSES.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_scores_stay_finite_and_right(name, dtype):
    # mean log-probs down to -1e4, up to exactly 0, and with huge gaps in both directions
    means = [[-1e4, 0.0, -3.0], [0.0, -1e4, -1e-30], [-1e4, -1e4, -1e4], [0.0, 0.0, -1e-9]]
    lengths = torch.tensor([[1, 1, 2], [3, 1, 1], [1, 2, 3], [1, 1, 1]])
    logps = (torch.tensor(means, dtype=dtype) * lengths).requires_grad_()
    batch = random_batch(0, prompts=4, n=3, poison=False)
    batch.logps, batch.lengths = logps.detach(), lengths
    batch.mask = torch.ones(4, 3, dtype=torch.bool)
    batch.ref_logps = torch.full((4, 3), -2.0, dtype=dtype)
    batch.rewards = torch.tensor([[2.0, 1.0, -1.0]] * 4)
    loss, metrics = LOSSES[name](logps, lengths, **batch.inputs())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()
    assert all(torch.isfinite(value).all() for value in metrics.values())
    if name != "orpo":  # the oracle has infinite odds at probability 1
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        assert loss.item() == pytest.approx(expected(name, batch)[0], rel=tolerance)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", LOSSES)
def test_scores_of_both_signs_1e4(name, sign):
    logps = (sign * torch.tensor([[1e4, -1e4, 5.0], [-1e4, 1e4, 0.0]])).requires_grad_()
    loss, _ = LOSSES[name](
        logps,
        torch.ones(2, 3),
        rewards=torch.tensor([[1e3, 0.0, -1e3]] * 2) / (1 if name != "lipo_lambda" else 1e3),
        ref_logps=torch.zeros(2, 3),
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(name, dtype):
    batch = random_batch(5)
    low = batch.logps.to(dtype).requires_grad_()
    full = low.detach().float().requires_grad_()
    inputs = batch.inputs(ref_logps=batch.ref_logps.float(), rewards=batch.rewards.float())
    loss, metrics = LOSSES[name](low, batch.lengths, **inputs)
    wide, _ = LOSSES[name](full, batch.lengths, **inputs)
    assert loss.dtype == torch.float32 and torch.equal(loss, wide)
    loss.backward()
    wide.backward()
    assert low.grad.dtype == dtype and torch.equal(low.grad, full.grad.to(dtype))
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_one_candidate_none_and_empty_batch(name):
    kwargs = {"ref_logps": torch.zeros(1, 1), "rewards": torch.ones(1, 1)}
    logps = torch.tensor([[-6.0]], requires_grad=True)
    loss, _ = LOSSES[name](logps, torch.tensor([[3]]), **kwargs)
    sft = {"pro": 0.05 * 2, "cpo": 2, "orpo": 2, "rrhf": 6, "slic": 3}.get(name, 0.0)
    assert loss.item() == pytest.approx(sft)
    loss.backward()
    assert torch.isfinite(logps.grad).all()

    logps = torch.tensor([[-6.0]], requires_grad=True)
    loss, _ = LOSSES[name](logps, torch.tensor([[0]]), **kwargs)
    loss.backward()
    assert loss.item() == 0 and logps.grad.item() == 0

    empty = torch.zeros(0, 3, requires_grad=True)
    loss, metrics = LOSSES[name](empty, empty.detach(), rewards=empty, ref_logps=empty)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "tokens"])
@pytest.mark.parametrize("name", ["cpo", "orpo", "rrhf", "slic"])
def test_sft_reductions(name, reduction):
    batch = random_batch(8)
    best = [prompt[0] for prompt in batch.prompts() if prompt]
    total = {
        "mean": average(-c.s for c in best),
        "sum": average(-c.S for c in best),
        "tokens": -sum(c.S for c in best) / sum(c.m for c in best),
    }[reduction]
    weight = 0.5 if name == "slic" else 1.0
    _, metrics = LOSSES[name](batch.logps, batch.lengths, **batch.inputs(), sft_reduction=reduction)
    assert metrics["sft_loss"].item() == pytest.approx(weight * float(total), rel=1e-6)


def published_two_candidate(name, pc, pr, rc, rr, mc, mr):
    """Chosen/rejected losses as TRL writes them, a pair at a time, default hyperparameters."""
    sigmoid_loss = lambda x: math.log1p(math.exp(-x))  # noqa: E731
    if name in ("dpo", "dpo_pl"):
        return sigmoid_loss(0.1 * ((pc - pr) - (rc - rr)))
    if name == "s_dpo":
        return sigmoid_loss(1.0 * ((pc - pr) - (rc - rr)))
    if name == "ipo":
        return ((pc - rc) / mc - (pr - rr) / mr - 1 / (2 * 0.1)) ** 2
    if name == "simpo":
        return sigmoid_loss(2.0 * (pc / mc - pr / mr - 0.5 / 2.0))
    if name == "cpo":
        return sigmoid_loss(0.1 * (pc - pr)) - pc / mc
    if name == "orpo":
        c, r = pc / mc, pr / mr
        odds = (c - r) - (math.log1p(-math.exp(c)) - math.log1p(-math.exp(r)))
        return -pc / mc + 0.1 * sigmoid_loss(odds)
    if name == "slic":
        return max(0.0, 1.0 - (pc - pr)) - 0.5 * pc
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["dpo", "dpo_pl", "s_dpo", "ipo", "simpo", "cpo", "orpo", "slic"])
def test_two_candidates_equal_the_published_formula(name):
    gen = torch.Generator().manual_seed(3)
    m = torch.randint(2, 9, (5, 2), generator=gen)
    logps = -m * torch.rand(5, 2, generator=gen, dtype=torch.float64) - 0.1
    ref = logps + torch.randn(5, 2, generator=gen, dtype=torch.float64)
    loss, metrics = LOSSES[name](logps, m, ref_logps=ref)
    rows = zip(logps.tolist(), ref.tolist(), m.tolist(), strict=True)
    each = [published_two_candidate(name, *p, *r, *length) for p, r, length in rows]
    assert loss.item() == pytest.approx(sum(each) / 5, rel=1e-12)
    if name == "dpo":
        chosen, rejected = (0.1 * (logps - ref)).unbind(1)
        assert metrics["rewards/chosen"].item() == pytest.approx(chosen.mean().item(), rel=1e-6)
        assert metrics["rewards/rejected"].item() == pytest.approx(rejected.mean().item(), rel=1e-6)
        accuracy = (chosen > rejected).double().mean().item()
        assert metrics["rewards/accuracies"].item() == pytest.approx(accuracy)


@pytest.mark.parametrize("rewards", ["distinct", "tied"])
@pytest.mark.parametrize(("name", "pairs"), [("simpo", "all"), ("dpo", "best"), ("pro", "all")])
def test_metrics_average_over_pairs_then_prompts(name, pairs, rewards):
    batch = random_batch(9, rewards=rewards)
    options = {"pairs": pairs} if name != "pro" else {"equal_rewards": "keep"}
    _, metrics = LOSSES[name](batch.logps, batch.lengths, **batch.inputs(), **options)
    implicit = {
        "simpo": lambda c: 2 * c.s,
        "dpo": lambda c: 0.1 * c.d,
        "pro": lambda c: c.s,
    }[name]
    prompts = [pairs_of(p, pairs) for p in batch.prompts()]
    prompts = [p for p in prompts if p]
    for key, value in {
        "rewards/chosen": lambda a, b: implicit(a),
        "rewards/rejected": lambda a, b: implicit(b),
        "rewards/margins": lambda a, b: implicit(a) - implicit(b),
        "rewards/accuracies": lambda a, b: int(implicit(a) > implicit(b)),
        "logps/chosen": lambda a, b: a.S,
        "logps/rejected": lambda a, b: b.S,
    }.items():
        wanted = float(average(average(value(a, b) for a, b in p) for p in prompts))
        assert metrics[key].item() == pytest.approx(wanted, rel=1e-6), key


@pytest.mark.parametrize("name", LOSSES)
def test_reads_no_values_off_the_cpu(name):
    meta = torch.zeros(3, 4, device="meta", requires_grad=True)
    loss, metrics = LOSSES[name](
        meta, meta.detach(), rewards=meta, ref_logps=meta, mask=meta.detach().bool()
    )
    loss.backward()
    assert meta.grad.shape == (3, 4)
    assert all(value.device.type == "meta" for value in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_fp32_is_close_to_the_oracle_also_compiled_in_one_graph(name):
    batch = random_batch(6)
    for field in ("logps", "rewards", "ref_logps"):
        setattr(batch, field, getattr(batch, field).float())
    torch._dynamo.reset()  # it gives all callable objects one frame, compiled for 8 of them
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="eager")
    for function in (LOSSES[name], compiled):
        loss, _ = function(batch.logps, batch.lengths, **batch.inputs())
        assert loss.item() == pytest.approx(expected(name, batch)[0], rel=2e-6)


def test_log1mexp_is_accurate_at_both_ends():
    points = [-1e-15, -1e-6, -0.1, -0.6931, -0.6932, -2.0, -40.0, -80.0, -1e4]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    values = log1mexp(x)
    values.sum().backward()
    for point, value, slope in zip(points, values.tolist(), x.grad.tolist(), strict=True):
        p = exp(mpf(point))
        assert value == pytest.approx(float(log(1 - p)), rel=1e-13, abs=0)
        assert slope == pytest.approx(float(-p / (1 - p)), rel=1e-13, abs=0)
