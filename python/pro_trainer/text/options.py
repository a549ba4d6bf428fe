"""How ranked lists become token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pro_trainer.data.options import DataOptions
from pro_trainer.options import check_choices, check_integers, option


@dataclass
class TemplateOptions:
    """From texts to what the model sees."""

    group: ClassVar[str] = "text"

    chat_template: Literal["auto", "on", "off"] = option(
        "auto",
        "Whether strings become turns of a chat. auto: yes, where the tokenizer has a chat "
        "template and no text of the list holds one of its control tokens (no with "
        "compat=official). Messages always go through the template.",
    )
    split_special_tokens: bool | None = option(
        None,
        "Control tokens in the text of a user: as ordinary text (true) or as control tokens "
        "(false). Default: ordinary text in messages, control tokens in strings.",
    )


@dataclass
class ListOptions(TemplateOptions, DataOptions):
    """From records to token ids."""

    group: ClassVar[str] = "text"

    max_length: int = option(
        512, "Tokens of prompt and completion together. A longer completion loses its end and EOS."
    )
    max_prompt_length: int | None = option(
        None,
        "Tokens of the prompt. Default: what the longest completion leaves of max_length, and at "
        "least half of it.",
    )
    truncation_mode: Literal["keep_end", "keep_start"] = option(
        "keep_end",
        "Which part of a prompt that is too long stays. A chat loses whole turns first, the oldest "
        "first; this part of its last user turn stays.",
    )
    too_long: Literal["truncate", "drop"] = option(
        "truncate", "What happens to a list that does not fit: cut it as above, or drop it."
    )
    append_eos: bool | None = option(
        None,
        "End each completion with EOS unless it was cut. Chat templates end their turns "
        "themselves. Default: yes, and no with compat=official.",
    )

    def check_list_options(self) -> None:
        """Raise ValueError for an option out of range."""
        check_choices(self, ListOptions)
        check_integers(self, "max_length", "max_prompt_length", "num_candidates")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"max_prompt_length must lie in [1, max_length={self.max_length}), "
                f"got {self.max_prompt_length}"
            )
        if self.num_candidates is not None and self.num_candidates < 2:
            raise ValueError(f"num_candidates must be at least 2, got {self.num_candidates}")

    def prompt_room(self, completion_length: int) -> int:
        """Most tokens of a prompt before a completion of so many."""
        if self.max_prompt_length is not None:
            return self.max_prompt_length
        return max(self.max_length - completion_length, self.max_length // 2)
