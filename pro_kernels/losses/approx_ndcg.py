"""ApproxNDCG: NDCG with a smooth rank.

"A General Approximation Framework for Direct Optimization of Information Retrieval Measures" (Qin,
Liu and Li, Information Retrieval 13, 2010). s_i = S_i / m_i, G the gains of the rewards:

    rank_i = 1 + Σ_{j≠i} σ((s_j − s_i) / T)
    L = 1 − Σ_i G_i / log2(1 + rank_i) / max DCG,   G_i = 2^{r_i} − 1

T is 1/α of the paper. Without rewards r falls evenly from 1 (best) to 0 (worst).
"""

from __future__ import annotations

from typing import Annotated

import torch

from pro_kernels.option_types import Gain, LengthNormalize, Limits

from .gains import by_gaps, ndcg_shares, not_a_gain
from .ranked import Ranked, Result, differences
from .registry import register


@register(uses_gaps=by_gaps, reward_fault=not_a_gain)
def approx_ndcg(
    ranked: Ranked,
    *,
    temperature: Annotated[float, Limits(above=0), "Temperature of the smooth ranks."] = 0.1,
    gain: Gain = "exp2",
    length_normalize: LengthNormalize = True,
) -> Result:
    """1 − ApproxNDCG on s = S/m (S where length_normalize is False)."""
    scores = ranked.scores(length_normalize)
    shares = ndcg_shares(ranked, gain)
    others = ranked.valid[:, None, :] & ~torch.eye(
        scores.shape[1], dtype=torch.bool, device=scores.device
    )
    ahead = torch.where(others, torch.sigmoid(-differences(scores) / temperature), 0.0).sum(2)
    losses = 1 - (shares / torch.log2(2 + ahead)).sum(1)
    return ranked.result(torch.where(shares.any(1), losses, 0.0), scores)
