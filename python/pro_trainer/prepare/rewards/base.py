"""What every reward is to the recipe, and how one is written: ``[WEIGHT*]WHAT``, its kind told by
its form.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pro_trainer.data.fields import Text
from pro_trainer.data.records import RankedList

Kind = Literal["classifier", "function", "score", "classify", "pooling", "judge"]
Scored = tuple[RankedList, Text]  # a completion of this list

_LARGEST = 3.4e38  # the trainer takes rewards as fp32
_WEIGHTED = re.compile(r"(?:([-+\w.]*)\*)?(.+)")
_FUNCTION = re.compile(r"(.+\.py|[\w.]+):(\w+)")
_SERVER = re.compile(r"(?:(.+)@)?(https?://[^@]+)")
# Where a server is asked for it.
PATHS: dict[Kind, str] = {
    "score": "/score", "classify": "/classify", "pooling": "/pooling",
    "judge": "/chat/completions",
}  # fmt: skip


class Spec(NamedTuple):
    """One reward: ``target`` is a folder or hub name, a module or file, or a URL.

    ``part`` is the function, or the model that a server is asked for ("": its only one).
    """

    weight: float
    kind: Kind
    target: str
    part: str
    name: str


def parse(written: Sequence[str]) -> list[Spec]:
    """What ``--reward`` says; ValueError for a weight, URL or form that cannot be, or one twice."""
    specs = [_spec(text) for text in written]
    short = [spec.name for spec in specs]
    if len(set(short)) < len(short):
        whole = [text.rpartition("*")[2] for text in written]
        if len(set(whole)) < len(whole):
            twice = next(text for text in whole if whole.count(text) > 1)
            raise ValueError(f"reward {twice} was given twice: add up its weights")
        specs = [spec._replace(name=text) for spec, text in zip(specs, whole, strict=True)]
    return specs


def _spec(text: str) -> Spec:
    factor, what = _WEIGHTED.fullmatch(text).groups() if text else (None, "")
    try:
        weight = 1.0 if factor is None else float(factor)
    except ValueError:
        weight = math.nan
    if not what or not math.isfinite(weight) or weight == 0:
        raise ValueError(
            f"reward {text!r}: [WEIGHT*]WHAT was expected with a weight that is a finite number "
            "other than 0"
        )
    if match := _SERVER.fullmatch(what):
        model, url = match[1] or "", match[2].rstrip("/")
        path = urlsplit(url).path
        kind = next((kind for kind, end in PATHS.items() if path.endswith(end)), None)
        if kind is None:
            raise ValueError(
                f"reward {what}: the path of the URL must say what is asked for and end in one of "
                f"{', '.join(PATHS.values())}"
            )
        return Spec(weight, kind, url, model, model.rpartition("/")[2] or kind)
    if "://" in what:
        raise ValueError(f"reward {what}: a URL was expected as [MODEL@]http://HOST:PORT/PATH")
    if match := _FUNCTION.fullmatch(what):
        return Spec(weight, "function", match[1], match[2], match[2])
    name = what.rstrip("/").rpartition("/")[2]
    return Spec(weight, "classifier", what, "", name)


@dataclass(frozen=True)
class Score:
    """A finite number, higher is better, or None; ``notes`` are counted and reported."""

    value: float | None
    notes: tuple[str, ...] = ()


class Scorer(contextlib.AbstractContextManager["Scorer"]):
    """Scores candidates; inside its context, where it holds what takes time to get.

    Attributes:
        name: of its column in ``raw_rewards``.
        weight: in the sum of several.
        failures: requests that failed, by reason; of those answered later, too.
        taken: the data's other columns that it takes, once ``columns`` told it which there are.
    """

    def __init__(self, spec: Spec) -> None:
        self.name, self.weight = spec.name, spec.weight
        self.failures: Counter[str] = Counter()
        self.taken: list[str] = []

    def __exit__(self, *exception: object) -> None:
        """Let go of what it holds."""

    def identity(self) -> dict[str, Any]:
        """What scores depend on beside the options of the command and the files that they name."""
        return {}

    def columns(self, known: Collection[str]) -> None:
        """Hear which other columns the data has; ValueError where it needs another."""

    def score(self, texts: Sequence[Scored]) -> list[Score]:
        """A score for each completion of the list it stands with, in their order.

        The completions of a list stand together.

        Raises:
            ValueError: something that is no score.
        """
        raise NotImplementedError


def as_score(value: Any, what: str) -> float:
    """A finite number that fp32 can hold; ValueError, of ``what``, for anything else."""
    if not isinstance(value, Real) or not abs(float(value)) <= _LARGEST:
        raise ValueError(f"{what}: a finite number was expected, got {value!r:.80}")
    return float(value)


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
