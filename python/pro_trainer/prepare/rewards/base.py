"""What every reward is to the recipe."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from pro_trainer.data.fields import Text
from pro_trainer.data.records import RankedList

_LARGEST = 3.4e38  # the trainer takes rewards as fp32


@dataclass(frozen=True)
class Score:
    """A finite number, higher is better, or None; ``notes`` are counted and reported."""

    value: float | None
    notes: tuple[str, ...] = ()


class Scorer(contextlib.AbstractContextManager["Scorer"]):
    """Scores candidates; inside its context, where it holds what takes time to get.

    Attributes:
        name: of its column in ``raw_rewards``.
        failures: requests that failed, by reason; of those answered later, too.
        taken: the data's other columns that it takes, once ``columns`` told it which there are.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures: Counter[str] = Counter()
        self.taken: list[str] = []

    def __exit__(self, *exception: object) -> None:
        """Let go of what it holds."""

    def identity(self) -> dict[str, Any]:
        """What scores depend on beside the options of the command and the files that they name."""
        return {}

    def columns(self, known: Collection[str]) -> None:
        """Hear which other columns the data has.

        Raises:
            ValueError: it needs one that is not among those known.
        """

    def score(self, texts: Sequence[tuple[RankedList, Text]]) -> list[Score]:
        """A score for each completion of the list it stands with, in their order.

        The completions of a list stand together.

        Raises:
            ValueError: something that is no score.
        """
        raise NotImplementedError


def as_score(value: Any, what: str) -> float:
    """A finite number that fp32 can hold.

    Raises:
        ValueError: something else; ``what`` says of what.
    """
    if not isinstance(value, Real) or not abs(float(value)) <= _LARGEST:
        raise ValueError(f"{what}: a finite number was expected, got {value!r:.80}")
    return float(value)


def is_finite(value: float) -> bool:
    """Whether ``as_score`` takes it."""
    return math.isfinite(value) and abs(value) <= _LARGEST


def excerpt(ranked: RankedList, completion: Text) -> str:
    """Where a text stands and how it begins, for messages."""
    return f"{ranked.where or 'a list'}, the completion {completion!r:.60}"


def readable(text: Text) -> str:
    """A text as a reader without a chat template sees it: speakers where there are several."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)
