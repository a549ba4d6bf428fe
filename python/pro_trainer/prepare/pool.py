"""The candidates of one list on their way through the recipe."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pro_trainer.data.fields import Text, plain
from pro_trainer.data.records import RankedList

DATA = "data"  # the source of candidates that no generator made


@dataclass
class Pool:
    """The candidates of one list, and what happened on the way.

    Attributes:
        chosen: index of the candidate that the data prefers; None: it was lost.
        raw: the scores that each reward gave, by its name.
        samples: of each generator.
        lost: candidates that are no longer there, by reason.
        notes: what each reward says, by its name.
    """

    prompt: Text
    completions: list[Text]
    sources: list[str]
    rewards: list[float] | None
    chosen: int | None
    ranked: RankedList
    raw: dict[str, list[float]] = field(default_factory=dict)
    samples: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    lost: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    @classmethod
    def of(cls, ranked: RankedList) -> Pool:
        """The candidates of the data; none of them is chosen where there are none."""
        rewards = None if ranked.rewards is None else list(ranked.rewards)
        chosen = ranked.sft_index
        if chosen is None and ranked.completions:
            chosen = 0 if rewards is None else rewards.index(max(rewards))
        sources = [DATA] * len(ranked.completions)
        completions = list(ranked.completions)
        raw = {name: list(scores) for name, scores in ranked.raw_rewards.items()}
        return cls(ranked.prompts[0], completions, sources, rewards, chosen, ranked, raw)

    def extend(self, texts: Sequence[str], source: str) -> None:
        """Add samples that are neither empty nor there already (white space around aside)."""
        seen = {_key(completion) for completion in self.completions}
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
                self.completions.append(completion)
                self.sources.append(source)

    def keep(self, indices: Sequence[int], why: str) -> None:
        """Lose the other candidates."""
        if lost := len(self.completions) - len(indices):
            self.lost[why] += lost
        if self.chosen is not None:
            self.chosen = indices.index(self.chosen) if self.chosen in indices else None
        self.completions = [self.completions[i] for i in indices]
        self.sources = [self.sources[i] for i in indices]
        if self.rewards is not None:
            self.rewards = [self.rewards[i] for i in indices]
        self.raw = {name: [scores[i] for i in indices] for name, scores in self.raw.items()}

    def lengths(self) -> list[int]:
        """Of the completions, in characters."""
        return [len(plain(completion)) for completion in self.completions]

    def order(self) -> list[int]:
        """Indices, best first; of equal rewards the earlier one."""
        indices = range(len(self.completions))
        if self.rewards is None:
            return list(indices)
        return sorted(indices, key=lambda i: -self.rewards[i])

    def in_form(self, text: str) -> Text:
        """A sample in the form of what is there: text, or one message."""
        if isinstance((*self.completions, self.prompt)[0], str):
            return text.rstrip()
        return ({"role": "assistant", "content": text.strip()},)


def _key(completion: Text) -> object:
    if isinstance(completion, str):
        return completion.strip()
    return json.dumps([m | {"content": m["content"].strip()} for m in completion], sort_keys=True)
