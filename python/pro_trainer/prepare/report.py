"""What ``pro-kernels prepare`` did, counted from the lines it saved.

Nothing is counted on the way, so a run that was cut short reports the same as one that was not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from pro_trainer.data.report import DataReport


@dataclass
class PrepareReport:
    """Counts over all lists.

    Attributes:
        lists: usable lists of the data.
        kept: of these, written.
        dropped: the others, by reason.
        candidates: lists by their number of candidates, as written.
        shorter: lists with fewer candidates than ``ranking_length``.
        samples: by generator: ``made``, of these ``empty`` and ``repeated`` (dropped), and ``cut``
            by length (kept); ``prompts_cut``, prompts that lost their start before the generator;
            ``failed: ...``, samples that did not come from a server, or not whole.
        texts_cut: texts that lost their start before the reward model.
        reward_count: candidates by source, before the ranking was cut to length.
        reward_mean: their mean reward.
        chosen_first: share of lists whose preferred candidate (by the data) the reward model ranks
            first; None without a reward model.
        chosen_first_of_data: the same among the data's own candidates.
        data: the report of reading.
    """

    lists: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    candidates: Counter[int] = field(default_factory=Counter)
    shorter: int = 0
    samples: dict[str, Counter[str]] = field(default_factory=dict)
    texts_cut: int = 0
    reward_count: Counter[str] = field(default_factory=Counter)
    reward_mean: dict[str, float] = field(default_factory=dict)
    chosen_first: float | None = None
    chosen_first_of_data: float | None = None
    data: DataReport = field(default_factory=DataReport)

    @classmethod
    def of(
        cls, lines: Iterable[dict[str, Any]], data: DataReport, ranking_length: int | None
    ) -> PrepareReport:
        """Count the lines that ``Recipe`` made."""
        report = cls(data=data)
        totals: Counter[str] = Counter()
        agreed: Counter[str] = Counter()
        scored = 0
        for line in lines:
            report._count(line, ranking_length)
            for source, (count, total) in line["reward_sums"].items():
                report.reward_count[source] += count
                totals[source] += total
            if line["chosen_first"] is not None:
                scored += 1
                for name in ("chosen_first", "chosen_first_of_data"):
                    agreed[name] += line[name]
        report.reward_mean = {
            source: total / report.reward_count[source] for source, total in totals.items()
        }
        if scored:
            report.chosen_first = agreed["chosen_first"] / scored
            report.chosen_first_of_data = agreed["chosen_first_of_data"] / scored
        return report

    def _count(self, line: dict[str, Any], ranking_length: int | None) -> None:
        self.lists += 1
        self.texts_cut += line["texts_cut"]
        for name, counts in line["samples"].items():
            self.samples.setdefault(name, Counter()).update(counts)
        if line["record"] is None:
            self.dropped[line["dropped"]] += 1
            return
        self.kept += 1
        n = len(line["record"]["completions"])
        self.candidates[n] += 1
        self.shorter += ranking_length is not None and n < ranking_length

    def as_dict(self) -> dict[str, Any]:
        """All counts, as JSON takes them."""
        counts = {item.name: getattr(self, item.name) for item in fields(self)}
        counts["candidates"] = {str(n): c for n, c in sorted(self.candidates.items())}
        return counts | {"data": self.data.as_dict()}

    def json_bytes(self) -> bytes:
        """The report as the file beside the output holds it."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False).encode() + b"\n"

    def text(self) -> str:
        """The report as lines to print; a count that is 0 is left out."""
        n = ", ".join(f"{count} of {size}" for size, count in sorted(self.candidates.items()))
        lines = [self.data.text(), f"lists written: {self.kept} of {self.lists} ({n} candidates)"]
        lines += [f"lists dropped, {why}: {count}" for why, count in self.dropped.items()]
        if self.shorter:
            lines.append(f"lists with fewer candidates than ranking_length: {self.shorter}")
        for name, counts in self.samples.items():
            lost = [f"{counts[why]} {why}" for why in ("empty", "repeated") if counts[why]]
            dropped = f" (dropped: {', '.join(lost)})" if lost else ""
            lines.append(f"samples of {name}: {counts['made']}{dropped}")
            if counts["cut"]:
                lines.append(f"  cut at their greatest length: {counts['cut']}")
            lines += [f"  {why}: {n}" for why, n in sorted(counts.items()) if ":" in why]
            if counts["prompts_cut"]:
                lines.append(f"  prompts cut to its length: {counts['prompts_cut']}")
        if self.texts_cut:
            lines.append(f"texts cut to the reward model's length: {self.texts_cut}")
        lines += [
            f"mean reward of {source}: {mean:.4g} ({self.reward_count[source]} candidates)"
            for source, mean in self.reward_mean.items()
        ]
        if self.chosen_first is not None:
            lines.append(
                f"preferred by the data and ranked first: {self.chosen_first:.1%} of the lists; "
                f"among the data's own candidates: {self.chosen_first_of_data:.1%}"
            )
        return "\n".join(lines)
