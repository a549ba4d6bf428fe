"""SWEPO: weighted contrast of the candidates above the mean reward with all of them.

"SWEPO: Simultaneous Weighted Preference Optimization for Group Contrastive Alignment",
arXiv 2412.04628. h_i = β (S_i − S_ref,i), Δ_i = r_i − mean reward of the prompt:

    L = −log [ Σ_{Δ_i > 0} w_i exp(h_i) / Σ_i w_i exp(h_i) ],   w_i = exp(α |Δ_i|)

A prompt of equal rewards has loss 0.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch

from pro_kernels.option_types import Beta, Limits

from .ranked import Ranked, Result
from .registry import register


@register(needs=["ref_logps", "rewards"], uses_gaps=True)
def swepo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[float, Limits(at_least=0), "Weight of the deviation from the mean."] = 1.0,
) -> Result:
    """SWEPO with weights exp(alpha |deviation from the mean reward|)."""
    implicit, gaps = beta * ranked.log_ratios(), ranked.gaps()
    mean = gaps.sum(1, keepdim=True) / ranked.counts.clamp(min=1)[:, None]
    deviation = torch.where(ranked.valid, gaps - mean, 0.0)
    log_shares = ranked.log_softmax(implicit + alpha * deviation.abs())
    above = ranked.valid & (gaps > gaps.amin(1, keepdim=True)) & (deviation > 0)
    found = above.any(1, keepdim=True)
    chosen = log_shares.masked_fill(found & ~above, -math.inf).logsumexp(1)
    return ranked.result(torch.where(found[:, 0], -chosen, 0.0), implicit)
