"""RRHF: rank responses to align with human feedback.

"RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
arXiv 2304.05302. s_i = S_i / m_i:

    L = Σ over pairs (i better than j) of max(0, s_j − s_i) + w · NLL(best)

Pairs of equal reward are left out. NLL is summed over tokens as the paper writes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    SFT_REDUCTIONS,
    check_choice,
    check_number,
    differences,
    preference_metrics,
    rank_candidates,
)


def rrhf(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,  # (B, n)
    sft_weight: float = 1.0,
    sft_reduction: str = "sum",
) -> tuple[Tensor, dict[str, Tensor]]:
    """RRHF: the hinge summed over every pair in the wrong order, plus SFT on the best."""
    check_number("sft_weight", sft_weight, at_least=0)
    check_choice("sft_reduction", sft_reduction, SFT_REDUCTIONS)
    ranked = rank_candidates(
        logps, lengths, rewards=rewards, ref_logps=ref_logps, mask=mask, loss="rrhf"
    )
    scores = ranked.scores(length_normalize=True)
    hinges = (-differences(scores)).relu()
    losses = torch.where(ranked.better(), hinges, 0.0).sum((1, 2))
    sft = ranked.mean(sft_weight * ranked.sft(sft_reduction))
    metrics = preference_metrics(ranked, scores)
    return ranked.mean(losses) + sft, {"sft_loss": sft.detach().float(), **metrics}
