"""NeuralNDCG: NDCG with a smooth sort.

"NeuralNDCG: Direct Optimisation of a Ranking Metric via Differentiable Relaxation of Sorting",
arXiv 2102.07831. s_i = S_i / m_i, G the gains of the rewards, n candidates:

    P_k = softmax_i( ((n + 1 − 2k) s_i − Σ_j |s_i − s_j|) / τ ),   k = 1 … n   (NeuralSort)
    L = 1 − Σ_k (sinkhorn(P) G)_k / log2(1 + k) / max DCG,   G_i = 2^{r_i} − 1

Sinkhorn scaling divides columns and rows by their sums, 30 times as in the paper. Without rewards r
falls evenly from 1 (best) to 0 (worst).
"""

from __future__ import annotations

import math
from typing import Annotated

import torch

from pro_kernels.option_types import Gain, LengthNormalize, Limits

from .gains import by_gaps, discounts, ndcg_shares, not_a_gain
from .ranked import Ranked, Result, differences
from .registry import register

SINKHORN_STEPS = 30


@register(uses_gaps=by_gaps, reward_fault=not_a_gain)
def neural_ndcg(
    ranked: Ranked,
    *,
    temperature: Annotated[float, Limits(above=0), "Temperature of the smooth sort."] = 1.0,
    gain: Gain = "exp2",
    length_normalize: LengthNormalize = True,
) -> Result:
    """1 − NeuralNDCG on s = S/m (S where length_normalize is False)."""
    scores, valid = ranked.scores(length_normalize), ranked.valid
    shares = ndcg_shares(ranked, gain)
    both = valid[:, :, None] & valid[:, None, :]
    apart = torch.where(both, differences(scores).abs(), 0.0).sum(2)
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    slopes = (ranked.counts[:, None] + 1 - 2 * places).to(scores.dtype)
    near = scores - scores[:, :1].detach()  # P does not change, and the product rounds less
    log_p = (slopes[:, :, None] * near[:, None, :] - apart[:, None, :]) / temperature
    # An absent candidate is at its own place, so that every row and column has an entry.
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device) & ~valid[:, None]
    log_p = log_p.masked_fill(~both, -math.inf).masked_fill(itself, 0.0).log_softmax(2)
    for _ in range(SINKHORN_STEPS):
        log_p = log_p.log_softmax(1).log_softmax(2)
    sorted_share = (log_p.exp() * shares[:, None, :]).sum(2)
    losses = 1 - (sorted_share * discounts(shares)).sum(1)
    return ranked.result(torch.where(shares.any(1), losses, 0.0), scores)
