"""Preference Ranking Optimization (PRO): the formula on scores."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from pro_kernels import validate
from pro_kernels.option_types import (
    Eps,
    LengthNormalize,
    Limits,
    RewardScale,
    SftReduction,
    Temperature,
    Ties,
    TopK,
)
from pro_kernels.ranking import rank_terms, scaled_rewards, temperatures

from .ranked import Ranked, Result, preference_metrics
from .registry import register


@register(uses_gaps=lambda temperature, **_: isinstance(temperature, str))
def pro(
    ranked: Ranked,
    *,
    sft_weight: Annotated[
        float, Limits(at_least=0), "Weight of the SFT term, times (n - 1)^2."
    ] = 0.05,
    sft_reduction: SftReduction = "mean",
    length_normalize: LengthNormalize = True,
    temperature: Temperature = "reward",
    ties: Ties = "zero",
    eps: Eps = 0.0,
    sft_index: Tensor | None = None,  # (B,)
    top_k: TopK = None,
    reward_scale: RewardScale = 1.0,
    equal_rewards: Literal["error", "keep"] = "error",
) -> Result:
    """Preference Ranking Optimization (PRO).

    "Preference Ranking Optimization for Human Alignment", arXiv 2306.17492. Candidates 1..n best to
    worst, s_i = S_i / m_i, rewards r_1 ≥ … ≥ r_n:

        τ_ki = r_k − r_i  (i > k),   τ_kk = max_{i>k} τ_ki
        L_rank = Σ_{k<n} [ log( Σ_{i≥k} exp(s_i τ_ki) + eps ) − s_k τ_kk ]
        L = L_rank + w (n−1)² · (−s_sft)

    The temperatures are constants of the gradient. The paper has −S_sft in the last term, which is
    sft_reduction="sum"; eps = 1e-10 is what the official code uses. Options mean what they mean in
    ``linear_pro_loss``. With one valid candidate (n−1)² is replaced by 1: the loss is the SFT term.

    sft_index: original column of the SFT candidate; default the best-ranked valid one. A prompt
        whose SFT candidate is absent has no SFT term.
    equal_rewards: "error" raises where a prompt's rewards are all equal (CPU tensors only, and
        not with a constant τ); "keep" leaves such a prompt with SFT only, as on a GPU.

    Metrics: "rank_losses" (n−1,) and "sft_loss" sum to the loss.
    """
    valid, dtype = ranked.valid, ranked.logps.dtype
    validate.check_candidates(ranked.shape, None, None, sft_index)
    if sft_index is not None:
        validate.check_device("sft_index", sft_index, "logps", ranked.logps)
    if validate.readable(valid):
        validate.check_of_prompts(None, sft_index, valid.shape[1], dtype, None)
    scores = ranked.scores(length_normalize)
    tau, tied = None, None
    if not isinstance(temperature, str):
        tau = scores.new_full((1, 1, 1), 1.0 / temperature)
    elif ranked.rewards is not None:
        if validate.readable(valid):
            kept, instead = equal_rewards == "keep", ', or keep them with equal_rewards="keep"'
            validate.check_gaps(
                ranked.rewards, valid, reward_scale, may_be_equal=kept, instead=instead
            )
        scaled = scaled_rewards(ranked.rewards, valid, reward_scale, torch.float64)
        tau, tied = temperatures(scaled, valid, dtype)
    left_out = tied if ties == "skip" else None
    terms, _, _ = rank_terms(scores, valid, tau, left_out=left_out, eps=eps, top_k=top_k)
    of_sft = ranked.scores(sft_reduction == "mean")
    nll = -of_sft[:, 0]
    if sft_index is not None:
        nll = -torch.where(ranked.order == sft_index[:, None], of_sft, 0.0).sum(1)
    sft = sft_weight * (nll * (ranked.counts - 1).clamp(min=1).square())

    rank_losses, sft_loss = (ranked.shares[:, None] * terms[:, :-1]).sum(0), ranked.mean(sft)
    metrics = {
        "rank_losses": rank_losses.detach().float(),
        "sft_loss": sft_loss.detach().float(),
        **preference_metrics(ranked, scores),
    }
    return rank_losses.sum() + sft_loss, metrics
