"""DPO on log-ratios of a token: TRL's "sigmoid_norm".

"Tulu 3: Pushing Frontiers in Open Language Model Post-Training", arXiv 2411.15124, equation 6
(length-normalized DPO). d_i = S_i − S_ref,i:

    L = mean over pairs (i better than j) of −log σ( β (d_i/m_i − d_j/m_j) )

Pairs of equal reward are left out.
"""

from __future__ import annotations

from pro_kernels.option_types import Beta, Pairs

from .ranked import Ranked, Result, differences, logistic, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def sigmoid_norm(ranked: Ranked, *, beta: Beta = 0.1, pairs: Pairs = "all") -> Result:
    """Length-normalized DPO over all pairs, or the best with the rest with pairs="best"."""
    implicit = beta * ranked.log_ratios() / ranked.lengths
    selected = ranked.better(pairs)
    return ranked.result(pair_mean(logistic(differences(implicit)), selected), implicit, selected)
