"""What ranking means on (B, n) tensors: the candidates' order, the temperatures, the PRO terms.

The one vectorised form of the formula, ``reference.rank_terms`` being the one to be read. Losses
let autograd differentiate it; the plain backend takes the shares p_ki for its closed-form gradient.

Legend: ``B`` prompts, ``n`` candidates; ``k`` the rank of a term, ``i`` a candidate in it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exact(rewards: Tensor) -> Tensor:
    """In a dtype that holds them and their gaps."""
    return rewards.double() if rewards.is_floating_point() else rewards.long()


def last_where_not(valid: Tensor | None, rewards: Tensor) -> Tensor:
    """``exact`` rewards, the lowest there is where they do not count; None: all do."""
    values = exact(rewards)
    if valid is None:
        return values
    lowest = -math.inf if values.is_floating_point() else torch.iinfo(values.dtype).min
    return values.masked_fill(~valid, lowest)


def rank_of(
    valid: Tensor | None,  # (B, n) bool; None: all
    rewards: Tensor | None,  # (B, n); None: best to worst as they stand
) -> Tensor:
    """The column at each rank, (B, n): equal ones as they stand, those that do not count last."""
    if rewards is None:
        assert valid is not None  # else there is nothing to sort by
        return (~valid).to(torch.int8).argsort(dim=1, stable=True)
    key = rewards if valid is None else last_where_not(valid, rewards)
    return key.argsort(dim=1, descending=True, stable=True)


def as_given(rewards: Tensor, scale: float) -> bool:
    """Whether gaps may be taken of these rewards themselves."""
    return rewards.dtype == torch.float32 and scale == 1


def scaled_rewards(
    rewards: Tensor,  # (B, n)
    valid: Tensor | None,  # (B, n) bool, which count; None: all
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Rewards to take gaps of: times ``scale``, less their prompt's largest before rounding."""
    if as_given(rewards, scale):
        return rewards
    values = exact(rewards)
    best = last_where_not(valid, values).amax(1, keepdim=True)
    return ((values - best).double() * scale).to(dtype)


def mean_weights(present: Tensor, prompt_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Each prompt's share of the batch mean, 0 where ``present`` (B,) is not or all are: (B,)."""
    weights = present.to(dtype)
    if prompt_weights is not None:
        given = prompt_weights.to(present.device, dtype, non_blocking=True)
        weights = torch.where(present, given, 0.0)
    total = weights.sum()
    return weights / torch.where(total > 0, total, 1.0)


def later_pairs(valid: Tensor) -> Tensor:
    """(B, n) -> (B, k, i): both count, and i comes after k."""
    return (valid[:, :, None] & valid[:, None, :]).triu(1)


def temperatures(
    rewards: Tensor,  # (B, n) in rank order, scaled
    valid: Tensor,  # (B, n) bool
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Inverse temperatures (B, k, i): gaps, on the diagonal the largest; and which are tied."""
    # In the rewards' own dtype, as the official code subtracts them.
    gaps = rewards[:, :, None] - rewards[:, None, :]
    later, tau = later_pairs(valid), gaps.to(dtype)
    own = tau.masked_fill(~later, -math.inf).amax(2)
    own = torch.where(later.any(2), own, 0.0)
    return torch.where(later, tau, 0.0) + torch.diag_embed(own), gaps == 0


def rank_terms(
    scores: Tensor,  # (B, n) best first
    valid: Tensor,  # (B, n) bool, those that count first
    tau: Tensor | None = None,  # (B, k, i), or (1, 1, 1); None: 1
    *,
    left_out: Tensor | None = None,  # (B, k, i) bool, candidates that leave a term
    eps: float = 0.0,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of L_rank; with every tau 1 they are Plackett-Luce's.

    Returns:
        ``terms`` (B, n), 0 where there is none; ``log_p`` (B, k, i), the log of candidate i's share
        p_ki of term k, -inf where it has none; ``live`` (B, n), where there is a term: one that
        counts comes after k. A score that is NaN or infinite reaches its own prompt only.
    """
    n = scores.shape[1]
    later = later_pairs(valid)
    live = later.any(2)
    if top_k is not None:
        live = live & (torch.arange(n, device=scores.device) < top_k)
    if left_out is not None:
        later = later & ~left_out
    taken = later | torch.eye(n, dtype=torch.bool, device=scores.device)
    tau = scores.new_ones(1, 1, 1) if tau is None else tau
    own = scores * tau.diagonal(dim1=1, dim2=2)
    # Entry (k, k) less itself is 0 exactly, so no term is the difference of two large numbers.
    shift = own.detach()
    shift = torch.where(shift.isfinite(), shift, 0.0)
    z = scores[:, None, :] * tau - shift[:, :, None]
    z = z.masked_fill(~taken, -math.inf)
    log_z = z.logsumexp(2)
    if eps > 0:
        log_z = torch.logaddexp(log_z, math.log(eps) - shift)
    terms = torch.where(live, log_z - (own - shift), 0.0)
    log_p = (z - log_z[:, :, None]).masked_fill(~(taken & live[:, :, None]), -math.inf)
    return terms, log_p, live
