"""Plackett–Luce negative log-likelihood of the ranking (ListMLE).

"Listwise Approach to Learning to Rank: Theory and Algorithm" (Xia et al., ICML 2008). Candidates
1..n best to worst:

    L = Σ_{k<n} [ log Σ_{i≥k} exp(s_i) − s_k ]

Rewards only order the candidates; equal rewards keep their column order.
"""

from __future__ import annotations

from pro_kernels.option_types import LengthNormalize, TopK
from pro_kernels.ranking import rank_terms

from .ranked import Ranked, Result
from .registry import register


@register()
def plackett_luce(
    ranked: Ranked, *, length_normalize: LengthNormalize = True, top_k: TopK = None
) -> Result:
    """ListMLE on s = S/m (S where length_normalize is False); top_k keeps the first terms only."""
    scores = ranked.scores(length_normalize)
    return ranked.result(rank_terms(scores, ranked.valid, top_k=top_k)[0].sum(1), scores)
