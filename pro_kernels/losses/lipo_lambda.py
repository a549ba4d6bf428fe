"""LiPO-λ: pairwise logistic loss with LambdaLoss weights.

"LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv 2402.01878.
s_i = β (S_i − S_ref,i), ψ_i the rewards, rank_i the place of candidate i when sorted by s:

    L = Σ over pairs (ψ_i > ψ_j) of |G_i − G_j| · |1/D_i − 1/D_j| · log(1 + exp(s_j − s_i))
    G_i = 2^ψ_i − 1,   D_i = log(1 + rank_i)

The weights are constants of the gradient. The paper's ψ lie in [0, 1]. Without rewards ψ falls
evenly from 1 (best) to 0 (worst).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pro_kernels.option_types import Beta, Gain

from .gains import by_gaps, gains, too_large
from .ranked import Ranked, Result, differences, pair_sum
from .registry import register


@register(needs=["ref_logps"], uses_gaps=by_gaps, reward_fault=too_large)
def lipo_lambda(ranked: Ranked, *, beta: Beta = 0.05, gain: Gain = "exp2") -> Result:
    """LiPO-λ; gain="linear" takes G = ψ, for rewards too large for 2^ψ."""
    implicit = beta * ranked.log_ratios()
    gaps = differences(gains(ranked, gain)).abs().to(implicit.dtype)
    discounts = differences(1 / torch.log1p(_ranks(implicit.detach(), ranked.valid))).abs()
    losses = gaps * discounts * softplus(-differences(implicit))
    return ranked.result(pair_sum(losses, ranked.better()), implicit)


def _ranks(scores: Tensor, valid: Tensor) -> Tensor:  # (B, n) from 1
    order = scores.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) + 1).to(scores.dtype)
