"""LiPO-λ: pairwise logistic loss with LambdaLoss weights.

"LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv 2402.01878.
s_i = β (S_i − S_ref,i), ψ_i the rewards, rank_i the place of candidate i when sorted by s:

    L = Σ over pairs (ψ_i > ψ_j) of |G_i − G_j| · |1/D_i − 1/D_j| · log(1 + exp(s_j − s_i))
    G_i = 2^ψ_i − 1,   D_i = log(1 + rank_i)

The weights are constants of the gradient. The paper's ψ lie in [0, 1]. Without rewards ψ falls
evenly from 1 (best) to 0 (worst); without reference log-probs S_ref is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._common import (
    Ranked,
    check_choice,
    check_number,
    differences,
    preference_metrics,
    rank_candidates,
    readable,
)

MAX_EXPONENT = 64  # 2^ψ and its products stay finite in fp32


def lipo_lambda(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,  # (B, n)
    mask: Tensor | None = None,  # (B, n)
    beta: float = 0.05,
    gain: str = "exp2",
) -> tuple[Tensor, dict[str, Tensor]]:
    """LiPO-λ; gain="linear" takes G = ψ, for rewards too large for 2^ψ."""
    check_number("beta", beta, above=0)
    check_choice("gain", gain, ("exp2", "linear"))
    ranked = rank_candidates(
        logps, lengths, rewards=rewards, ref_logps=ref_logps, mask=mask, loss="lipo_lambda"
    )
    implicit = beta * ranked.log_ratios()
    gains = differences(_gains(ranked, gain)).abs().to(implicit.dtype)
    discounts = differences(1 / torch.log1p(_ranks(implicit.detach(), ranked.valid))).abs()
    losses = gains * discounts * softplus(-differences(implicit))
    loss = ranked.mean(torch.where(ranked.better(), losses, 0.0).sum((1, 2)))
    return loss, preference_metrics(ranked, implicit)


def _gains(ranked: Ranked, gain: str) -> Tensor:  # (B, n)
    if ranked.rewards is None:
        scores = ranked.logps
        places = torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype)
        labels = 1 - places / (ranked.counts - 1).clamp(min=1)[:, None]
        labels = torch.where(ranked.valid, labels, 0.0)
    else:
        labels = ranked.rewards
    if gain == "linear":
        return labels
    if readable(labels) and (labels > MAX_EXPONENT).any():
        raise ValueError(
            f'rewards must be <= {MAX_EXPONENT} with gain="exp2", got {labels.max().item()}: '
            'scale them to [0, 1] or pass gain="linear"'
        )
    return torch.exp2(labels.double().clamp(max=MAX_EXPONENT)) - 1


def _ranks(scores: Tensor, valid: Tensor) -> Tensor:  # (B, n) from 1
    order = scores.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) + 1).to(scores.dtype)
