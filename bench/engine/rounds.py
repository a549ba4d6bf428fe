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
    """How a run is made."""

    preset: str = "cpu-small"
    cases: tuple[str, ...] = ()  # substrings of case names, or group names; empty for all
    providers: tuple[str, ...] = ()  # empty for all
    without: tuple[str, ...] = ()  # providers to leave out
    repeats: int | None = None  # rounds; None for each case's own
    memory: bool = True  # weigh the cases marked for it
    # A peer leaves a case's rounds once it has run this long. If its first call took longer, and
    # nothing was compiled in it, that call is its one round. Floors and ours take part in all.
    peer_seconds: float = 12.0
    seconds: float | None = None  # start nothing more after this time


class Clock:
    """Time since the start, and whether it is over."""

    def __init__(self, seconds: float | None = None) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    def __str__(self) -> str:
        return f"[{time.perf_counter() - self.start:6.0f} s]"

    @property
    def over(self) -> bool:
        return self.seconds is not None and time.perf_counter() - self.start > self.seconds


def interleaved(
    names: Iterable[str],
    rounds: int,
    take: Callable[[str], Taken],
    *,
    clock: Clock | None = None,
    least: int = 1,
    skip: Callable[[str, list[Taken]], bool] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[Taken]]:
    """What ``take(name)`` gave of every contender, round by round.

    ``least`` rounds are made whatever the clock says. ``skip``: whether one sits out this round,
    given what it gave so far. ``failed`` is told of one that raised, which leaves; without it the
    exception goes through.
    """
    order, taken = random.Random(0), {name: [] for name in names}
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
