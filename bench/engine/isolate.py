"""What may die runs in a process of its own: the weighing of a provider, or a whole run.

    python -m bench.engine.isolate SUITE PROVIDER DEVICE CASES

is the child that weighs cases, given as JSON. It says a line of JSON a case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench.engine import memory
from bench.engine.timing import describe

ROOT = Path(__file__).resolve().parents[2]
DEVICE_LOST = 75  # exit code of a run in which a provider left the GPU unusable
STALLED = 120.0  # seconds; torch.compile of a peer takes half of that
_MARK = "@bench "  # before what a child says to its parent
_CHILDREN = 8
_TAIL = 2000  # characters of a failed process's last words


def say(**what: object) -> None:
    """Tell the parent."""
    print(_MARK + json.dumps(what), flush=True)


class Child:
    """A process in a group of its own, listened to until a deadline."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        """Start it; ``env`` beside the variables of this process."""
        self._process = subprocess.Popen(
            command, cwd=ROOT, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **env},
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._tail, self._late = "", False
        self.code: int | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        """End the child and what it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def said(self, until: Callable[[], float] = lambda: time.monotonic() + 1e6) -> Iterator[dict]:
        """What it says until it closes its output or the deadline has passed."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until() - time.monotonic()))
            except queue.Empty:
                self._late = True
                return
            if line is None:
                return
            if line.startswith(_MARK):
                yield json.loads(line.removeprefix(_MARK))
            else:
                self._tail = (self._tail + line)[-_TAIL:]

    def verdict(self) -> tuple[str, str]:
        """``(status, note)`` of a child that says no more."""
        if self._late:
            return "timeout", self._tail.strip()
        self.code = self._process.wait()
        return "failed" if self.code else "ok", self._tail.strip()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def weigh(suite: str, provider: str, cases: list, device: torch.device) -> Iterator[dict]:
    """Weigh one provider on several cases of a suite: an answer for each as it is done.

    A case that kills the process (out of memory) gets a note; the others go on in a new one.
    """
    memory.trim()  # what was timed before held on to its memory
    begin = [sys.executable, "-m", "bench.engine.isolate", suite, provider, str(device)]
    env = {**memory.CHILD_ENV, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    left = list(cases)
    while left:
        with Child([*begin, json.dumps([dataclasses.asdict(x) for x in left])], env) as child:
            for answer in child.said():
                left = [case for case in left if case.name != answer["case"]]
                yield answer
        if left:
            yield {"case": left.pop(0).name, "note": "memory: the process died (too large?)"}


def main(suite_name: str, provider: str, kind: str, cases: str) -> None:
    """The child: one answer a case."""
    from bench.suites import load

    suite, device = load(suite_name), torch.device(kind)
    for raw in json.loads(cases):
        try:
            case = suite.case_type(**{**raw, "only": tuple(raw["only"])})
            found = suite.weigh(suite.providers(device)[provider], case, device)
        except Exception as error:
            found = {"note": f"memory: {describe(error)}"}
        say(case=raw["name"], **found)


def watched(argv: list[str], results: Path, on_gpu: bool) -> int:
    """Run ``python -m bench`` in a child: a peer that crashes or hangs costs its own row only.

    Where it dies of a signal, loses the GPU or, on a GPU, writes nothing for ``STALLED`` seconds,
    another goes on with ``--resume``, which leaves out who was running.
    """
    child = [sys.executable, "-m", "bench.cli", *argv]
    for _ in range(_CHILDREN):
        code = wait_for(child, results, on_gpu)
        if code >= 0 and code != DEVICE_LOST:
            return code
        print(f"the process ended with code {code}: going on without who ran", file=sys.stderr)
        child = [sys.executable, "-m", "bench.cli", *argv, "--resume"]
    return 1 if code < 0 else code


def wait_for(command: list[str], results: Path, on_gpu: bool) -> int:
    """A command's exit code; on a GPU it is killed where its results file stands still."""
    started = time.time()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        while True:
            try:
                return process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                written = results.stat().st_mtime if results.exists() else started
                if on_gpu and time.time() - max(written, started) > STALLED:
                    process.kill()
    except KeyboardInterrupt:  # it has it too, and keeps what it measured
        return process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
