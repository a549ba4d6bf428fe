"""DPO with the Plackett–Luce model over all n candidates.

"Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv 2305.18290, appendix on the Plackett–Luce model. d_i = S_i − S_ref,i, best to worst:

    L = Σ_{k<n} [ log Σ_{i≥k} exp(β d_i) − β d_k ]

Equal to DPO for n = 2. Rewards only order the candidates; equal rewards keep their column order.
"""

from __future__ import annotations

from pro_kernels.option_types import Beta
from pro_kernels.ranking import rank_terms

from .ranked import Ranked, Result
from .registry import register


@register(needs=["ref_logps"])
def dpo_pl(ranked: Ranked, *, beta: Beta = 0.1) -> Result:
    """Listwise DPO: Plackett–Luce over the implicit rewards β (S − S_ref)."""
    implicit = beta * ranked.log_ratios()
    return ranked.result(rank_terms(implicit, ranked.valid)[0].sum(1), implicit)
