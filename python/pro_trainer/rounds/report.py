"""What a run of rounds says of its rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pro_trainer.evaluate.plots import draw_intervals


def with_best(found: dict[str, Any], policy: Callable[[int], str]) -> dict[str, Any]:
    """``best``: the round of the highest win rate, of equal ones the first; and its model."""
    rates = [found["base"]["win_rate"], *(x["win_rate"] for x in found["rounds"])]
    best = max(range(len(rates)), key=rates.__getitem__)
    return {**found, "best": best, "checkpoint": policy(best)}


def told(name: str, found: dict[str, Any]) -> str:
    """The metrics of a round, as a line."""
    low, high = found["win_rate_interval"]
    return (
        f"{name:8} reward {found['reward']:.4g}, best of its answers {found['best_of']:.4g}, "
        f"win rate against the base {found['win_rate']:.3f} [{low:.3f}, {high:.3f}], "
        f"{found['length']:.0f} characters"
    )


def summary(found: dict[str, Any]) -> str:
    """All rounds, why there are no more, and where the best model is."""
    lines = ["", "held-out prompts:", told("base", found["base"])]
    lines += [told(f"round {n}", x) for n, x in enumerate(found["rounds"], 1)]
    lines.append(f"ended: {found['ended']}")
    if found["best"]:
        lines.append(f"best: round {found['best']}, its model is {found['checkpoint']}")
    else:
        lines.append(f"best: the base, {found['checkpoint']}; no round won against it")
    return "\n".join(lines)


def draw(path: Path, found: dict[str, Any]) -> None:
    """Draw reward and win rate of all rounds with the intervals of their change since the base."""
    base = found["base"]["reward"]
    reward: dict[str, tuple[float, ...]] = {}
    win_rate: dict[str, tuple[float, ...]] = {}
    for number, x in enumerate([found["base"], *found["rounds"]]):
        name = f"round {number}" if number else "base"
        change = [base + end for end in x["reward_interval"]]
        for rows, value, (low, high) in (
            (reward, x["reward"], change),
            (win_rate, x["win_rate"], x["win_rate_interval"]),
        ):
            rows[name] = (value, min(low, value), max(high, value))  # of few prompts, rounding
    panels = {"mean reward": reward, "win rate against the base": win_rate}
    lines = {"mean reward": ("base", base), "win rate against the base": ("chance", 0.5)}
    draw_intervals(path, panels, lines)
