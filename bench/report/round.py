"""The report of the rounds on a GPU: targets met, missed or not measured; parts; all numbers."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.tables import (
    Column,
    by_case,
    case_table,
    columns_table,
    header,
    joined,
    number,
    outcome_table,
    table,
)
from bench.report.targets import (
    FROZEN,
    MEANS,
    PEERS,
    Outcome,
    Rows,
    Target,
    best,
    inverse,
    linear,
    misfit,
)
from bench.suites import filter
from bench.suites.gpu.parts import PARTS

# Milliseconds by rows that QuACK and Liger publish for sm_90, H 4096 and V 128256.
_PUBLISHED = {4096: 16.7, 8192: 34.35, 16384: 73.7}


def _filter(model: str) -> Target:
    def value(rows: Rows) -> float | None:
        found = filter.best([r for r in rows if r.get("batch") == model])
        return found[0]["of_floor"] if found else None

    most = {"SmolLM2": 0.55, "Gemma 3": 0.5}[model]
    return Target(f"the filter, {model}", value, most, " of the dense floor")


def _copied(rows: Rows) -> float | None:
    mine = (r for r in rows if r["part"] == "logits" and "predicted" in r)
    found = (r["predicted"] / r["seconds"] for r in mine)
    return min(found, default=None)


# Of the rounds on a GPU, in the order of their parts.
TARGETS = (
    Target("comparisons that fail", best("failed", part="check"), 0),
    Target("tests marked gpu that fail", best("failed", "all", part="tests"), 0),
    Target("tests marked gpu that did not run", best("not_run", "all", part="tests"), 0),
    Target("the best peer measured, in any case",
           best("vs_ours", part="peers", provider=(*PEERS, *MEANS)), 1, " times ours", least=True),
    *(Target(f"QuACK or Liger for sm_90, {n} rows, {ms} ms as published",
             best("seconds", f"ce H=4096 V=128256 bf16 n=4 R={n} masked 0%", 1e3,
                  provider=("quack-mean", "liger-sm90-mean", "liger-sm90")), 1.1 * ms, " ms")
      for n, ms in _PUBLISHED.items()),
    Target("three matmuls with QuACK's epilogue, 6528 rows",
           best("seconds", "N=6528", 1e3, part="gemm", name="QuACK, three"), 27.4, " ms"),
    *(Target(f"scoring 6528 rows, {how}",
             inverse(best("floor", f"N=6528 H=4096 V=128256, {how}", name="ours")), 0.95,
             " of one matmul", least=True)
      for how in ("device", "with the host")),
    Target("the least memory (T3)", best("vs_ours", part="budgets", provider="ours-T3"), 1.6,
           " times T1"),
    FROZEN,
    Target("logits in", _copied, 0.9, " of a copy's rate", least=True),
    Target("ranking 4096 prompts of 64 candidates, 16 tokens each",
           best("seconds", "n=64, 4096 prompts, 16 tokens", 1e6), 50, " us"),
    *map(_filter, ("SmolLM2", "Gemma 3")),
    *(Target(f"distinct tokens by {way}", best("padded", part="packed", name=way), 1,
             " of padded rows")
      for way in ("varlen", "FlexAttention")),
    linear("time in scored tokens",
            misfit("scored", "seconds", group="growth N", vs_ours=1.0), 0.2),
    Target("a sharded head of one rank", best("tensor", name="DTensor, sharded"), 1.05,
           " of the tensor's time"),
)  # fmt: skip
_NUMBERS: list[Column] = [
    *((k or "", lambda row, k=k or "name": row.get(k, "")) for k in ("case", "")),
    ("ms", number("seconds", ".4g", 1e3)),
    ("predicted, ms", number("predicted", ".4g", 1e3)),
    ("TB/s", number("bytes_per_second", ".3g", 1e-12)),
    ("tau", lambda row: filter.shown(row) if row.get("tau") else ""),
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
    return joined(*lines) + "\n"


def blocks(data: dict, _: dict[str, str]) -> dict[str, str]:
    """What a page shows."""
    return {"gpu-round": _summary(data)}


def outcomes(data: dict) -> list[Outcome]:
    """Every target, measured or not; a dry run measured nothing."""
    rows = [row for row in data["results"] if not row.get("wrong") and data["device"] != "cpu"]
    return [target.outcome(rows) for target in TARGETS]


def _summary(data: dict) -> str:
    """Machine, targets, and what became of each part."""
    ended = {x["part"]: x for x in data["parts"] if x["status"] != "skipped"}
    lines, notes = [], []
    for part in PARTS:
        units = part.units(data["device"])
        mine = [ended[unit] for unit in units if unit in ended]
        well = sum(x["status"] == "ok" for x in mine)
        when = ", ".join(sorted({f"{x['date']} ({x['commit']})" for x in mine}))
        took, counts = f"{sum(x['seconds'] for x in mine):.0f}", f"{well} of {len(units)}"
        lines.append([str(part.section), part.what, counts, took, when or "not measured"])
        for x in mine:
            if x["status"] != "ok":
                last = (x["note"].strip().splitlines() or [""])[-1][:160]
                notes.append(f"- {x['part']}: {x['status']} ({last})")
    where = header(data) if data["parts"] else "No round has run yet."
    if data["parts"] and data["device"] == "cpu":
        where += "\n\n**A dry run on the CPU: its numbers mean nothing.**"
    head = ["", "part", "units measured", "seconds", "date (commit)"]
    parts = [where, outcome_table(outcomes(data)), table(head, lines), "\n".join(notes)]
    return joined(*parts)
