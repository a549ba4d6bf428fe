"""A run of a suite that has providers: case after case into a results file, then their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import roofline
from bench.engine import isolate
from bench.engine.record import NO_TIME, Record, facts
from bench.engine.timing import Clock
from bench.providers.base import Provider, all_providers, select


class DeviceLost(Exception):
    """A provider left the GPU unusable; whoever goes on needs a new process."""


# What every suite measures, in a row of its own for each (case, provider); None where it was not.
COMMON = ("seconds", "q1", "q3", "of_floor", "peak_bytes", "gradient_bytes", "loss", "loss_error")


@dataclass(frozen=True)
class Settings:
    """How a run is made."""

    preset: str = "cpu-small"
    cases: tuple[str, ...] = ()  # substrings of case names, or group names; empty for all
    providers: tuple[str, ...] = ()  # empty for all
    without: tuple[str, ...] = ()  # providers to leave out
    repeats: int | None = None  # rounds; None for each case's own
    memory: bool = True  # weigh the cases marked for it
    # A peer leaves a case's rounds once it has run this long. If its first call took longer, and
    # nothing was compiled in it, that call is its one round. Floors and ours take part in all.
    peer_seconds: float = 12.0
    seconds: float | None = None  # start nothing more after this time


@dataclass(frozen=True)
class Suite:
    """Cases and how one is measured."""

    name: str  # as on the command line
    case_type: type  # of the cases; each has name, only, repeats, memory, dtype, facts
    presets: dict[str, Callable[[bool], list]]  # the cases on a GPU (True) or a CPU
    measure: Callable[[Any, list[Provider], Run], list[dict]]  # rows of a case, one a provider
    # peak_bytes and more of a provider on a case, in a process made for it.
    weigh: Callable[[Provider, Any, torch.device], dict]
    measured: tuple[str, ...]  # what its rows have beside COMMON
    # What the file says of the run, beside its rows; ValueError where the suite cannot run.
    about: Callable[[Settings, list, torch.device], dict] = lambda *_: {}
    # Whether a device's memory is weighed where it is timed.
    in_process: Callable[[torch.device], bool] = lambda _: False

    def providers(self, device: torch.device) -> dict[str, Provider]:
        return all_providers(device, self.name)

    def blank(self, case: Any, provider: Provider) -> dict:
        """A row without numbers: every key is always there."""
        return {
            "case": case.name, **case.facts, "provider": provider.name,
            "label": provider.label_of(case), "loss_type": provider.loss_type,
            **dict.fromkeys((*COMMON, *self.measured)), "rounds": 0, "wrong": False, "note": "",
        }  # fmt: skip

    def cases(self, preset: str, patterns: tuple[str, ...] = (), on_gpu: bool = False) -> list:
        """The cases of a preset whose name or group contains one of ``patterns`` (none: all).

        Raises:
            ValueError: an unknown preset, or nothing left.
        """
        if preset not in self.presets:
            raise ValueError(f"preset must be one of {list(self.presets)}, got {preset!r}")
        found = [
            case
            for case in self.presets[preset](on_gpu)
            if not patterns or any(p in case.name or p == case.group for p in patterns)
        ]
        if not found:
            raise ValueError(f"no case of preset {preset!r} matches {list(patterns)}")
        return found


@dataclass
class Run:
    """What a case is measured with."""

    settings: Settings
    device: torch.device
    clock: Clock = field(default_factory=Clock)
    record: Record | None = None

    def repeats(self, case: Any) -> int:
        return self.settings.repeats or case.repeats

    def running(self, *case_and_provider: str) -> None:
        """The record says who runs, or that nobody does: whoever runs as it dies is left out."""
        if self.record is not None:
            self.record.put(running=list(case_and_provider) or None)


def run(
    suite: Suite, settings: Settings, path: Path, device: torch.device, resume: bool = False
) -> dict:
    """Measure a preset into the JSON file ``path``; returns its content.

    Whatever interrupts the run, the file keeps the cases measured so far. ``resume`` goes on with
    such a file: cases in it are kept, and a provider in which the process died is left out of the
    case it died in.

    Raises:
        ValueError: a case or provider that there is not.
        DeviceLost: a provider left the GPU unusable; start again with ``resume``.
    """
    cases = suite.cases(settings.preset, settings.cases, device.type == "cuda")
    table, names = suite.providers(device), (settings.providers, settings.without)
    chosen = {case.name: select(table, case.only, *names) for case in cases}
    about = suite.about(settings, cases, device) | facts(device, **asdict(settings))
    about["benchmark"] = suite.name
    record = Record(path, about, resume)
    clock = Clock(settings.seconds)
    one = Run(settings, device, clock, record)
    if "ceilings" not in record.data:
        print(f"{clock} ceilings")
        record.put(ceilings=roofline.measure(device, [case.dtype for case in cases]))
    for i, case in enumerate(cases):
        if record.has(case.name):
            continue
        print(f"{clock} {i + 1}/{len(cases)} {case.name}")
        if clock.over:
            late = {"note": f"not run: {NO_TIME}"}
            rows = [suite.blank(case, provider) | late for provider in chosen[case.name]]
        else:
            rows = suite.measure(case, chosen[case.name], one)
        record.add(rows)
        print("\n".join(f"    {_line(row)}" for row in rows))
    if settings.memory and not suite.in_process(device):
        _weigh(suite, cases, one)
    record.finish()
    return record.data


def _line(row: dict) -> str:
    """A row in the log."""
    if row["seconds"] is None:
        return f"{row['label']:52} {row['note'] or 'to be weighed'}"
    names = {"of_floor": "of the floor", "vs_ours": "x ours", "speedup": "x official",
             "vs_trl": "x TRL", "head_share": "in the head"}  # fmt: skip
    ratios = [f"{row[key]:6.2f} {name}" for key, name in names.items() if row.get(key) is not None]
    return "  ".join([f"{row['label']:52} {row['seconds'] * 1e3:10.1f} ms", *ratios, row["note"]])


def _weigh(suite: Suite, cases: list, run: Run) -> None:
    """Memory of what ran, one process a provider."""
    record = run.record
    by_name = {case.name: case for case in cases if case.memory}
    groups: dict[str, list] = {}
    for row in record.data["results"]:
        weighed_only = getattr(by_name.get(row["case"]), "kind", "") == "memory"
        if row["case"] in by_name and (row["rounds"] or weighed_only and not row["note"]):
            groups.setdefault(row["provider"], []).append(by_name[row["case"]])
    for name, group in groups.items():
        if name.startswith("floor"):
            continue
        if run.clock.over:
            answers = [{"case": case.name, "note": f"not weighed: {NO_TIME}"} for case in group]
        else:
            print(f"{run.clock} memory of {name}")
            answers = isolate.weigh(suite.name, name, group, run.device)
        for answer in answers:
            record.update(answer.pop("case"), name, answer)


def collect(
    suite: str,
    parts: Iterable[Callable[[], list[dict]]],
    path: Path,
    line: Callable[[dict], str],
    **about: Any,
) -> dict:
    """Rows of a suite without providers, part after part, into the file ``path``; its content."""
    record = Record(path, {"benchmark": suite, **about})
    for part in parts:
        rows = part()
        record.add(rows)
        print("\n".join(map(line, rows)))
    record.finish()
    return record.data
