"""What training costs: scored tokens per second, share of positions scored, peak memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Usage:
    """Counts on the host between two log lines; evaluation and saving are left out of the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._depth = 0
        self.restart()

    def restart(self) -> None:
        """Forget what was counted and start the clock."""
        self._scored = self._positions = 0
        self._start = time.perf_counter()

    def count(self, scored: int, positions: int) -> None:
        """Add a batch: tokens scored, and real tokens (no padding) that went into the model."""
        self._scored += scored
        self._positions += positions

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        begin, self._depth = time.perf_counter(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:  # an evaluation of several data sets calls itself
                self._start += time.perf_counter() - begin

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics since the last call, over all processes (memory: the largest)."""
        seconds = time.perf_counter() - self._start
        every = torch.tensor([[self._scored, self._positions, peak_memory_mb(self._device)]])
        if accelerator.num_processes > 1:
            every = accelerator.gather(every.to(self._device)).cpu()
        self.restart()
        scored, positions = every[:, 0].sum().item(), every[:, 1].sum().item()
        return {
            "scored_tokens_per_second": scored / seconds,
            "scored_share": scored / max(1.0, positions),
            "peak_memory_mb": every[:, 2].max().item(),
        }


def peak_memory_mb(device: torch.device) -> float:
    """MB: most that tensors took on a GPU; on a CPU the largest resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
