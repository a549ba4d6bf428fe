"""APO-down: anchored preference optimization, for candidates worse than the model.

"Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in
Alignment", arXiv 2408.06266, equation 8. h_i = β (S_i − S_ref,i):

    L = mean over pairs (i better than j) of σ(h_i) + 1 − σ(h_i − h_j)

Pairs of equal reward are left out.
"""

from __future__ import annotations

import torch

from pro_kernels.option_types import Beta, Pairs

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def apo_down(ranked: Ranked, *, beta: Beta = 0.1, pairs: Pairs = "all") -> Result:
    """APO-down over all pairs, or the best with the rest with pairs="best"."""
    implicit = beta * ranked.log_ratios()
    losses = torch.sigmoid(implicit)[:, :, None] + torch.sigmoid(-differences(implicit))
    selected = ranked.better(pairs)
    return ranked.result(pair_mean(losses, selected), implicit, selected)
