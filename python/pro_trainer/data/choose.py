"""Which of many candidates to keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose(
    order: Sequence[int],
    rewards: Sequence[float] | None,
    limit: int | None,
    keep: int | None = None,
) -> list[int]:
    """``limit`` of the candidates, best first, the best and the worst among them.

    Different rewards go first, spread over the range of the rewards: each next one is the farthest
    from those taken. Candidates of a reward that is taken come in only where no other is left.
    Without rewards the candidates taken are evenly spaced in rank.

    Args:
        order: the candidates, best first.
        rewards: of each candidate, by its index; None: only the order is known.
        limit: how many to keep, at least 2; None: all.
        keep: a candidate to keep in any case: it takes the place of the one nearest in rank, and
            that of the best or the worst only where there is nothing between.
    """
    n = len(order)
    if limit is None or n <= limit:
        return list(order)
    if rewards is None:
        places = _even(range(n), limit)
    else:
        places = _different([np.float32(rewards[i]) for i in order], limit)
    if keep is not None and (place := order.index(keep)) not in places:
        nearest = min(places[1:-1] or places, key=lambda other: abs(other - place))
        places[places.index(nearest)] = place
    return [order[place] for place in sorted(places)]


def _even(places: Sequence[int], count: int) -> list[int]:
    """So many of the places, the first and the last among them where there are two."""
    last = len(places) - 1
    return [places[round(i * last / max(1, count - 1))] for i in range(count)]


def _different(rewards: Sequence[float], limit: int) -> list[int]:
    """Places of ``limit`` rewards, which descend; the loss tells them apart as fp32."""
    first = [p for p in range(len(rewards)) if p == 0 or rewards[p] != rewards[p - 1]]
    if len(first) <= limit:
        tied = [p for p in range(len(rewards)) if p not in first]
        return sorted(first + _even(tied, limit - len(first)))
    taken = [first[0], first[-1]]
    while len(taken) < limit:
        left = [p for p in first if p not in taken]
        taken.append(max(left, key=lambda p: min(abs(rewards[p] - rewards[q]) for q in taken)))
    return sorted(taken)
