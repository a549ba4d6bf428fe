"""SPPO with hard labels: self-play preference optimization.

"Self-Play Preference Optimization for Language Model Alignment", arXiv 2405.00675, equation 4.7
with win probabilities 1 and 0. d_i = S_i − S_ref,i (β is 1/η of the paper):

    L = mean over pairs (i better than j) of (d_i − 1/(2β))² + (d_j + 1/(2β))²

Pairs of equal reward are left out.
"""

from __future__ import annotations

from pro_kernels.option_types import Beta, Pairs

from .ranked import Ranked, Result, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def sppo_hard(ranked: Ranked, *, beta: Beta = 0.1, pairs: Pairs = "all") -> Result:
    """SPPO over all pairs, or the best with the rest with pairs="best"."""
    ratios, target = ranked.log_ratios(), 1 / (2 * beta)
    losses = (ratios - target).square()[:, :, None] + (ratios + target).square()[:, None, :]
    selected = ranked.better(pairs)
    return ranked.result(pair_mean(losses, selected), beta * ratios, selected)
