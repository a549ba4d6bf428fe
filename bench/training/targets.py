"""What the trainer set out to reach, against what a results file holds."""

from __future__ import annotations

from bench.targets import Outcome

_COLLATION = 0.03
_MEMORY = 0.4
SPEED = {"n=4 P=512 R=64": 3.5, "n=8 P=512 R=64": 5.0}
NEVER_SLOWER = "n=8 P=128 R=128"


def outcomes(rows: list[dict]) -> list[Outcome]:
    """Every target, measured or not; ours is what ``auto`` does, against the leaner official."""
    found = {(row["case"], row["provider"]): row for row in rows if not row["wrong"]}
    lines = [_speed(found.get((case, "ours-auto")), case, least) for case, least in SPEED.items()]
    for case in SPEED:
        lines.append(_memory(*(found.get((case, p)) for p in ("ours-auto", "official")), case))
    return [*lines, _sharing(found.get((NEVER_SLOWER, "ours-auto"))), _collation(rows)]


def _speed(row: dict | None, case: str, least: float) -> Outcome:
    what = f"one training step, {case}, against the official procedure"
    target = f">= {least:.1f}x as fast"
    if row is None or row["speedup"] is None:
        return Outcome(what, target, "not measured", None)
    text = f"{row['speedup']:.2f}x ({row['speedup_gradient']:.2f}x without the optimizer)"
    return Outcome(what, target, text, row["speedup"] >= least)


def _memory(ours: dict | None, official: dict | None, case: str) -> Outcome:
    what, target = f"peak memory of that step, {case}", f"<= {_MEMORY:.2f}x"
    if not (ours and official and ours["peak_bytes"] and official["peak_bytes"]):
        return Outcome(what, target, "not measured", None)
    value = ours["peak_bytes"] / official["peak_bytes"]
    return Outcome(what, target, f"{value:.2f}x", value <= _MEMORY)


def _sharing(row: dict | None) -> Outcome:
    what = f"{NEVER_SLOWER}: auto against ours without sharing"
    if row is None or row["vs_padded"] is None:
        return Outcome(what, "never slower", "not measured", None)
    value = row["vs_padded"]
    return Outcome(what, "never slower", f"{value:.2f}x as fast", value >= 1)


def _collation(rows: list[dict]) -> Outcome:
    shares = [
        row["collate_share"]
        for row in rows
        if row["provider"].startswith("ours-") and row["collate_share"] is not None
    ]
    what, target = "collation, the worst case", f"< {_COLLATION:.0%} of a step"
    if not shares:
        return Outcome(what, target, "not measured", None)
    return Outcome(what, target, f"{max(shares):.2%}", max(shares) < _COLLATION)
