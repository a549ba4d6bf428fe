"""Contrastive Preference Optimization.

"Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
Translation", arXiv 2401.08417:

    L = mean over pairs (i better than j) of −log σ( β (S_i − S_j) ) + α · NLL(best)

NLL is per token by default, as in the official code and TRL; sft_reduction="sum" is −S as the
paper writes it, "tokens" averages over the tokens of the whole batch exactly as TRL does. Pairs
of equal reward are left out.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ._common import (
    PAIRS,
    SFT_REDUCTIONS,
    check_choice,
    check_number,
    differences,
    pair_mean,
    preference_metrics,
    rank_candidates,
)


def cpo(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,  # (B, n)
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    sft_reduction: str = "mean",
    pairs: str = "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """CPO over all pairs, or best-versus-rest with pairs="best"."""
    check_number("beta", beta, above=0)
    check_number("cpo_alpha", cpo_alpha, at_least=0)
    check_choice("sft_reduction", sft_reduction, SFT_REDUCTIONS)
    check_choice("pairs", pairs, PAIRS)
    ranked = rank_candidates(
        logps, lengths, rewards=rewards, ref_logps=ref_logps, mask=mask, loss="cpo"
    )
    implicit = beta * ranked.logps
    selected = ranked.better(pairs)
    losses = pair_mean(-logsigmoid(differences(implicit)), selected)
    sft = ranked.mean(cpo_alpha * ranked.sft(sft_reduction))
    metrics = preference_metrics(ranked, implicit, selected)
    return ranked.mean(losses) + sft, {"sft_loss": sft.detach().float(), **metrics}
