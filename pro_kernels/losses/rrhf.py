"""RRHF: rank responses to align with human feedback.

"RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
arXiv 2304.05302. s_i = S_i / m_i:

    L = Σ over pairs (i better than j) of max(0, s_j − s_i) + w · NLL(best)

Pairs of equal reward are left out. w is sft_weight; NLL is summed over tokens as the
paper writes it.
"""

from __future__ import annotations

from .ranked import Ranked, Result, differences, pair_sum
from .registry import register


@register(sft_weight=1.0, sft_reduction="sum")
def rrhf(ranked: Ranked) -> Result:
    """RRHF: the hinge summed over every pair in the wrong order, plus SFT on the best."""
    scores = ranked.scores()
    return ranked.result(pair_sum((-differences(scores)).relu(), ranked.better()), scores)
