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
        tau: the mass that rows were allowed to lose on average, or "auto".
        dropped_mass: (N,) fp32, the probability that each scored row lost; under a softcap every
            probability counts by the softcap's slope at its logit.
        dropped_weight: (N,) fp32; times the rows' weights, its norm is the bound of dW.
        dropped_hidden: (N,) fp32, bound of the norm of what each row of dZ0 W lost.
        kept: (N,) fp32, the share of vocabulary columns that stayed in each row's gradient.
        rows: (N,) rows of the flattened hidden states; None: row i is token i.
        row_weights: (N,) ``d loss / d log-prob`` for an upstream gradient of 1.
    """

    tau: float | str
    dropped_mass: Tensor
    dropped_weight: Tensor
    dropped_hidden: Tensor
    kept: Tensor
    rows: Tensor | None
    row_weights: Tensor

    @torch.no_grad()
    def error_bounds(self) -> tuple[Tensor, Tensor]:
        """Upper bounds of the Frobenius norms of the errors of dHidden and dW, 0-dim, in fp32.

        For an upstream gradient of 1, against the gradients without a filter from the same stored
        dZ0, in exact arithmetic.
        """
        size = self.row_weights.abs()
        lost = size * self.dropped_hidden
        if self.rows is not None:  # errors of tokens that share a row of the hidden states add up
            _, place = self.rows.unique(return_inverse=True)
            lost = torch.zeros_like(lost).index_add_(0, place, lost)
        return _norm(lost), _norm(size * self.dropped_weight)


def _norm(x: Tensor) -> Tensor:
    """The norm of ``x (N,)``, of numbers near 1, whose squares stay in the range of fp32."""
    limits = torch.finfo(x.dtype)
    largest = x.max().clamp(limits.tiny, limits.max) if x.numel() else x.new_ones(())
    return torch.linalg.vector_norm(x / largest) * largest


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


class TopK(NamedTuple):
    """The k most likely tokens of each row, the likeliest first; without gradient.

    They have the largest logits, as the call holds these: rounded, where the head's dtype has 16
    bits (``head_dtype``). Ties are in the order of ``torch.topk``, and for k = 1 the first wins.
    Log-probs are of the same logits, but for that of the target, which is the one returned for it.

    Attributes:
        logps: (..., k) fp32 (fp64); 0 where nothing is scored.
        ids: (..., k) int64; -1 where nothing is scored.
    """

    logps: Tensor
    ids: Tensor


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
