"""Two models on the same lists: what each measures, and how sure the difference is.

Every measure is a ratio of sums over lists (pairs in the right order over pairs, a list's tau over
one), so one resampling of lists serves all. The interval is the percentile bootstrap over lists
(Efron 1979), paired: both models are measured on the same resampled lists.

Shapes: L lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pro_trainer.evaluate.metrics import ListStatistics

RESAMPLES = 2000
LEVEL = 0.95  # of the intervals
_DRAWN_AT_ONCE = 1 << 22  # bounds the memory, whatever L is


class Difference(NamedTuple):
    """A measure of both models, and ``low`` to ``high``: the interval of tuned minus base."""

    base: float
    tuned: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """Tuned minus base."""
        return self.tuned - self.base


def compare(
    base: ListStatistics,
    tuned: ListStatistics,
    losses: tuple[Tensor, Tensor] | None = None,  # (L,) each
    weights: Tensor | None = None,  # (L,)
) -> dict[str, Difference]:
    """Pairwise accuracy, top-1 accuracy, Kendall's tau-b, NDCG and, where given, loss.

    ``weights`` are those of the lists in the mean loss; None: all weigh 1.

    A measure without any list that defines it is left out.
    """
    ranks = base.pairs > 0
    measures = {
        "pairwise_accuracy": (base.right, tuned.right, base.pairs),
        "top1_accuracy": (base.top1, tuned.top1, ranks),
        "kendall_tau": (base.kendall_tau, tuned.kendall_tau, ranks),
        "ndcg": (base.ndcg, tuned.ndcg, ranks),
    }
    if losses is not None:
        weights = torch.ones_like(losses[0]) if weights is None else weights
        measures["loss"] = (losses[0] * weights, losses[1] * weights, weights)
    return {name: found for name, sums in measures.items() if (found := difference(*sums))}


def intervals(statistics: ListStatistics) -> dict[str, tuple[float, float, float]]:
    """The measures of one model: value, and the ends of its interval."""
    kept = statistics[:2]  # candidates and pairs
    nothing = ListStatistics(*kept, *map(torch.zeros_like, statistics[2:]))
    found = compare(nothing, statistics)
    return {name: (x.tuned, x.low, x.high) for name, x in found.items()}


def as_rows(found: Mapping[str, Difference]) -> dict[str, dict[str, float]]:
    """For JSON: ``base``, ``tuned``, ``difference``, ``low`` and ``high`` by measure."""
    return {name: {**x._asdict(), "difference": x.change} for name, x in found.items()}


def difference(
    base: Tensor,  # (L,)
    tuned: Tensor,  # (L,)
    weight: Tensor,  # (L,)
) -> Difference | None:
    """Of sums over lists, divided by that of ``weight``; None where no list defines both.

    A list of weight 0, or with a number that is not finite, does not count.
    """
    base, tuned, weight = base.double(), tuned.double(), weight.double()
    counts = (weight > 0) & base.isfinite() & tuned.isfinite()
    base, tuned, weight = base[counts], tuned[counts], weight[counts]
    if not len(weight):
        return None
    generator = torch.Generator().manual_seed(0)  # the same lists for the same data
    rounds = max(1, _DRAWN_AT_ONCE // len(weight))
    parts = []
    for done in range(0, RESAMPLES, rounds):
        shape = min(rounds, RESAMPLES - done), len(weight)
        drawn = torch.randint(len(weight), shape, generator=generator)
        parts.append((tuned - base)[drawn].sum(1) / weight[drawn].sum(1))
    differences = torch.cat(parts)
    tail = (1 - LEVEL) / 2
    low, high = differences.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    total = weight.sum()
    return Difference((base.sum() / total).item(), (tuned.sum() / total).item(), low, high)
