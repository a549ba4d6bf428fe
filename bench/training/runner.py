"""The runner: interleaved rounds of all steps in one process, then their memory.

As for the loss (``bench.runner``): every round runs each step once, in a random order, and ratios
are medians over rounds of times taken in the same round. Right after its step, each head runs alone
(``steps.HeadAlone``). Before that each step's loss and every parameter's gradient are held against
the plain procedure's (``truth``).
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import memory
from bench.case_run import Clock, Settings
from bench.record import NO_TIME, Record, facts
from bench.step import describe
from bench.timing import paired, quartiles
from bench.training.cases import TrainingCase, cases_of, left_out
from bench.training.providers import Provider, select
from bench.training.steps import Floor, HeadAlone, Timed, TrainingStep
from bench.training.truth import Truth, compare, drifts, flag_wrong, note, truths_of
from bench.training.workload import DTYPES, Workload
from pro_kernels import backends

BASELINE, TRL = "official", "trl-dpo"
_PADDED = {"pro": "ours-padded", "dpo": "ours-dpo-padded"}
PACKAGES = ("torch", "transformers", "trl", "pro-kernels")
_COLLATIONS = 5

Steps = dict[str, TrainingStep | Floor]
Heads = dict[str, HeadAlone]


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
    cases = cases_of(settings.preset, settings.cases, device.type == "cuda")
    chosen = {case.name: select(case.only, settings.providers, settings.without) for case in cases}
    record, clock = Record(path, _about(settings, cases, device)), Clock(settings.seconds)
    for i, case in enumerate(cases):
        log(f"{clock} {i + 1}/{len(cases)} {case.name}")
        rows = time_case(case, chosen[case.name], settings, device, clock)
        record.add(rows)
        log("\n".join(f"    {_line(row)}" for row in rows))
    names = dict.fromkeys(p.name for ps in chosen.values() for p in ps if not p.is_floor)
    for name in names if settings.memory else ():
        timed = {r["case"] for r in record.data["results"] if r["provider"] == name and r["rounds"]}
        group = [case for case in cases if case.name in timed]
        put = _weighed(record, name)
        if clock.over:
            for case in group:
                put({"case": case.name, "note": f"not weighed: {NO_TIME}"})
            continue
        log(f"{clock} memory of {name}")
        memory.weigh(name, group, device, put, "bench.training.weigh")
    record.finish()
    return record.data


def time_case(
    case: TrainingCase,
    providers: list[Provider],
    settings: Settings,
    device: torch.device,
    clock: Clock | None = None,
) -> list[dict]:
    """One row a provider: build and check each, then the interleaved rounds."""
    clock = clock or Clock(None)
    rows = {p.name: empty_row(case, p.name, p.label, p.loss_type) for p in providers}
    if clock.over:
        return [{**row, "note": f"not run: {NO_TIME}"} for row in rows.values()]
    work = Workload(case, device, settings.seed)
    truths = truths_of(work, (p.loss_type for p in providers if not p.is_floor))
    steps: Steps = {}
    heads: Heads = {}
    for provider in providers:
        row = rows[provider.name]
        step = _prepare(provider, work, truths, row)
        if step is None:
            continue
        steps[provider.name] = step
        if isinstance(step, TrainingStep):
            head = _head_of(step, row)
            heads |= {} if head is None else {provider.name: head}
    truths.clear()
    times = _rounds(
        steps,
        heads,
        rows,
        _clocked(settings.repeats or case.repeats, clock),
        random.Random(settings.seed),
    )
    for name, taken in times.items():
        _fill(rows[name], taken, times)
    return list(rows.values())


def empty_row(case: TrainingCase, provider: str, label: str, loss_type: str = "pro") -> dict:
    """A row without numbers: every key is always there."""
    return {
        "case": case.name,
        **{k: getattr(case, k) for k in ("n", "P", "R", "B", "model", "tokens", "scored")},
        "needed": case.needed,
        "shape": asdict(case.shape),
        "provider": provider,
        "label": label,
        "loss_type": loss_type,
        "seconds": None,
        "q1": None,
        "q3": None,
        "rounds": 0,
        "tokens_per_second": None,
        "gradient_seconds": None,
        "optimizer_seconds": None,
        "head_seconds": None,
        "head_share": None,
        "of_floor": None,
        "speedup": None,
        "speedup_gradient": None,
        "vs_trl": None,
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


def _about(settings: Settings, cases: list[TrainingCase], device: torch.device) -> dict:
    """What the file says of the run, beside its rows."""
    dtypes = dict.fromkeys(DTYPES[case.shape.dtype] for case in cases)
    used = dict.fromkeys(backends.resolve("auto", device, dtype) for dtype in dtypes)
    return {
        "benchmark": "training",
        "backend": ", ".join(used),
        "left_out": left_out(settings.preset, settings.cases, device.type == "cuda"),
        **facts(device, PACKAGES, **asdict(settings)),
    }


def _prepare(
    provider: Provider, work: Workload, truths: dict[str, Truth], row: dict
) -> TrainingStep | Floor | None:
    """Build, warm up and check one provider; None where it fails, with a note."""
    try:
        step = provider.build(work)
        timed = step.run(keep_gradients=True)
        row |= {"note": step.detail, "gradient_bytes": work.gradient_bytes, "loss": timed.loss}
        if timed.loss is not None:
            compare(row, truths[provider.loss_type], work)
            row["collate_seconds"] = _collation(step)
    except Exception as error:  # one that runs out of memory must not end the run
        row["note"] = describe(error)
        return None
    finally:
        work.clear()
    return step


def _head_of(step: TrainingStep, row: dict) -> HeadAlone | None:
    """The step's head alone, warmed up; None, with a note, where it is not the step's."""
    try:
        head = HeadAlone(step)
        if drifts(row, head.run().loss):
            raise ValueError("the head alone gives another loss")
    except Exception as error:
        note(row, f"head not measured: {describe(error)}")
        return None
    return head


def _collation(step: TrainingStep) -> float:
    """Seconds of making the batch."""
    taken = []
    for _ in range(_COLLATIONS):
        start = time.perf_counter()
        step.collate()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _rounds(
    steps: Steps, heads: Heads, rows: dict[str, dict], rounds: Iterable[int], order: random.Random
) -> dict[str, list[Timed]]:
    """Times of every round by provider; one that fails leaves, with a note."""
    times: dict[str, list[Timed]] = {name: [] for name in steps}
    for _ in rounds:
        gc.collect()
        for name in order.sample(sorted(times), len(times)):
            try:
                timed = steps[name].run()
            except Exception as error:
                rows[name]["note"] = describe(error)
                steps[name].work.clear()
                del times[name]
                continue
            if timed.loss is not None and drifts(rows[name], timed.loss):
                flag_wrong(rows[name], "WRONG RESULT: its loss changed from round to round")
            times[name].append(replace(timed, head_seconds=_head_seconds(name, heads, rows)))
    return times


def _clocked(repeats: int, clock: Clock) -> Iterator[int]:
    """One round, and the others while there is time."""
    return itertools.takewhile(lambda i: i == 0 or not clock.over, range(repeats))


def _head_seconds(name: str, heads: Heads, rows: dict[str, dict]) -> float | None:
    """Of the head alone, once; one that fails is not tried again."""
    if name not in heads:
        return None
    try:
        return heads[name].run().seconds
    except Exception as error:
        note(rows[name], f"head not measured: {describe(error)}")
        heads.pop(name).step.work.clear()
        return None


def _fill(row: dict, taken: list[Timed], times: dict[str, list[Timed]]) -> None:
    """Medians, quartiles and ratios within rounds."""
    full = {name: [t.seconds for t in ts] for name, ts in times.items()}
    gradient = {name: [t.gradient_seconds for t in ts] for name, ts in times.items()}
    name, loss_type = row["provider"], row["loss_type"]
    row["q1"], row["seconds"], row["q3"] = quartiles(full[name])
    row["rounds"] = len(taken)
    row["gradient_seconds"] = statistics.median(gradient[name])
    row["of_floor"] = paired(gradient.get("floor", []), gradient[name])
    if name == "floor":
        return
    row["tokens_per_second"] = row["tokens"] / row["seconds"]
    row["optimizer_seconds"] = statistics.median(t.optimizer_seconds for t in taken)
    if loss_type == "pro":
        row["speedup"] = paired(full.get(BASELINE, []), full[name])
        row["speedup_gradient"] = paired(gradient.get(BASELINE, []), gradient[name])
    else:
        row["vs_trl"] = paired(full.get(TRL, []), full[name])
    row["vs_padded"] = paired(full.get(_PADDED[loss_type], []), full[name])
    row["collate_share"] = row["collate_seconds"] / row["seconds"]
    heads = [t.head_seconds for t in taken if t.head_seconds is not None]
    if len(heads) == len(taken):
        row["head_seconds"] = statistics.median(heads)
        row["head_share"] = paired(heads, full[name])


def _weighed(record: Record, provider: str) -> Callable[[dict], None]:
    def put(answer: dict) -> None:
        record.update(answer["case"], provider, {k: v for k, v in answer.items() if k != "case"})

    return put


def _line(row: dict) -> str:
    if row["seconds"] is None:
        return f"{row['label']:52} {row['note']}"
    ratios = (("speedup", "official"), ("vs_trl", "TRL"))
    faster = "".join(f"  {row[k]:6.2f}x {name}" for k, name in ratios if row[k] is not None)
    head = "" if row["head_share"] is None else f"  head {row['head_share']:.0%}"
    return f"{row['label']:52} {row['seconds'] * 1e3:10.1f} ms{faster}{head}  {row['note']}"
