"""DPO with the Plackett–Luce model over all n candidates.

"Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv 2305.18290, appendix on the Plackett–Luce model. d_i = S_i − S_ref,i, best to worst:

    L = Σ_{k<n} [ log Σ_{i≥k} exp(β d_i) − β d_k ]

Equal to DPO for n = 2. Rewards only order the candidates; equal rewards keep their column order.
"""

from __future__ import annotations

from torch import Tensor

from ._common import check_number, preference_metrics, rank_candidates
from .plackett_luce import plackett_luce_terms


def dpo_pl(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,  # (B, n), required
    mask: Tensor | None = None,  # (B, n)
    beta: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Listwise DPO: Plackett–Luce over the implicit rewards β (S − S_ref)."""
    check_number("beta", beta, above=0)
    ranked = rank_candidates(
        logps,
        lengths,
        rewards=rewards,
        ref_logps=ref_logps,
        mask=mask,
        needs=("ref_logps",),
        loss="dpo_pl",
    )
    implicit = beta * ranked.log_ratios()
    loss = ranked.mean(plackett_luce_terms(implicit, ranked.valid).sum(1))
    return loss, preference_metrics(ranked, implicit)
