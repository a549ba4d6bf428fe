"""From layout and rewards to what the ranking kernel takes, and from its outputs to ``PROOutput``.

Legend: ``B`` prompts, ``n`` candidates, ``S`` sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pro_kernels import checks
from pro_kernels.layout import Layout
from pro_kernels.options import PROOptions, RankingOptions
from pro_kernels.output import PROOutput


@dataclass(frozen=True)
class RankedCandidates:
    """Candidates in rank order, as the backends' ``ranking`` takes them."""

    order: Tensor  # (B, n) int64
    rewards: Tensor | None  # (B, n) at those ranks, scaled
    sft_rank: Tensor  # (B,) int64
    weights: Tensor  # (B,) summing to 1, or all 0 where nothing is scored
    options: RankingOptions

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """In the order of the ops' schemas."""
        return self.order, self.rewards, self.sft_rank, self.weights


def rank_candidates(
    layout: Layout,
    rewards: Tensor | None,  # (B, n), on the layout's device or on the CPU
    options: PROOptions,
    candidate_mask: Tensor | None,  # (B, n) bool
    prompt_weights: Tensor | None,  # (B,)
    sft_index: Tensor | None,  # (B,)
    dtype: torch.dtype,
) -> RankedCandidates:
    """Check the per-candidate inputs and put the candidates of each prompt in rank order."""
    shape, device = layout.shape, layout.device
    compiling = torch.compiler.is_compiling()
    _check_shapes(shape, candidate_mask, prompt_weights, sft_index, compiling)
    exists = layout.sequences >= 0
    if candidate_mask is not None:
        exists = exists & candidate_mask.to(device, non_blocking=True)
    valid = exists & (layout.lengths[layout.sequences.clamp_min(0)] > 0)
    if rewards is not None and not compiling:
        _check_rewards(rewards, shape, exists, valid, candidate_mask, options)
    if options.official and not compiling:
        _check_official(rewards, valid)

    if rewards is not None:
        if rewards.dtype not in (torch.float32, dtype):
            rewards = rewards.to(dtype)
        rewards = rewards.to(device, non_blocking=True) * options.reward_scale
    if options.official:
        rank_of = torch.arange(shape[1], device=device).expand(shape)
    elif rewards is None:
        rank_of = (~valid).to(torch.int8).argsort(dim=1, stable=True)
    else:
        rank_of = rewards.masked_fill(~valid, -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
    sequences = layout.sequences.masked_fill(~valid, -1)
    order = sequences.gather(1, rank_of)
    at_rank = None
    if rewards is not None and isinstance(options.temperature, str):
        at_rank = rewards.masked_fill(~valid, 0).gather(1, rank_of).contiguous()
    return RankedCandidates(
        order.contiguous(),
        at_rank,
        _sft_rank(order, rank_of, sft_index),
        _mean_weights(valid.any(1), prompt_weights, dtype),
        options.ranking(),
    )


def make_output(
    loss: Tensor, per_rank: Tensor, sums: Tensor, layout: Layout, options: PROOptions
) -> PROOutput:
    """Per-candidate outputs back in the caller's columns."""
    seq = layout.sequences.clamp_min(0)
    exists = layout.sequences >= 0
    logps = torch.where(exists, sums[seq], 0.0)
    lengths = torch.where(exists, layout.lengths[seq], 0)
    scores = logps / lengths.clamp_min(1) if options.length_normalize else logps
    return PROOutput(loss, per_rank[:-1], per_rank[-1], scores, logps, lengths)


def _sft_rank(order: Tensor, rank_of: Tensor, sft_index: Tensor | None) -> Tensor:
    """Rank that carries the SFT term: the best, or that of column ``sft_index``; -1 if unscored."""
    if sft_index is None:
        rank = torch.zeros(order.shape[0], dtype=torch.int64, device=order.device)
    else:
        column = sft_index.to(order.device, torch.int64, non_blocking=True)
        rank = (rank_of == column[:, None]).to(torch.int8).argmax(1)
    found = order.gather(1, rank[:, None])[:, 0]
    return torch.where(found >= 0, rank, -1)


def _mean_weights(counts: Tensor, prompt_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    weights = counts.to(dtype)
    if prompt_weights is not None:
        weights = weights * prompt_weights.to(weights.device, dtype, non_blocking=True)
    total = weights.sum()
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(dtype).tiny), 0.0)


def _check_shapes(
    shape: tuple[int, int],
    candidate_mask: Tensor | None,
    prompt_weights: Tensor | None,
    sft_index: Tensor | None,
    compiling: bool,
) -> None:
    if candidate_mask is not None:
        if candidate_mask.dtype != torch.bool:
            raise TypeError(f"candidate_mask must be a bool tensor, got {candidate_mask.dtype}")
        checks.check_same_shape("candidate_mask", candidate_mask, shape, "(B, n)")
    if prompt_weights is not None:
        checks.check_float("prompt_weights", prompt_weights)
        checks.check_same_shape("prompt_weights", prompt_weights, shape[:1], "(B,)")
        if not compiling and prompt_weights.device.type == "cpu":
            bad = ~(prompt_weights >= 0) | prompt_weights.isinf()
            if bad.any():
                raise ValueError(
                    f"prompt_weights must be finite and >= 0, got {prompt_weights.tolist()}"
                )
    if sft_index is not None:
        checks.check_same_shape("sft_index", sft_index, shape[:1], "(B,)")
        if not compiling and sft_index.device.type == "cpu":
            bad = (sft_index < 0) | (sft_index >= shape[1])
            if bad.any():
                raise ValueError(f"sft_index must lie in [0, {shape[1]}), got {sft_index.tolist()}")


def _check_rewards(
    rewards: object,
    shape: tuple[int, int],
    exists: Tensor,
    valid: Tensor,
    candidate_mask: Tensor | None,
    options: PROOptions,
) -> None:
    # Where the layout is on a GPU, only what the host knows can be looked at without waiting.
    on_host = valid.device.type == "cpu"
    mask = exists if on_host else candidate_mask
    if mask is not None and isinstance(rewards, Tensor) and mask.device != rewards.device:
        mask = None if rewards.device.type == "cpu" else mask.to(rewards.device)
    checks.check_rewards(rewards, shape, mask)
    assert isinstance(rewards, Tensor)
    looked_at = rewards.device.type == "cpu" and not options.official
    if looked_at and isinstance(options.temperature, str):
        known = valid if on_host else torch.ones(shape, dtype=torch.bool) if mask is None else mask
        checks.check_not_all_equal(rewards, known)


def _check_official(rewards: Tensor | None, valid: Tensor) -> None:
    if rewards is None:
        raise ValueError('rewards must be given with compat="official", got None')
    if valid.device.type == "cpu" and not valid.all():
        b, i = (~valid).nonzero()[0].tolist()
        raise ValueError(
            f'compat="official" needs a scored token in every candidate; prompt {b} candidate {i} '
            "has none (the official code would give NaN)"
        )
