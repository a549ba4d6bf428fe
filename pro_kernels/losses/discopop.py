"""DiscoPOP: the log-ratio modulated loss, found by a language model.

"Discovering Preference Optimization Algorithms with and for Large Language Models",
arXiv 2406.08414, equation 5. Δ = β (d_i − d_j), d_i = S_i − S_ref,i, m = σ(Δ/τ):

    L = mean over pairs (i better than j) of −(1−m) log σ(Δ) + m exp(−Δ)

Pairs of equal reward are left out.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, Limits, Pairs

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def discopop(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    tau: Annotated[float, Limits(above=0, at_most=1), "Temperature of the modulation."] = 0.05,
    pairs: Pairs = "all",
) -> Result:
    """DiscoPOP over all pairs, or the best with the rest with pairs="best"."""
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    # As one exponent: for a very negative margin, exp(-margin) alone is infinite.
    exponential = torch.exp(logsigmoid(margins / tau) - margins)
    losses = exponential - torch.sigmoid(-margins / tau) * logsigmoid(margins)
    selected = ranked.better(pairs)
    return ranked.result(pair_mean(losses, selected), implicit, selected)
