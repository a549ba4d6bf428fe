"""DPO with ties, by the Rao–Kupper model.

"On Extending Direct Preference Optimization to Accommodate Ties", arXiv 2409.17431.
Δ = β (d_i − d_j), d_i = S_i − S_ref,i:

    L = mean over pairs of  −log σ(Δ − α)                                            i better
                            −log[ (e^{2α} − 1) / ((1 + e^{α+Δ}) (1 + e^{α−Δ})) ]     i, j tied

Candidates of equal reward are tied. Without rewards there are no ties.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch.nn.functional import softplus

from pro_kernels.option_types import Beta, Limits, Pairs
from pro_kernels.ranking import later_pairs

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def dpo_ties(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[
        float, Limits(above=0), "How readily candidates tie (log 3 in the paper)."
    ] = 1.0986122886681098,
    pairs: Pairs = "all",
) -> Result:
    """DPO with ties over all pairs, or the best with the rest with pairs="best"."""
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    wins = ranked.better(pairs)
    taken = later_pairs(ranked.valid)
    if pairs == "best":
        taken = taken & ranked.first[:, None]
    # Both factors times e^(-2 alpha), which is infinite for no alpha.
    tie = softplus(-alpha - margins) + softplus(margins - alpha) - math.log(-math.expm1(-2 * alpha))
    losses = pair_mean(torch.where(wins, softplus(alpha - margins), tie), taken)
    return ranked.result(losses, implicit, wins)
