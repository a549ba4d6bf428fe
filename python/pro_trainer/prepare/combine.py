"""From the scores of several rewards to one reward a candidate, within one list."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pro_trainer.data.fields import Text
from pro_trainer.data.similarity import overlap, pieces

Normalize = Literal["none", "zscore", "rank"]


def combined(
    raw: Mapping[str, Sequence[float]],
    weights: Mapping[str, float],
    lengths: Sequence[int],
    normalize: Normalize = "none",
    length_penalty: float = 0.0,
) -> list[float]:
    """One number for each candidate: the weighted sum of the scores in ``raw``, less the penalty.

    ``normalize``: what is made of the scores that a reward gives to a list before they are
    weighted: nothing, (x - mean) / standard deviation, or the share of the other candidates that a
    candidate beats (ties count half). ``length_penalty``: taken off for each of the ``lengths``.
    """
    parts = {name: _NORMALIZED[normalize](scores) for name, scores in raw.items()}
    return [
        sum(weights[name] * part[i] for name, part in parts.items())
        - (length_penalty * length if length_penalty else 0.0)
        for i, length in enumerate(lengths)
    ]


def _zscore(scores: Sequence[float]) -> list[float]:
    if min(scores) == max(scores):  # their mean may be off by rounding, which is no deviation
        return [0.0] * len(scores)
    mean = math.fsum(scores) / len(scores)
    deviation = math.hypot(*(score - mean for score in scores)) / math.sqrt(len(scores))
    return [(score - mean) / deviation for score in scores]


def _rank(scores: Sequence[float]) -> list[float]:
    others = max(1, len(scores) - 1)
    return [
        (sum(x < score for x in scores) + (sum(x == score for x in scores) - 1) / 2) / others
        for score in scores
    ]


_NORMALIZED = {"none": list, "zscore": _zscore, "rank": _rank}


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
