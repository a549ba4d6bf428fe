"""Options: each field is a flag of the commands, a key of their YAML file, its help and default.

``ListOptions`` says what becomes of the data, ``LossOptions`` what is minimised; ``PROConfig`` is
transformers' ``TrainingArguments`` with both.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments

import pro_kernels as pk
from pro_trainer.train.distributed import set_timeout

# What PROTrainer does not work with otherwise: its collator reads all columns, its metrics are made
# of the scores of all lists, and its losses have no labels to smooth.
_FIXED = {
    "remove_unused_columns": False,
    "batch_eval_metrics": False,
    "eval_do_concat_batches": True,
    "label_smoothing_factor": 0.0,
}
_LOSS_ARGUMENTS = ("logps", "lengths", "rewards", "ref_logps", "mask")


def option(default: Any, text: str) -> Any:
    """A dataclass field with help text; a list default is copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ListOptions:
    """From records to token ids."""

    num_candidates: int | None = option(
        None,
        "At most this many candidates a list: the best, the worst and those evenly between them. "
        "Default: all.",
    )
    max_length: int = option(
        512, "Tokens of prompt and completion together. A longer completion loses its end and EOS."
    )
    max_prompt_length: int | None = option(
        None, "Tokens of the prompt. Default: half of max_length."
    )
    truncation_mode: Literal["keep_end", "keep_start"] = option(
        "keep_end", "Which part of a prompt longer than max_prompt_length stays."
    )
    too_long: Literal["truncate", "drop"] = option(
        "truncate", "What happens to a list that does not fit: cut it as above, or drop it."
    )
    append_eos: bool | None = option(
        None,
        "End each completion with EOS unless it was cut. Chat templates end their turns "
        "themselves. Default: yes, and no with compat=official.",
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

    def check_list_options(self) -> None:
        """Raise ValueError for an option out of range."""
        check_choices(self, ListOptions)
        check_integers(self, "max_length", "max_prompt_length", "num_candidates")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if not 1 <= self.prompt_limit() < self.max_length:
            raise ValueError(
                f"max_prompt_length must lie in [1, max_length={self.max_length}), "
                f"got {self.max_prompt_length}"
            )
        if self.num_candidates is not None and self.num_candidates < 2:
            raise ValueError(f"num_candidates must be at least 2, got {self.num_candidates}")

    def prompt_limit(self) -> int:
        """Most tokens of a prompt."""
        return self.max_length // 2 if self.max_prompt_length is None else self.max_prompt_length


@dataclass
class LossOptions:
    """What is minimised, and by which implementation."""

    loss_type: str = option(
        "pro", f"The loss on sequence log-probs, one of {', '.join(pk.losses.LOSSES)}."
    )
    loss_impl: Literal["auto", "triton", "cuda", "cpu", "torch", "reference"] = option(
        "auto",
        "The fused loss with this backend (auto: the fastest usable), or the plain PyTorch "
        "reference.",
    )
    compat: Literal["none", "official"] = option(
        "none", "official: the meaning of the authors' code, quirks included (loss_type pro only)."
    )
    sft_weight: float = option(
        0.05, "Weight of the SFT term on the best candidate (loss_type pro; others keep their own)."
    )
    sft_reduction: Literal["sum", "mean"] = option(
        "sum", "SFT term: log-probabilities of the best candidate summed, or their mean."
    )
    length_normalize: bool = option(
        True, "Score is the mean log-probability a token (the paper) instead of the sum."
    )
    temperature: str = option(
        "reward",
        "'reward': reward differences are the inverse temperatures (the paper). A number T: 1 / T "
        "for every pair, rewards only order the list. Lists without rewards use T = 1 under "
        "'reward'.",
    )
    reward_scale: float = option(1.0, "Rewards are multiplied by this number (> 0).")
    ties: Literal["zero", "skip"] = option(
        "zero", "A tied candidate adds exp(0) to the denominator (the paper) or leaves the term."
    )
    eps: float = option(0.0, "Constant inside the log of each rank term (official code: 1e-10).")
    loss_kwargs: dict[str, Any] | str | None = option(
        None, "Further options of a loss_type other than pro, as JSON: '{\"beta\": 0.1}'."
    )
    budget_mb: int | None = option(
        None, "MiB the fused loss may take beyond the gradients. Default: an eighth of the memory."
    )

    def check_loss_options(self) -> None:
        """Raise ValueError for an option out of range."""
        check_choices(self, LossOptions)
        pk.losses.get_loss(self.loss_type)
        if self.compat == "official" and self.loss_type != "pro":
            raise ValueError(
                f"compat='official' is a meaning of loss_type='pro', got {self.loss_type!r}"
            )
        check_positive(self, "reward_scale", "budget_mb")
        self.loss_kwargs = self._checked_loss_kwargs()
        self.fixed_temperature()
        self.temperature = str(self.temperature)

    def _checked_loss_kwargs(self) -> dict[str, Any]:
        given = self.loss_kwargs or {}
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(f"loss_kwargs must be JSON, got {given!r}: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"loss_kwargs must be a JSON object, got {given!r}")
        parameters = inspect.signature(pk.losses.get_loss(self.loss_type)).parameters
        known = [name for name in parameters if name not in _LOSS_ARGUMENTS]
        if self.loss_type == "pro":
            known = []  # it has fields of its own
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(
                f"loss_kwargs of loss_type={self.loss_type!r} may hold {known}, got {unknown}"
            )
        return given

    def ranks_only(self) -> bool:
        """Whether the loss takes only the order from rewards, and not their gaps."""
        if self.loss_type == "pro":
            return self.compat == "none" and self.fixed_temperature() is not None
        return self.loss_type not in ("listnet", "lipo_lambda")

    def fixed_temperature(self) -> float | None:
        """The temperature where it is a number; None under ``'reward'``."""
        if self.temperature == "reward":
            return None
        try:
            value = float(self.temperature)
        except (TypeError, ValueError):
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"temperature must be 'reward' or a number > 0, got {self.temperature!r}"
            )
        return value


@dataclass
class PROConfig(LossOptions, ListOptions, TrainingArguments):
    """``transformers.TrainingArguments`` plus what PRO needs. A batch is counted in prompts.

    Defaults that differ from ``TrainingArguments``: ``learning_rate`` 5e-6 (the paper's),
    ``logging_nan_inf_filter`` off (it waits for the device at every step; a loss that is not finite
    stops the run at the next logging step instead), ``remove_unused_columns`` off.

    Raises:
        ValueError: an option out of range.
    """

    learning_rate: float = option(5e-6, "Highest learning rate (the paper's).")
    logging_steps: float = option(10, "Steps between log lines; < 1: a share of all steps.")
    logging_nan_inf_filter: bool = option(
        False, "transformers' filter; it waits for the device at every step."
    )
    remove_unused_columns: bool = option(False, "Kept off: the collator reads all columns.")
    prefix_sharing: Literal["auto", "on", "off"] = option(
        "auto",
        "Run each prompt once for all its candidates: where the cost model says it pays (auto), "
        "always (on: an error for models that cannot), or never.",
    )
    packing: bool = option(
        False, "Where prefixes are not shared: sequences end to end in one row instead of padded."
    )
    disable_dropout: bool = option(True, "Train without dropout.")
    overwrite: bool = option(
        False, "Replace the run in an output_dir that holds one; other files there are kept."
    )
    sample_steps: int = option(0, "Print samples for held-out prompts every so many steps; 0: no.")
    sample_prompts: int = option(3, "How many prompts are sampled from.")
    sample_tokens: int = option(64, "Most tokens of a sample.")

    def __post_init__(self) -> None:
        self.check_list_options()
        self.check_loss_options()
        check_positive(self, "sample_prompts", "sample_tokens", "ddp_timeout")
        if self.prefix_sharing not in ("auto", "on", "off"):
            raise ValueError(
                f"prefix_sharing must be 'auto', 'on' or 'off', got {self.prefix_sharing!r}"
            )
        if self.sample_steps < 0:
            raise ValueError(f"sample_steps must be >= 0, got {self.sample_steps}")
        for name, only in _FIXED.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name} must stay {only}, got {getattr(self, name)!r}")
        super().__post_init__()
        set_timeout(self.ddp_timeout)
        if self.auto_find_batch_size and self.world_size > 1:
            raise ValueError(
                f"auto_find_batch_size is for one process: of {self.world_size} each would find "
                "a batch size of its own"
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to copy to; torch would warn

    @property
    def device(self) -> torch.device:
        """This process's device; CPUs have no index (accelerate's ``cpu:0`` loads no optimizer)."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def append_eos_to_completions(self) -> bool:
        """Whether completions end with EOS."""
        return self.compat != "official" if self.append_eos is None else self.append_eos


def check_choices(config: object, kind: type) -> None:
    """Raise ValueError where a field of ``kind`` is none of those its ``Literal`` names."""
    for name, hint in get_type_hints(kind).items():
        allowed = get_args(hint)
        if get_origin(hint) is Literal and getattr(config, name) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, "
                f"got {getattr(config, name)!r}"
            )


def check_integers(config: object, *names: str) -> None:
    """Raise TypeError unless the named fields are None or integers."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer, got {value!r}")


def check_positive(config: object, *names: str) -> None:
    """Raise TypeError or ValueError unless the named fields are None, or finite and > 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value}")
