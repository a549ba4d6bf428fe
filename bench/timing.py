"""How one call is timed, and what is made of the times."""

from __future__ import annotations

import ctypes
import statistics
import time

import torch

from bench.step import Step

# More than the L2 of any GPU and than most CPUs' caches.
_FLUSH_BYTES = 256 << 20
_LEAD_CYCLES = 10_000_000  # of a GPU's clock: some 5 ms, more than the host needs for any step

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Let freed memory stay with the process, as a GPU's caching allocator does (glibc).

    Otherwise each large tensor is new memory, and where the kernel has no huge pages left its
    faults take several times what a provider computes, in one run and not in the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


class Timer:
    """Seconds of one call, caches cold: the clock on a CPU, events on a GPU.

    Cold: memory of 256 MiB is written before. On a CPU only where asked for (``flush``): the
    tensors of large cases are several times that.

    With ``lead``, a GPU first waits a few milliseconds, so that the host is ahead of it as within
    a training step, and the time is the device's alone. Without, it is the clock until the device
    is idle again, with the host's work.
    """

    def __init__(self, device: torch.device, flush: bool = False, lead: bool = True) -> None:
        """Make the events and the flush buffer."""
        self.cuda, self.lead = device.type == "cuda", lead
        if not self.cuda:
            keep_memory()
        self.buffer = None
        if self.cuda or flush:
            self.buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        if self.cuda and lead:
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, step: Step, warm: bool = False) -> float:
        """Run the step once; what it returns is freed after the clock stops."""
        if self.buffer is not None and not warm:
            self.buffer.zero_()
        if not (self.cuda and self.lead):
            if self.cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            value = step.run()
            if self.cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            del value
            return seconds
        torch.cuda._sleep(_LEAD_CYCLES)
        self.events[0].record()
        value = step.run()
        self.events[1].record()
        torch.cuda.synchronize()
        del value
        return self.events[0].elapsed_time(self.events[1]) / 1e3


def paired(numerator: list[float], denominator: list[float]) -> float | None:
    """Median over the rounds both took part in of the ratio within the round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=False)]
    return statistics.median(ratios) if ratios else None


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")
