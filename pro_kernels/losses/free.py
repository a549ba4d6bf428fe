"""Losses of the pairs of a prompt that need no reference model.

A pair is i better than j; pairs of equal reward are left out. s_i = S_i / m_i.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, LabelSmoothing, LengthNormalize, Limits, Pairs

from .ranked import Ranked, Result, differences, logistic, pair_sum
from .registry import register


@register(sft_weight=1.0)
def cpo(
    ranked: Ranked, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0, pairs: Pairs = "all"
) -> Result:
    """Contrastive Preference Optimization.

    "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
    Translation", arXiv 2401.08417:

        mean over pairs of −log σ( β (S_i − S_j) ) + α · NLL(best)

    α is sft_weight. NLL is per token by default, as in the official code and TRL;
    sft_reduction="sum" is −S as the paper writes it, "tokens" averages over the tokens of the whole
    batch exactly as TRL does. label_smoothing is as in ``dpo``.
    """
    implicit = beta * ranked.logps
    return ranked.over_pairs(logistic(differences(implicit), label_smoothing), implicit, pairs)


@register()
def simpo(
    ranked: Ranked,
    *,
    beta: Beta = 2.0,
    gamma: Annotated[float, Limits(at_least=0), "Target margin."] = 0.5,
    label_smoothing: LabelSmoothing = 0.0,
    pairs: Pairs = "all",
) -> Result:
    """SimPO: reference-free preference optimization with a target margin.

    "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv 2405.14734:

        mean over pairs of −log σ( β (s_i − s_j) − γ )

    γ is the paper's (TRL's ``simpo_gamma``), not the ratio γ/β. label_smoothing is as in ``dpo``.
    """
    implicit = beta * ranked.scores()
    losses = logistic(differences(implicit) - gamma, label_smoothing)
    return ranked.over_pairs(losses, implicit, pairs)


@register(sft_weight=1.0)
def orpo(ranked: Ranked, *, beta: Beta = 0.1, pairs: Pairs = "all") -> Result:
    """Odds Ratio Preference Optimization.

    "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691. Log-odds
    o_i = s_i − log(1 − exp(s_i)):

        NLL(best) + mean over pairs of −β log σ(o_i − o_j)

    β is the paper's λ. NLL is per token by default; sft_reduction="tokens" averages over the tokens
    of the whole batch as TRL does. A score closer to 0 than the dtype's epsilon is taken as
    −epsilon in the log-odds, so probability 1 has finite odds.
    """
    scores = ranked.scores()
    clamped = scores.clamp(max=-torch.finfo(scores.dtype).eps)
    log_odds = clamped - log1mexp(clamped)
    return ranked.over_pairs(-beta * logsigmoid(differences(log_odds)), beta * scores, pairs)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, accurate at both ends and in its gradient."""
    near_zero = x > -math.log(2)
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, near, far)


@register(sft_weight=0.5, sft_reduction="sum")
def slic(
    ranked: Ranked,
    *,
    delta: Annotated[float, Limits(at_least=0), "Margin."] = 1.0,
    length_normalize: LengthNormalize = False,
    pairs: Pairs = "all",
) -> Result:
    """SLiC-HF: sequence likelihood calibration with human feedback.

    "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", arXiv 2305.10425:

        mean over pairs of max(0, δ − S_i + S_j) + λ · NLL(best)

    λ is sft_weight. The best candidate stands for the paper's regularization target.
    """
    scores = ranked.scores(length_normalize)
    return ranked.over_pairs((delta - differences(scores)).relu(), scores, pairs)


@register(sft_weight=1.0, sft_reduction="sum")
def rrhf(ranked: Ranked) -> Result:
    """RRHF: rank responses to align with human feedback.

    "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
    arXiv 2304.05302:

        Σ over pairs of max(0, s_j − s_i) + w · NLL(best)

    w is sft_weight; NLL is summed over tokens as the paper writes it.
    """
    scores = ranked.scores()
    return ranked.result(pair_sum((-differences(scores)).relu(), ranked.better()), scores)
