"""A round: units of the parts, one after the other, against the clock, into one results file.

A process measures them and says (``isolate.say``) ``{"part": ..., "row": {...}}`` for a number and
``{"part": ..., "status": "ok", "note": ""}`` when a unit is over. One that dies or goes past a
unit's time is started again with the units that are left, so a bad kernel costs its own unit only:
what it did to the device's context dies with the process.

What was measured with the same code, packages and machine is not measured again, and what was
measured before stays in the file until it is.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.engine.isolate import DEVICE_LOST, ROOT, Child
from bench.engine.record import Record, facts, load
from bench.suites.gpu import parts

WHEELS = "PRO_KERNELS_WHEELS"  # names a folder of wheels that were brought along
SITE = ROOT / "build" / "gpu-site"  # where they are installed
_PREPARED = 180.0  # seconds for the build, and for the wheels
_TRIES = 3  # of a case with providers: the next goes on without who was running


@dataclass(frozen=True)
class Turn:
    name: str  # "part: unit"
    limit: float = 60.0  # seconds
    tries: int = 1  # how often it is started where the process dies
    key: str = ""  # of code, packages, machine; a result of the same key is not measured again


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
                found.append(Turn(name, part.limit, tries, key))
    return found


def _digest(*folders: str) -> str:
    """Of the source files in these folders."""
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh")
    files = (p for name in folders for p in (ROOT / name).rglob("*") if p.suffix in kinds)
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(files))).hexdigest()


def prepare(device: torch.device, end: float) -> None:
    """Install wheels that were brought along, and build the native kernels, before ``end``."""
    wheels = sorted(Path(os.environ.get(WHEELS) or os.devnull).glob("*.whl"))
    pip = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target")
    build = ("build_native", "--inplace") if device.type == "cuda" else ("--version",)
    commands = {"build": ("setup.py", *build)}
    if wheels:
        commands["wheels"] = (*pip, str(SITE), *map(str, wheels))
    else:
        print(
            f"no wheels: {WHEELS} names no folder with any; peers that are not installed stay out"
        )
    for name, command in commands.items():
        with Child((sys.executable, *command), _environment()) as process:
            until = min(end, time.monotonic() + _PREPARED)
            list(process.said(lambda: until))  # noqa: B023
            print(f"{name}: {': '.join(process.verdict())[-300:]}")
    sys.path.insert(0, str(SITE))  # whose versions are those of the results


def run(
    todo: list[Turn],
    path: Path,
    seconds: float,
    device: torch.device,
    again: bool = False,
    command: Sequence[str] = (sys.executable, "-m", "bench.suites.gpu.parts"),
) -> dict:
    """Measure within ``seconds`` what is not there yet (``again``: that, too); the file's content.

    Units of other calls stay in the file at ``path``. ``command`` is of the process that measures;
    device, file, scratch folder and names come behind it.
    """
    end = time.monotonic() + seconds
    about = {"benchmark": "gpu-round", **facts(device, seconds=seconds)}
    old = load(path) if path.exists() else {"parts": [], "results": []}
    record = Record(path, {**about, "parts": old["parts"]})
    record.add(old["results"])
    there = {part["part"]: part for part in old["parts"]}
    left = [t for t in todo if again or not _is_done(t, there.get(t.name, {}))]
    print(f"{len(todo) - len(left)} of {len(todo)} units are measured already")
    with tempfile.TemporaryDirectory() as scratch:
        begin = (*command, str(device), str(path.resolve()), scratch)
        _measure(left, begin, record, end)
    if all(_is_done(t, p) for t in todo for p in record.data["parts"] if p["part"] == t.name):
        record.finish()
    return record.data


def _is_done(turn: Turn, part: dict) -> bool:
    """Failed and too slow is a result; refused or without time may be another tomorrow."""
    return part.get("key") == turn.key and part["status"] not in ("refused", "skipped")


def _measure(left: list[Turn], begin: tuple, record: Record, end: float) -> None:
    tried: Counter[str] = Counter()

    def put(status: str, note: str, started: float, rows: Sequence[dict]) -> None:
        _put(record, left.pop(0), status, note, time.monotonic() - started, rows)

    while left and time.monotonic() < end:
        with Child((*begin, *(turn.name for turn in left)), _environment()) as process:
            started, rows, before = time.monotonic(), [], len(left)
            limit = started + left[0].limit
            for said in process.said(lambda: min(limit, end)):  # noqa: B023
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
) -> None:  # fmt: skip
    last = (note.splitlines() or [""])[-1][:120]
    print(f"{turn.name[:60]:60} {status:8} {seconds:6.1f} s  {last}")
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
