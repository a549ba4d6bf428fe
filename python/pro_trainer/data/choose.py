"""Which of many candidates to keep, and how much two texts have in common.

Texts are compared by the pieces of five characters that they are made of, and not by words, so that
it works for languages without spaces, too. Case and the amount of white space do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pro_trainer.data.fields import Text, plain
from pro_trainer.data.options import Select

_PIECE = 5  # characters


def pieces(text: Text) -> frozenset[str]:
    """The different pieces of a text; of a text shorter than a piece, the text itself."""
    letters = " ".join(plain(text).casefold().split())
    return frozenset(letters[i : i + _PIECE] for i in range(max(1, len(letters) - _PIECE + 1)))


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """The share of their pieces that both have (Jaccard): 1 for equal texts, 0 for unlike ones."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def without_near_duplicates(texts: Sequence[Text], share: float, first: int | None) -> list[int]:
    """Indices of texts of which no two have ``share`` of their pieces in common.

    Of those that have, the earlier one stays, and ``first`` before all.
    """
    made_of = [pieces(text) for text in texts]
    kept: list[int] = []
    for i in sorted(range(len(texts)), key=lambda i: i != first):
        if all(overlap(made_of[i], made_of[j]) < share for j in kept):
            kept.append(i)
    return sorted(kept)


def choose(
    order: Sequence[int],
    rewards: Sequence[float] | None,
    limit: int | None,
    keep: int | None = None,
    *,
    select: Select = "spread",
    bottom: int = 0,
    texts: Sequence[Text] = (),
) -> list[int]:
    """``limit`` of the candidates, best first, the best among them.

    ``spread`` keeps the worst, too, and what lies between. Different rewards go first, spread over
    the range of the rewards: each next one is the farthest from those taken. Candidates of a reward
    that is taken come in only where no other is left. Without rewards the candidates taken are
    evenly spaced in rank. ``top`` keeps the best ones. ``diverse`` takes, from the best on, the
    text each time that is least like any taken before (``overlap``).

    Args:
        order: the candidates, best first.
        rewards: of each candidate, by its index; None: only the order is known.
        limit: how many to keep, at least 2; None: all.
        keep: a candidate to keep in any case: it takes the place of the one nearest in rank, and
            that of the best, or of the worst that are asked for, only where there is no other.
        select: which ones.
        bottom: of ``top`` and ``diverse``: how many of the places, fewer than ``limit``, the worst
            ones have.
        texts: of each candidate, by its index; for ``diverse``.
    """
    n = len(order)
    if limit is None or n <= limit:
        return list(order)
    if select == "top":
        places = [*range(limit - bottom), *range(n - bottom, n)]
    elif select == "diverse":
        places = _diverse([texts[i] for i in order], limit, [0, *range(n - bottom, n)])
    elif rewards is None:
        places = _even(range(n), limit)
    else:
        places = _different([np.float32(rewards[i]) for i in order], limit)
    if keep is not None and (place := order.index(keep)) not in places:
        ends = 1 if select == "spread" else bottom  # at the foot, to be left as they are
        nearest = min(places[1 : limit - ends] or places, key=lambda other: abs(other - place))
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


def _diverse(texts: Sequence[Text], limit: int, taken: list[int]) -> list[int]:
    """``limit`` places, those ``taken`` among them; of texts as unlike the better ranked one."""
    made_of = [pieces(text) for text in texts]
    likest = [max(overlap(made_of[p], made_of[q]) for q in taken) for p in range(len(texts))]
    while len(taken) < limit:
        left = [p for p in range(len(texts)) if p not in taken]
        taken = [*taken, min(left, key=lambda p: likest[p])]
        likest = [max(x, overlap(made_of[p], made_of[taken[-1]])) for p, x in enumerate(likest)]
    return sorted(taken)
