"""What becomes of records that cannot be used as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pro_trainer.options import option

Select = Literal["spread", "top", "diverse"]  # see ``choose``


@dataclass
class DataOptions:
    """From records to ranked lists."""

    group: ClassVar[str] = "data"
    fewest: ClassVar[int] = 2  # candidates that a list must have; 0: prompts alone are lists, too

    num_candidates: int | None = option(
        None,
        "At most this many candidates a list: the best, the worst and others between them, "
        "different rewards first and spread over their range. Default: all.",
    )
    on_bad_line: Literal["error", "skip"] = option(
        "error", "A malformed record stops the run (error), or is counted and reported (skip)."
    )
    all_equal: Literal["drop", "error", "order"] = option(
        "drop",
        "A list whose rewards are all equal ranks nothing: drop it and count it, stop with an "
        "error, or take the order of its completions, best first, as the ranking.",
    )
    different_contexts: Literal["drop", "keep"] = option(
        "drop",
        "A list whose candidates answer different dialogues: drop it and count it, or keep it, "
        "each candidate after its own prompt (as the authors' code does).",
    )

    def reward_fault(self, rewards: Sequence[float]) -> str | None:
        """Why the loss cannot take these rewards of a list; None, where no loss is known."""
        return None


@dataclass
class PromptOptions(DataOptions):
    """Lists that samples are added to may have no candidates yet."""

    fewest: ClassVar[int] = 0
