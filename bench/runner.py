"""The runner: interleaved rounds of all providers in one process, then their memory.

Every round runs each provider once, in a random order, so that a slow minute of the machine falls
on all of them; ratios are medians over rounds of times taken in the same round. Gradients are
dropped between calls, outside the timing.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import memory
from bench.cases import Case, cases_of
from bench.inputs import Inputs, Truth, make_inputs, make_truth
from bench.providers import Provider, all_providers, ours_name, select
from bench.record import Record, empty_row, facts
from bench.step import Step, describe

# A provider further than this from fp64 computes something else: its row is flagged.
LOSS_TOLERANCE = 2e-2
# Gradient rows of the official code's bf16 arithmetic are off by 0.05; a missing rank term by 1.
GRAD_TOLERANCE = 0.2
_L2_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        preset: name of the case table.
        cases: substrings of case names, or group names; empty for all.
        providers: provider names; empty for all.
        repeats: rounds, None for each case's own.
        memory: weigh the cases marked for it.
        peer_seconds: a peer leaves a case's rounds once it has run this long; if its first call
            took longer, and nothing was compiled in it, that call is its one round. Floors and ours
            take part in all.
        seed: of the data and of the order.
    """

    preset: str = "quick"
    cases: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    repeats: int | None = None
    memory: bool = True
    peer_seconds: float = 12.0
    seed: int = 0


class Timer:
    """Seconds of one call: the clock on a CPU, events after an L2 flush on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Make the events and the flush buffer where ``device`` is a GPU."""
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, step: Step) -> float:
        """Run the step once; what it returns is freed after the clock stops."""
        if not self.cuda:
            start = time.perf_counter()
            value = step.run()
            seconds = time.perf_counter() - start
            del value
            return seconds
        self.flush.zero_()
        self.events[0].record()
        value = step.run()
        self.events[1].record()
        torch.cuda.synchronize()
        del value
        return self.events[0].elapsed_time(self.events[1]) / 1e3


def run(
    settings: Settings, path: Path, device: torch.device, log: Callable[[str], None] = print
) -> dict:
    """Measure a preset into the JSON file ``path``; returns its content.

    Whatever interrupts the run, the file keeps the cases measured so far.
    """
    cases = cases_of(settings.preset, settings.cases)
    providers = all_providers(device)
    chosen = {case.name: select(providers, case.only, settings.providers) for case in cases}
    record = Record(path, facts(device, **asdict(settings)))
    started = time.perf_counter()
    for i, case in enumerate(cases):
        log(f"[{time.perf_counter() - started:6.0f} s] {i + 1}/{len(cases)} {case.name}")
        if case.kind == "memory":
            rows = [empty_row(case, p.name, p.label_of(case)) for p in chosen[case.name]]
        else:
            rows = time_case(case, chosen[case.name], settings, device)
        record.add(rows)
        log("".join(f"    {_line(row)}\n" for row in rows).rstrip())
    if settings.memory:
        for name, group in _to_weigh(cases, chosen).items():
            log(f"[{time.perf_counter() - started:6.0f} s] memory of {name}")
            memory.weigh(name, group, device, _weighed(record, name))
    record.finish()
    return record.data


def time_case(
    case: Case, providers: list[Provider], settings: Settings, device: torch.device
) -> list[dict]:
    """One row a provider: build and check each, then the interleaved rounds."""
    torch._dynamo.reset()  # or the recompile limit would quietly turn compilation off
    inputs = make_inputs(case, device, settings.seed)
    truth = make_truth(inputs)
    rows = {p.name: empty_row(case, p.name, p.label_of(case)) for p in providers}
    steps, times = {}, {}
    for provider in providers:
        row = rows[provider.name]
        prepared = _prepare(provider, inputs, truth, row)
        if prepared is None:
            continue
        step, first = prepared
        steps[provider.name], times[provider.name] = step, []
        if _takes_part_once(provider, first, settings, device):
            times[provider.name].append(first)
            row["note"] = "; ".join(x for x in (row["note"], "one call, the first") if x)
    _rounds(steps, times, rows, case, settings, device)
    ours = times.get(ours_name(device), [])
    for name, taken in times.items():
        row = rows[name]
        row["seconds"] = statistics.median(taken)
        row["q1"], _, row["q3"] = quartiles(taken)
        row["rounds"] = len(taken)
        row["of_floor"] = paired(times.get("floor", []), taken)
        row["of_floor_fp32"] = paired(times.get("floor-fp32", []), taken)
        row["vs_ours"] = paired(taken, ours)
    return list(rows.values())


def _prepare(
    provider: Provider, inputs: Inputs, truth: Truth, row: dict
) -> tuple[Step, float] | None:
    """Build, warm up and check one provider: its step and the first call's seconds.

    None where it cannot be timed, with a note.
    """
    case = inputs.case
    row["note"] = provider.refusal_of_size(case) or ""
    if row["note"]:
        return None
    try:
        step = provider.build(inputs)
        start = time.perf_counter()
        value = step.run()
        if inputs.device.type == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        if not provider.is_floor:
            row["loss"] = float(value)
            row["loss_error"] = truth.loss_error(row["loss"])
            row["grad_error"] = truth.grad_error(step.leaves)
            row["gradient_bytes"] = step.gradient_bytes
            flag_wrong(row)
    except Exception as error:  # a peer may raise anything; its row says what
        row["note"] = describe(error)
        return None
    finally:
        for leaf in inputs.leaves:
            leaf.grad = None
    step.clear()
    return step, first


def flag_wrong(row: dict) -> None:
    """Mark a row whose loss or gradient is not that of the others (NaN included)."""
    checks = ((row["loss_error"], LOSS_TOLERANCE), (row["grad_error"], GRAD_TOLERANCE))
    if any(error is not None and not error <= limit for error, limit in checks):
        row["wrong"] = True
        row["note"] = "WRONG RESULT: not comparable"


def _takes_part_once(
    provider: Provider, first: float, settings: Settings, device: torch.device
) -> bool:
    """Whether the first call, of ``first`` seconds, is all the time a provider gets."""
    always = provider.is_floor or provider.name == ours_name(device) or provider.compiles
    return not always and first > settings.peer_seconds


def _rounds(
    steps: dict[str, Step],
    times: dict[str, list[float]],
    rows: dict[str, dict],
    case: Case,
    settings: Settings,
    device: torch.device,
) -> None:
    """Fill the seconds of every round by provider; one that fails leaves, with a note."""
    timer, order = Timer(device), random.Random(settings.seed)
    always = {"floor", "floor-fp32", ours_name(device)}
    for _ in range(settings.repeats or case.repeats):
        gc.collect()
        for name in order.sample(sorted(steps), len(steps)):
            if name not in always and sum(times[name]) > settings.peer_seconds:
                continue
            try:
                times[name].append(timer(steps[name]))
            except Exception as error:
                rows[name]["note"] = describe(error)
                del steps[name], times[name]
                continue
            steps[name].clear()


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
        row = next(
            r
            for r in record.data["results"]
            if (r["case"], r["provider"]) == (answer["case"], provider)
        )
        if row["note"] and "note" in numbers:  # it already says why there are no numbers
            return
        if row["kind"] == "memory" and "seconds" in numbers:
            numbers |= {"q1": numbers["seconds"], "q3": numbers["seconds"], "rounds": 1}
        record.update(answer["case"], provider, numbers)
        flag_wrong(row)

    return put


def paired(numerator: list[float], denominator: list[float]) -> float | None:
    """Median over the rounds both took part in of the ratio within the round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=False)]
    return statistics.median(ratios) if ratios else None


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def _line(row: dict) -> str:
    if row["seconds"] is None:
        return f"{row['label']:42} {row['note'] or 'to be weighed'}"
    of = "" if row["of_floor"] is None else f"  {row['of_floor']:6.2f} of the floor"
    vs = "" if row["vs_ours"] is None else f"  {row['vs_ours']:6.2f}x ours"
    return f"{row['label']:42} {row['seconds'] * 1e3:10.1f} ms{of}{vs}  {row['note']}"
