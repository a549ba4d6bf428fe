"""What ``pro-kernels prepare`` did, counted from the lines it saved.

Nothing is counted on the way, so a run that was cut short reports the same as one that was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pro_trainer.data.rankings import Rankings
from pro_trainer.data.report import DataReport, counted

_POWERS = 12  # best of 1, 2, 4, ... 2048


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
        lost: candidates that were dropped, by reason.
        notes: by reward: what it said, and how often.
        reward_count: candidates with a reward by source, before the ranking was cut to length.
        reward_mean: their mean reward.
        best_of: by source and k: the mean over lists of the best reward among the first k
            candidates of that source (of all where there are fewer), k = 1, 2, 4, ... and all.
        rankings: of all candidates with a reward.
        chosen_first: share of lists whose preferred candidate (by the data) the rewards rank
            first; None without a reward.
        chosen_first_of_data: the same among the data's own candidates.
        data: the report of reading.
    """

    lists: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    candidates: Counter[int] = field(default_factory=Counter)
    shorter: int = 0
    samples: dict[str, Counter[str]] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Counter[str]] = field(default_factory=dict)
    reward_count: Counter[str] = field(default_factory=Counter)
    reward_mean: dict[str, float] = field(default_factory=dict)
    best_of: dict[str, dict[int, float]] = field(default_factory=dict)
    rankings: Rankings = field(default_factory=Rankings)
    chosen_first: float | None = None
    chosen_first_of_data: float | None = None
    data: DataReport = field(default_factory=DataReport)

    @classmethod
    def of(
        cls, lines: Iterable[dict[str, Any]], data: DataReport, ranking_length: int | None
    ) -> PrepareReport:
        """Count the lines that ``Recipe`` made."""
        report = cls(data=data)
        by_source: dict[str, _Source] = {}
        agreed: Counter[str] = Counter()
        for line in lines:
            report._count(line, ranking_length)
            rewards, sources = line["scored"]["rewards"], line["scored"]["sources"]
            report.rankings.add(rewards, line["scored"]["lengths"])
            of_line: dict[str, list[float]] = {}
            for source, reward in zip(sources, rewards or (), strict=False):
                of_line.setdefault(source, []).append(reward)
            for source, found in of_line.items():
                by_source.setdefault(source, _Source()).add(found)
            if line["chosen_first"] is not None:
                agreed["lists"] += 1
                for name in ("chosen_first", "chosen_first_of_data"):
                    agreed[name] += line[name]
        for source, of_it in by_source.items():
            report.reward_count[source] = of_it.count
            report.reward_mean[source] = of_it.total / of_it.count
            report.best_of[source] = of_it.best_of()
        if agreed["lists"]:
            report.chosen_first = agreed["chosen_first"] / agreed["lists"]
            report.chosen_first_of_data = agreed["chosen_first_of_data"] / agreed["lists"]
        return report

    def _count(self, line: dict[str, Any], ranking_length: int | None) -> None:
        self.lists += 1
        self.lost.update(line["lost"])
        for kept, of_line in ((self.samples, line["samples"]), (self.notes, line["notes"])):
            for name, counts in of_line.items():
                kept.setdefault(name, Counter()).update(counts)
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
        return counts | {"rankings": self.rankings.as_dict(), "data": self.data.as_dict()}

    def losses(self) -> list[str]:
        """Lines on candidates that were dropped, and on what rewards said."""
        of_rewards = [counted(notes, f"reward {name}, ") for name, notes in self.notes.items()]
        return sum(of_rewards, counted(self.lost, "candidates dropped, "))

    def text(self) -> str:
        """The report as lines to print; a count that is 0 is left out."""
        n = ", ".join(f"{count} of {size}" for size, count in sorted(self.candidates.items()))
        lines = [self.data.text(), f"lists written: {self.kept} of {self.lists} ({n} candidates)"]
        lines += counted(self.dropped, "lists dropped, ")
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
        lines += self.losses()
        for source, mean in self.reward_mean.items():
            count, best = self.reward_count[source], self.best_of[source]
            lines.append(f"mean reward of {source}: {mean:.4g} ({count} candidates)")
            ks, means = ", ".join(map(str, best)), ", ".join(f"{of:.4g}" for of in best.values())
            lines.append(f"  of the best of the first {ks} in each list: {means}")
        if self.reward_count:
            lines.append("all candidates with a reward:")
            lines += [f"  {line}" for line in self.rankings.text()]
        if self.chosen_first is not None:
            lines.append(
                f"preferred by the data and ranked first: {self.chosen_first:.1%} of the lists; "
                f"among the data's own candidates: {self.chosen_first_of_data:.1%}"
            )
        return "\n".join(lines)


class _Source:
    """Rewards of the candidates of one source."""

    def __init__(self) -> None:
        self.lists = self.count = self.most = 0
        self.total = 0.0
        self.best: Counter[int] = Counter()  # k = 1, 2, 4, ...: the sum over lists

    def add(self, rewards: Sequence[float]) -> None:
        """Count those of one list, in the order they were made."""
        self.lists += 1
        self.count += len(rewards)
        self.most = max(self.most, len(rewards))
        self.total += sum(rewards)
        for power in range(_POWERS):
            self.best[2**power] += max(rewards[: 2**power])

    def best_of(self) -> dict[int, float]:
        """The mean over lists of the best of the first k, up to the first k that is all."""
        ks = [2**power for power in range(_POWERS)]
        ks = [k for k in ks if k < self.most] + [min(self.most, ks[-1])]
        # Of k that is all there are, the sum is that of any k beyond.
        sums = {k: self.best[k] if k in self.best else self.best[1 << k.bit_length()] for k in ks}
        return {k: total / self.lists for k, total in sums.items()}
