"""Two runs against each other, by their ratios: ``bench compare OLD NEW``.

Absolute times differ between machines and hours; ratios to the floor, measured in the same rounds,
carry over. A ratio is worse when the share of the floor falls by more than ``THRESHOLD``, or, where
a case has no floor, when a peer's distance to ours does. Medians of a quiet machine repeat within
10 %, so that is the threshold.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from bench.engine.record import load
from bench.report.tables import table

THRESHOLD = 0.10
Key = tuple[str, str]


def compare(old: Path, new: Path, threshold: float = THRESHOLD) -> tuple[str, int]:
    """A Markdown table of what changed, and how many ratios of ours are worse than allowed.

    Raises:
        ValueError: a file that is neither, or nothing in common.
    """
    before, after = ratios_of(old), ratios_of(new)
    both = [key for key in before if key in after]
    if not both:
        raise ValueError(f"{old} and {new} have no case and provider in common")
    lines, worse, changes = [], 0, []
    for key in both:
        change = after[key] / before[key] - 1
        changes.append(abs(change))
        bad = change < -threshold and key[1].startswith("ours-")
        worse += bad
        if abs(change) > threshold:
            lines.append([*key, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{change:+.0%}",
                          "**worse**" if bad else ""])  # fmt: skip
    changes.sort()
    high = changes[min(len(changes) - 1, int(0.9 * len(changes)))]
    said = (
        f"{len(both)} ratios (floor / provider): half differ by less than "
        f"{statistics.median(changes):.1%}, nine in ten by less than {high:.1%}, the worst by "
        f"{changes[-1]:.1%}; {worse} of ours worse by more than {threshold:.0%}."
    )
    head = ["case", "provider", "before", "after", "change", ""]
    return (said if not lines else f"{said}\n\n{table(head, lines)}"), worse


def ratios_of(path: Path) -> dict[Key, float]:
    """``floor / provider`` by case and provider, of a results file or pytest-benchmark's JSON.

    Raises:
        ValueError: the file is neither.
    """
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(raw, dict) and "benchmarks" in raw:
        rows = [{"case": b["group"], **b["extra_info"]} for b in raw["benchmarks"]]
    else:
        rows = load(path)["results"]
    return {
        (row["case"], row["provider"]): row["of_floor"]
        for row in rows
        if row.get("of_floor") and not row["provider"].startswith("floor")
    }
