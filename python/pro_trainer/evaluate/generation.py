"""A model's answers to prompts, beside the best completions of the data.

Two numbers that the paper reports: BLEU of the answers against the best completions, and their mean
score by a reward model that training did not use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from pro_trainer.data.fields import plain
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.sampling import bleu, sample
from pro_trainer.text.encode import Encoder

if TYPE_CHECKING:
    from pro_trainer.data.formats import RankedList
    from pro_trainer.prepare.scoring import RewardModel


def generate_answers(
    model: nn.Module,
    encoder: Encoder,
    lists: Sequence[RankedList],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    max_prompt_length: int | None = None,
    reward_model: RewardModel | None = None,
) -> dict[str, Any]:
    """Answer the prompt of every list greedily.

    A reward model is moved to the model's device. Of a list whose candidates have prompts of their
    own, that of the best completion is answered.

    ``encoder`` makes the ids of the prompts, as it does in training.

    Returns:
        ``prompts`` (how many), ``bleu`` (of the corpus, 0 to 100, against the best completions),
        ``answers`` (each with ``prompt``, ``answer``, ``best_completion``); with a reward model
        also ``reward`` and ``best_completion_reward``, as means and in each answer, and
        ``win_rate``: the share of the answers with a higher reward than the best completion, a tie
        counting half.

    Raises:
        ValueError: no lists, or as ``sample`` and ``RewardModel.score``.
    """
    if not lists:
        raise ValueError("no lists to answer the prompts of")
    best = [_best(candidates.rewards) for candidates in lists]
    prompts = [x.prompts[min(i, len(x.prompts) - 1)] for x, i in zip(lists, best, strict=True)]
    asked = [replace(x, prompts=(prompt,)) for x, prompt in zip(lists, prompts, strict=True)]
    completions = [x.completions[i] for x, i in zip(lists, best, strict=True)]
    options = PrepareArguments(
        num_samples=1,
        max_new_tokens=max_new_tokens,
        stop=[],
        batch_size=batch_size,
        max_prompt_length=max_prompt_length,
    )
    made = sample(model, encoder, asked, options)
    answers = [texts[0] for texts in made]
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "answer": answer, "best_completion": completion}
        for prompt, answer, completion in zip(prompts, answers, completions, strict=True)
    ]
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "bleu": bleu([x.strip() for x in answers], [plain(x).strip() for x in completions]),
    }
    if reward_model is not None:
        reward_model.model.to(next(model.parameters()).device)
        rewards = reward_model.score(asked, answers)
        of_best = reward_model.score(asked, completions)
        for name, values in (("reward", rewards), ("best_completion_reward", of_best)):
            found[name] = math.fsum(values) / len(values)
            for row, value in zip(rows, values, strict=True):
                row[name] = value
        wins = [(x > y) + (x == y) / 2 for x, y in zip(rewards, of_best, strict=True)]
        found["win_rate"] = sum(wins) / len(wins)
    return {**found, "answers": rows}


def _best(rewards: Sequence[float] | None) -> int:
    """Place of the highest reward; lists without rewards are in order, best first."""
    return 0 if rewards is None else max(range(len(rewards)), key=rewards.__getitem__)
