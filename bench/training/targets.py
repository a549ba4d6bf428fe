"""What the trainer set out to reach, against what a results file holds."""

from __future__ import annotations

from bench.targets import Outcome, linear_misfit
from bench.training.cases import GROWTH

_COLLATION = 0.03
_MEMORY = 0.4
_LINEAR = 0.1
SPEED = {"n=4 P=512 R=64": 3.5, "n=8 P=512 R=64": 5.0}
# Lists against the same step on padded rows.
AGAINST_PADDED = {
    "n=8 P=128 R=128": 1.0,
    "ranked n=8, SmolLM2": 2.2,
    "ranked pairs n=2, SmolLM2": 1.0,
    "n=16 P=2048 R=64": 8.0,
}
OF_FLOOR = {"ranked n=8, SmolLM2": 0.8}
TRL = "HH n=2, SmolLM2"


def outcomes(rows: list[dict]) -> list[Outcome]:
    """Every target, measured or not; against the leaner official procedure."""
    # The names of targets say nothing of the dtype, which is the machine's.
    found = {
        (row["case"].split(" in ")[0], row["provider"]): row for row in rows if not row["wrong"]
    }

    def of(case: str, key: str, provider: str = "ours-lists") -> float | None:
        row = found.get((case, provider))
        return row and row[key]

    lines = [_speed(found.get((case, "ours-lists")), case, least) for case, least in SPEED.items()]
    for case in SPEED:
        peaks = (of(case, "peak_bytes", name) for name in ("ours-lists", "official"))
        lines.append(_peak(f"peak memory of that step, {case}", *peaks, _MEMORY))
    for case, least in AGAINST_PADDED.items():
        lines.append(_ratio(f"{case}: lists against padded rows", of(case, "vs_padded"), least))
    for case, least in OF_FLOOR.items():
        value = of(case, "of_floor")
        text = "not measured" if value is None else f"{value:.2f}"
        met = None if value is None else value >= least
        lines.append(Outcome(f"{case}: lists", f">= {least:.2f} of the floor", text, met))
    with_all, with_head = (of(TRL, "vs_trl", f"trl-dpo-{name}") for name in ("distinct", "head"))
    lines.append(_ratio(f"{TRL}: TRL with accelerate_trl() against TRL", with_all, 3.5))
    over = with_all / with_head if with_all and with_head else None
    lines.append(_ratio("the same against TRL with the fused head alone", over, 3.0))
    peaks = (of(TRL, "peak_bytes", name) for name in ("trl-dpo-distinct", "trl-dpo"))
    lines.append(_peak("peak memory of that step against TRL's", *peaks, 0.5))
    lines += [_linear(rows, *what) for what in (("time", "seconds"), ("memory", "peak_bytes"))]
    return [*lines, _collation(rows)]


def _ratio(what: str, value: float | None, least: float) -> Outcome:
    target = "never slower" if least == 1 else f">= {least:.1f}x as fast"
    if value is None:
        return Outcome(what, target, "not measured", None)
    return Outcome(what, target, f"{value:.2f}x as fast", value >= least)


def _peak(what: str, ours: int | None, theirs: int | None, most: float) -> Outcome:
    if not (ours and theirs):
        return Outcome(what, f"<= {most:.2f}x", "not measured", None)
    return Outcome(what, f"<= {most:.2f}x", f"{ours / theirs:.2f}x", ours / theirs <= most)


def _linear(rows: list[dict], name: str, key: str) -> Outcome:
    mine = [r for r in rows if r["case"].startswith(GROWTH) and r["provider"] == "ours-lists"]
    points = [(r["needed"], r[key]) for r in mine if r[key] and not r["wrong"]]
    what, target = f"{name} linear in tokens that differ", f"a line fits within {_LINEAR:.0%}"
    if len(points) < 3:
        return Outcome(what, target, "not measured", None)
    worst = linear_misfit(*map(list, zip(*points, strict=True)))
    what += f", {points[0][0]:,} to {points[-1][0]:,}"
    return Outcome(what, target, f"within {worst:.1%}", worst <= _LINEAR)


def _speed(row: dict | None, case: str, least: float) -> Outcome:
    what = f"one training step, {case}, against the official procedure"
    target = f">= {least:.1f}x as fast"
    if row is None or row["speedup"] is None:
        return Outcome(what, target, "not measured", None)
    text = f"{row['speedup']:.2f}x ({row['speedup_gradient']:.2f}x without the optimizer)"
    return Outcome(what, target, text, row["speedup"] >= least)


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
