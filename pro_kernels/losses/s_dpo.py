"""Softmax-DPO: one preferred candidate against several negatives.

"On Softmax Direct Preference Optimization for Recommendation", arXiv 2406.09215.
d_i = S_i − S_ref,i, candidate 1 the best:

    L = −log σ( −log Σ_{j>1} exp(β (d_j − d_1)) ) = log( 1 + Σ_{j>1} exp(β (d_j − d_1)) )

Equal to DPO for n = 2. Candidates whose reward equals the best one's are no negatives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import check_number, preference_metrics, rank_candidates


def s_dpo(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,  # (B, n), required
    mask: Tensor | None = None,  # (B, n)
    beta: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """S-DPO: the best candidate against all the worse ones at once."""
    check_number("beta", beta, above=0)
    ranked = rank_candidates(
        logps,
        lengths,
        rewards=rewards,
        ref_logps=ref_logps,
        mask=mask,
        needs=("ref_logps",),
        loss="s_dpo",
    )
    implicit = beta * ranked.log_ratios()
    pairs = ranked.better("best")
    first = torch.arange(implicit.shape[1], device=implicit.device) == 0
    kept = pairs[:, 0] | first  # the best one's own entry is exp(0), the 1 of the formula
    entries = (implicit - implicit[:, :1]).masked_fill(~kept, -math.inf)
    return ranked.mean(entries.logsumexp(1)), preference_metrics(ranked, implicit, pairs)
