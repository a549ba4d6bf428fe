"""What only the PRO loss has."""

from __future__ import annotations

import math

import pytest
import torch
from loss_oracles import expected, random_batch

from pro_kernels import reference
from pro_kernels.losses import LOSSES

pro = LOSSES["pro"]


def test_hand_computed():
    # s = (-1, -2), r = (1, 0): τ = 1 twice; (n-1)² = 1
    loss, metrics = pro(
        torch.tensor([[-2.0, -6.0]]), torch.tensor([[2, 3]]), rewards=torch.tensor([[1.0, 0.0]])
    )
    rank = math.log(math.exp(-1) + math.exp(-2)) + 1
    assert metrics["rank_losses"].tolist() == pytest.approx([rank])
    assert metrics["sft_loss"].item() == pytest.approx(0.05 * 1)
    assert loss.item() == pytest.approx(rank + 0.05)


@pytest.mark.parametrize("ties", ["zero", "skip"])
def test_ties_by_hand(ties):
    # r = (1, 1, 0), s = (-1, -2, -3); term 1 meets one tied candidate
    rewards = torch.tensor([[1.0, 1.0, 0.0]])
    logps = torch.tensor([[-1.0, -2.0, -3.0]])
    _, metrics = pro(logps, torch.ones(1, 3), rewards=rewards, ties=ties)
    tied = 1.0 if ties == "zero" else 0.0
    first = math.log(math.exp(-1) + tied + math.exp(-3)) + 1
    second = math.log(math.exp(-2) + math.exp(-3)) + 2
    assert metrics["rank_losses"].tolist() == pytest.approx([first, second])


@pytest.mark.parametrize("temperature", ["reward", 0.5])
@pytest.mark.parametrize("ties", ["zero", "skip"])
def test_ties_are_those_of_the_reference(ties, temperature):
    """With a number as temperature rewards only order, and nothing is skipped."""
    logits = torch.randn(2, 4, 3, 9, dtype=torch.float64)
    targets, rewards = torch.randint(0, 9, (2, 4, 3)), torch.tensor([[1.0, 3, 3, 0], [2, 2, 2, 1]])
    how = {"ties": ties, "temperature": temperature}
    out = reference.pro_loss(logits, targets, rewards, **how)
    loss, _ = pro(out.logps, out.lengths, rewards=rewards, **how)
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-12)
    if temperature != "reward":
        assert loss == pro(out.logps, out.lengths, rewards=rewards, temperature=temperature)[0]


@pytest.mark.parametrize("rewards", ["distinct", "tied"])
def test_gradient_is_the_closed_form(rewards):
    batch = random_batch(21, prompts=3, n=5, rewards=rewards, poison=False)
    batch.mask[:], batch.lengths = True, batch.lengths.clamp(min=1)
    batch.rewards = batch.rewards.sort(1, descending=True).values
    logps = batch.logps.clone().requires_grad_()
    pro(logps, batch.lengths, rewards=batch.rewards)[0].backward()
    s = (batch.logps / batch.lengths).tolist()
    r, m, n = batch.rewards.tolist(), batch.lengths.tolist(), 5
    for b in range(3):
        for j in range(n):
            g = 0.0
            for k in range(min(j + 1, n - 1)):
                own = r[b][k] - r[b][n - 1]
                tau = {i: (own if i == k else r[b][k] - r[b][i]) for i in range(k, n)}
                weights = {i: math.exp(s[b][i] * t) for i, t in tau.items()}
                p = weights[j] / sum(weights.values())
                g += -tau[j] * (1 - p) if j == k else tau[j] * p
            g = (g - (0.05 * (n - 1) ** 2 if j == 0 else 0)) / m[b][j] / 3
            assert logps.grad[b, j].item() == pytest.approx(g, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sft_index_is_an_original_column(reduction):
    batch = random_batch(13)
    sft_index = torch.tensor([4, 3, 0, 1, 5, 2])  # some of them absent: no SFT term there
    loss, metrics = pro(
        batch.logps, batch.lengths, **batch.inputs(), sft_index=sft_index, sft_reduction=reduction
    )
    value, sft = expected("pro", batch, sft_index=sft_index, sft_reduction=reduction)
    default, default_sft = expected("pro", batch, sft_reduction=reduction)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert metrics["sft_loss"].item() == pytest.approx(sft, rel=1e-6)
    assert abs(sft - default_sft) > 1e-3


def test_prompt_weights():
    batch = random_batch(14)
    weights = torch.tensor([0.5, 2.0, 7.0, 0.0, 1.5, 3.0])  # prompt 2 has no candidate
    loss, _ = pro(batch.logps, batch.lengths, **batch.inputs(), prompt_weights=weights)
    assert loss.item() == pytest.approx(expected("pro", batch, weights=weights)[0], rel=1e-12)
    none, _ = pro(batch.logps, batch.lengths, **batch.inputs(), prompt_weights=0 * weights)
    assert none.item() == 0


@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
def test_metrics_sum_to_the_loss(top_k):
    batch = random_batch(15)
    weights = torch.rand(6, dtype=torch.float64)
    loss, metrics = pro(
        batch.logps, batch.lengths, **batch.inputs(), top_k=top_k, prompt_weights=weights
    )
    assert metrics["rank_losses"].shape == (5,)
    assert (metrics["rank_losses"][:top_k] > 0).any()
    assert top_k is None or (metrics["rank_losses"][top_k:] == 0).all()
    total = metrics["rank_losses"].sum() + metrics["sft_loss"]
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)


def test_without_rewards_it_is_plackett_luce():
    batch = random_batch(16, rewards=None)
    loss, _ = pro(batch.logps, batch.lengths, mask=batch.mask, sft_weight=0.0)
    other, _ = LOSSES["plackett_luce"](batch.logps, batch.lengths, mask=batch.mask)
    assert loss.item() == pytest.approx(other.item(), rel=1e-12)


def test_equal_rewards_name_the_rows():
    logps = -torch.arange(1.0, 13.0).reshape(4, 3).requires_grad_()
    lengths = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    rewards = torch.tensor([[1.0, 0.0, 0.0], [2.0, 2.0, 5.0], [1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    with pytest.raises(ValueError, match=r"rewards are all equal in prompts \[1, 3\]"):
        pro(logps, lengths, rewards=rewards)
    pro(logps, lengths, rewards=rewards, temperature=1.0)
    kept, metrics = pro(logps, lengths, rewards=rewards, equal_rewards="keep")
    (grad,) = torch.autograd.grad(kept, logps)
    assert (grad[3, 1:] == 0).all() and grad[3, 0] == pytest.approx(-0.05 * 4 / 4)
    assert torch.isfinite(kept)


def test_eps_saturates_low_scores_as_the_official_code_does():
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    logps = torch.tensor([[-30.0, -30.0]], dtype=torch.float64)
    plain, _ = pro(logps, torch.ones(1, 2), rewards=rewards, sft_weight=0.0)
    official, _ = pro(logps, torch.ones(1, 2), rewards=rewards, sft_weight=0.0, eps=1e-10)
    assert plain.item() == pytest.approx(math.log(2))
    assert official.item() == pytest.approx(math.log(2 * math.exp(-30) + 1e-10) + 30)


BAD_OPTIONS = [
    ({"sft_weight": -1.0}, ValueError, "sft_weight must be >= 0, got -1.0"),
    (
        {"sft_reduction": "tokens"},
        ValueError,
        "sft_reduction must be one of ['sum', 'mean'], got 'tokens'",
    ),
    ({"length_normalize": 1}, TypeError, "length_normalize must be a bool, got 1"),
    ({"length_normalize": "no"}, TypeError, "length_normalize must be a bool, got 'no'"),
    ({"temperature": "r"}, ValueError, "temperature must be a number or one of ['reward'], got"),
    ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
    ({"temperature": None}, TypeError, "temperature must be a number, got None"),
    ({"ties": "drop"}, ValueError, "ties must be one of ['zero', 'skip'], got 'drop'"),
    ({"eps": math.nan}, ValueError, "eps must be 0 or of a size in [1e-30, 1e+30], got nan"),
    ({"top_k": 0}, ValueError, "top_k must be None or an integer >= 1, got 0"),
    ({"top_k": 1.0}, TypeError, "top_k must be None or an integer >= 1, got 1.0"),
    ({"reward_scale": 0}, ValueError, "reward_scale must be > 0, got 0"),
    ({"reward_scale": 1e39}, ValueError, "reward_scale must be of a size in [1e-30, 1e+30]"),
    (
        {"rewards": torch.tensor([[0.0, 1, 2], [3e38, -3e38, 0]])},
        ValueError,
        "rewards of prompt 1 are too far apart",
    ),
    ({"equal_rewards": "x"}, ValueError, "equal_rewards must be one of ['error', 'keep'], got 'x'"),
    ({"sft_index": [0, 0]}, TypeError, "sft_index must be an integer tensor, got list"),
    (
        {"sft_index": torch.zeros(3).long()},
        ValueError,
        "sft_index must have shape (B,) = (2,), got (3,)",
    ),
    ({"sft_index": torch.zeros(2)}, TypeError, "sft_index must be an integer tensor, got dtype"),
    ({"sft_index": torch.tensor([0, 3])}, ValueError, "sft_index must lie in [0, 3), got [0, 3]"),
    ({"sft_index": torch.tensor([0, -1])}, ValueError, "sft_index must lie in [0, 3), got [0, -1]"),
    (
        {"prompt_weights": torch.tensor([1.0, -1.0])},
        ValueError,
        "prompt_weights must be finite and >= 0, got [1.0, -1.0]",
    ),
    ({"prompt_weights": torch.tensor([1e39, 1], dtype=torch.double)}, ValueError, "add up to"),
    ({"prompt_weights": torch.tensor([1e-39, 0], dtype=torch.double)}, ValueError, "add up to"),
    (
        {"prompt_weights": torch.ones(2, 1)},
        ValueError,
        "prompt_weights must have shape (B,) = (2,), got (2, 1)",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options(options, error, message):
    with pytest.raises(error) as caught:
        pro(-torch.ones(2, 3), torch.ones(2, 3), **options)
    assert message in str(caught.value)
