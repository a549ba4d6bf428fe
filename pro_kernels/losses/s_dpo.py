"""Softmax-DPO: one preferred candidate against several negatives.

"On Softmax Direct Preference Optimization for Recommendation", arXiv 2406.09215.
d_i = S_i − S_ref,i, candidate 1 the best:

    L = −log σ( −log Σ_{j>1} exp(β (d_j − d_1)) ) = log( 1 + Σ_{j>1} exp(β (d_j − d_1)) )

Equal to DPO for n = 2. Candidates whose reward equals the best one's are no negatives.
"""

from __future__ import annotations

from pro_kernels.option_types import Beta
from pro_kernels.ranking import rank_terms

from .ranked import Ranked, Result
from .registry import register


@register(needs=["ref_logps"])
def s_dpo(ranked: Ranked, *, beta: Beta = 1.0) -> Result:
    """S-DPO: the best candidate against all the worse ones at once."""
    implicit = beta * ranked.log_ratios()
    pairs = ranked.better("best")
    terms, _, _ = rank_terms(implicit, ranked.valid, left_out=~pairs, top_k=1)
    return ranked.result(terms.sum(1), implicit, pairs)
