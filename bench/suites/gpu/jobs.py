"""A round: units of the parts, one after the other, against the clock, into one results file.

A process measures them and says what it does on its standard output, a line each: ``@bench {"part":
..., "row": {...}}`` for a number, ``@bench {"part": ..., "status": "ok", "note": ""}`` when a unit
is over. One that dies or goes past a unit's time is started again with the units that are left, so
a bad kernel costs its own unit only: what it did to the device's context dies with the process.

What was measured with the same code, packages and machine is not measured again, and what was
measured before stays in the file until it is.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.engine.isolate import DEVICE_LOST, MARK, ROOT
from bench.engine.record import Record, facts, load
from bench.suites.gpu import parts

WHEELS = "PRO_KERNELS_WHEELS"  # names a folder of wheels that were brought along
SITE = ROOT / "build" / "gpu-site"  # where they are installed
_TAIL = 2000  # characters of a failed process's last words
_PREPARED = 180.0  # seconds for the build, and for the wheels
_TRIES = 3  # of a case with providers: the next goes on without who was running


@dataclass(frozen=True)
class Turn:
    """One unit's turn.

    Attributes:
        name: "part: unit", as the process that measures announces it.
        limit: seconds.
        tries: how often it is started where the process dies.
        key: of code, packages and machine; a result of the same key is not measured again.
    """

    name: str
    limit: float = 60.0
    tries: int = 1
    key: str = ""


def turns(device: torch.device, names: Sequence[str] = ()) -> list[Turn]:
    """All units in order, or those of the parts named.

    Raises:
        ValueError: a part that does not exist.
    """
    known = [part.name for part in parts.PARTS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--parts must be of {known}, got {unknown}")
    about = facts(device)
    versions = about["versions"]
    code = _digest("pro_kernels", "csrc")
    alike = [code, about["machine"], versions["torch"], versions["triton"]]
    peers = [_digest("bench/providers"), versions]
    found = []
    for part in parts.PARTS:
        source = inspect.getsource(part.measure)
        for name, unit in part.units(device).items():
            what = [*alike, source, unit, peers if part.measure in parts.WITH_PEERS else ""]
            key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
            tries = _TRIES if part.measure is parts.providers else 1
            if not names or part.name in names:
                found.append(Turn(f"{part.name}: {name}", part.limit, tries, key))
    return found


def _digest(*folders: str) -> str:
    """Of the source files in these folders."""
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh")
    files = (p for name in folders for p in (ROOT / name).rglob("*") if p.suffix in kinds)
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(files))).hexdigest()


def prepare(device: torch.device, end: float, log: Callable[[str], None] = print) -> None:
    """Install wheels that were brought along, and build the native kernels, before ``end``."""
    wheels = sorted(Path(os.environ.get(WHEELS) or os.devnull).glob("*.whl"))
    pip = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target")
    build = ("build_native", "--inplace") if device.type == "cuda" else ("--version",)
    commands = {"build": ("setup.py", *build)}
    if wheels:
        commands["wheels"] = (*pip, str(SITE), *map(str, wheels))
    else:
        log(f"no wheels: {WHEELS} names no folder with any; peers that are not installed stay out")
    for name, command in commands.items():
        with _Process((sys.executable, *command)) as process:
            for _ in process.lines(min(end, time.monotonic() + _PREPARED)):
                pass
            log(f"{name}: {': '.join(process.verdict())[-300:]}")
    sys.path.insert(0, str(SITE))  # whose versions are those of the results


def run(
    todo: list[Turn],
    path: Path,
    seconds: float,
    device: torch.device,
    log: Callable[[str], None] = print,
    again: bool = False,
    command: Sequence[str] = (sys.executable, "-m", "bench.suites.gpu.parts"),
) -> dict:
    """Measure within ``seconds`` what is not there yet (``again``: that, too); the file's content.

    Args:
        todo: the units.
        path: the results file; units of other calls stay in it.
        seconds: for all of it.
        device: the GPU, or the CPU for a dry run.
        log: is given a line a unit.
        again: whether what is there is measured again.
        command: of the process that measures; device, file, scratch folder and names come behind.
    """
    end = time.monotonic() + seconds
    about = {"benchmark": "gpu-round", **facts(device, seconds=seconds)}
    old = load(path) if path.exists() else {"parts": [], "results": []}
    record = Record(path, {**about, "parts": old["parts"]})
    record.add(old["results"])
    there = {part["part"]: part for part in old["parts"]}
    left = [t for t in todo if again or not _is_done(t, there.get(t.name, {}))]
    log(f"{len(todo) - len(left)} of {len(todo)} units are measured already")
    with tempfile.TemporaryDirectory() as scratch:
        begin = (*command, str(device), str(path.resolve()), scratch)
        _measure(left, begin, record, end, log)
    if all(_is_done(t, p) for t in todo for p in record.data["parts"] if p["part"] == t.name):
        record.finish()
    return record.data


def _is_done(turn: Turn, part: dict) -> bool:
    """Failed and too slow is a result; refused or without time may be another tomorrow."""
    return part.get("key") == turn.key and part["status"] not in ("refused", "skipped")


def _measure(
    left: list[Turn], begin: tuple, record: Record, end: float, log: Callable[[str], None]
) -> None:
    tried: Counter[str] = Counter()

    def put(status: str, note: str, started: float, rows: Sequence[dict]) -> None:
        _put(record, left.pop(0), status, note, time.monotonic() - started, rows, log)

    while left and time.monotonic() < end:
        with _Process((*begin, *(turn.name for turn in left))) as process:
            started, rows, before = time.monotonic(), [], len(left)
            limit = started + left[0].limit
            for line in process.lines(lambda: min(limit, end)):  # noqa: B023
                if not line.startswith(MARK):
                    continue
                said = json.loads(line.removeprefix(MARK))
                if "row" in said:
                    rows.append(said["row"])
                    continue
                put(said["status"], said["note"], started, rows)
                started, rows = time.monotonic(), []
                limit = started + (left[0].limit if left else 0)
            status, note = process.verdict()
            if not left or time.monotonic() >= end:
                break
            if process.code == DEVICE_LOST and len(left) < before:
                continue
            tried[left[0].name] += 1
            if tried[left[0].name] == left[0].tries:  # it died, or took too long
                status = "failed" if status == "ok" else status
                long = f"it took longer than {left[0].limit:g} s" if status == "timeout" else ""
                put(status, note or long or "it ended early", started, rows)
    while left:
        put("skipped", "no time was left", time.monotonic(), ())


def _put(
    record: Record, turn: Turn, status: str, note: str, seconds: float, rows: Sequence[dict],
    log: Callable[[str], None],
) -> None:  # fmt: skip
    last = (note.splitlines() or [""])[-1][:120]
    log(f"{turn.name[:60]:60} {status:8} {seconds:6.1f} s  {last}")
    data = record.data
    if status == "skipped" and any(p["part"] == turn.name for p in data["parts"]):
        return  # what was measured before says more
    about = {"key": turn.key, "date": data["date"][:10], "commit": (data["commit"] or "")[:12]}
    part = {"part": turn.name, "status": status, "seconds": round(seconds, 2), "note": note}
    data["parts"] = [p for p in data["parts"] if p["part"] != turn.name] + [part | about]
    data["results"] = [r for r in data["results"] if r["unit"] != turn.name]
    record.add([{**row, "part": turn.name.partition(":")[0], "unit": turn.name} for row in rows])


def _environment() -> dict[str, str]:
    """Kernels that never ran on a GPU take part: this is where they do."""
    paths = (str(SITE), str(ROOT / "python"), os.environ.get("PYTHONPATH"))
    return {"PRO_KERNELS_UNVERIFIED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


class _Process:
    """A child in a process group of its own, its output read line by line until a deadline."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._child = subprocess.Popen(
            command, cwd=ROOT, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **_environment()},
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
