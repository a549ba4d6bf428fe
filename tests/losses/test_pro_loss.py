"""What only the PRO loss has."""

from __future__ import annotations

import math

import pytest
import torch
from loss_oracles import expected, random_batch

from pro_kernels import reference
from pro_kernels.losses import LOSSES

pro = LOSSES["pro"]


e = math.exp


@pytest.mark.parametrize(
    ("logps", "lengths", "rewards", "options", "terms"),
    [
        # τ = 1 twice
        ([-2.0, -6.0], [2, 3], [1.0, 0.0], {}, [math.log(e(-1) + e(-2)) + 1]),
        *(  # term 1 meets one tied candidate
            (
                [-1.0, -2.0, -3.0],
                [1, 1, 1],
                [1.0, 1.0, 0.0],
                {"ties": ties},
                [math.log(e(-1) + tied + e(-3)) + 1, math.log(e(-2) + e(-3)) + 2],
            )
            for ties, tied in (("zero", 1.0), ("skip", 0.0))
        ),
        # eps saturates low scores, as in the official code
        ([-30.0, -30.0], [1, 1], [1.0, 0.0], {}, [math.log(2)]),
        ([-30.0, -30.0], [1, 1], [1.0, 0.0], {"eps": 1e-10}, [math.log(2 * e(-30) + 1e-10) + 30]),
    ],
)
def test_by_hand(logps, lengths, rewards, options, terms):
    loss, metrics = pro(
        torch.tensor([logps]), torch.tensor([lengths]), rewards=torch.tensor([rewards]), **options
    )
    sft = 0.05 * (len(logps) - 1) ** 2 * -logps[0] / lengths[0]
    assert metrics["rank_losses"].tolist() == pytest.approx(terms)
    assert metrics["sft_loss"].item() == pytest.approx(sft)
    assert loss.item() == pytest.approx(sum(terms) + sft)


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
