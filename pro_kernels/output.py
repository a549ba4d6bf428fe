"""The results of the PRO losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradFilter:
    """What ``grad_filter`` left out of the gradients of one call.

    Bounds and their derivation: ``fused/columns.py``, docs/design.md.

    Attributes:
        tau: the largest mass that a row was allowed to lose.
        dropped_mass: (N,) fp32, the probability that each scored row lost, at most tau; under a
            softcap every probability counts by the softcap's slope at its logit.
        dropped_norm: (N,) fp32, the norm of what each row of dZ0 lost.
        dropped_hidden: (N,) fp32, bound of the norm of what each row of dZ0 W lost.
        rows: (N,) rows of the flattened hidden states; None: row i is token i.
        row_weights: (N,) ``d loss / d log-prob`` for an upstream gradient of 1.
    """

    tau: float
    dropped_mass: Tensor
    dropped_norm: Tensor
    dropped_hidden: Tensor
    rows: Tensor | None
    row_weights: Tensor

    @torch.no_grad()
    def error_bounds(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Upper bounds of the Frobenius norms of the errors of dHidden and dW, 0-dim.

        In fp32, in fp64 for fp64 hidden states. For an upstream gradient of 1, against the
        gradients without a filter from the same stored dZ0, in exact arithmetic.

        Args:
            hidden: (..., H), as given to the loss.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = self.rows
        if rows is None:
            rows = torch.arange(flat.shape[0], device=flat.device)
        wide = torch.promote_types(flat.dtype, torch.float32)  # norms of 16 bits round, or overflow
        size = self.row_weights.abs().to(wide)
        lost = size.new_zeros(flat.shape[0]).index_add_(0, rows, size * self.dropped_hidden)
        norms = _norms(flat, wide)[rows]
        return _norms(lost[None], wide)[0], (size * norms * self.dropped_norm).sum()


def _norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms of the rows; squares are of numbers near 1, so that they stay in the dtype's range."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], dtype=dtype)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True, dtype=dtype)
    limits = torch.finfo(dtype)
    largest.clamp_(limits.tiny, limits.max)
    return torch.linalg.vector_norm(x / largest, dim=1) * largest[:, 0]


class PROOutput(NamedTuple):
    """What the PRO losses return; all but ``loss`` are detached.

    Attributes:
        loss: scalar, fp32 (fp64 for fp64 inputs).
        rank_losses: (n - 1,), the k-th rank term, averaged over prompts.
        sft_loss: scalar, the SFT term with its weight, averaged over prompts.
        scores: (B, n), S / m (or S), by column; 0 where nothing is scored.
        logps: (B, n), S, the summed log-probs, by column.
        lengths: (B, n) int64, m, the scored tokens, by column.
        grad_filter: what ``grad_filter`` left out of the gradients; None without one.
    """

    loss: Tensor
    rank_losses: Tensor
    sft_loss: Tensor
    scores: Tensor
    logps: Tensor
    lengths: Tensor
    grad_filter: GradFilter | None = None


class CrossEntropyOutput(NamedTuple):
    """What ``linear_cross_entropy(..., return_stats=True)`` returns; (...): 0 where not scored.

    Attributes:
        loss: with its z-loss.
        z_loss: what of the loss that is, reduced likewise, detached.
        logps: (...) log-prob of each target, differentiable.
        lse: (...) log-sum-exp of each row's logits, differentiable.
        predicted: (...) int64, the most likely token, -1 where nothing is scored.
    """

    loss: Tensor
    z_loss: Tensor
    logps: Tensor
    lse: Tensor
    predicted: Tensor


class TokenStats(NamedTuple):
    """What ``linear_token_stats`` returns: (...) each, fp32 (fp64), 0 where nothing is scored.

    Attributes:
        logps: log-prob of the target.
        entropy: of the row's distribution, in nats.
        log_sum_sq_probs: ``log sum_v p_v^2``, without gradient; None unless asked for.
        mean_logits: mean over the vocabulary of the logits after scale and softcap, likewise.
        is_top1: bool, whether the target is the most likely, likewise.
    """

    logps: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
