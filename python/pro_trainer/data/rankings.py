"""What rewards and lengths of ranked lists are like, counted while the lists stream by."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pro_trainer.data.records import best_first

_STEPS = 10  # of the histogram
_SHOWN_RANKS = 8
_BIAS = 0.3  # mean correlation of reward and length that is worth a warning


class Numbers(Counter[float]):
    """Counts of numbers."""

    def summary(self) -> dict[str, float] | None:
        """Least, median, 95th percentile and greatest; None where nothing was counted."""
        if not self:
            return None
        order = sorted(self)
        below = list(itertools.accumulate(self[number] for number in order))
        shares = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
        return {
            name: order[bisect.bisect_left(below, max(1, share * below[-1]))]
            for name, share in shares.items()
        }

    def histogram(self) -> list[int]:
        """How many lie in each of ten equal steps from the least to the greatest."""
        counts = [0] * _STEPS
        low, high = min(self, default=0.0), max(self, default=0.0)
        for number, count in self.items():
            share = (number - low) / (high - low) if high > low else 0.0
            counts[min(_STEPS - 1, int(share * _STEPS))] += count
        return counts

    def add(self, number: float, count: int) -> None:
        """Count a number to three digits, so that many different ones take little memory."""
        number = float(f"{number:.3g}")
        self[number] += count
        if not self[number]:
            del self[number]


class Rankings:
    """Rewards, margins, lengths by rank, and whether what is longer ranks higher.

    Lengths are in characters, since rewards are given to texts and not to tokens.
    """

    def __init__(self) -> None:
        self.rewards = Numbers()
        self.to_second = Numbers()
        self.to_worst = Numbers()
        self.lengths: list[list[int]] = []  # by rank: candidates, and their characters
        self.correlations = [0.0, 0.0, 0.0]  # of lists: how many, their sum, that of squares

    def add(self, rewards: Sequence[float] | None, lengths: Sequence[int], sign: int = 1) -> None:
        """Count a list of these rewards and characters, or (``sign`` -1) uncount it."""
        n = len(lengths)
        order = best_first(rewards, n)
        for reward in rewards or ():
            self.rewards.add(reward, sign)
        if rewards is not None and n > 1:
            best, second, worst = (rewards[order[place]] for place in (0, 1, -1))
            self.to_second.add(best - second, sign)
            self.to_worst.add(best - worst, sign)
        self.lengths += [[0, 0] for _ in range(n - len(self.lengths))]
        for counted, i in zip(self.lengths, order, strict=False):
            counted[0] += sign
            counted[1] += sign * lengths[i]
        values = range(0, -n, -1) if rewards is None else rewards
        if (r := correlation(values, lengths)) is not None:
            for i, x in enumerate((1.0, r, r * r)):
                self.correlations[i] += sign * x

    def length_bias(self) -> float | None:
        """The correlation of reward (or rank) and length in a list, its mean over lists.

        None where it is defined in no list.
        """
        lists, total, _ = self.correlations
        return total / lists if lists else None

    def text(self) -> list[str]:
        """Lines to print; none where nothing was counted."""
        lines = []
        if self.rewards:
            lines.append(f"rewards: {_shown(self.rewards)}")
            counts = ", ".join(map(str, self.rewards.histogram()))
            lines.append(f"  in ten equal steps from min to max: {counts}")
            lines.append(f"margin of the best to the second: {_shown(self.to_second)}")
            lines.append(f"margin of the best to the worst: {_shown(self.to_worst)}")
        if means := self._mean_lengths():
            shown = ", ".join(f"{mean:.0f}" for mean in means[:_SHOWN_RANKS])
            more = f", ... {means[-1]:.0f}" if len(means) > _SHOWN_RANKS else ""
            lines.append(f"mean characters by rank, best first: {shown}{more}")
        bias = self.length_bias()
        if bias is not None:
            what = "reward" if self.rewards else "rank"
            lines.append(f"correlation of {what} and length within a list, mean: {bias:.2f}")
            if self._is_biased():
                longer = "longer" if bias > 0 else "shorter"
                lines.append(
                    f"length bias: {longer} candidates rank higher, and a model trained on these "
                    f"lists will learn to write {longer} answers"
                )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "rewards": self.rewards.summary(),
            "reward_histogram": self.rewards.histogram(),
            "margin_to_second": self.to_second.summary(),
            "margin_to_worst": self.to_worst.summary(),
            "characters_by_rank": self._mean_lengths(),
            "length_correlation": self.length_bias(),
            "length_bias": self._is_biased(),
        }

    def _mean_lengths(self) -> list[float]:
        return [total / count for count, total in self.lengths if count]

    def _is_biased(self) -> bool:
        """Whether the correlation is large, and larger than chance makes it."""
        lists, total, squares = self.correlations
        if lists < 2 or abs(total / lists) < _BIAS:
            return False
        variance = max(0.0, squares / lists - (total / lists) ** 2)
        return abs(total / lists) > 2 * math.sqrt(variance / lists)


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's, of as many numbers; None where one of the two does not vary."""
    if len(xs) < 2:
        return None
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    dx, dy = [x - mean_x for x in xs], [y - mean_y for y in ys]
    scale = math.hypot(*dx) * math.hypot(*dy)
    return sum(a * b for a, b in zip(dx, dy, strict=True)) / scale if scale > 0 else None


def _shown(numbers: Numbers) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in (numbers.summary() or {}).items())
