"""What is minimised (``LossOptions``) and how steps are made of lists (``StepOptions``)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pro_trainer.options import (
    check_choices,
    check_positive,
    import_module,
    json_object,
    option,
)
from pro_trainer.train.losses import LOSS_SETTINGS, MIXED, LossSettings

if TYPE_CHECKING:
    from pro_kernels.losses import Loss

# Options that every loss of ours is given by the trainer.
SET_BY_TRAINER = {"equal_rewards"}


@dataclass
class LossOptions(LossSettings):
    """What is minimised, and by which implementation.

    An option that is None takes the default of the loss (``pro_kernels.losses``); one that the loss
    does not have is refused.
    """

    loss_module: str | None = option(
        None,
        "Python file or module to import first, which registers a loss of your own "
        "(pro_kernels.losses.register).",
    )
    loss_options: str | None = option(
        None, 'Options of such a loss that are no flags here, as JSON: {"margin": 2.0}.'
    )
    kto_kl: Literal["other_prompts", "batch"] = option(
        "other_prompts",
        "KTO's KL: from each prompt with the best completion of the list before it in the batch, "
        "as TRL has it, where a batch has two lists; or from the candidates themselves, which "
        "costs no further tokens.",
    )
    compat: Literal["none", "official"] = option(
        "none", "official: the meaning of the authors' code, quirks included (pro only)."
    )
    loss_impl: Literal["auto", "triton", "cuda", "cpu", "torch", "reference"] = option(
        "auto",
        "The fused loss with this backend (auto: the fastest usable), or the plain PyTorch "
        "reference.",
    )
    head_dtype: Literal["float32"] | None = option(
        None,
        "float32: logits are fp32 sums, whatever the dtype of the weights, and mixed precision "
        "leaves the LM head alone. Default: that of the weights, or of mixed precision.",
    )
    grad_filter: str | None = option(
        None,
        "Leave vocabulary columns out of the head's gradients: at most this share of a token's "
        "probability on average, or auto, what 16-bit rounding hides. Default: none.",
    )
    budget_mb: int | None = option(
        None, "MiB the fused loss may take beyond the gradients. Default: an eighth of the memory."
    )

    def _check_grad_filter(self) -> None:
        if self.grad_filter != "auto":
            share = float("nan")
            with contextlib.suppress(ValueError):
                share = float(self.grad_filter)  # type: ignore[arg-type]
            if not 0 < share < 1:
                raise ValueError(
                    f"grad_filter must be a number in (0, 1) or auto, got {self.grad_filter!r}"
                )
            self.grad_filter = share  # type: ignore[assignment]
        if self.loss_impl == "reference":
            raise ValueError(
                "grad_filter is an option of the fused loss, got loss_impl='reference' and "
                f"grad_filter={self.grad_filter!r}"
            )

    def check_loss_options(self) -> None:
        """Raise ValueError for an option out of range, or of another loss."""
        check_choices(self, LossOptions)
        if self.compat == "official" and self.loss_type != "pro":
            raise ValueError(
                f"compat='official' is a meaning of loss_type='pro', got {self.loss_type!r}"
            )
        check_positive(self, "budget_mb")
        if self.grad_filter is not None:
            self._check_grad_filter()
        if self.loss_type != "kto" and self.kto_kl != "other_prompts":
            raise ValueError(f"kto_kl is an option of loss_type='kto', got {self.loss_type!r}")
        for name in MIXED:
            if getattr(self, name) is not None:
                setattr(self, name, str(getattr(self, name)))
        if self.loss_module and self.loss_module.endswith(".py"):
            self.loss_module = str(Path(self.loss_module).resolve())
        if isinstance(self.loss_options, Mapping):
            self.loss_options = json.dumps(self.loss_options)
        own = [name for name in self.loss().types if name not in SET_BY_TRAINER]
        for name in json_object(self, "loss_options").keys() & self._flags().keys():
            raise ValueError(f"{name} was given as a flag and in loss_options: choose one")
        for name, value in self.given().items():
            if name not in own:
                raise ValueError(
                    f"{name}={value!r} is no option of loss_type={self.loss_type!r}, "
                    f"which has {', '.join(own) or 'none'}"
                )
        self._try_out()

    def _try_out(self) -> None:
        """Let the loss check its options and what it returns, on one list of two."""
        import torch

        logps = torch.tensor([[-1.0, -2.0]])
        rewards = torch.tensor([[1.0, 0.0]])
        try:
            self.loss()(
                logps, torch.ones_like(logps), rewards=rewards, ref_logps=logps, **self.given()
            )
        except TypeError as error:
            raise ValueError(f"loss_type={self.loss_type!r}: {error}") from error

    def loss(self) -> Loss:
        """The loss that is meant.

        Raises:
            ValueError: there is none of that name, or no such ``loss_module``.
        """
        from pro_kernels.losses import get_loss

        if self.loss_module:
            import_module(f"loss_module {self.loss_module}", self.loss_module)
        return get_loss(self.loss_type)

    def given(self) -> dict[str, Any]:
        """The options of the loss that were given, as it takes them."""
        return self._flags() | json_object(self, "loss_options")

    def _flags(self) -> dict[str, Any]:
        found = {
            name: value for name in LOSS_SETTINGS if (value := getattr(self, name)) is not None
        }
        for name in MIXED & found.keys():
            with contextlib.suppress(ValueError):
                found[name] = float(found[name])
        return found

    def scores_are_means(self) -> bool:
        """Whether the loss, and so the ranking, is on mean log-probabilities of a token."""
        defaults = {"length_normalize": True, **self.loss().defaults}
        return bool({**defaults, **self.given()}["length_normalize"])

    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return "ref_logps" in self.loss().needs(**self.given())

    def reward_fault(self, rewards: Sequence[float]) -> str | None:
        """Why the loss cannot take these rewards of a list, or None."""
        return self.loss().reward_fault(rewards, **self.given())

    def ranks_only(self) -> bool:
        """Whether the loss takes only the order from rewards, and not their gaps."""
        return self.compat == "none" and not self.loss().uses_gaps(**self.given())


@dataclass
class StepOptions:
    """How lists become rows, what is compared with, and what is shown on the way."""

    group: ClassVar[str] = "batch"

    batching: Literal["auto", "lists", "padded"] = option(
        "auto",
        "lists: a step runs each distinct token of its lists once, and no padding; padded: a row "
        "for each candidate; auto: lists, where the model can.",
    )
    tokens_per_batch: int | None = option(
        None,
        "In place of per_device_train_batch_size: as many lists as have up to so many tokens, a "
        "prompt counted once for all its candidates (padded rows: rows times the longest).",
    )
    disable_dropout: bool = option(True, "Train without dropout.")
    precompute_ref_log_probs: bool = option(
        False,
        "Score the lists by the reference model (of a loss that has one) once, before training, "
        "and keep the scores in output_dir; then no second model stays in memory.",
    )
    sync_ref_model: bool = option(
        False, "Move the reference model towards the trained one every ref_model_sync_steps steps."
    )
    ref_model_mixup_alpha: float = option(
        0.6, "Share of the trained model in the reference model at each of these."
    )
    ref_model_sync_steps: int = option(512, "Optimizer steps between two of these.")
    overwrite: bool = option(
        False, "Replace the run in an output_dir that holds one; other files there are kept."
    )
    sample_steps: int = option(0, "Print samples for held-out prompts every so many steps; 0: no.")
    sample_prompts: int = option(3, "How many prompts are sampled from.")
    sample_tokens: int = option(64, "Most tokens of a sample.")

    def check_step_options(self) -> None:
        """Raise ValueError for an option out of range."""
        check_choices(self, StepOptions)
        check_positive(self, "sample_prompts", "sample_tokens", "ref_model_sync_steps")
        check_positive(self, "tokens_per_batch")
        if self.sample_steps < 0:
            raise ValueError(f"sample_steps must be >= 0, got {self.sample_steps}")
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ValueError(
                f"ref_model_mixup_alpha must lie in [0, 1], got {self.ref_model_mixup_alpha}"
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model moves the reference model, and precompute_ref_log_probs scores "
                "with it once: choose one"
            )
