"""One timed call, the one interleaved-round loop, and what is made of the times.

Every round runs each contender once, in a random order, so that a slow minute of the machine falls
on all of them. Ratios are medians over rounds of times taken in the same round (``paired``).
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Taken = TypeVar("Taken")
# More than the L2 of any GPU and than most CPUs' caches.
_FLUSH_BYTES = 256 << 20
_LEAD_CYCLES = 10_000_000  # of a GPU's clock: some 5 ms, more than the host needs for any step

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


class Refused(Exception):
    """A provider does not apply to a case; the message is the reason shown with its row."""


@dataclass(frozen=True)
class Step:
    """One timed unit."""

    run: Callable[[], Any]  # returns the detached loss, or for a floor what it made
    leaves: tuple[Tensor, ...] = ()  # whose .grad it fills; cleared outside the timing
    # Its log-prob of every position (B, n, T), any value where nothing is scored. Never timed.
    logps: Callable[[], Tensor] | None = None

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    @property
    def gradient_bytes(self) -> int:
        return sum(x.grad.nbytes for x in self.leaves if x.grad is not None)


def backward_step(
    loss: Callable[[], Tensor],
    leaves: tuple[Tensor, ...],
    grad: bool = True,
    logps: Callable[[], Tensor] | None = None,
) -> Step:
    """Forward and backward of ``loss``; forward alone, without autograd, where not ``grad``."""

    def run() -> Tensor:
        with torch.set_grad_enabled(grad):
            value = loss()
        if grad:
            value.backward()
        return value.detach()

    return Step(run, leaves if grad else (), logps)


def describe(error: Exception) -> str:
    """An exception in one line of a table."""
    if isinstance(error, Refused):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def keep_memory() -> None:
    """Let freed memory stay with the process, as a GPU's caching allocator does (glibc).

    Otherwise each large tensor is new memory, and where the kernel has no huge pages left its
    faults take several times what a provider computes, in one run and not in the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


def wait(device: torch.device) -> None:
    """Until everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def clocked(device: torch.device, *calls: Callable[[], Any]) -> tuple[list[float], list[Any]]:
    """Seconds of each call until the device is idle again, and what they returned."""
    seconds, values = [], []  # a value is freed after the clock has stopped
    wait(device)
    start = time.perf_counter()
    for call in calls:
        values.append(call())
        wait(device)
        end = time.perf_counter()
        seconds.append(end - start)
        start = end
    return seconds, values


class Timer:
    """Seconds of one call, caches cold: the clock on a CPU, events on a GPU.

    Cold: memory of 256 MiB is written before. On a CPU only where asked for (``flush``): the
    tensors of large cases are several times that.

    With ``lead``, a GPU first waits a few milliseconds, so that the host is ahead of it as within
    a training step, and the time is the device's alone. Without, it is the clock until the device
    is idle again, with the host's work.
    """

    def __init__(self, device: torch.device, flush: bool = False, lead: bool = True) -> None:
        self.device, self.events = device, None
        if device.type != "cuda":
            keep_memory()
        elif lead:
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.buffer = None
        if device.type == "cuda" or flush:
            self.buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, step: Step, warm: bool = False) -> float:
        """Run the step once; what it returns is freed after the clock stops."""
        if self.buffer is not None and not warm:
            self.buffer.zero_()
        if self.events is None:
            return clocked(self.device, step.run)[0][0]
        torch.cuda._sleep(_LEAD_CYCLES)
        self.events[0].record()
        _ = step.run()
        self.events[1].record()
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


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


def paired(numerator: list[float], denominator: list[float]) -> float | None:
    """Median over the rounds both took part in of the ratio within the round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=False)]
    return statistics.median(ratios) if ratios else None


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def summary(values: list[float]) -> dict[str, float | int]:
    """Median, quartiles and number of rounds, as every row has them."""
    low, middle, high = quartiles(values)
    return {"seconds": middle, "q1": low, "q3": high, "rounds": len(values)}
