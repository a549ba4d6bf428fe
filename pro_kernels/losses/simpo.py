"""SimPO: reference-free preference optimization with a target margin.

"SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv 2405.14734.
s_i = S_i / m_i:

    L = mean over pairs (i better than j) of −log σ( β (s_i − s_j) − γ )

γ is the paper's (TRL's ``simpo_gamma``), not the ratio γ/β. Pairs of equal reward are left out.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ._common import (
    PAIRS,
    check_choice,
    check_number,
    differences,
    pair_mean,
    preference_metrics,
    rank_candidates,
)


def simpo(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,  # (B, n)
    beta: float = 2.0,
    gamma: float = 0.5,
    pairs: str = "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """SimPO over all pairs, or best-versus-rest with pairs="best"."""
    check_number("beta", beta, above=0)
    check_number("gamma", gamma, at_least=0)
    check_choice("pairs", pairs, PAIRS)
    ranked = rank_candidates(
        logps, lengths, rewards=rewards, ref_logps=ref_logps, mask=mask, loss="simpo"
    )
    implicit = beta * ranked.scores(length_normalize=True)
    selected = ranked.better(pairs)
    losses = -logsigmoid(differences(implicit) - gamma)
    loss = ranked.mean(pair_mean(losses, selected))
    return loss, preference_metrics(ranked, implicit, selected)
