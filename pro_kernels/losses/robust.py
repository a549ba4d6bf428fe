"""Robust DPO: an estimate of DPO's loss that label noise does not bias.

"Provably Robust DPO: Aligning Language Models with Noisy Feedback", arXiv 2403.00409.
Δ = β (d_i − d_j), d_i = S_i − S_ref,i, ε the share of labels that are wrong:

    L = mean over pairs (i better than j) of ( −(1−ε) log σ(Δ) + ε log σ(−Δ) ) / (1 − 2ε)

Pairs of equal reward are left out.
"""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, Limits, Pairs

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def robust(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float, Limits(at_least=0, at_most=0.49), "Share of labels taken to be wrong."
    ] = 0.1,
    pairs: Pairs = "all",
) -> Result:
    """Robust DPO over all pairs, or the best with the rest with pairs="best"."""
    implicit, e = beta * ranked.log_ratios(), label_smoothing
    margins = differences(implicit)
    losses = (e * logsigmoid(-margins) - (1 - e) * logsigmoid(margins)) / (1 - 2 * e)
    selected = ranked.better(pairs)
    return ranked.result(pair_mean(losses, selected), implicit, selected)
