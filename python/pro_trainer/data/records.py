"""What is known of a record: the ranked list it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pro_trainer.data.fields import Text


def best_first(rewards: Sequence[float] | None, n: int) -> list[int]:
    """Indices of n candidates, best first; of equal rewards, and without any, the earlier one."""
    return list(range(n)) if rewards is None else sorted(range(n), key=lambda i: -rewards[i])


@dataclass(frozen=True)
class RankedList:
    """A prompt and its n ranked completions.

    Attributes:
        prompts: 1 (shared by all) or n (one a completion, where they answer different dialogues).
        completions: n texts.
        rewards: n finite numbers, higher is better; None: the completions stand best first.
        sft_index: the completion that carries the SFT term; None: the best.
        desirable: n bools, for losses that take candidates one by one; None: the best is.
        weight: of the list in the mean over lists.
        raw_rewards: of each reward that ``rewards`` were made of, by its name, n numbers.
        template: what the chat template is given beside the messages: ``tools`` and keywords.
        columns: those of the record that nothing here uses, for reward functions.
        where: file and line it came from, for messages; like ``columns`` no part of its value.
    """

    prompts: tuple[Text, ...]
    completions: tuple[Text, ...]
    rewards: tuple[float, ...] | None = None
    sft_index: int | None = None
    desirable: tuple[bool, ...] | None = None
    weight: float = 1.0
    raw_rewards: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)

    def best_first(self) -> list[int]:
        """Indices of the candidates, best first; of equal rewards the earlier one."""
        return best_first(self.rewards, len(self.completions))

    def record(self) -> dict[str, Any]:
        """The list as JSON Lines hold it; of prompts of their own the first."""
        found: dict[str, Any] = {"prompt": self.prompts[0], "completions": self.completions}
        for name in ("rewards", "raw_rewards", "sft_index", "desirable"):
            if (value := getattr(self, name)) not in (None, {}):
                found[name] = value
        return found | self.beside()

    def beside(self) -> dict[str, Any]:
        """What a record says of its list beside prompt and candidates: weight and template."""
        found: dict[str, Any] = {} if self.weight == 1 else {"prompt_weight": self.weight}
        template = dict(self.template)
        if tools := template.pop("tools", None):
            found["tools"] = tools
        return found | ({"chat_template_kwargs": template} if template else {})


@dataclass(frozen=True)
class ParsedRecord:
    """What a record says, before empty, repeated and unranked candidates are taken out.

    Attributes:
        format: the name of its form, for the report.
        content: the list, or why a well-formed record ranks nothing.
        by_rank: whether the list's rewards are negated ranks, which do no more than order it.
        unused: columns that nothing uses.
        notes: what the report counts.
    """

    format: str
    content: RankedList | str
    by_rank: bool = False
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
