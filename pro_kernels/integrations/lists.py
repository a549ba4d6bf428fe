"""Ranked lists for a trainer of single rows: its collator's batch as an attached model takes it.

Legend: ``B`` prompts of a batch, ``n`` candidates of the longest list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pro_kernels.losses.ranked import preference_metrics, ranked_batch

Row = Mapping[str, Any]


def why_unusable(rewards: Sequence[float | None]) -> str | None:
    """Why there is nothing to rank in a list with these rewards (all None: best first)."""
    if len(rewards) < 2:
        return "fewer than two candidates"
    if rewards[0] is not None and len(set(rewards)) == 1:
        return "all rewards are equal"
    return None


def collate_lists(
    collate: Callable[[list[Row]], Mapping[str, Any]],  # makes a batch of rows, with ``labels``
    lists: Sequence[Sequence[Row]],  # of each prompt's candidates
    rewards: Sequence[Sequence[float | None]],  # None for each where the first is the best
) -> dict[str, Any]:
    """A batch for a model of ``attach(loss="ranking")``: n rows a prompt.

    With ``candidate_mask`` (B, n), which comes first, as trainers count a batch by its first
    tensor; and ``rewards`` (B, n) or ``num_candidates``. A list shorter than n has its last row
    again, which the mask leaves out. ValueError: lists with rewards and lists without.
    """
    n = max(map(len, lists))
    present = torch.tensor([[i < len(rows) for i in range(n)] for rows in lists])
    found: dict[str, Any] = {"candidate_mask": present}
    unknown = {reward is None for values in rewards for reward in values}
    if len(unknown) > 1:
        raise ValueError("a batch needs lists that all have rewards or all have none, got both")
    if True in unknown:
        found["num_candidates"] = n
    else:
        found["rewards"] = torch.tensor([[*r, *[0.0] * (n - len(r))] for r in rewards])
    return {**found, **collate([rows[min(i, len(rows) - 1)] for rows in lists for i in range(n)])}


def list_metrics(out: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The terms of an attached model's loss, and TRL's metrics over the pairs of each list."""
    ranked = ranked_batch(out.logps, out.lengths, batch.get("rewards"), None, None)
    terms = {"rank_loss": out.rank_losses.sum(), "sft_loss": out.sft_loss}
    return {**terms, **preference_metrics(ranked, out.scores)}
