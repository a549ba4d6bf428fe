"""Gains and discounts of ranking metrics, as the losses made of them share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pro_kernels.validate import readable

from .ranked import Ranked

MAX_EXPONENT = 64  # 2^r and its products stay finite in fp32


def too_large(rewards: Sequence[float], *, gain: str, **_: Any) -> str | None:
    """Why the gain of these rewards cannot be, or None."""
    if gain != "exp2" or max(rewards) <= MAX_EXPONENT:
        return None
    return (
        f"too large for the gain 2^reward, which takes {MAX_EXPONENT} at most: scale them to "
        "[0, 1], or give gain='linear' or 'rank'"
    )


def not_a_gain(rewards: Sequence[float], *, gain: str, **_: Any) -> str | None:
    """The same where gains are summed, and so must not be negative."""
    if min(rewards) < 0 and gain != "rank":
        return "below 0, and so is their gain: add a number to all, or give gain='rank'"
    return too_large(rewards, gain=gain)


def by_gaps(*, gain: str, **_: Any) -> bool:
    """Whether such gains take more than an order from rewards."""
    return gain != "rank"


def gains(ranked: Ranked, gain: str, fault: Any = too_large) -> Tensor:
    """Of each candidate, (B, n); without rewards as with gain="rank".

    Raises:
        ValueError: rewards that ``fault`` refuses; for CPU tensors.
    """
    if ranked.rewards is None or gain == "rank":
        scores = ranked.logps
        places = torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype)
        labels = 1 - places / (ranked.counts - 1).clamp(min=1)[:, None]
        labels = torch.where(ranked.valid, labels, 0.0)
    else:
        labels = ranked.rewards
    if readable(labels) and labels.numel():
        ends = [labels.min().item(), labels.max().item()]
        if found := fault(ends, gain=gain):
            raise ValueError(f"rewards {ends[0]:g} to {ends[1]:g} are {found}")
    if gain == "linear":
        return labels
    return torch.exp2(labels.double().clamp(max=MAX_EXPONENT)) - 1


def ndcg_shares(ranked: Ranked, gain: str) -> Tensor:
    """What each candidate adds to the NDCG at the first place, (B, n); 0 where all gains are 0."""
    found = gains(ranked, gain, not_a_gain).to(ranked.logps.dtype)
    ideal = (found * discounts(found)).sum(1, keepdim=True)  # they stand in rank order
    return found / torch.where(ideal > 0, ideal, 1.0)


def discounts(like: Tensor) -> Tensor:
    """1 / log2(1 + i) of the places i = 1 … n: (n,)."""
    places = torch.arange(1, like.shape[1] + 1, device=like.device, dtype=like.dtype)
    return 1 / torch.log2(1 + places)
