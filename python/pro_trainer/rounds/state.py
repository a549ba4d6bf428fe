"""``rounds.json``: what a run of rounds was begun with, what its rounds came to, how it is told.

It is replaced as a whole. Which parts of a round are complete is not written there: the last file
of each part appears whole or not at all, so that file says it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pro_trainer.evaluate.plots import draw_intervals
from pro_trainer.prepare.output import changes, plain, write_json

STATE = "rounds.json"


class Round:
    """The files of a round; round 0 is the base model, which only answers.

    Attributes:
        sampled: ranked lists of the policy's samples.
        lists: what was trained on: these and what was mixed in.
        checkpoint: the model that was trained.
        adapters: what was trained where only adapters are; the checkpoint holds them merged.
        answers: of the model to the held-out prompts.
        metrics: of these answers.
    """

    def __init__(self, output: Path, number: int) -> None:
        self.number = number
        self.name = f"round {number}" if number else "base"
        self.folder = output / self.name.replace(" ", "-")
        self.sampled, self.lists = self.folder / "sampled.jsonl", self.folder / "lists.jsonl"
        self.checkpoint, self.adapters = self.folder / "checkpoint", self.folder / "adapters"
        self.answers, self.metrics = self.folder / "answers.jsonl", self.folder / "metrics.json"


def complete(path: Path) -> bool:
    """Whether a file is there; then what it was made from goes, if a kill left that."""
    if not path.exists():
        return False
    for end in (".partial", ".partial.json"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    return True


def check(output: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether ``output`` holds a run with these settings to go on with.

    ``overwrite``: False, where it is none.

    Raises:
        ValueError: it holds one with others, or something that says of no settings.
    """
    file = output / STATE
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file")
    if not file.exists():
        own = (".lock", f"{STATE}.writing")  # of a run that was killed at once
        others = sorted(p.name for p in output.glob("*") if p.name not in own)
        if others and not overwrite:
            raise ValueError(
                f"output_dir {output} holds {others[0]} and no {STATE}: give another output_dir, "
                "or replace what is there with overwrite"
            )
        return False
    try:
        before = json.loads(file.read_bytes())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        if overwrite:
            return False
        raise ValueError(f"{file} cannot be read ({error!r}): start over with overwrite") from None
    changed = changes(before, plain(settings))
    if changed and not overwrite:
        raise ValueError(
            f"output_dir {output} was begun with other settings: {changed}. Go on with those, give "
            "another output_dir, or start over with overwrite"
        )
    return not changed


def clear(output: Path) -> None:
    """Remove what an earlier run of rounds wrote, and nothing else."""
    (output / STATE).unlink(missing_ok=True)
    rounds = [p for p in output.glob("round-*") if p.name.removeprefix("round-").isdigit()]
    for folder in (output / "base", *rounds):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("prompts.jsonl", "held-out.jsonl", "reference.jsonl", "rounds.png"):
        (output / name).unlink(missing_ok=True)


def write(output: Path, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Replace the file."""
    write_json(output / STATE, {**found, "settings": plain(settings)})


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
