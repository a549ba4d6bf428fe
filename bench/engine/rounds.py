"""The one interleaved-round loop, and how a run is made.

Every round runs each contender once, in a random order, so that a slow minute of the machine falls
on all of them. Ratios are medians over rounds of times taken in the same round (``timing.paired``).
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from bench.engine.timing import Step

Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        preset: name of the case table.
        cases: substrings of case names, or group names; empty for all.
        providers: provider names; empty for all.
        without: provider names to leave out.
        repeats: rounds, None for each case's own.
        memory: weigh the cases marked for it.
        peer_seconds: a peer leaves a case's rounds once it has run this long; if its first call
            took longer, and nothing was compiled in it, that call is its one round. Floors and ours
            take part in all.
        seconds: start nothing more after this time; None for no limit.
        seed: of the data and of the order.
    """

    preset: str = "cpu-small"
    cases: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    repeats: int | None = None
    memory: bool = True
    peer_seconds: float = 12.0
    seconds: float | None = None
    seed: int = 0


class Clock:
    """Time since the start, and whether it is over."""

    def __init__(self, seconds: float | None = None) -> None:
        """Start it; None never ends."""
        self.start, self.seconds = time.perf_counter(), seconds

    def __str__(self) -> str:
        return f"[{time.perf_counter() - self.start:6.0f} s]"

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return self.seconds is not None and time.perf_counter() - self.start > self.seconds


def interleaved(
    names: Iterable[str],
    rounds: int,
    take: Callable[[str], Taken],
    *,
    seed: int = 0,
    clock: Clock | None = None,
    least: int = 1,
    skip: Callable[[str, list[Taken]], bool] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[Taken]]:
    """What ``take(name)`` gave of every contender, round by round.

    Args:
        names: the contenders.
        rounds: how many rounds; fewer where the clock is over and ``least`` are done.
        take: runs one contender once.
        seed: of the order within a round.
        clock: ends the rounds.
        least: rounds that are made whatever the clock says.
        skip: whether one sits out this round, given what it gave so far.
        failed: told of one that raised, which leaves; None lets the exception through.
    """
    order, taken = random.Random(seed), {name: [] for name in names}
    for turn in range(rounds):
        if turn >= least and clock is not None and clock.over:
            break
        gc.collect()
        for name in order.sample(sorted(taken), len(taken)):
            if skip is not None and skip(name, taken[name]):
                continue
            try:
                taken[name].append(take(name))
            except Exception as error:  # a peer may raise anything
                if failed is None:
                    raise
                del taken[name]
                failed(name, error)
    return taken


def timed(
    steps: dict[str, Step], rounds: int, timer: Callable[[Step], float], warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each step by round, after ``warm`` calls each; gradients dropped in between."""

    def take(name: str) -> float:
        seconds = timer(steps[name])
        steps[name].clear()
        return seconds

    for name in [*steps] * warm:
        take(name)
    return interleaved(steps, rounds, take)
