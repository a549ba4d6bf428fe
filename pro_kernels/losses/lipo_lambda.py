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
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pro_kernels.option_types import Beta
from pro_kernels.validate import readable

from .ranked import Ranked, Result, differences, pair_sum
from .registry import register

MAX_EXPONENT = 64  # 2^ψ and its products stay finite in fp32


def _too_large(rewards: Sequence[float], *, gain: str, **_: Any) -> str | None:
    if gain == "linear" or max(rewards) <= MAX_EXPONENT:
        return None
    return (
        f"too large for the gain 2^reward of lipo_lambda, which takes {MAX_EXPONENT} at most: "
        "scale them to [0, 1], or give gain='linear'"
    )


@register(uses_gaps=True, reward_fault=_too_large)
def lipo_lambda(
    ranked: Ranked,
    *,
    beta: Beta = 0.05,
    gain: Annotated[Literal["exp2", "linear"], "Gain of a reward r: 2^r - 1, or r."] = "exp2",
) -> Result:
    """LiPO-λ; gain="linear" takes G = ψ, for rewards too large for 2^ψ."""
    implicit = beta * ranked.log_ratios()
    gains = differences(_gains(ranked, gain)).abs().to(implicit.dtype)
    discounts = differences(1 / torch.log1p(_ranks(implicit.detach(), ranked.valid))).abs()
    losses = gains * discounts * softplus(-differences(implicit))
    return ranked.result(pair_sum(losses, ranked.better()), implicit)


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
    if readable(labels) and labels.numel():
        if fault := _too_large([labels.max().item()], gain=gain):
            raise ValueError(f"rewards up to {labels.max().item():g} are {fault}")
    return torch.exp2(labels.double().clamp(max=MAX_EXPONENT)) - 1


def _ranks(scores: Tensor, valid: Tensor) -> Tensor:  # (B, n) from 1
    order = scores.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) + 1).to(scores.dtype)
