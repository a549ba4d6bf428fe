"""How a command ends that does not come to its end: one line, an exit code, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from pro_trainer.errors import TrainingError
from pro_trainer.files import disk_full
from pro_trainer.train import distributed

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the first signal that ends a process; yields a list for it.

    Those that follow are ignored, since the end is under way. So are those that the process was
    started to ignore, as ``nohup`` does.
    """
    caught: list[int] = []
    owner = os.getpid()

    def stop(number: int, _: Any) -> None:
        if os.getpid() != owner:  # a forked worker; Ctrl-C reaches it too, and its parent ends it
            if number != signal.SIGINT:
                os._exit(128 + number)
        elif not caught:
            caught.append(number)
            sys.unraisablehook = lambda _: None  # what was half made complains as it goes
            if hasattr(signal, "SIGCHLD"):  # torch's handler complains of workers that it ended too
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise KeyboardInterrupt

    def uncaught(*error: Any) -> None:
        if os.getpid() == owner:  # a worker hands its errors on, but for: its parent went away
            hook(*error)

    hook, sys.excepthook = sys.excepthook, uncaught
    before = {}
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not the main thread
                before[number] = signal.signal(number, stop)
    yield caught
    if not caught:
        sys.excepthook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def advising(how: Callable[[], str]) -> Iterator[None]:
    """What stops the run in here is told with ``how()``: where it was, and how to go on."""
    try:
        yield
    except BaseException as error:
        vars(error).setdefault("advice", how())
        raise


def code(error: BaseException, caught: list[int]) -> int:
    """Print what stopped a command, and return its exit code.

    Raises:
        BaseException: ``error``, where it is a fault of this program.
    """
    rank = f"rank {dist.get_rank()}: " if distributed.several() else ""
    advice = vars(error).get("advice", "before anything was written; start it again")
    if caught or isinstance(error, KeyboardInterrupt):
        print(f"\n{rank}interrupted {advice}", file=sys.stderr)
        return 128 + (caught[0] if caught else signal.SIGINT)
    text = str(error)
    if disk_full(error):
        text = f"no space is left ({text.splitlines()[0]}); stopped {advice}"
    elif isinstance(error, ConnectionError):
        text = f"{text}; stopped {advice}"
    elif not isinstance(error, (ValueError, OSError, ImportError, TrainingError)):
        if not distributed.several():
            raise error
        traceback.print_exception(error)
        return 1
    print(f"error: {rank}{text}", file=sys.stderr)
    return 1 if isinstance(error, (TrainingError, ConnectionError)) or disk_full(error) else 2
