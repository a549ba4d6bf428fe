"""Identity Preference Optimization.

"A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036
(β is the paper's τ). d_i = S_i − S_ref,i:

    L = mean over pairs (i better than j) of ( d_i − d_j − 1/(2β) )²

The paper sums over tokens; TRL divides each d_i by its number of scored tokens. The default here
is TRL's; length_normalize=False is the paper's. Pairs of equal reward are left out.
"""

from __future__ import annotations

from torch import Tensor

from ._common import (
    PAIRS,
    check_choice,
    check_flag,
    check_number,
    differences,
    pair_mean,
    preference_metrics,
    rank_candidates,
)


def ipo(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,  # (B, n), required
    mask: Tensor | None = None,  # (B, n)
    beta: float = 0.1,
    length_normalize: bool = True,
    pairs: str = "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """IPO over all pairs, or best-versus-rest with pairs="best"."""
    check_number("beta", beta, above=0)
    check_flag("length_normalize", length_normalize)
    check_choice("pairs", pairs, PAIRS)
    ranked = rank_candidates(
        logps,
        lengths,
        rewards=rewards,
        ref_logps=ref_logps,
        mask=mask,
        needs=("ref_logps",),
        loss="ipo",
    )
    ratios = ranked.log_ratios()
    if length_normalize:
        ratios = ratios / ranked.lengths
    losses = (differences(ratios) - 1 / (2 * beta)).square()
    selected = ranked.better(pairs)
    loss = ranked.mean(pair_mean(losses, selected))
    return loss, preference_metrics(ranked, beta * ratios, selected)
