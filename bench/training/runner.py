"""The runner: interleaved rounds of all steps in one process, then their memory.

As for the loss (``bench.runner``): every round runs each step once, in a random order, and ratios
are medians over rounds of times taken in the same round. Before that each step's loss and every
parameter's gradient are held against the official procedure's.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bench import memory
from bench.record import Record, facts
from bench.runner import Settings, paired, quartiles
from bench.step import describe
from bench.training.cases import TrainingCase, cases_of
from bench.training.providers import Floor, Provider, Timed, TrainingStep, Workload, select
from pro_kernels import backends

# Same weights and lists, fp32: what differs is the order of sums.
LOSS_TOLERANCE = 1e-5
GRAD_TOLERANCE = 1e-4
BASELINE = "official"
PACKAGES = ("torch", "transformers", "pro-kernels")
_COLLATIONS = 5


def run(
    settings: Settings, path: Path, device: torch.device, log: Callable[[str], None] = print
) -> dict:
    """Measure a preset into the JSON file ``path``; returns its content.

    Whatever interrupts the run, the file keeps the cases measured so far.

    Raises:
        ValueError: a case or provider that there is not; no transformers.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--training needs transformers: pip install 'pro-kernels[train]'")
    cases = cases_of(settings.preset, settings.cases)
    chosen = {case.name: select(case.only, settings.providers) for case in cases}
    about = facts(device, PACKAGES, **asdict(settings))
    backend = backends.resolve("auto", device, torch.float32)
    record = Record(path, {"benchmark": "training", "backend": backend, **about})
    started = time.perf_counter()
    for i, case in enumerate(cases):
        log(f"[{time.perf_counter() - started:6.0f} s] {i + 1}/{len(cases)} {case.name}")
        rows = time_case(case, chosen[case.name], settings, device)
        record.add(rows)
        log("\n".join(f"    {_line(row)}" for row in rows))
    names = dict.fromkeys(p.name for ps in chosen.values() for p in ps if not p.is_floor)
    for name in names if settings.memory else ():
        log(f"[{time.perf_counter() - started:6.0f} s] memory of {name}")
        group = [case for case in cases if name in {p.name for p in chosen[case.name]}]
        memory.weigh(name, group, device, _weighed(record, name), "bench.training.weigh")
    record.finish()
    return record.data


def time_case(
    case: TrainingCase, providers: list[Provider], settings: Settings, device: torch.device
) -> list[dict]:
    """One row a provider: build and check each, then the interleaved rounds."""
    work = Workload(case, device, settings.seed)
    rows = {p.name: empty_row(case, p.name, p.label) for p in providers}
    steps, truth = {}, None
    for provider in sorted(providers, key=lambda p: p.name != BASELINE):
        row = rows[provider.name]
        try:
            step = provider.build(work)
            timed = step.run(keep_gradients=True)
        except Exception as error:  # one that runs out of memory must not end the run
            row["note"] = describe(error)
            work.clear()
            continue
        steps[provider.name] = step
        row |= {"note": step.detail, "gradient_bytes": work.gradient_bytes}
        if timed.loss is not None:
            truth = truth or (timed.loss, _gradients(work))
            compare(row, timed.loss, truth, work)
            row["collate_seconds"] = _collation(step)
        work.clear()
    times = _rounds(steps, rows, settings.repeats or case.repeats, settings.seed)
    for name, taken in times.items():
        _fill(rows[name], taken, times)
    return list(rows.values())


def compare(row: dict, loss: float, truth: tuple[float, dict[str, Tensor]], work: Workload) -> None:
    """Put the distance from the official loss and gradients into a row; flag it if too large."""
    expected, gradients = truth
    row["loss"] = loss
    row["loss_error"] = abs(loss - expected) / abs(expected)
    row["grad_error"] = max(
        float((p.grad - gradients[name]).norm() / gradients[name].norm())
        for name, p in work.model.named_parameters()
    )
    if not (row["loss_error"] <= LOSS_TOLERANCE and row["grad_error"] <= GRAD_TOLERANCE):
        row["wrong"] = True
        row["note"] = "WRONG RESULT: not comparable"


def empty_row(case: TrainingCase, provider: str, label: str) -> dict:
    """A row without numbers: every key is always there."""
    return {
        "case": case.name,
        **{k: getattr(case, k) for k in ("n", "P", "R", "B", "model", "tokens", "scored")},
        "needed": case.needed,
        "shape": asdict(case.shape),
        "provider": provider,
        "label": label,
        "seconds": None,
        "q1": None,
        "q3": None,
        "rounds": 0,
        "gradient_seconds": None,
        "optimizer_seconds": None,
        "of_floor": None,
        "speedup": None,
        "speedup_gradient": None,
        "vs_padded": None,
        "collate_seconds": None,
        "collate_share": None,
        "peak_bytes": None,
        "gradient_bytes": None,
        "loss": None,
        "loss_error": None,
        "grad_error": None,
        "wrong": False,
        "note": "",
    }


def _gradients(work: Workload) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in work.model.named_parameters()}


def _collation(step: TrainingStep) -> float:
    """Seconds of making the batch."""
    taken = []
    for _ in range(_COLLATIONS):
        start = time.perf_counter()
        step.collate()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _rounds(
    steps: dict[str, TrainingStep | Floor], rows: dict[str, dict], repeats: int, seed: int
) -> dict[str, list[Timed]]:
    """Times of every round by provider; one that fails leaves, with a note."""
    order = random.Random(seed)
    times: dict[str, list[Timed]] = {name: [] for name in steps}
    for _ in range(repeats):
        gc.collect()
        for name in order.sample(sorted(times), len(times)):
            try:
                timed = steps[name].run()
            except Exception as error:
                rows[name]["note"] = describe(error)
                steps[name].work.clear()
                del times[name]
                continue
            times[name].append(timed)
            expected = rows[name]["loss"]
            assert timed.loss is None or abs(timed.loss - expected) <= LOSS_TOLERANCE * abs(
                expected
            )
    return times


def _fill(row: dict, taken: list[Timed], times: dict[str, list[Timed]]) -> None:
    """Medians, quartiles and ratios within rounds."""
    full = {name: [t.seconds for t in ts] for name, ts in times.items()}
    gradient = {name: [t.gradient_seconds for t in ts] for name, ts in times.items()}
    name = row["provider"]
    row["q1"], row["seconds"], row["q3"] = quartiles(full[name])
    row["rounds"] = len(taken)
    row["gradient_seconds"] = statistics.median(gradient[name])
    row["of_floor"] = paired(gradient.get("floor", []), gradient[name])
    if name == "floor":
        return
    row["optimizer_seconds"] = statistics.median(t.optimizer_seconds for t in taken)
    row["speedup"] = paired(full.get(BASELINE, []), full[name])
    row["speedup_gradient"] = paired(gradient.get(BASELINE, []), gradient[name])
    row["vs_padded"] = paired(full.get("ours-padded", []), full[name])
    row["collate_share"] = row["collate_seconds"] / row["seconds"]


def _weighed(record: Record, provider: str) -> Callable[[dict], None]:
    def put(answer: dict) -> None:
        record.update(answer["case"], provider, {k: v for k, v in answer.items() if k != "case"})

    return put


def _line(row: dict) -> str:
    if row["seconds"] is None:
        return f"{row['label']:52} {row['note']}"
    faster = "" if row["speedup"] is None else f"  {row['speedup']:6.2f}x official"
    return f"{row['label']:52} {row['seconds'] * 1e3:10.1f} ms{faster}  {row['note']}"
