"""How candidates are scored and chosen, as flags of ``pro-kernels prepare``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from pro_trainer.data.options import Select
from pro_trainer.options import check_choices, check_integers, check_positive, option
from pro_trainer.prepare.rewards.base import parse


@dataclass
class RewardOptions:
    """From candidates to ranked lists."""

    group: ClassVar[str] = "rewards"

    reward: list[str] = option(
        [],
        "What scores every candidate, each written [WEIGHT*]WHAT, as in 0.7*my_rewards:short "
        "org/reward-model. WHAT is a folder or hub name (a sequence classifier with one label), "
        "module:function or file.py:function (called as TRL calls one), or a URL "
        "[MODEL@]http://HOST:PORT/PATH of which PATH ends in score, classify, pooling (vLLM) or "
        "chat/completions (a judge). Default: the data's own ranking (possible only without a "
        "generator and a server).",
        action="extend",  # --reward A --reward B is --reward A B
    )
    normalize: Literal["none", "zscore", "rank"] = option(
        "none",
        "What is made of the scores that a reward gives to one list, before they are weighted and "
        "added: nothing, (score - mean) / deviation, or the share of the other candidates that one "
        "beats.",
    )
    length_penalty: float = option(
        0.0, "Taken off the sum for each character of a completion, as in 0.001."
    )
    near_duplicates: float | None = option(
        None,
        "Drop a candidate that has this share of its pieces of five characters in common with an "
        "earlier one, as in 0.8. Default: only equal ones go.",
    )
    ranking_length: int | None = option(None, "Candidates kept of each list. Default: all.")
    select: Select = option(
        "spread",
        "Which are kept. spread: the best, the worst and those evenly between them. top: the best. "
        "diverse: the best, and those that are least like any kept before.",
    )
    bottom: int = option(
        0, "So many of those that top or diverse keep are the worst ones of the list."
    )
    sft: Literal["best", "chosen"] = option(
        "best",
        "The candidate that sft_index marks: the best of the new ranking, or the one that the "
        "data prefers (which is then always kept).",
    )
    judge: Literal["number", "pairs"] = option(
        "number",
        "What a judge is asked: a number for each candidate, or which of two is better, of all "
        "pairs of a list and in both orders.",
    )
    judge_template: str | None = option(
        None,
        "File with the message to a judge, which holds {prompt} and {completion}, or {prompt}, {a} "
        "and {b}.",
    )
    judge_pattern: str | None = option(
        None,
        "Regular expression whose group finds the number in a judge's answer, or A, B or C (a "
        "tie). The last match counts. Default: as in [[7]] and [[A]].",
    )
    judge_max_tokens: int = option(512, "Most tokens of a judge's answer.")
    reward_api_key_env: str | None = option(
        None, "Name of the environment variable that holds the API key of servers that score."
    )

    def asks_servers(self) -> bool:
        """Whether one of the rewards is behind a server."""
        return any(spec.kind not in ("classifier", "function") for spec in parse(self.reward))

    def reward_files(self) -> list[str]:
        """The paths (or hub names) that scoring reads, but for the source of functions."""
        read = [spec.target for spec in parse(self.reward) if spec.kind == "classifier"]
        return read + ([self.judge_template] if self.judge_template else [])

    def reward_sources(self) -> list[str]:
        """The files of functions."""
        return [spec.target for spec in parse(self.reward) if spec.target.endswith(".py")]

    def check_rewards(self) -> None:
        """Raise ValueError or TypeError for options out of range or at odds."""
        check_choices(self, RewardOptions)
        check_integers(self, "ranking_length", "bottom", "judge_max_tokens")
        check_positive(self, "near_duplicates", "judge_max_tokens")
        kinds = [spec.kind for spec in parse(self.reward)]
        given = [f.name for f in fields(RewardOptions) if getattr(self, f.name) != f.default]
        for name in given:
            if name in ("normalize", "length_penalty") and not kinds:
                raise ValueError(f"{name} is for scores: give a reward")
            if name.startswith("judge") and "judge" not in kinds:
                raise ValueError(
                    f"{name} is for a judge: give a reward with a URL that ends in chat/completions"
                )
            if name == "reward_api_key_env" and not self.asks_servers():
                raise ValueError(f"{name} is for servers that score: give a reward with a URL")
            if name in ("select", "bottom") and self.ranking_length is None:
                raise ValueError(f"{name} says which candidates are kept: give ranking_length, too")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")
        if self.near_duplicates is not None and self.near_duplicates > 1:
            raise ValueError(f"near_duplicates must lie in (0, 1], got {self.near_duplicates}")
        if self.ranking_length is not None and self.ranking_length < 2:
            raise ValueError(f"ranking_length must be at least 2, got {self.ranking_length}")
        if self.bottom and self.select == "spread":
            raise ValueError("bottom is for select=top or diverse: spread keeps the worst one")
        if not 0 <= self.bottom < (self.ranking_length or 1):
            raise ValueError(
                f"bottom must lie in [0, ranking_length={self.ranking_length}), got {self.bottom}"
            )
