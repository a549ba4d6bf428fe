"""Plackett–Luce negative log-likelihood of the ranking (ListMLE).

"Listwise Approach to Learning to Rank: Theory and Algorithm" (Xia et al., ICML 2008). Candidates
1..n best to worst:

    L = Σ_{k<n} [ log Σ_{i≥k} exp(s_i) − s_k ]

Rewards only order the candidates; equal rewards keep their column order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_flag, check_top_k, preference_metrics, rank_candidates


def plackett_luce(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,  # (B, n)
    length_normalize: bool = True,
    top_k: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """ListMLE on s = S/m (S where length_normalize is False); top_k keeps the first terms only."""
    check_flag("length_normalize", length_normalize)
    check_top_k(top_k)
    ranked = rank_candidates(
        logps, lengths, rewards=rewards, ref_logps=ref_logps, mask=mask, loss="plackett_luce"
    )
    scores = ranked.scores(length_normalize)
    loss = ranked.mean(plackett_luce_terms(scores, ranked.valid, top_k).sum(1))
    return loss, preference_metrics(ranked, scores)


def plackett_luce_terms(
    scores: Tensor,  # (B, n) best to worst, absent last
    valid: Tensor,  # (B, n)
    top_k: int | None = None,
) -> Tensor:  # (B, n)
    """Term k of the Plackett–Luce loss, 0 where fewer than two candidates are left."""
    # Absent candidates get a finite score whose exp is 0 beside any other: -inf in
    # logcumsumexp would give NaN gradients.
    lowest = scores.detach().amin(1, keepdim=True).clamp(max=0)
    scores = torch.where(valid, scores, 2 * lowest - 1e4)
    suffix = scores.flip(1).logcumsumexp(1).flip(1)
    places = torch.arange(scores.shape[1], device=scores.device)
    active = places + 1 < valid.sum(1, keepdim=True)
    if top_k is not None:
        active = active & (places < top_k)
    return torch.where(active, suffix - scores, 0.0)
