"""SLiC-HF: sequence likelihood calibration with human feedback.

"SLiC-HF: Sequence Likelihood Calibration with Human Feedback", arXiv 2305.10425:

    L = mean over pairs (i better than j) of max(0, δ − S_i + S_j) + λ · NLL(best)

The best candidate stands for the paper's regularization target. Pairs of equal reward are left
out.
"""

from __future__ import annotations

from torch import Tensor

from ._common import (
    PAIRS,
    SFT_REDUCTIONS,
    check_choice,
    check_flag,
    check_number,
    differences,
    pair_mean,
    preference_metrics,
    rank_candidates,
)


def slic(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,  # (B, n)
    delta: float = 1.0,
    sft_weight: float = 0.5,
    sft_reduction: str = "sum",
    length_normalize: bool = False,
    pairs: str = "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """SLiC-HF over all pairs, or best-versus-rest with pairs="best"."""
    check_number("delta", delta, at_least=0)
    check_number("sft_weight", sft_weight, at_least=0)
    check_choice("sft_reduction", sft_reduction, SFT_REDUCTIONS)
    check_flag("length_normalize", length_normalize)
    check_choice("pairs", pairs, PAIRS)
    ranked = rank_candidates(
        logps, lengths, rewards=rewards, ref_logps=ref_logps, mask=mask, loss="slic"
    )
    scores = ranked.scores(length_normalize)
    selected = ranked.better(pairs)
    losses = pair_mean((delta - differences(scores)).relu(), selected)
    sft = ranked.mean(sft_weight * ranked.sft(sft_reduction))
    metrics = preference_metrics(ranked, scores, selected)
    return ranked.mean(losses) + sft, {"sft_loss": sft.detach().float(), **metrics}
