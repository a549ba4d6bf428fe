"""What only the PRO loss has."""

from __future__ import annotations

import pytest
import torch

from loss_oracles import expected, random_batch
from pro_kernels import reference
from pro_kernels.losses import LOSSES

pro = LOSSES["pro"]


@pytest.mark.parametrize("temperature", ["reward", 0.5])
@pytest.mark.parametrize("ties", ["zero", "skip"])
def test_it_is_the_references(ties, temperature):
    """With a number as temperature rewards only order, and no tie is skipped."""
    logits = torch.randn(2, 4, 3, 9, dtype=torch.float64)
    targets, rewards = torch.randint(0, 9, (2, 4, 3)), torch.tensor([[1.0, 3, 3, 0], [2, 2, 2, 1]])
    how = {"ties": ties, "temperature": temperature}
    out = reference.pro_loss(logits, targets, rewards, **how)
    loss, _ = pro(out.logps, out.lengths, rewards=rewards, **how)
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-12)
    if temperature != "reward":
        assert loss == pro(out.logps, out.lengths, rewards=rewards, temperature=temperature)[0]


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
