"""The runner: case after case into a results file, then their memory.

How one case is timed is in ``case_run``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from bench import ceilings, memory
from bench.case_run import CaseRun, Clock, Settings, flag_wrong
from bench.cases import Case
from bench.presets import cases_of
from bench.providers import Provider, all_providers, available_bytes, select
from bench.record import NO_TIME, Record, empty_row, facts
from bench.timing import Timer, paired, quartiles  # noqa: F401


def run(
    settings: Settings,
    path: Path,
    device: torch.device,
    log: Callable[[str], None] = print,
    resume: bool = False,
) -> dict:
    """Measure a preset into the JSON file ``path``; returns its content.

    Whatever interrupts the run, the file keeps the cases measured so far. ``resume`` goes on with
    such a file: cases in it are kept, and a provider in which the process died is left out of the
    case it died in.

    Raises:
        DeviceLost: a provider left the GPU unusable; start again with ``resume``.
    """
    cases = cases_of(settings.preset, settings.cases, device.type == "cuda")
    providers = all_providers(device)
    chosen = {
        case.name: select(providers, case.only, settings.providers, settings.without)
        for case in cases
    }
    about = facts(device, **asdict(settings))
    record = Record.resume(path, about) if resume else Record(path, about)
    clock = Clock(settings.seconds)
    if "ceilings" not in record.data:
        log(f"{clock} ceilings")
        record.put(ceilings=ceilings.measure(device, [case.dtype for case in cases]))
    for i, case in enumerate(cases):
        if record.has(case.name):
            continue
        log(f"{clock} {i + 1}/{len(cases)} {case.name}")
        rows = _rows_of(case, chosen[case.name], settings, device, clock, record)
        record.add(rows)
        log("".join(f"    {_line(row)}\n" for row in rows).rstrip())
    if settings.memory and device.type != "cuda":
        for name, group in _to_weigh(cases, chosen).items():
            log(f"{clock} memory of {name}")
            memory.weigh(name, group, device, _weighed(record, name))
    record.finish()
    return record.data


def _rows_of(
    case: Case,
    providers: list[Provider],
    settings: Settings,
    device: torch.device,
    clock: Clock,
    record: Record,
) -> list[dict]:
    """A case's rows, or why it has no numbers."""
    rows = [empty_row(case, p.name, p.label_of(case)) for p in providers]
    free = available_bytes()
    if clock.over:
        note = f"not run: {NO_TIME}"
    elif case.input_bytes > 0.7 * free:
        note = (
            f"not run: its inputs need {case.input_bytes / 1e9:.0f} GB, {free / 1e9:.0f} are free"
        )
    elif case.kind == "memory" and device.type != "cuda":
        return rows  # weighed later
    else:
        return CaseRun(case, settings, device, clock, record).rows(providers)
    return [{**row, "note": note} for row in rows]


def _to_weigh(cases: list[Case], chosen: dict[str, list[Provider]]) -> dict[str, list[Case]]:
    """Cases to weigh by provider: one process a provider."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        for provider in chosen[case.name] if case.memory else []:
            fits = provider.refusal_of_size(case) is None
            if fits and not provider.is_floor:
                found.setdefault(provider.name, []).append(case)
    return found


def _weighed(record: Record, provider: str) -> Callable[[dict], None]:
    def put(answer: dict) -> None:
        numbers = {k: v for k, v in answer.items() if k != "case"}
        row = record.row(answer["case"], provider)
        if row["note"] and "note" in numbers:  # it already says why there are no numbers
            return
        if row["kind"] == "memory" and "seconds" in numbers:
            numbers |= {"q1": numbers["seconds"], "q3": numbers["seconds"], "rounds": 1}
        record.update(answer["case"], provider, numbers)
        flag_wrong(row)

    return put


def _line(row: dict) -> str:
    if row["seconds"] is None:
        return f"{row['label']:42} {row['note'] or 'to be weighed'}"
    of = "" if row["of_floor"] is None else f"  {row['of_floor']:6.2f} of the floor"
    vs = "" if row["vs_ours"] is None else f"  {row['vs_ours']:6.2f}x ours"
    return f"{row['label']:42} {row['seconds'] * 1e3:10.1f} ms{of}{vs}  {row['note']}"
