"""Direct Preference Optimization.

"Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv 2305.18290; label smoothing ε as in conservative DPO. d_i = S_i − S_ref,i:

    L = mean over pairs (i better than j) of
        −(1−ε) log σ(β (d_i − d_j)) − ε log σ(−β (d_i − d_j))

Pairs of equal reward are left out.
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


def dpo(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,  # (B, n), required
    mask: Tensor | None = None,  # (B, n)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pairs: str = "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO over all pairs, or best-versus-rest with pairs="best"."""
    check_number("beta", beta, above=0)
    check_number("label_smoothing", label_smoothing, at_least=0, at_most=0.5)
    check_choice("pairs", pairs, PAIRS)
    ranked = rank_candidates(
        logps,
        lengths,
        rewards=rewards,
        ref_logps=ref_logps,
        mask=mask,
        needs=("ref_logps",),
        loss="dpo",
    )
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    selected = ranked.better(pairs)
    loss = ranked.mean(pair_mean(losses, selected))
    return loss, preference_metrics(ranked, implicit, selected)
