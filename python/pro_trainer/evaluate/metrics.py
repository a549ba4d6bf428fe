"""How well scores rank the candidates of each list, from host tensors and with no loop over lists.

What each number means, over the lists that hold at least one pair of different reward:

* ``pairwise_accuracy``: share of all pairs of different reward, over all lists together, whose
  better candidate has the higher score.
* ``top1_accuracy``: share of the lists whose highest-scored candidate has the highest reward.
* ``kendall_tau``: Kendall's tau-b, (C - D) / sqrt(pairs untied in reward * pairs untied in score)
  with C pairs in the right and D in the wrong order; mean over the lists where it is defined, which
  leaves out those whose scores are all equal.
* ``ndcg``: DCG over the DCG of the best order. The gain of a candidate is linear, its reward minus
  the smallest reward of its list (so it is 0 for the worst and never negative), and its discount
  is 1 / log2(1 + place). Candidates of equal score share the mean of their places' discounts.
* ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``: score of
  the better and of the worse candidate, their difference, and whether it is positive; means over
  the pairs of a list, then over lists. TRL's names, with the meaning of ``pro_kernels.losses``.
* ``best_margin``: mean score of the best candidates minus that of the rest; ``best_accuracy``:
  share of the pairs (best, rest) in the right order.

Equal scores are never counted as right, so that the order of storage (often best first) earns
nothing.

Shapes: L lists, n places for candidates (``mask`` tells which are taken).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

_COMPARISONS_AT_ONCE = 1 << 22  # bounds the (lists, n, n) tensors, whatever L is

Row = dict[str, float]


class ListStatistics(NamedTuple):
    """Each (L,): int64 counts, and float64 numbers that are NaN where they are undefined."""

    candidates: Tensor
    pairs: Tensor  # of different reward
    right: Tensor  # of these, the better one has the higher score
    top1: Tensor
    kendall_tau: Tensor
    ndcg: Tensor
    chosen: Tensor
    rejected: Tensor
    best_margin: Tensor
    best_accuracy: Tensor

    def select(self, lists: Tensor) -> ListStatistics:
        """The statistics of some lists, given as (L,) bool."""
        return ListStatistics(*(values[lists] for values in self))

    def metrics(self) -> Row:
        """The metrics of the module's docstring, with ``pairs`` and ``prompts`` counted.

        NaN where no list defines a metric.
        """
        ranks = self.pairs > 0
        pairs, right = int(self.pairs.sum()), int(self.right.sum())
        tau = self.kendall_tau
        return {
            "pairwise_accuracy": right / pairs if pairs else math.nan,
            "top1_accuracy": _mean(self.top1[ranks]),
            "kendall_tau": _mean(tau[~tau.isnan()]),
            "ndcg": _mean(self.ndcg[ranks]),
            "rewards/chosen": _mean(self.chosen[ranks]),
            "rewards/rejected": _mean(self.rejected[ranks]),
            "rewards/margins": _mean((self.chosen - self.rejected)[ranks]),
            "rewards/accuracies": _mean((self.right.double() / self.pairs)[ranks]),
            "best_margin": _mean(self.best_margin[ranks]),
            "best_accuracy": _mean(self.best_accuracy[ranks]),
            "pairs": pairs,
            "prompts": len(self.pairs),
        }


def ranking_metrics(
    scores: Tensor,  # (L, n) real
    rewards: Tensor,  # (L, n) real
    mask: Tensor,  # (L, n) bool, True where there is a candidate
) -> Row:
    """Metrics by name, as the module's docstring defines them; NaN where no list defines one.

    Raises:
        ValueError: shapes or dtypes that do not fit, NaN scores, rewards that are not finite.
    """
    return list_statistics(scores, rewards, mask).metrics()


def list_statistics(
    scores: Tensor,  # (L, n) real
    rewards: Tensor,  # (L, n) real
    mask: Tensor,  # (L, n) bool
) -> ListStatistics:
    """What ``ranking_metrics`` averages, list by list.

    Raises:
        ValueError: as ``ranking_metrics``.
    """
    parts = [_statistics(*piece) for piece in _pieces(scores, rewards, mask)]
    return ListStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


def metrics_by_candidates(statistics: ListStatistics) -> list[Row]:
    """Metrics of the lists of each size, smallest first; ``candidates`` names the size."""
    sizes = statistics.candidates.unique().tolist()
    return [
        {"candidates": n, **statistics.select(statistics.candidates == n).metrics()} for n in sizes
    ]


def accuracy_by_reward_gap(
    scores: Tensor,  # (L, n) real
    rewards: Tensor,  # (L, n) real
    mask: Tensor,  # (L, n) bool
    quantiles: int = 4,
) -> list[Row]:
    """Pairwise accuracy of the pairs in each quantile of their difference in reward.

    Smallest differences first. Each row has ``gap_from`` and ``gap_to`` (smallest and largest
    difference in it, units of the reward), ``pairs`` and ``pairwise_accuracy``. Equal differences
    stay together, so there are fewer rows than ``quantiles`` where few different ones exist, and
    none without pairs.

    Raises:
        ValueError: ``quantiles`` below 1, or as ``ranking_metrics``.
    """
    if quantiles < 1:
        raise ValueError(f"quantiles must be at least 1, got {quantiles}")
    gaps, rights = [], []
    for s, r, present in _pieces(scores, rewards, mask):
        better = _above(r, present)
        gaps.append((r[:, :, None] - r[:, None, :])[better])
        rights.append(_above(s, present)[better])
    gap, order = torch.cat(gaps).sort()
    right = torch.cat(rights)[order]
    if not len(gap):
        return []
    cuts = gap[[math.ceil(len(gap) * k / quantiles) - 1 for k in range(1, quantiles + 1)]]
    ends = torch.searchsorted(gap, cuts.unique(), right=True).tolist()
    return [
        {
            "gap_from": gap[start].item(),
            "gap_to": gap[end - 1].item(),
            "pairs": end - start,
            "pairwise_accuracy": right[start:end].double().mean().item(),
        }
        for start, end in itertools.pairwise([0, *ends])
    ]


def score_by_rank(
    scores: Tensor,  # (L, n) real
    rewards: Tensor,  # (L, n) real
    mask: Tensor,  # (L, n) bool
) -> list[Row]:
    """Mean score of the candidates of each rank, for the lists of each size.

    The mean of its list is taken off each score first: lists differ far more in level than their
    candidates differ among each other. ``rank`` is 1 plus how many candidates have a higher reward
    (equal rewards share a rank). Rows have ``candidates``, ``rank``, ``score``, ``standard_error``
    (of the mean; NaN for a single candidate) and ``count``.

    Raises:
        ValueError: as ``ranking_metrics``.
    """
    better = [_above(r, present).sum(1) for _, r, present in _pieces(scores, rewards, mask)]
    ranks, scores = 1 + torch.cat(better), scores.double()
    sizes = mask.sum(1, keepdim=True)
    centred = scores - torch.where(mask, scores, 0.0).sum(1, keepdim=True) / sizes.clamp(min=1)
    rows: list[Row] = []
    for n in sizes.unique().tolist():
        for rank in range(1, n + 1):
            values = centred[mask & (sizes == n) & (ranks == rank)]
            if count := len(values):
                error = values.std().item() / math.sqrt(count) if count > 1 else math.nan
                row = {"candidates": n, "rank": rank, "score": values.mean().item()}
                rows.append({**row, "standard_error": error, "count": count})
    return rows


def _statistics(scores: Tensor, rewards: Tensor, present: Tensor) -> ListStatistics:
    better = _above(rewards, present)  # (L, n, n): entry (i, j) is whether i is better than j
    higher = _above(scores, present)
    right = better & higher
    pairs, num_right = better.sum((1, 2)), right.sum((1, 2))
    wrong = (better & higher.transpose(1, 2)).sum((1, 2))
    untied = (pairs * higher.sum((1, 2))).double().sqrt()

    best = present & ~better.any(1)
    rest = present & ~best
    top = [scores.masked_fill(~group, -torch.inf).amax(1) for group in (best, rest)]
    no_pair = pairs == 0
    return ListStatistics(
        candidates=present.sum(1),
        pairs=pairs,
        right=num_right,
        top1=(top[0] > top[1]).double().masked_fill(no_pair, math.nan),
        kendall_tau=(num_right - wrong) / untied,
        ndcg=_ndcg(scores, rewards, present, higher),
        chosen=_row_mean(scores, better.sum(2)),
        rejected=_row_mean(scores, better.sum(1)),
        best_margin=_row_mean(scores, best) - _row_mean(scores, rest),
        best_accuracy=(right & best[:, :, None]).sum((1, 2)).double() / (best.sum(1) * rest.sum(1)),
    )


def _ndcg(scores: Tensor, rewards: Tensor, present: Tensor, higher: Tensor) -> Tensor:
    n = scores.shape[1]
    discounts = 1 / torch.arange(2, n + 2, dtype=torch.float64).log2()
    cumulative = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])
    before = higher.sum(1)  # (L, n): candidates placed above
    tied = ((scores[:, :, None] == scores[:, None, :]) & present[:, :, None]).sum(1).clamp(min=1)
    last = (before + tied).clamp(max=n)  # places of absent candidates have no meaning and no gain
    discount = (cumulative[last] - cumulative[before]) / tied
    least = rewards.masked_fill(~present, torch.inf).amin(1, keepdim=True)
    gain = torch.where(present, rewards - least, 0.0)
    ideal = (gain.sort(dim=1, descending=True).values * discounts).sum(1)
    return (gain * discount).sum(1) / ideal


def _above(values: Tensor, present: Tensor) -> Tensor:
    """(L, n) -> (L, n, n) bool: entry (i, j) is whether value i is above value j, both present."""
    both = present[:, :, None] & present[:, None, :]
    return both & (values[:, :, None] > values[:, None, :])


def _row_mean(values: Tensor, weights: Tensor) -> Tensor:
    """(L, n), (L, n) -> (L,): weighted means; NaN where all weights are 0."""
    return torch.where(weights > 0, values * weights, 0.0).sum(1) / weights.sum(1)


def _mean(values: Tensor) -> float:
    return values.mean().item()


def _pieces(scores: Tensor, rewards: Tensor, mask: Tensor) -> list[tuple[Tensor, ...]]:
    """Scores and rewards as float64, and the mask, so many lists at a time; or ValueError."""
    if scores.dim() != 2 or not scores.shape == rewards.shape == mask.shape:
        raise ValueError(
            "scores, rewards and mask must all be (L, n), got "
            f"{tuple(scores.shape)}, {tuple(rewards.shape)} and {tuple(mask.shape)}"
        )
    if not scores.shape[1]:
        raise ValueError(f"lists need places for candidates, got shape {tuple(scores.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    for name, bad in (("scores", scores.isnan()), ("rewards", ~rewards.isfinite())):
        lists = (bad & mask).any(1).nonzero()[:, 0].tolist()
        if lists:
            raise ValueError(
                f"{name} of {len(lists)} of {len(mask)} lists are not numbers, first in list "
                f"{lists[0]}"
            )
    lists = max(1, _COMPARISONS_AT_ONCE // scores.shape[1] ** 2)
    parts = (x.split(lists) for x in (scores.double(), rewards.double(), mask))
    return list(zip(*parts, strict=True))
