"""The table of docs/integrations/frameworks.md."""

from __future__ import annotations

import re

from bench.report.tables import header
from bench.suites.frameworks.measure import STEPS, WAYS
from bench.suites.frameworks.table import FRAMEWORKS

BLOCK = "frameworks"


def blocks(data: dict, _: dict[str, str]) -> dict[str, str]:
    """The table, and where it was measured."""
    rows = data["results"]
    order = [(x.key, way) for x in FRAMEWORKS for way in WAYS]
    rows.sort(key=lambda row: order.index((row["framework"], row["way"])))
    lines = [
        f"{header(data)}\ntorch {rows[0]['versions']['torch']}.",
        "",
        "| framework | what is typed | losses | difference | CPU s a step | peak memory, GB "
        "| logits never made | tokens not run |",
        "|---|---|---|---|---|---|---|---|",
        *(cells(row, rows) for row in rows),
    ]
    return {BLOCK: "\n".join(lines)}


def cells(row: dict, rows: list[dict]) -> str:
    """One line of the table."""
    (framework,) = (x for x in FRAMEWORKS if x.key == row["framework"])
    (plain,) = (x for x in rows if (x["framework"], x["way"]) == (framework.key, "plain"))
    name = f"{framework.name} {framework.version}, transformers {row['versions']['transformers']}"
    if framework.package != "trl":
        name += f", TRL {row['versions']['trl']}"
    ours = f"pro-kernels {' '.join(WAYS[row['way']])} -- " if WAYS[row["way"]] else ""
    typed = f"`{ours}{framework.command}`"
    if "note" in row:
        return f"| {name} | {typed} | {row['note']} | | | | | |"
    losses = ", ".join(f"{x:.6f}" for x in row["losses"])
    apart = difference(row, plain)
    said = row["said"] or ""
    shares = [
        found[1] if (found := re.search(rf"(\d+%) of {what}", said)) else ""
        for what in ("the logits", r"\d+ tokens were not run")
    ]
    numbers = [f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 1e9:.2f}", *shares]
    shown = "" if row is plain else f"{apart:.1e}"
    return "| " + " | ".join([name, typed, losses, shown, *numbers]) + " |"


def difference(row: dict, plain: dict) -> float:
    """The largest between the losses of a run and those without pro_kernels."""
    steps = list(zip(row["losses"], plain["losses"], strict=True))
    assert len(steps) == STEPS
    return max(abs(a - b) for a, b in steps)
