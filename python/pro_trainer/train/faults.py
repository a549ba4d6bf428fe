"""When one rank fails all end, and each says which rank failed and why.

The ranks of a run talk in collectives, and one that stops leaves the others waiting in one that
never completes, for the whole timeout and without a word of the cause. So a rank that fails says
why in the process group's store before it goes, and a thread of each rank listens there. Where
nobody says anything (killed, or slower than the timeout) those whose collective failed call the
roll: a rank whose thread does not answer is gone, one whose thread answers but that does not come
is stuck.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from pro_trainer.errors import TrainingError
from pro_trainer.models import first_line

_POLL = 0.5  # seconds between two looks at the store
_GRACE = 4.0  # seconds that ranks give one another to be heard
# In gloo's errors, which have no class of their own, with and without the place in its sources.
_OF_GLOO = re.compile("gloo|pair closure|Connection (closed|reset) by peer")
_runs = itertools.count()
_active: list[_Watch] = []


class RankError(TrainingError):
    """Another rank failed; the message names it and its cause."""


@contextlib.contextmanager
def shared(timeout: float) -> Iterator[None]:
    """What fails in here on one rank ends all of them; all ranks enter and leave together.

    Without a process group of several ranks, or inside another ``shared``, it does nothing.

    Args:
        timeout: of the collectives, in seconds; for the message only.

    Raises:
        RankError: a collective failed because of another rank. An error of this rank's own is told
            to the others and goes on as it is. A rank that is still stuck in a collective some
            seconds after another failed is ended by its listener, with exit code 1.
    """
    if _active or not dist.is_available() or not dist.is_initialized():
        yield
        return
    if dist.get_world_size() == 1:
        yield
        return
    watch = _Watch(timeout)
    _active.append(watch)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        watch.close()
        if not of_a_collective(error):
            watch.tell(error)
            raise
        raise RankError(watch.cause(error)) from error
    finally:
        watch.close()
        _active.remove(watch)


def of_a_collective(error: BaseException) -> bool:
    """Whether ``error`` is that of a collective."""
    if isinstance(error, TrainingError):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _OF_GLOO.search(str(error)) is not None
    )


class _Watch:
    """One rank's end of the store."""

    def __init__(self, timeout: float) -> None:
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._timeout = timeout
        # A connection of its own: the listener must not wait behind a collective being set up.
        store = dist.distributed_c10d._get_default_store().clone()
        store.set_timeout(timedelta(seconds=_GRACE))
        self._store = dist.PrefixStore(f"pro_trainer/{next(_runs)}", store)
        self._known = ""  # the cause, as the listener heard it
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Listen no longer."""
        self._over.set()
        self._listener.join()

    def tell(self, error: BaseException) -> None:
        """Give the others this rank's error, and time to read it."""
        text = f"failed with {type(error).__name__}: {first_line(error)}"
        if isinstance(error, KeyboardInterrupt):
            text = "was interrupted"
        with contextlib.suppress(dist.DistError):  # the store went first: nobody is there to read
            self._say(f"rank {self._rank} {text}")
            self._wait_for_readers(self._world)

    def cause(self, error: BaseException) -> str:
        """Why a collective of this rank failed."""
        if self._known:
            return self._known
        try:
            if told := self._told():
                self._store.add("heard", 1)
                return told
            cause = self._say(self._roll_call(error))
            self._wait_for_readers(len(self._ranks_with("awake")))
            return cause
        except dist.DistError:
            return (
                "the process group's store is gone, and with it the process that kept it: rank 0, "
                f"or torchrun's agent there ({first_line(error)})"
            )

    def _roll_call(self, error: BaseException) -> str:
        for name in ("roll call", f"awake {self._rank}", f"came {self._rank}"):
            self._store.set(name, "")
        end = time.monotonic() + _GRACE
        while time.monotonic() < end:
            if told := self._told():
                return told
            if len(self._ranks_with("came")) == self._world:
                break
            time.sleep(_POLL / 5)
        if gone := self._without("awake"):
            return f"{gone} gone (killed, or its machine or network is down)"
        if late := self._without("came"):
            return (
                f"{late} stuck or slow: a collective that the others were in was given up after "
                f"ddp_timeout={self._timeout:g} s"
            )
        return f"a collective failed, and no rank is gone: {first_line(error)}"

    def _ranks_with(self, mark: str) -> list[int]:
        return [r for r in range(self._world) if self._store.check([f"{mark} {r}"])]

    def _without(self, mark: str) -> str:
        ranks = sorted(set(range(self._world)) - set(self._ranks_with(mark)))
        return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {ranks} are" if ranks else ""

    def _wait_for_readers(self, count: int) -> None:
        """Until ``count`` ranks know the cause: the store may go with this process."""
        end = time.monotonic() + _GRACE
        self._store.add("heard", 1)
        while self._store.add("heard", 0) < count and time.monotonic() < end:
            time.sleep(_POLL / 5)

    def _say(self, text: str) -> str:
        """Put ``text`` down as the cause unless there is one; returns the one that is there."""
        return self._store.compare_set("fault", "", text).decode()

    def _told(self) -> str:
        return self._store.get("fault").decode() if self._store.check(["fault"]) else ""

    def _listen(self) -> None:
        while not self._over.wait(_POLL):
            try:
                if self._store.check(["roll call"]):
                    self._store.set(f"awake {self._rank}", "")
                self._known = self._told()
                if self._known:
                    self._store.add("heard", 1)
            except dist.DistError:
                return  # its keeper has ended; if the run has not, a collective will tell
            if self._known:
                # torchrun kills the others once one rank has ended: this may be all they say.
                print(f"rank {self._rank} stops: {self._known}", file=sys.stderr, flush=True)
                if not self._over.wait(_GRACE):
                    os._exit(1)  # the main thread waits for those who will not come
                return
