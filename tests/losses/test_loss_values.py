"""Every loss against the naive high-precision oracle, and its gradient."""

from __future__ import annotations

import pytest
import torch
from mpmath import exp, log, mpf

from loss_oracles import (
    OF_GAINS,
    ORACLES,
    PAIRWISE,
    Batch,
    average,
    expected,
    pairs_of,
    random_batch,
)
from pro_kernels.losses import LOSSES, get_loss
from pro_kernels.losses.free import log1mexp

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
    ("cpo", {"beta": 0.02, "label_smoothing": 0.3, "sft_weight": 0.3, "pairs": "best"}),
    ("simpo", {"label_smoothing": 0.1, "sft_weight": 0.1, "sft_on": "all"}),
    ("dpo", {"alpha": 0.03, "label_smoothing": 0.1}),
    ("kto", {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.4}),
    ("infonca", {"beta": 0.2, "alpha": 0.7}),
    ("infonca", {"alpha": 0.0}),
    ("nca", {"beta": 0.2, "alpha": 0.7}),
    ("nca", {"alpha": 0.0}),
    ("exo", {"beta": 0.2, "alpha": 0.7}),
    ("exo", {"label_smoothing": 0.2}),
    ("rpo", {"eta": 0.4, "beta": 0.3}),
    ("rpo", {"divergence": "backward"}),
    ("dpo_ties", {"alpha": 0.2, "pairs": "best"}),
    ("dpo_ties", {"alpha": 400.0}),
    ("apo_zero", {"beta": 0.5, "pairs": "best"}),
    ("apo_down", {"beta": 0.5, "pairs": "best"}),
    ("bco", {"delta": 0.3, "pairs": "best"}),
    ("sppo_hard", {"beta": 0.3, "pairs": "best"}),
    ("robust", {"label_smoothing": 0.3, "pairs": "best"}),
    ("discopop", {"tau": 0.7, "pairs": "best"}),
    ("sigmoid_norm", {"beta": 0.7, "pairs": "best"}),
    ("f_dpo", {"divergence": "forward_kl"}),
    ("f_dpo", {"divergence": "js_divergence", "pairs": "best"}),
    ("f_dpo", {"divergence": "alpha_divergence", "alpha": 0.3}),
    ("approx_ndcg", {"temperature": 0.9, "gain": "linear"}),
    ("approx_ndcg", {"temperature": 5.0, "length_normalize": False}),
    ("neural_ndcg", {"temperature": 0.6, "gain": "linear"}),
    ("neural_ndcg", {"gain": "rank"}),
    ("lipo_lambda", {"gain": "rank"}),
    ("lire", {"temperature": 7.0}),
    ("lire", {"length_normalize": True}),
    ("swepo", {"beta": 0.3, "alpha": 0.0}),
    ("orpo", {"beta": 0.7, "sft_reduction": "sum", "pairs": "best"}),
    ("rrhf", {"sft_weight": 0.2, "sft_reduction": "mean"}),
    ("slic", {"delta": 20.0, "pairs": "best"}),
    ("slic", {"length_normalize": True, "sft_weight": 0.0, "sft_reduction": "mean"}),
    ("listnet", {"length_normalize": False, "temperature": 0.4}),
    ("lipo_lambda", {"beta": 0.3, "gain": "linear"}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CASES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("name", sorted(set(LOSSES) - OF_GAINS - {"lire"}))
def test_rewards_are_compared_before_they_are_rounded(name, dtype):
    logps = torch.tensor([[-1.0, -2.5, -0.5], [-3.0, -1.0, -2.0]])
    gaps = torch.tensor([[1, 2, 0], [1, 0, 0]])
    options = {"gain": "linear"} if name == "lipo_lambda" else {}
    options["ref_logps"] = logps / 2

    def value(rewards):
        return LOSSES[name](logps, torch.ones(2, 3), rewards=rewards, **options)[0].item()

    assert value((2**40 + gaps).to(dtype)) == pytest.approx(value(gaps.float()), rel=1e-6)


@pytest.mark.parametrize("rewards", ["distinct", "tied", None])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_values_and_gradients(name, options, rewards):
    """By the oracle and numerically; absent places are poisoned and get no gradient."""
    needs = LOSSES[name].needs(**options)
    if rewards is None and "rewards" in needs:
        with pytest.raises(ValueError, match=f"{name} needs rewards"):
            zeros = torch.zeros(1, 2)
            LOSSES[name](zeros, zeros + 1, ref_logps=zeros, **options)
        return
    changes = {**options, **({"equal_rewards": "keep"} if name == "pro" else {})}

    def loss_of(logps, batch, **inputs):
        return LOSSES[name](logps, batch.lengths, **batch.inputs(**inputs), **changes)

    for seed in range(6):
        batch = random_batch(seed, rewards=rewards, name=name)
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
    free = {"reference_free": True} if "ref_logps" in needs else {}
    loss, _ = LOSSES[name](logps, batch.lengths, **batch.inputs(ref_logps=None), **changes, **free)
    value, _ = expected(name, batch, use_ref=False, **options)
    assert loss.item() == pytest.approx(value, rel=1e-11, abs=1e-12)

    small = random_batch(11, prompts=4, n=4, rewards=rewards, name=name)
    logps = small.logps.masked_fill(~small.mask | (small.lengths == 0), -1.0).requires_grad_()
    if name in ("kto", "bco"):  # what they take from the batch is a constant of the gradient
        changes |= {"kl": torch.tensor(1.3)} if name == "kto" else {"delta": 0.2}
    scaled = lambda x: -2.7 * loss_of(x, small)[0]  # noqa: E731
    assert torch.autograd.gradcheck(scaled, (logps,), atol=1e-7, rtol=1e-5)


SFT = [
    {"sft_weight": 0.3, "sft_on": on, "sft_reduction": reduction}
    for on in ("best", "all")
    for reduction in ("mean", "sum", "tokens")
]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_an_sft_term_and_prompt_weights(name):
    batch = random_batch(8, name=name)
    weights = torch.tensor([0.5, 2.0, 7.0, 0.0, 1.5, 3.0])  # prompt 2 has no candidate
    own = [{"sft_weight": 0.3}] if name == "pro" else SFT  # PRO has sft_index for sft_on
    for options in (*own, {"sft_weight": 0.0}):
        loss, metrics = LOSSES[name](
            batch.logps, batch.lengths, **batch.inputs(), prompt_weights=weights, **options
        )
        value, sft = expected(name, batch, weights=weights, **options)
        assert loss.item() == pytest.approx(value, rel=1e-11)
        if options["sft_weight"]:
            assert metrics["sft_loss"].item() == pytest.approx(sft, rel=1e-6)
    none, _ = LOSSES[name](
        batch.logps, batch.lengths, **batch.inputs(), prompt_weights=0 * weights, sft_weight=1.0
    )
    assert none.item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_order_of_rewards_counts_where_gaps_are_not_used(name):
    batch = random_batch(3, name=name)
    losses = [
        LOSSES[name](batch.logps, batch.lengths, **batch.inputs(rewards=rewards))[0].item()
        for rewards in (batch.rewards / 100, torch.exp(batch.rewards / 30))
    ]
    assert (losses[0] == pytest.approx(losses[1], rel=1e-12)) is not LOSSES[name].uses_gaps()


def test_every_loss_has_an_oracle_and_a_name():
    assert set(LOSSES) == ORACLES.keys() | PAIRWISE.keys()
    assert all(get_loss(name) is loss for name, loss in LOSSES.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_scores_stay_finite_and_right(name, dtype):
    # mean log-probs down to -1e4, up to exactly 0, and with huge gaps in both directions
    means = [[-1e4, 0.0, -3.0], [0.0, -1e4, -1e-30], [-1e4, -1e4, -1e4], [0.0, 0.0, -1e-9]]
    lengths = torch.tensor([[1, 1, 2], [3, 1, 1], [1, 2, 3], [1, 1, 1]])
    ones = torch.ones(2, 3)
    gaps = torch.tensor([[2.0, 1.0, 0.0]] * 2) * (1 if "gain" in LOSSES[name].types else 1e3)
    both = torch.tensor([[1e4, -1e4, 5.0], [-1e4, 1e4, 0.0]], dtype=dtype)  # as no log-probs are
    for sign in (1, -1):
        scores = (sign * both).requires_grad_()
        loss, _ = LOSSES[name](scores, ones, rewards=gaps, ref_logps=0 * ones)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(scores.grad).all()
    logps = (torch.tensor(means, dtype=dtype) * lengths).requires_grad_()
    batch = random_batch(0, prompts=4, n=3, poison=False)
    batch.logps, batch.lengths = logps.detach(), lengths
    batch.mask = torch.ones(4, 3, dtype=torch.bool)
    batch.ref_logps = torch.full((4, 3), -2.0, dtype=dtype)
    batch.rewards = torch.tensor([[3.0, 2.0, 0.0]] * 4)
    loss, metrics = LOSSES[name](logps, lengths, **batch.inputs())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()
    assert all(torch.isfinite(value).all() for value in metrics.values())
    if name != "orpo":  # the oracle has infinite odds at probability 1
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        assert loss.item() == pytest.approx(expected(name, batch)[0], rel=tolerance)


@pytest.mark.parametrize(("name", "far"), [("lire", (0, 1e6)), ("neural_ndcg", (-1e7, 0))])
def test_what_all_candidates_share_does_not_round_the_gradient(name, far):
    logps, rewards = (torch.tensor([[1.0, 0.0, -1.0, 2.0]]) + x for x in far)
    of_dtype = []
    for dtype in (torch.float32, torch.float64):
        scores = logps.to(dtype).requires_grad_()
        loss, _ = LOSSES[name](scores, torch.ones(1, 4), rewards=rewards.abs().to(dtype))
        of_dtype.append(torch.autograd.grad(loss, scores)[0].double())
    torch.testing.assert_close(*of_dtype, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(name, dtype):
    batch = random_batch(5, name=name)
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
    one = Batch(logps, torch.tensor([[3]]), **kwargs, mask=torch.ones(1, 1))
    assert loss.item() == pytest.approx(expected(name, one)[0], abs=1e-6)
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


@pytest.mark.parametrize("rewards", ["distinct", "tied"])
@pytest.mark.parametrize(("name", "pairs"), [("simpo", "all"), ("dpo", "best"), ("pro", "all")])
def test_metrics_average_over_pairs_then_prompts(name, pairs, rewards):
    batch = random_batch(9, rewards=rewards)
    options = {"pairs": pairs} if name != "pro" else {"equal_rewards": "keep"}
    _, metrics = LOSSES[name](batch.logps, batch.lengths, **batch.inputs(), **options)
    implicit = {"simpo": lambda c: 2 * c.s, "dpo": lambda c: 0.1 * c.d, "pro": lambda c: c.s}[name]
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
    batch = random_batch(6, name=name)
    for field in ("logps", "rewards", "ref_logps"):
        setattr(batch, field, getattr(batch, field).float())
    torch._dynamo.reset()  # it gives all callable objects one frame, compiled for 8 of them
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="eager")
    for function in (LOSSES[name], compiled):
        loss, _ = function(batch.logps, batch.lengths, **batch.inputs())
        assert loss.item() == pytest.approx(expected(name, batch)[0], rel=2e-6)


def test_bco_keeps_a_running_mean():
    one, two = (random_batch(seed, poison=False) for seed in (1, 2))
    running, seen = torch.zeros(2, dtype=torch.float64), []
    for batch in (one, two):
        inputs = batch.logps, batch.lengths
        loss, _ = LOSSES["bco"](*inputs, **batch.inputs(), running=running)
        there = batch.mask & (batch.lengths > 0)
        seen.append((0.1 * (batch.logps - batch.ref_logps))[there])
        mean = torch.cat(seen).mean().item()
        assert (running[0] / running[1]).item() == pytest.approx(mean, rel=1e-12)
        assert loss.item() == pytest.approx(expected("bco", batch, delta=mean)[0], rel=1e-11)
    with torch.no_grad():  # an evaluation takes the mean as it is
        again, _ = LOSSES["bco"](*inputs, **batch.inputs(), running=running)
    assert again == loss


def test_log1mexp_is_accurate_at_both_ends():
    points = [-1e-15, -1e-6, -0.1, -0.6931, -0.6932, -2.0, -40.0, -80.0, -1e4]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    values = log1mexp(x)
    values.sum().backward()
    for point, value, slope in zip(points, values.tolist(), x.grad.tolist(), strict=True):
        p = exp(mpf(point))
        assert value == pytest.approx(float(log(1 - p)), rel=1e-13, abs=0)
        assert slope == pytest.approx(float(-p / (1 - p)), rel=1e-13, abs=0)
