"""What a model answers to the held-out prompts, and how good that is beside the base's answers.

Both models answer the same prompts with the same random numbers. What the base answered and what
the model answered is scored as one list, as ``prepare`` would: that is what judges of pairs and
normalised rewards need. A model wins a prompt by the share of pairs, one answer of each, of which
its own has the higher reward; a tie counts half.

Shapes: L prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from pro_trainer.data.records import RankedList
from pro_trainer.evaluate.compare import Difference, difference
from pro_trainer.prepare.draws import Samples
from pro_trainer.prepare.output import PartialFile
from pro_trainer.prepare.pool import Pool
from pro_trainer.prepare.recipe import Recipe
from pro_trainer.prepare.served import Served

Line = dict[str, Any]
KEYS = ("prompt", "completions", "rewards", "raw_rewards", "lengths", "win_rate", "samples")
_NAME = "policy"  # seeds of samples depend on the name, and every model shall have the same


def fill(
    partial: PartialFile,
    recipe: Recipe,
    lists: Sequence[RankedList],
    base: Sequence[Line] | None,
) -> None:
    """Answer the prompts of ``lists`` that are missing, and save each group of them.

    The recipe has one generator. ``base``: lines of the base model, None where that answers.
    """
    (generator,) = recipe.generators
    generator.name = _NAME
    if isinstance(generator, Served):
        generator.begin(lists[partial.done :], partial.done)
    size = recipe.options.batch_size
    for start in range(partial.done, len(lists), size):
        group = lists[start : start + size]
        of_base = base[start : start + size] if base else None
        partial.append(_lines(recipe, group, generator.samples(group, start), of_base))


def _lines(
    recipe: Recipe,
    group: Sequence[RankedList],
    made: Sequence[Samples],
    base: Sequence[Line] | None,
) -> list[Line]:
    pools = []
    for i, (ranked, (texts, _)) in enumerate(zip(group, made, strict=True)):
        pool = Pool.of(ranked)
        pool.add(base[i]["completions"] if base else (), "base")
        pool.add([pool.in_form(text) for text in texts], _NAME)
        pools.append(pool)
    recipe.score(pools)
    lines = []
    for pool, (_, counts) in zip(pools, made, strict=True):
        win_rate = _win_rate(pool) if base else 0.5
        rewards = recipe.combined(pool, "none") if pool.sources else ()
        pool.ranked = replace(pool.ranked, rewards=tuple(rewards))
        pool.keep([i for i, source in enumerate(pool.sources) if source == _NAME], "of the base")
        own = pool.ranked
        found = (own.prompts[0], own.completions, own.rewards, own.raw_rewards, pool.lengths())
        lines.append(dict(zip(KEYS, (*found, win_rate, counts), strict=True)))
    return lines


def _win_rate(pool: Pool) -> float | None:
    """None where one of the models has no answer with a score."""
    by_source: dict[str, list[float]] = {"base": [], _NAME: []}
    for source, reward in zip(pool.sources, pool.ranked.rewards or (), strict=True):
        by_source[source].append(reward)
    pairs = [(x > y) + (x == y) / 2 for x in by_source[_NAME] for y in by_source["base"]]
    return sum(pairs) / len(pairs) if pairs else None


def metrics(lines: Sequence[Line], base: Sequence[Line]) -> dict[str, Any]:
    """Means over prompts of what the lines of a model say, beside those of the base.

    Returns:
        ``prompts`` and ``answers`` (counts), ``reward`` (mean of the sampled answers), ``best_of``
        (mean of the best answer of each prompt), ``win_rate`` (against the base) and ``length``
        (characters); ``reward_interval``, that of the change of ``reward`` since the base, and
        ``win_rate_interval``, both of 95 %.

    Raises:
        ValueError: no prompt has answers of both models with a score.
    """
    rewards = [line["rewards"] for line in lines]
    length = [length for line in lines for length in line["lengths"]]
    change = _paired([_mean(x["rewards"]) for x in base], map(_mean, rewards))
    win = _paired([0.5] * len(lines), [line["win_rate"] for line in lines])
    if change is None or win is None:
        raise ValueError("no held-out prompt has answers of the base and of the model with a score")
    return {
        "prompts": len(lines),
        "answers": sum(map(len, rewards)),
        "reward": change.tuned,
        "best_of": _mean([max(x) for x in rewards if x]),
        "win_rate": win.tuned,
        "length": _mean(length),
        "reward_interval": [change.low, change.high],
        "win_rate_interval": [0.5 + win.low, 0.5 + win.high],
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _paired(base: Sequence[float], own: Iterable[float | None]) -> Difference | None:
    """Prompts without a number of both do not count."""
    found = torch.tensor([math.nan if x is None else x for x in own], dtype=torch.float64)
    before = torch.tensor(base, dtype=torch.float64)
    return difference(before, found, torch.ones_like(found))
