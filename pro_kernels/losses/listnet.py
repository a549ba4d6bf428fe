"""ListNet: cross-entropy between the top-one distributions of rewards and scores.

"Learning to Rank: From Pairwise Approach to Listwise Approach" (Cao et al., ICML 2007):

    L = −Σ_i softmax(r / T)_i · log softmax(s)_i

Equal rewards need no special case.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import check_flag, check_number, preference_metrics, rank_candidates


def listnet(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n), required
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,  # (B, n)
    length_normalize: bool = True,
    reward_temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """ListNet on s = S/m (S where length_normalize is False)."""
    check_flag("length_normalize", length_normalize)
    check_number("reward_temperature", reward_temperature, above=0)
    ranked = rank_candidates(
        logps,
        lengths,
        rewards=rewards,
        ref_logps=ref_logps,
        mask=mask,
        needs=("rewards",),
        loss="listnet",
    )
    assert ranked.rewards is not None
    scores = ranked.scores(length_normalize)
    # An empty prompt keeps its first place, so that no softmax is over nothing.
    absent = ~ranked.valid & (torch.arange(scores.shape[1], device=scores.device) > 0)
    gaps = (ranked.rewards - ranked.rewards[:, :1]).to(scores.dtype)
    targets = (gaps / reward_temperature).masked_fill(absent, -math.inf).softmax(1)
    predicted = scores.masked_fill(absent, -math.inf).log_softmax(1).masked_fill(absent, 0.0)
    loss = ranked.mean(-(targets * predicted).sum(1))
    return loss, preference_metrics(ranked, scores)
