"""``PROConfig`` is ``TrainingArguments`` with what PRO needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from pro_trainer.options import check_positive, option
from pro_trainer.text.options import ListOptions
from pro_trainer.train.distributed import set_timeout
from pro_trainer.train.options import LossOptions, StepOptions

# What PROTrainer does not work with otherwise: its collator reads all columns, its metrics are made
# of the scores of all lists, and its losses have no labels to smooth.
_FIXED = {
    "remove_unused_columns": False,
    "batch_eval_metrics": False,
    "eval_do_concat_batches": True,
    "label_smoothing_factor": 0.0,
}


@dataclass
class PROConfig(LossOptions, StepOptions, ListOptions, TrainingArguments):
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

    def __post_init__(self) -> None:
        self.check_list_options()
        self.check_loss_options()
        self.check_step_options()
        if self.compat == "official":  # the authors' code: texts as written, no EOS of its own
            self.append_eos = bool(self.append_eos)
            self.chat_template = "off" if self.chat_template == "auto" else self.chat_template
        check_positive(self, "ddp_timeout")
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
        self._check_tokens_per_batch()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to copy to; torch would warn

    def _check_tokens_per_batch(self) -> None:
        if self.tokens_per_batch is None:
            return
        plain = {
            "per_device_train_batch_size": 8,
            "auto_find_batch_size": False,
            "train_sampling_strategy": "random",
            "dataloader_drop_last": False,
            "split_batches": False,
            "dispatch_batches": False,
        }
        for name, default in plain.items():
            holder = self.accelerator_config if name.endswith("_batches") else self
            given = getattr(holder, name, None)
            if given not in (None, default):
                raise ValueError(
                    f"tokens_per_batch={self.tokens_per_batch} says which lists are in a batch, "
                    f"and so does {name}={given!r}: choose one"
                )

    @property
    def device(self) -> torch.device:
        """This process's device; CPUs have no index (accelerate's ``cpu:0`` loads no optimizer)."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device
