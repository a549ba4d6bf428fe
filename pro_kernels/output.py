"""The result of the PRO losses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PROOutput(NamedTuple):
    """What the PRO losses return; all but ``loss`` are detached.

    Attributes:
        loss: scalar, fp32 (fp64 for fp64 inputs).
        rank_losses: (n - 1,), the k-th rank term, averaged over prompts.
        sft_loss: scalar, the SFT term with its weight, averaged over prompts.
        scores: (B, n), S / m (or S), by column; 0 where nothing is scored.
        logps: (B, n), S, the summed log-probs, by column.
        lengths: (B, n) int64, m, the scored tokens, by column.
    """

    loss: Tensor
    rank_losses: Tensor
    sft_loss: Tensor
    scores: Tensor
    logps: Tensor
    lengths: Tensor
