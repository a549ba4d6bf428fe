"""How far a run is: a bar on a terminal, else a line now and then, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

_LINES_A_MESSAGE = 100
_SECONDS_A_MESSAGE = 60.0


class Progress:
    """Counts lists, and tokens where someone knows them."""

    def __init__(self, done: int, total: int, tokens: Callable[[], int] = lambda: 0) -> None:
        from tqdm import tqdm

        self.start = self.done = done
        self.total = total
        self.tokens = tokens
        self.terminal = sys.stderr.isatty()
        self.began = self.said = time.monotonic()
        self.bar = tqdm(
            total=total, initial=done, unit="list", file=sys.stderr, disable=not self.terminal
        )

    def __enter__(self) -> Progress:
        if self.start:
            self.say(f"going on after {self.start} of {self.total} lists")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, count: int) -> None:
        """Count lists that are done."""
        before, self.done = self.done, self.done + count
        now = time.monotonic()
        rate = (self.done - self.start) / max(1e-9, now - self.began)
        tokens = self.tokens() / max(1e-9, now - self.began)
        if tokens:
            self.bar.set_postfix_str(f"{tokens:.0f} tokens/s", refresh=False)
        self.bar.update(count)
        due = before // _LINES_A_MESSAGE < self.done // _LINES_A_MESSAGE
        if due or self.done == self.total or now - self.said > _SECONDS_A_MESSAGE:
            self.said = now
            left = (self.total - self.done) / rate
            self.say(
                f"{self.done} of {self.total} lists, {rate:.3g} a second"
                + (f", {tokens:.0f} tokens a second" if tokens else "")
                + (f", about {_duration(left)} left" if left else "")
            )

    def say(self, message: str) -> None:
        """A line, where no bar says the same."""
        if not self.terminal:
            print(f"prepare: {message}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
