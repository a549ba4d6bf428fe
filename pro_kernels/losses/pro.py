"""Preference Ranking Optimization (PRO).

"Preference Ranking Optimization for Human Alignment", arXiv 2306.17492. Candidates 1..n best to
worst, s_i = S_i / m_i, rewards r_1 ≥ … ≥ r_n:

    τ_ki = r_k − r_i  (i > k),   τ_kk = max_{i>k} τ_ki
    L_rank = Σ_{k<n} [ log( Σ_{i≥k} exp(s_i τ_ki) + eps ) − s_k τ_kk ]
    L = L_rank + w (n−1)² · (−s_sft)

The temperatures are constants of the gradient. The paper has −S_sft in the last term, which is
sft_reduction="sum"; eps = 1e-10 is what the official code uses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pro_kernels.options import gap_fault

from ._common import (
    Ranked,
    check_choice,
    check_flag,
    check_number,
    check_tensor,
    check_top_k,
    differences,
    preference_metrics,
    rank_candidates,
    readable,
)


def pro(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None = None,  # (B, n)
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,  # (B, n)
    sft_weight: float = 0.05,
    sft_reduction: str = "mean",
    length_normalize: bool = True,
    temperature: str | float = "reward",
    ties: str = "zero",
    eps: float = 0.0,
    sft_index: Tensor | None = None,  # (B,)
    prompt_weights: Tensor | None = None,  # (B,)
    top_k: int | None = None,
    reward_scale: float = 1.0,
    equal_rewards: str = "error",
) -> tuple[Tensor, dict[str, Tensor]]:
    """PRO loss; see the module's formula and `pro_kernels.losses` for the shared arguments.

    sft_weight: w. With one valid candidate (n−1)² is replaced by 1: the loss is the SFT term.
    sft_reduction: "mean" is −S/m of the SFT candidate, "sum" is −S (the paper).
    length_normalize: rank by S/m; False ranks by S.
    temperature: "reward" takes τ from the rewards (τ = 1 without rewards); a number T makes every
        τ = 1/T.
    ties: candidates of equal reward have τ = 0: "zero" counts them as exp(0) = 1 in the
        denominator, "skip" leaves them out. With constant τ "zero" changes nothing.
    sft_index: original column of the SFT candidate; default the best-ranked valid one. A prompt
        whose SFT candidate is absent has no SFT term.
    prompt_weights: the loss is Σ w_b L_b / Σ w_b over the prompts with a candidate.
    top_k: keep the first top_k rank terms only.
    reward_scale: multiplies every τ that comes from rewards.
    equal_rewards: "error" raises where a prompt's rewards are all equal (CPU tensors only, and
        not with a constant τ); "keep" leaves such a prompt with SFT only, as on a GPU.

    Metrics: "rank_losses" (n−1,) and "sft_loss" sum to the loss.
    """
    _check_options(sft_weight, sft_reduction, temperature, ties, eps, reward_scale, equal_rewards)
    check_flag("length_normalize", length_normalize)
    check_top_k(top_k)
    ranked = rank_candidates(
        logps, lengths, rewards=rewards, ref_logps=ref_logps, mask=mask, loss="pro"
    )
    _check_prompt_tensors(logps, sft_index, prompt_weights)

    scores = ranked.scores(length_normalize)
    tau = _temperatures(ranked, temperature, reward_scale, equal_rewards)
    terms = _rank_terms(ranked, scores, tau, ties, eps, top_k)[:, :-1]
    sft = sft_weight * _sft(ranked, sft_reduction, sft_index)

    shares = ranked.shares(prompt_weights)
    rank_losses, sft_loss = (shares[:, None] * terms).sum(0), (shares * sft).sum()
    metrics = {
        "rank_losses": rank_losses.detach().float(),
        "sft_loss": sft_loss.detach().float(),
        **preference_metrics(ranked, scores),
    }
    return rank_losses.sum() + sft_loss, metrics


def _temperatures(
    ranked: Ranked, temperature: str | float, reward_scale: float, equal_rewards: str
) -> Tensor:  # (B, n, n)
    """τ_ki above the diagonal and τ_kk on it; what is below is never read."""
    count = ranked.valid.shape[1]
    if temperature != "reward" or ranked.rewards is None:
        constant = 1.0 if temperature == "reward" else 1.0 / float(temperature)
        return ranked.logps.new_full((1, count, count), constant)
    gaps = differences(ranked.rewards).double()
    tau = (reward_scale * gaps).to(ranked.logps.dtype)
    diagonal = torch.where(ranked.valid[:, None, :], tau, 0.0).triu(1).amax(2)  # (B, n)
    if readable(diagonal):
        largest = torch.where(ranked.valid, gaps[:, 0], 0.0).amax(1)
        for row, gap in enumerate(largest.tolist()):
            if fault := gap_fault(gap, reward_scale):
                raise ValueError(f"rewards of prompt row {row} are {fault}")
        rows = ((largest == 0) & (ranked.counts > 1)).nonzero()[:, 0].tolist()
        if rows and equal_rewards == "error":
            raise ValueError(
                f"rewards must differ within a prompt, got all equal in prompt rows {rows}: PRO "
                "has nothing to rank there. Drop these prompts, pass temperature=1.0 to rank by "
                'column order, or equal_rewards="keep" for SFT only'
            )
    return torch.triu(tau, 1) + torch.diag_embed(diagonal)


def _rank_terms(
    ranked: Ranked,
    scores: Tensor,  # (B, n)
    tau: Tensor,  # (B, n, n)
    ties: str,
    eps: float,
    top_k: int | None,
) -> Tensor:  # (B, n)
    """Term k of the ranking loss, 0 where fewer than two candidates are left."""
    places = torch.arange(scores.shape[1], device=scores.device)
    in_term = (ranked.valid[:, :, None] & ranked.valid[:, None, :]).triu(1)
    active = in_term.any(2)
    if top_k is not None:
        active = active & (places < top_k)
    if ties == "skip" and ranked.rewards is not None:
        in_term = in_term & (differences(ranked.rewards) != 0)
    in_term = in_term | (places[:, None] == places)  # the k-th entry itself

    own = scores * tau.diagonal(dim1=1, dim2=2)  # s_k τ_kk
    # Entry (k, k) is exactly 0 below, so the log-sum-exp is finite in every row.
    entries = (scores[:, None, :] * tau - own[:, :, None]).masked_fill(~in_term, -math.inf)
    if eps > 0:
        entries = torch.cat([entries, math.log(eps) - own[:, :, None]], dim=2)
    return torch.where(active, entries.logsumexp(2), 0.0)


def _sft(ranked: Ranked, reduction: str, sft_index: Tensor | None) -> Tensor:  # (B,)
    scores = ranked.scores(reduction == "mean")
    if sft_index is None:
        nll = -scores[:, 0]
    else:
        nll = -torch.where(ranked.order == sft_index[:, None], scores, 0.0).sum(1)
    return nll * (ranked.counts - 1).clamp(min=1).square()


def _check_options(
    sft_weight: float,
    sft_reduction: str,
    temperature: str | float,
    ties: str,
    eps: float,
    reward_scale: float,
    equal_rewards: str,
) -> None:
    check_number("sft_weight", sft_weight, at_least=0)
    check_choice("sft_reduction", sft_reduction, ("sum", "mean"))
    if isinstance(temperature, str):
        check_choice("temperature", temperature, ("reward",))
    else:
        check_number("temperature", temperature, above=0)
    check_choice("ties", ties, ("zero", "skip"))
    check_number("eps", eps, at_least=0)
    check_number("reward_scale", reward_scale, above=0)
    check_choice("equal_rewards", equal_rewards, ("error", "keep"))


def _check_prompt_tensors(
    logps: Tensor, sft_index: Tensor | None, prompt_weights: Tensor | None
) -> None:
    prompts, candidates = logps.shape
    if sft_index is not None:
        check_tensor("sft_index", sft_index, logps, (prompts,), "int64")
        if readable(sft_index) and ((sft_index < 0) | (sft_index >= candidates)).any():
            raise ValueError(f"sft_index must be in [0, {candidates}), got {sft_index.tolist()}")
    if prompt_weights is not None:
        check_tensor("prompt_weights", prompt_weights, logps, (prompts,))
        if readable(prompt_weights):
            if not (torch.isfinite(prompt_weights) & (prompt_weights >= 0)).all():
                raise ValueError(
                    f"prompt_weights must be finite and >= 0, got {prompt_weights.tolist()}"
                )
