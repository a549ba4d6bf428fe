"""The candidates of one list on their way through the recipe."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pro_trainer.data.fields import Text, plain
from pro_trainer.data.lists import select
from pro_trainer.data.records import RankedList

DATA = "data"  # the source of candidates that no generator made
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
