"""Processes, one after the other, against the clock; the results file is rewritten as they speak.

A job says what it does on its standard output, a line each: ``@bench {"part": ..., "row": {...}}``
for a number, ``@bench {"part": ..., "status": "ok", "note": ""}`` when a part is over. A job that
dies or goes past a part's time is started again with the parts that are left, so a bad kernel costs
its own part only: what it did to the device's context dies with the process.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.engine.isolate import DEVICE_LOST, MARK, ROOT
from bench.engine.record import Record, facts
from bench.suites.gpu import kernels
from pro_kernels import backends

_TAIL = 2000  # characters of a failed job's last words
_CASES_SECONDS = 200.0
# Kernels that never ran on a GPU take part here: this is where they do. The trainer need not be
# installed.
_ENVIRONMENT = {
    "PRO_KERNELS_UNVERIFIED": "1",
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(ROOT / "python"), os.environ.get("PYTHONPATH")))
    ),
}


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: as in the results.
        command: its arguments; the names of ``parts`` are put behind them.
        parts: what it announces, in order; empty for a command that only succeeds or fails.
        limit: seconds for each part, or for the command.
    """

    name: str
    command: tuple[str, ...]
    parts: tuple[str, ...] = ()
    limit: float = 60.0


def make_jobs(out: Path, names: tuple[str, ...], chosen: tuple[str, ...]) -> list[Job]:
    """All jobs in order of importance, narrowed to these parts and backends.

    Raises:
        ValueError: a name that does not exist.
    """
    python = sys.executable
    commands = [
        Job("build", (python, "setup.py", "build_native", "--inplace"), limit=180),
        Job("check", (python, "-m", "pro_kernels", "check", "--json",
                      str((out / "check.json").resolve())), limit=90),
        Job("loss", (python, "-m", "bench", "loss", "--preset", "gpu", "--device", "cuda",
                     "--seconds", str(_CASES_SECONDS), "--out", str(out.resolve())),
            limit=_CASES_SECONDS + 45),
        Job("step", (python, "-m", "bench", "step", "--preset", "gpu", "--case", "0.5B",
                     "--device", "cuda", "--repeats", "3", "--out",
                     str((out / "step").resolve())), limit=75),
        Job("tests", (python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider",
                      "tests"), limit=90),
    ]  # fmt: skip
    every = tuple(name for name in kernels.PARTS if name != "tuning")
    known = (*(job.name for job in commands), *kernels.PARTS)
    _check("parts", names, known)
    gpu_backends = tuple(b for b in ("triton", "cuda", "torch") if b in backends.ORDER)
    _check("backends", chosen, gpu_backends)
    wanted = tuple(p for p in every if not names or p in names)
    jobs = [job for job in commands if not names or job.name in names]
    for backend in chosen or gpu_backends:
        if wanted:
            jobs.append(Job(backend, _worker(backend), wanted))
    if (not names or "tuning" in names) and "triton" in (chosen or gpu_backends):
        jobs.append(Job("tuning", _worker("triton"), ("tuning",), limit=120))
    return jobs


def _worker(backend: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "bench.suites.gpu.kernels", backend)


def _check(what: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{what} must be of {list(known)}, got {unknown}")


def run(
    jobs: list[Job],
    path: Path,
    seconds: float,
    device: torch.device | None = None,
    log: Callable[[str], None] = print,
) -> dict:
    """Run the jobs within ``seconds``; returns what ``path`` holds at the end."""
    end = time.monotonic() + seconds
    about = facts(device or torch.device("cuda"), seconds=seconds)
    record = Record(path, {"benchmark": "gpu", **about, "gpu": _gpu(), "parts": []})
    for job in jobs:
        done = _run_parts(job, record, end, log) if job.parts else _run_command(job, end)
        if done is not None:
            _put(record, done, log)
    record.finish()
    return record.data


def _run_command(job: Job, end: float) -> dict:
    started = time.monotonic()
    limit = min(job.limit, end - started)
    if limit <= 0:
        return _part(job.name, job.name, "skipped", "no time was left")
    with _Process(job.command) as process:
        for _ in process.lines(started + limit):
            pass
        status, note = process.verdict()
    return _part(job.name, job.name, status, note, time.monotonic() - started)


def _run_parts(job: Job, record: Record, end: float, log: Callable[[str], None]) -> None:
    left = list(job.parts)
    while left:
        if time.monotonic() >= end:
            for name in left:
                _put(record, _part(job.name, name, "skipped", "no time was left"), log)
            return
        with _Process((*job.command, *left)) as process:
            started, rows, before = time.monotonic(), [], len(left)
            limit = started + job.limit
            for line in process.lines(lambda: min(limit, end)):  # noqa: B023
                if not line.startswith(MARK):
                    continue
                said = json.loads(line.removeprefix(MARK))
                if "row" in said:
                    rows.append(said["row"])
                    continue
                seconds = time.monotonic() - started
                part = _part(job.name, left.pop(0), said["status"], said["note"], seconds)
                _put(record, part, log, rows)
                started, rows = time.monotonic(), []
                limit = started + job.limit
            if left:  # it died, or took too long
                status, note = process.verdict()
                if process.code == DEVICE_LOST and len(left) < before:
                    continue
                status = "failed" if status == "ok" else status
                seconds = time.monotonic() - started
                part = _part(job.name, left.pop(0), status, note or "it ended early", seconds)
                _put(record, part, log, rows)


def _part(job: str, name: str, status: str, note: str, seconds: float = 0.0) -> dict:
    return {
        "job": job,
        "part": name,
        "status": status,
        "seconds": round(seconds, 2),
        "note": note,
    }


def _put(record: Record, part: dict, log: Callable[[str], None], rows: Sequence[dict] = ()) -> None:
    record.data["parts"].append(part)
    record.add([{"job": part["job"], **row} for row in rows])
    first = (part["note"].splitlines() or [""])[-1][:120]
    log(f"{part['job']:8} {part['part']:10} {part['status']:8} {part['seconds']:7.1f} s  {first}")


def _gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "sms": found.multi_processor_count,
        "memory": found.total_memory,
        "cuda": torch.version.cuda,
    }


class _Process:
    """A child in a process group of its own, its output read line by line until a deadline."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._child = subprocess.Popen(
            command, cwd=ROOT, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **_ENVIRONMENT},
        )  # fmt: skip
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._tail = ""
        self._late = False
        self.code: int | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        """End the child and what it started."""
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._child.wait()

    def lines(self, until: float | Callable[[], float]) -> Iterator[str]:
        """Lines until the child closes its output or the deadline has passed."""
        while True:
            deadline = until() if callable(until) else until
            try:
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self._late = True
                return
            if line is None:
                return
            if not line.startswith(MARK):
                self._tail = (self._tail + line)[-_TAIL:]
            yield line

    def verdict(self) -> tuple[str, str]:
        """``(status, note)`` of a child whose lines are over."""
        if self._late:
            return "timeout", self._tail.strip()
        self.code = self._child.wait()
        return "failed" if self.code else "ok", self._tail.strip()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._queue.put(line)
        self._queue.put(None)
