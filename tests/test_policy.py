"""Policy losses against loops over the published formulas in fp64; in TRL: test_integrations.py."""

from __future__ import annotations

import pytest
import torch

import pro_kernels as pk
from pro_kernels.policy import PolicyOptions
from test_no_sync import Gpu

B, T, NAN = 5, 7, float("nan")


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    """Ragged completions: whole, of one token, with a gap, empty, short; NaN where none counts."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor([T, 1, 6, 0, 3])[:, None]
    mask[2, 2:4] = False

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    given = {"logps": values(B, T) - 2, "advantages": values(B)}
    given |= {"old_logps": given["logps"] + 0.4 * values(B, T), "ref_logps": values(B, T) - 2}
    given |= {"entropies": values(B, T).abs()}
    advantages = given.pop("advantages").to(dtype)
    given = {name: torch.where(mask, x, NAN).to(dtype) for name, x in given.items()}
    return given | {"mask": mask, "advantages": advantages}


def loss_of(given: dict, **options) -> tuple[torch.Tensor, dict]:
    return pk.policy_loss(**given | options)


def by_hand(given: dict, **options):
    """Loss and metrics, a token at a time."""
    how = PolicyOptions(**options)
    high = how.epsilon if how.epsilon_high is None else how.epsilon_high
    where = [[t for t in range(T) if given["mask"][b, t]] for b in range(B)]
    tokens = sum(map(len, where))
    seen = sorted(given["entropies"][b, t].item() for b in range(B) for t in where[b])
    place = (1 - how.top_entropy_quantile) * (len(seen) - 1)
    below = seen[int(place)]
    threshold = below + (place - int(place)) * (seen[min(int(place) + 1, len(seen) - 1)] - below)
    rows, kls, chosen, clipped = [], [], [], {"low": [], "high": []}
    for b in range(B):
        gaps = {t: given["logps"][b, t] - given["old_logps"][b, t] for t in where[b]}
        if how.importance_sampling_level == "sequence":
            gaps = dict.fromkeys(gaps, sum(gaps.values()) / max(len(gaps), 1))
        rows.append(torch.zeros((), dtype=torch.float64))
        for t, gap in gaps.items():
            logp, w = given["logps"][b, t], gap.exp()
            a = given["advantages"].view(B, -1).expand(B, T)[b, t]
            free = w if how.delta is None or w < how.delta else w.new_tensor(how.delta)
            if how.loss_type == "cispo":
                term = -min(w.item(), high) * a * logp
            elif how.loss_type == "sapo":
                tau = how.sapo_temperature_pos if a > 0 else how.sapo_temperature_neg
                term = -4 / tau / (1 + (-tau * (w - 1)).exp()) * a
            else:
                inside = w.new_tensor(min(max(w.item(), 1 - how.epsilon), 1 + high))
                inside = w if inside == w else inside
                larger, smaller = (free, inside) if free > inside else (inside, free)
                term = -a * (smaller if a >= 0 else larger)
            clipped["low"].append(bool(free < 1 - how.epsilon and a < 0))
            clipped["high"].append(bool(free > 1 + high and a > 0))
            if how.top_entropy_quantile == 1 or given["entropies"][b, t] >= threshold:
                chosen.append(given["entropies"][b, t])
            else:
                term = 0 * term
            apart = given["ref_logps"][b, t] - logp
            kls.append((apart.exp() - apart - 1) * (w if how.use_bias_correction_kl else 1))
            rows[b] = rows[b] + term + how.beta * kls[-1]
    loss = {
        "grpo": sum(row / max(len(w), 1) for row, w in zip(rows, where, strict=True)) / B,
        "dr_grpo": sum(rows) / (B * (how.max_completion_length or 1)),
        "luspo": sum(rows) / B,
        "bnpo": sum(rows) / tokens,
    }
    loss["sapo"], loss["dapo"] = loss["grpo"], sum(rows) / (given["num_items_in_batch"] or tokens)
    value = loss.get(how.loss_type, loss["dapo"]) - how.entropy_coef * sum(chosen) / len(chosen)
    means = {"kl": sum(kls), "entropy": sum(seen)}
    means |= {f"clip_ratio/{name}_mean": sum(found) for name, found in clipped.items()}
    return value, {name: torch.as_tensor(x).item() / tokens for name, x in means.items()}


TYPES = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {"max_completion_length": 9},
    "dapo": {},
    "cispo": {"epsilon_high": 1.1},
    "sapo": {"sapo_temperature_neg": 1.7},
    "luspo": {},
}
OPTIONS = [
    {},
    {"beta": 0.3, "epsilon": 0.1},
    {"beta": 0.3, "use_bias_correction_kl": True, "delta": 1.3},
    {"epsilon_high": 0.28, "beta": 0.1, "top_entropy_quantile": 0.5, "entropy_coef": 0.7},
]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("loss_type", TYPES)
def test_values_and_gradients_are_those_of_the_published_formulas(loss_type, options, level):
    options = {"loss_type": loss_type, **options, **TYPES[loss_type]}
    options["importance_sampling_level"] = level
    for seed, items in ((0, None), (1, 31.0), (2, None)):
        given = batch(seed) | {"num_items_in_batch": items}
        if seed == 2:  # an advantage for each token
            given["advantages"] = torch.where(given["mask"], given["old_logps"] + 2, NAN)
        found = []
        for function in (loss_of, by_hand):
            leaves = {x: given[x].clone().requires_grad_() for x in ("logps", "entropies")}
            loss, metrics = function(given | leaves, **options)
            assert loss.dtype == torch.float64 and loss.shape == ()
            loss.backward()
            zero = torch.zeros(B, T).double()
            grads = [zero if x.grad is None else x.grad for x in leaves.values()]
            found.append((loss, grads, metrics))
        (ours, grads, metrics), (theirs, expected, means) = found
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-14)
        assert (grads[0][~given["mask"]] == 0).all() and (grads[0] != 0).any()
        for name in metrics.keys() & means.keys():
            if level == "token" or "clip" not in name:  # of completions at the other level
                assert metrics[name].item() == pytest.approx(means[name], rel=1e-5), name


@pytest.mark.parametrize("loss_type", TYPES)
def test_what_does_not_count_changes_nothing(loss_type):
    """Rows without a token count in means over rows; without any token the loss is 0."""
    given, options = batch(4), {"loss_type": loss_type, "beta": 0.2, **TYPES[loss_type]}
    want = loss_of(given, **options)[0]
    given["advantages"][3] = NAN
    assert loss_of(given, **options)[0] == want
    if loss_type in ("bnpo", "dapo", "cispo"):
        less = {name: x[[0, 1, 2, 4]] for name, x in given.items()}
        torch.testing.assert_close(loss_of(less, **options)[0], want)
    given |= {"mask": torch.zeros(B, T, dtype=torch.bool), "logps": given["logps"].requires_grad_()}
    more = {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "num_items_in_batch": 0}
    loss, metrics = loss_of(given, **options, **more)
    loss.backward()
    assert loss == 0 and (given["logps"].grad == 0).all()
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("options", [{}, {"delta": 5.0}, {"loss_type": "sapo"}], ids=str)
@pytest.mark.parametrize("a", [0.7, 0.0])
def test_a_ratio_that_overflows_has_the_gradient_of_one_that_is_clipped(a, options):
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old, mask = torch.tensor([[-300.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = pk.policy_loss(logps, old, torch.tensor([a]), mask, **options)
    loss.backward()
    assert loss.isfinite()
    assert logps.grad[0, 0] == 0 and logps.grad[0, 1] == pytest.approx(-a / 2)


def test_without_old_log_probs_the_gradient_is_that_of_reinforce():
    given = batch(5)
    given |= {"old_logps": None, "logps": given["logps"].requires_grad_()}
    loss_of(given)[0].backward()
    want = -given["advantages"][:, None] * given["mask"] / given["mask"].sum()
    torch.testing.assert_close(given["logps"].grad, want)


def test_a_factor_of_the_sampler_acts_on_all_but_the_kl_term():
    given, options = batch(6), {"beta": 0.3, "loss_type": "grpo"}
    policy = loss_of(given, loss_type="grpo")[0]
    kl = loss_of(given, **options)[0] - policy
    for shape in ((B, 1), (B, T)):
        factor = torch.full(shape, 3.0)
        if shape == (B, T):
            factor[~given["mask"]] = NAN
        given["logps"].requires_grad_().grad = None
        loss, _ = loss_of(given, importance_sampling_ratio=factor, **options)
        torch.testing.assert_close(loss, 3 * policy + kl)
        loss.backward()
        assert given["logps"].grad.isfinite().all()


@pytest.mark.skipif(torch.__version__ < "2.12", reason="nanquantile of torch 2.10 waits")
def test_low_precision_is_computed_in_fp32_and_a_gpu_is_not_waited_for():
    given = batch(7, torch.bfloat16)
    options = {"beta": 0.1, "top_entropy_quantile": 0.3, "entropy_coef": 0.1}
    wide = {k: x if x.dtype == torch.bool else x.float() for k, x in given.items()}
    want = loss_of(wide, num_items_in_batch=torch.tensor(9), **options)
    with Gpu():
        found = loss_of(given, num_items_in_batch=torch.tensor(9), **options)
        pk.group_advantages(torch.randn(2, 3))
    assert found[0].dtype == torch.float32 and found[0] == want[0] and found[1] == want[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": [1.0]}, "logps must be a tensor, got list"),
        ({"logps": torch.zeros(3)}, r"logps must have shape \(B, T\) with B, T >= 1, got \(3,\)"),
        ({"mask": torch.ones(B, T)}, "mask must be a bool tensor, got torch.float32"),
        ({"mask": torch.ones(B) > 0}, r"mask must have shape \(5, 7\), got \(5,\)"),
        ({"advantages": torch.ones(T)}, r"advantages must have shape .* or \(5,\), got \(7,\)"),
        ({"advantages": torch.full((B,), NAN)}, "advantages must be finite .* for completion 0"),
        ({"old_logps": torch.zeros(B, 1)}, r"old_logps must have shape \(5, 7\), got \(5, 1\)"),
        ({"ref_logps": torch.zeros(B, T).long()}, "ref_logps must be float64"),
        ({"entropies": torch.zeros(B, T, device="meta")}, "entropies must be on the device of"),
        ({"importance_sampling_ratio": torch.ones(B)}, r"have shape \(5, 7\) or \(5, 1\), got"),
        ({"num_items_in_batch": torch.ones(B)}, "num_items_in_batch must have shape"),
        ({"num_items_in_batch": -1}, "num_items_in_batch must be >= 0, got -1"),
        ({"loss_type": "ppo"}, "loss_type must be one of .*'grpo'.*, got 'ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of"),
        ({"epsilon": -0.1}, "epsilon must be >= 0, got -0.1"),
        ({"delta": 0.0}, "delta must be > 0"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile must be <= 1"),
        ({"clip": 0.2}, r"policy_loss\(\) got options \['clip'\]"),
        ({"beta": 0.1, "ref_logps": None}, "beta=0.1 needs ref_logps, got None"),
        ({"entropy_coef": 0.1, "entropies": None}, "entropy_coef=0.1 needs entropies"),
        ({"top_entropy_quantile": 0.2, "entropies": None}, "top_entropy_quantile=0.2 needs"),
        ({"loss_type": "dr_grpo"}, "loss_type='dr_grpo' needs max_completion_length, got None"),
        ({"loss_type": "cispo"}, "loss_type='cispo' needs epsilon_high, got None"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        loss_of(batch() | change)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
def test_group_advantages(scale, dtype):
    rewards = torch.tensor([[3, 1, 2, 8], [5, 5, 5, 5], [0, 7, 1, -2]]).to(dtype)
    if dtype != torch.int64:
        rewards[0, 3] = NAN
        rewards[2, 1:] = NAN
    found = pk.group_advantages(rewards, scale)
    everything = [x for row in rewards.tolist() for x in row if x == x]

    def deviation(values: list) -> float:
        mean = sum(values) / len(values)
        return (sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)) ** 0.5

    for row, got in zip(rewards.tolist(), found.tolist(), strict=True):
        own = [x for x in row if x == x]
        by = {"group": deviation(own), "batch": deviation(everything), "none": 1 - 1e-4}[scale]
        want = [(x - sum(own) / len(own)) / (by + 1e-4) if x == x else 0.0 for x in row]
        assert got == pytest.approx(want, rel=1e-6)
    assert found.dtype == (dtype if dtype.is_floating_point else torch.float32)


@pytest.mark.parametrize(
    ("rewards", "scale", "message"),
    [
        (torch.zeros(3), "group", r"rewards must have shape \(B, n\), got \(3,\)"),
        (torch.tensor([[1.0, torch.inf]]), "group", "rewards must be finite, got inf"),
        (torch.zeros(1, 2), "std", "scale_rewards must be one of"),
    ],
)
def test_rewards_that_cannot_be(rewards, scale, message):
    with pytest.raises(ValueError, match=message):
        pk.group_advantages(rewards, scale)
