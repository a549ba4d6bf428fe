"""``LossOptions`` says what is minimised; ``PROConfig`` is ``TrainingArguments`` with it."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainingArguments

import pro_kernels as pk
from pro_trainer.options import check_choices, check_positive, option
from pro_trainer.text.options import ListOptions
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
        if self.compat == "official":  # the authors' code: texts as written, no EOS of its own
            self.append_eos = bool(self.append_eos)
            self.chat_template = "off" if self.chat_template == "auto" else self.chat_template
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
        on_cpu = (self.bf16 or self.bf16_full_eval) and not torch.accelerator.is_available()
        if on_cpu and not self.use_cpu:
            self.use_cpu = True
        super().__post_init__()
        if on_cpu and self.should_log:
            print("bf16 on the CPU: there is no accelerator")
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
