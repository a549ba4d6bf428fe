"""Odds Ratio Preference Optimization.

"ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691.
s_i = S_i / m_i, log-odds o_i = s_i − log(1 − exp(s_i)):

    L = NLL(best) + mean over pairs (i better than j) of −β log σ(o_i − o_j)

β is the paper's λ. NLL is per token by default; sft_reduction="tokens" averages over the tokens of
the whole batch as TRL does. A score closer to 0 than the dtype's epsilon is taken as −epsilon in
the log-odds, so probability 1 has finite odds. Pairs of equal reward are left out.
"""

from __future__ import annotations

import math

import torch
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


def orpo(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,  # (B, n)
    beta: float = 0.1,
    sft_reduction: str = "mean",
    pairs: str = "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """ORPO over all pairs, or best-versus-rest with pairs="best"."""
    check_number("beta", beta, above=0)
    check_choice("sft_reduction", sft_reduction, SFT_REDUCTIONS)
    check_choice("pairs", pairs, PAIRS)
    ranked = rank_candidates(
        logps, lengths, rewards=rewards, ref_logps=ref_logps, mask=mask, loss="orpo"
    )
    scores = ranked.scores(length_normalize=True)
    clamped = scores.clamp(max=-torch.finfo(scores.dtype).eps)
    log_odds = clamped - log1mexp(clamped)
    selected = ranked.better(pairs)
    losses = pair_mean(-beta * logsigmoid(differences(log_odds)), selected)
    sft = ranked.mean(ranked.sft(sft_reduction))
    metrics = preference_metrics(ranked, beta * scores, selected)
    return ranked.mean(losses) + sft, {"sft_loss": sft.detach().float(), **metrics}


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, accurate at both ends and in its gradient."""
    near_zero = x > -math.log(2)
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, near, far)
