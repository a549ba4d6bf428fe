"""The candidates of one list on their way through the recipe, and one reward of several scores."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pro_trainer.data.fields import Text, plain
from pro_trainer.data.lists import select
from pro_trainer.data.records import RankedList

DATA = "data"  # the source of candidates that no generator made
Normalize = Literal["none", "zscore", "rank"]
Counts = defaultdict[str, Counter[str]]


@dataclass
class Pool:
    """The candidates of one list, and what happened on the way.

    Attributes:
        given: the list of the data.
        ranked: as it is now; its ``sft_index`` is what the data prefers (chosen), None: lost.
        sources: of each candidate.
        samples: of each generator.
        lost: candidates that are no longer there, by reason.
        notes: what each reward says, by its name.
    """

    given: RankedList
    ranked: RankedList
    sources: list[str]
    samples: Counts = field(default_factory=lambda: defaultdict(Counter))
    lost: Counter[str] = field(default_factory=Counter)
    notes: Counts = field(default_factory=lambda: defaultdict(Counter))

    @classmethod
    def of(cls, ranked: RankedList) -> Pool:
        """The candidates of the data; none of them is chosen where there are none."""
        chosen = ranked.sft_index
        if chosen is None and ranked.completions:
            chosen = ranked.best_first()[0]
        now = replace(ranked, sft_index=chosen)
        return cls(ranked, now, [DATA] * len(ranked.completions))

    @property
    def chosen(self) -> int | None:
        """Index of the candidate that the data prefers."""
        return self.ranked.sft_index

    def extend(self, texts: Sequence[str], source: str) -> None:
        """Add samples that are neither empty nor there already (white space around aside)."""
        seen = {_key(completion) for completion in self.ranked.completions}
        counts = self.samples[source]
        for text in texts:
            counts["made"] += 1
            completion = self.in_form(text)
            if not text.strip():
                counts["empty"] += 1
            elif _key(completion) in seen:
                counts["repeated"] += 1
            else:
                seen.add(_key(completion))
                self.add([completion], source)

    def add(self, completions: Sequence[Text], source: str) -> None:
        """Add candidates as they are; rewards of the others are none of all."""
        texts = (*self.ranked.completions, *completions)
        self.ranked = replace(self.ranked, completions=texts, rewards=None, raw_rewards={})
        self.sources += [source] * len(completions)

    def keep(self, indices: Sequence[int], why: str) -> None:
        """Lose the other candidates."""
        if lost := len(self.sources) - len(indices):
            self.lost[why] += lost
        self.ranked = select(self.ranked, indices)
        self.sources = [self.sources[i] for i in indices]

    def lengths(self) -> list[int]:
        """Of the completions, in characters."""
        return [len(plain(completion)) for completion in self.ranked.completions]

    def in_form(self, text: str) -> Text:
        """A sample in the form of what is there: text, or one message."""
        if isinstance((*self.ranked.completions, self.ranked.prompts[0])[0], str):
            return text.rstrip()
        return ({"role": "assistant", "content": text.strip()},)


def _key(completion: Text) -> object:
    if isinstance(completion, str):
        return completion.strip()
    return json.dumps([m | {"content": m["content"].strip()} for m in completion], sort_keys=True)


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
