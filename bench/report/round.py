"""The report of the rounds on a GPU: targets met, missed or not measured; parts; all numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.report.tables import (
    Column,
    by_case,
    case_table,
    columns_table,
    header,
    number,
    outcome_table,
    table,
)
from bench.report.targets import PEERS, Outcome, linear_misfit
from bench.suites.filter import best as best_filter
from bench.suites.filter import shown
from bench.suites.gpu.parts import PARTS

Rows = list[dict]
Value = Callable[[Rows], float | None]
# Milliseconds by rows that QuACK and Liger publish for sm_90, H 4096 and V 128256.
RECORD = {4096: 16.7, 8192: 34.35, 16384: 73.7}
_MEANS = ("quack-mean", "liger-sm90-mean", "liger-ce", "torch-lce-mean")  # no gradient per token


class Target(NamedTuple):
    """What a part is held to: at most ``bound`` in ``unit``, or at least."""

    part: str
    what: str
    bound: float
    unit: str
    value: Value
    least: bool = False

    def outcome(self, data: dict) -> Outcome:
        """Against what was measured of its part; a dry run measured nothing."""
        on_gpu = data["device"] != "cpu"
        rows = [r for r in data["results"] if r["part"] == self.part and not r.get("wrong")]
        value = self.value(rows) if on_gpu else None
        target = f"{'>=' if self.least else '<='} {self.bound:g} {self.unit}".rstrip()
        if value is None:
            return Outcome(self.what, target, "not measured", None)
        met = value >= self.bound if self.least else value <= self.bound
        return Outcome(self.what, target, f"{value:.3g}", met)


def _best(key: str, where: str = "", scale: float = 1.0, **of: str | tuple) -> Value:
    """The least of a number, or of the ratio to ``key`` in the same rounds.

    Of rows whose case holds ``where``, and whose field is (one of) what ``of`` says.
    """

    def value(rows: Rows) -> float | None:
        fit = [row for row in rows if where in row["case"]]
        for name, what in of.items():
            fit = [r for r in fit if r.get(name) in ((what,) if isinstance(what, str) else what)]
        found = [row.get("over", {}).get(key, row.get(key)) for row in fit]
        return min((scale * x for x in found if x is not None), default=None)

    return value


def _inverse(value: Value) -> Value:
    return lambda rows: None if (found := value(rows)) is None else 1 / found


def _copy_rate(rows: Rows) -> float | None:
    return min((r["predicted"] / r["seconds"] for r in rows if "predicted" in r), default=None)


def _filter(model: str) -> Value:
    def value(rows: Rows) -> float | None:
        found = best_filter([row for row in rows if row["batch"] == model])
        return found[0]["of_floor"] if found else None

    return value


def _off_a_line(rows: Rows) -> float | None:
    ours = [r for r in rows if r["group"] == "growth N" and r["vs_ours"] == 1.0]
    points = [(r["scored"], r["seconds"]) for r in ours]
    return linear_misfit(*map(list, zip(*points, strict=True))) if len(points) > 2 else None


TARGETS = (
    Target("check", "comparisons that fail", 0, "", _best("failed")),
    Target("tests", "tests marked gpu that fail", 0, "", _best("failed", "all")),
    Target("tests", "tests marked gpu that did not run", 0, "", _best("not_run", "all")),
    Target("peers", "the best peer measured, in any case", 1, "times ours",
           _best("vs_ours", provider=(*PEERS, *_MEANS)), least=True),
    *(Target("peers", f"QuACK or Liger for sm_90, {n} rows, {ms} ms as published", 1.1 * ms, "ms",
             _best("seconds", f"ce H=4096 V=128256 bf16 n=4 R={n} masked 0%", 1e3,
                   provider=("quack-mean", "liger-sm90-mean", "liger-sm90")))
      for n, ms in RECORD.items()),
    Target("gemm", "three matmuls with QuACK's epilogue, 6528 rows", 27.4, "ms",
           _best("seconds", "N=6528", 1e3, name="QuACK, three")),
    *(Target("scoring", f"scoring 6528 rows, {how}", 0.95, "of one matmul",
             _inverse(_best("floor", f"N=6528 H=4096 V=128256, {how}", name="ours")), least=True)
      for how in ("device", "with the host")),
    Target("budgets", "the least memory (T3)", 1.6, "times T1",
           _best("vs_ours", provider="ours-T3")),
    Target("frozen", "a frozen head", 0.7, "of the full time",
           _inverse(_best("vs_ours", provider="ours-trained-head"))),
    Target("logits", "logits in", 0.9, "of a copy's rate", _copy_rate, least=True),
    Target("ranking", "ranking 4096 prompts of 64 candidates, 16 tokens each", 50, "us",
           _best("seconds", "n=64, 4096 prompts, 16 tokens", 1e6)),
    Target("filter", "the filter, SmolLM2", 0.55, "of the dense floor", _filter("SmolLM2")),
    Target("filter", "the filter, Gemma 3", 0.5, "of the dense floor", _filter("Gemma 3")),
    *(Target("packed", f"distinct tokens by {way}", 1, "of padded rows", _best("padded", name=way))
      for way in ("varlen", "FlexAttention")),
    Target("growth", "time in scored tokens, distance from a line", 0.2, "", _off_a_line),
    Target("dtensor", "a sharded head of one rank", 1.05, "of the tensor's time",
           _best("tensor", name="DTensor, sharded")),
)  # fmt: skip
_NUMBERS: list[Column] = [
    *((k or "", lambda row, k=k or "name": row.get(k, "")) for k in ("case", "")),
    ("ms", number("seconds", ".4g", 1e3)),
    ("predicted, ms", number("predicted", ".4g", 1e3)),
    ("TB/s", number("bytes_per_second", ".3g", 1e-12)),
    ("tau", lambda row: shown(row) if row.get("tau") else ""),
    ("of floor", number("of_floor", ".2f")),
    ("times the others", lambda r: ", ".join(f"{k} {v:.3f}" for k, v in r.get("over", {}).items())),
    *((k, lambda row, k=k: row.get(k, "")) for k in ("found", "note")),
]


def report(data: dict, _: Sequence[str] = ()) -> str:
    """The whole page."""
    lines = ["# Rounds on a GPU", _summary(data)]
    for part in PARTS:
        rows = [row for row in data["results"] if row["part"] == part.name]
        if rows:
            lines.append(f"## {part.section}. {part.what}")
        if rows and "provider" not in rows[0]:
            lines.append(columns_table(_NUMBERS, rows))
        elif rows:
            lines += [f"**{case}**\n\n{case_table(x)}" for case, x in by_case(rows).items()]
    return "\n\n".join(lines) + "\n"


def blocks(data: dict, _: dict[str, str]) -> dict[str, str]:
    """What a page shows."""
    return {"gpu-round": _summary(data)}


def _summary(data: dict) -> str:
    """Machine, targets, and what became of each part."""
    ended = {x["part"]: x for x in data["parts"] if x["status"] != "skipped"}
    lines, notes = [], []
    for part in PARTS:
        units = [f"{part.name}: {name}" for name in part.units(data["device"])]
        mine = [ended[unit] for unit in units if unit in ended]
        well = sum(x["status"] == "ok" for x in mine)
        when = ", ".join(sorted({f"{x['date']} ({x['commit']})" for x in mine}))
        took = f"{sum(x['seconds'] for x in mine):.0f}"
        counts = f"{well} of {len(units)}"
        lines.append([str(part.section), part.what, counts, took, when or "not measured"])
        for x in mine:
            if x["status"] != "ok":
                last = (x["note"].strip().splitlines() or [""])[-1][:160]
                notes.append(f"- {x['part']}: {x['status']} ({last})")
    where = header(data) if data["parts"] else "No round has run yet."
    if data["parts"] and data["device"] == "cpu":
        where += "\n\n**A dry run on the CPU: its numbers mean nothing.**"
    found = outcome_table([target.outcome(data) for target in TARGETS])
    head = ["", "part", "units measured", "seconds", "date (commit)"]
    return "\n\n".join(filter(None, [where, found, table(head, lines), "\n".join(notes)]))
