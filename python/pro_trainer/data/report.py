"""What the data held, counted while it streams by: bounded in memory, printed before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pro_trainer.data.fields import plain
from pro_trainer.data.rankings import Numbers, Rankings
from pro_trainer.data.records import RankedList

_SHOWN_BAD_LINES = 5


def counted(counts: Mapping[str, int], what: str = "") -> list[str]:
    """Lines that say how many of ``what`` there are."""
    return [f"{what}{why}: {count}" for why, count in counts.items()]


@dataclass
class DataReport:
    """What was read and what was left out.

    ``records = lists + all of dropped``; malformed records (``bad_lines``) come on top. Lengths are
    those of the kept lists before they are cut, so that ``max_length`` can be chosen from them.
    ``notes`` are sentences with a count, ``once`` sentences without, ``unused`` columns that
    nothing uses.
    """

    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    lists: int = 0
    candidates: Counter[int] = field(default_factory=Counter)
    with_rewards: int = 0
    tied: int = 0
    marked: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_completions: Counter[str] = field(default_factory=Counter)
    sft_marks_dropped: int = 0
    bad_lines: int = 0
    bad_line_messages: list[str] = field(default_factory=list)
    prompts_cut: int = 0
    completions_cut: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    once: dict[str, None] = field(default_factory=dict)
    prompt_lengths: Numbers = field(default_factory=Numbers)
    completion_lengths: Numbers = field(default_factory=Numbers)
    rankings: Rankings = field(default_factory=Rankings)

    def say(self, sentence: str) -> None:
        """Something that holds for all of the data."""
        self.once[sentence] = None

    def uncount(self, ranked: RankedList, why: str) -> None:
        """Move a list that was counted as kept to those dropped, for a later stage's reason."""
        self.count(ranked, -1)
        self.dropped[why] += 1

    def bad_line(self, message: str) -> None:
        """Count a malformed record; the first few messages are kept to be shown."""
        self.bad_lines += 1
        if len(self.bad_line_messages) < _SHOWN_BAD_LINES:
            self.bad_line_messages.append(message)

    def uncount_as_bad(self, ranked: RankedList, message: str) -> None:
        """Move a list that was counted as kept to the malformed records."""
        self.count(ranked, -1)
        self.records -= 1
        self.bad_line(message)

    def text(self) -> str:
        """The report as lines to print; a count that is 0 is left out."""
        sizes = ", ".join(f"{count} of {n}" for n, count in sorted(self.candidates.items()))
        formats = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items()))
        lines = [
            f"records read: {self.records} ({formats or 'none'})",
            f"lists kept: {self.lists} ({sizes or 'none'} candidates)",
            f"with rewards: {self.with_rewards}, of these with ties: {self.tied}; "
            f"in order only: {self.order_only}",
        ]
        if self.marked:
            lines.append(f"with desirable candidates marked: {self.marked}")
        for name, lengths in self._lengths().items():
            if lengths is not None:
                shown = ", ".join(f"{key} {value}" for key, value in lengths.items())
                lines.append(f"{name.replace('_', ' ')}: {shown}")
        lines += self.rankings.text()
        lines += counted(self.dropped, "lists dropped, ")
        lines += counted(self.dropped_completions, "completions dropped, ")
        if marks := self.sft_marks_dropped:
            lines.append(f"sft_index marks a dropped completion, the best is used: {marks}")
        if (prompts := self.prompts_cut) or self.completions_cut:
            lines.append(f"cut to length: {prompts} prompts, {self.completions_cut} completions")
        lines += counted(self.notes)
        lines += self.once
        if self.unused:
            columns = ", ".join(f"{name} ({count})" for name, count in self.unused.items())
            lines.append(f"columns that nothing uses (records that have them): {columns}")
        if self.bad_lines:
            lines.append(f"malformed records skipped: {self.bad_lines}")
            lines += [f"  {message}" for message in self.bad_line_messages]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        del found["prompt_lengths"], found["completion_lengths"]
        found["candidates"] = {str(n): count for n, count in sorted(self.candidates.items())}
        found["order_only"] = self.order_only
        found["rankings"] = self.rankings.as_dict()
        return found | {"once": list(self.once)} | self._lengths()

    @property
    def order_only(self) -> int:
        """Lists that have candidates and no rewards."""
        return self.lists - self.with_rewards - self.candidates[0]

    def _lengths(self) -> dict[str, dict[str, float] | None]:
        return {
            "prompt_tokens": self.prompt_lengths.summary(),
            "completion_tokens": self.completion_lengths.summary(),
        }

    def count(self, ranked: RankedList, sign: int = 1) -> None:
        """Count a list that is kept, or (``sign`` -1) uncount it."""
        n = len(ranked.completions)
        self.lists += sign
        self.candidates[n] += sign
        if not self.candidates[n]:
            del self.candidates[n]
        self.marked += sign * (ranked.desirable is not None)
        self.rankings.add(ranked.rewards, [len(plain(c)) for c in ranked.completions], sign)
        if ranked.rewards is not None:
            self.with_rewards += sign
            self.tied += sign * (len(set(ranked.rewards)) < n)
