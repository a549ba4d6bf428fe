"""One case: providers built and checked against fp64, then interleaved rounds.

Every round runs each provider once, in a random order, so that a slow minute of the machine falls
on all of them; ratios are medians over rounds of times taken in the same round. Gradients are
dropped between calls, outside the timing.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench import ceilings, memory
from bench.cases import Case
from bench.inputs import Inputs, Truth, make_inputs, make_truth
from bench.providers import Provider, ours_name
from bench.record import NO_TIME, Record, empty_row
from bench.step import Step, describe
from bench.timing import Timer, paired, quartiles

# A provider further than this from fp64 computes something else: its row is flagged.
LOSS_TOLERANCE = 2e-2
# Gradient rows of the official code's bf16 arithmetic are off by 0.05; a missing rank term by 1.
GRAD_TOLERANCE = 0.2


class DeviceLost(Exception):
    """A provider left the GPU unusable; whoever goes on needs a new process."""


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        preset: name of the case table.
        cases: substrings of case names, or group names; empty for all.
        providers: provider names; empty for all.
        without: provider names to leave out.
        repeats: rounds, None for each case's own.
        memory: weigh the cases marked for it.
        peer_seconds: a peer leaves a case's rounds once it has run this long; if its first call
            took longer, and nothing was compiled in it, that call is its one round. Floors and ours
            take part in all.
        seconds: start nothing more after this time; None for no limit.
        seed: of the data and of the order.
    """

    preset: str = "cpu-small"
    cases: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    repeats: int | None = None
    memory: bool = True
    peer_seconds: float = 12.0
    seconds: float | None = None
    seed: int = 0


class Clock:
    """Time since the start, and whether it is over."""

    def __init__(self, seconds: float | None) -> None:
        """Start it; None never ends."""
        self.start, self.seconds = time.perf_counter(), seconds

    def __str__(self) -> str:
        return f"[{time.perf_counter() - self.start:6.0f} s]"

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return self.seconds is not None and time.perf_counter() - self.start > self.seconds


class CaseRun:
    """One case: providers built and checked, then the interleaved rounds."""

    def __init__(
        self,
        case: Case,
        settings: Settings,
        device: torch.device,
        clock: Clock | None = None,
        record: Record | None = None,
    ) -> None:
        """Make inputs and truth; ``record`` learns who runs, for when the process dies."""
        torch._dynamo.reset()  # or the recompile limit would quietly turn compilation off
        self.case, self.settings, self.device = case, settings, device
        self.clock, self.record = clock or Clock(None), record
        self.inputs: Inputs = make_inputs(case, device, settings.seed)
        self.truth: Truth = make_truth(self.inputs)
        self.warm = case.fits_cache
        self.timer = Timer(device, flush=self.warm, lead=not self.warm)
        self.steps: dict[str, Step] = {}
        self.times: dict[str, list[float]] = {}
        self.warm_times: dict[str, list[float]] = {}

    def rows(self, providers: list[Provider]) -> list[dict]:
        """One row a provider."""
        rows = {p.name: empty_row(self.case, p.name, p.label_of(self.case)) for p in providers}
        for provider in providers:
            row = rows[provider.name]
            first = self._prepare(provider, row)
            if first is not None and self._takes_part_once(provider, first):
                self.times[provider.name].append(first)
                row["note"] = "; ".join(x for x in (row["note"], "one call, the first") if x)
        self._rounds(rows)
        ours = self.times.get(self._ours(rows) or "", [])
        for name, taken in self.times.items():
            self._fill(rows[name], taken, ours)
        return list(rows.values())

    def _prepare(self, provider: Provider, row: dict) -> float | None:
        """Build, warm up, check and, on a GPU, weigh one provider; the first call's seconds.

        None where it cannot be timed, with a note.
        """
        lost = self.record.lost(self.case.name, provider.name) if self.record else None
        row["note"] = lost or provider.refusal_of_size(self.case) or ""
        if self.clock.over and not row["note"]:
            row["note"] = f"not run: {NO_TIME}"
        if row["note"]:
            return None
        try:
            with self._named(provider.name):
                step = provider.build(self.inputs)
                start = time.perf_counter()
                value = step.run()
                self._wait()
                first = time.perf_counter() - start
                if not provider.is_floor:
                    loss = float(value)  # type: ignore[arg-type]
                    row |= {"loss": loss, **self.truth.errors(loss, step)}
                    row["gradient_bytes"] = step.gradient_bytes
                    flag_wrong(row)
                step.clear()
                if self.device.type == "cuda" and self.case.memory and not provider.is_floor:
                    del value
                    row["peak_bytes"], _ = memory.peak_extra_bytes(step, self.device)
        except Exception as error:  # a peer may raise anything; its row says what
            row["note"] = describe(error)
            self._check_device(provider.name)
            return None
        finally:
            for leaf in self.inputs.leaves:
                leaf.grad = None
        step.clear()
        self.steps[provider.name], self.times[provider.name] = step, []
        self.warm_times[provider.name] = []
        return first

    def _rounds(self, rows: dict[str, dict]) -> None:
        """Fill the seconds of every round by provider; one that fails leaves, with a note."""
        order = random.Random(self.settings.seed)
        always = {"floor", "floor-fp32", ours_name(self.device)}
        for turn in range(self.settings.repeats or self.case.repeats):
            if turn > 2 and self.clock.over:
                break
            gc.collect()
            for name in order.sample(sorted(self.steps), len(self.steps)):
                spent = sum(self.times[name])
                if name not in always and spent > self.settings.peer_seconds:
                    continue
                try:
                    with self._named(name):
                        self._time(name)
                except Exception as error:
                    rows[name]["note"] = describe(error)
                    self._check_device(name)
                    del self.steps[name], self.times[name], self.warm_times[name]

    def _time(self, name: str) -> None:
        step = self.steps[name]
        self.times[name].append(self.timer(step))
        step.clear()
        if self.warm:
            self.warm_times[name].append(self.timer(step, warm=True))
            step.clear()

    def _fill(self, row: dict, taken: list[float], ours: list[float]) -> None:
        """Medians, quartiles, ratios within rounds, rates."""
        if not taken:
            row["note"] = row["note"] or f"not run: {NO_TIME}"
            return
        row["q1"], row["seconds"], row["q3"] = quartiles(taken)
        row["rounds"] = len(taken)
        if self.warm_times[row["provider"]]:
            row["warm_seconds"] = statistics.median(self.warm_times[row["provider"]])
        row["of_floor"] = paired(self.times.get("floor", []), taken)
        row["of_floor_fp32"] = paired(self.times.get("floor-fp32", []), taken)
        row["vs_ours"] = paired(taken, ours)
        row["rate"] = (self.case.flops or self.case.bytes or 0) / row["seconds"]
        known = self.record.data.get("ceilings") if self.record else None
        ceiling = ceilings.of_case(known, self.case)
        row["of_ceiling"] = row["rate"] / ceiling if ceiling else None

    def _ours(self, rows: dict[str, dict]) -> str | None:
        """What ours is here: what "auto" picks; where that failed, the first that ran."""
        names = [ours_name(self.device), *(n for n in rows if n.startswith("ours-"))]
        return next((n for n in names if n in self.times and not rows[n]["wrong"]), None)

    def _takes_part_once(self, provider: Provider, first: float) -> bool:
        """Whether the first call, of ``first`` seconds, is all the time a provider gets."""
        always = provider.is_floor or provider.name == ours_name(self.device) or provider.compiles
        return not always and first > self.settings.peer_seconds

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """The record says who runs: if the process dies, that one is left out."""
        if self.record is None:
            yield
            return
        self.record.put(running=[self.case.name, name])
        yield
        self.record.put(running=None)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _check_device(self, name: str) -> None:
        try:
            self._wait()
        except RuntimeError as error:
            raise DeviceLost(f"{name}: {describe(error)}") from None
        if self.record is not None and "running" in self.record.data:
            self.record.put(running=None)  # it failed, but what comes next is not to blame


def flag_wrong(row: dict) -> None:
    """Mark a row whose loss or gradient is not that of the others (NaN included)."""
    limits = {"loss_error": LOSS_TOLERANCE, "input_grad_error": GRAD_TOLERANCE,
              "weight_grad_error": GRAD_TOLERANCE}  # fmt: skip
    if any(row[key] is not None and not row[key] <= limit for key, limit in limits.items()):
        row["wrong"] = True
        row["note"] = "WRONG RESULT: not comparable"
