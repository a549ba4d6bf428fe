"""What is minimised (``LossOptions``) and how steps are made of lists (``StepOptions``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pro_trainer.options import check_choices, check_positive, option

_INPUTS = ("logps", "lengths", "rewards", "ref_logps", "mask", "sft_index", "prompt_weights",
           "equal_rewards")  # fmt: skip
NEEDS_REFERENCE = ("dpo", "ipo", "dpo_pl", "s_dpo")


@dataclass
class LossOptions:
    """What is minimised, and by which implementation.

    An option that is None takes the default of the loss (``pro_kernels.losses``); one that the loss
    does not have is refused.
    """

    group: ClassVar[str] = "loss"

    loss_type: str = option(
        "pro",
        "The loss on sequence log-probs: pro, plackett_luce, dpo, dpo_pl, s_dpo, ipo, simpo, cpo, "
        "orpo, rrhf, slic, listnet or lipo_lambda.",
    )
    beta: float | None = option(
        None, "Inverse temperature of dpo, ipo, dpo_pl, s_dpo, simpo, cpo, orpo, lipo_lambda."
    )
    sft_weight: float | None = option(
        None,
        "Weight of the SFT term on the best candidate (pro, 0.05 by default, times (n - 1)^2; "
        "rrhf, slic).",
    )
    sft_reduction: Literal["sum", "mean", "tokens"] | None = option(
        None,
        "SFT term: log-probabilities of the best candidate summed, or their mean (pro, cpo, orpo, "
        "rrhf, slic); tokens: over the tokens of a batch (all of these but pro).",
    )
    length_normalize: bool | None = option(
        None,
        "Score is the mean log-probability of a token (default) or their sum (pro, plackett_luce, "
        "ipo, listnet, slic).",
    )
    temperature: str | None = option(
        None,
        "pro. 'reward', the default: reward differences are the inverse temperatures (the paper). "
        "A number T: 1 / T for every pair, rewards only order the list. Lists without rewards use "
        "T = 1 under 'reward'.",
    )
    reward_scale: float | None = option(None, "pro: rewards are multiplied by this number (> 0).")
    ties: Literal["zero", "skip"] | None = option(
        None,
        "pro: a tied candidate adds exp(0) to the denominator (zero, the paper) or leaves it.",
    )
    eps: float | None = option(
        None, "pro: constant inside the log of each rank term (official code: 1e-10)."
    )
    top_k: int | None = option(None, "pro, plackett_luce: only the first so many rank terms.")
    pairs: Literal["all", "best"] | None = option(
        None, "dpo, ipo, simpo, cpo, orpo, slic: all pairs of a list, or the best with the rest."
    )
    label_smoothing: float | None = option(None, "dpo: share of labels taken to be wrong.")
    gamma: float | None = option(None, "simpo: target margin.")
    cpo_alpha: float | None = option(None, "cpo: weight of its SFT term.")
    delta: float | None = option(None, "slic: margin.")
    gain: Literal["exp2", "linear"] | None = option(None, "lipo_lambda: gain of a reward.")
    reward_temperature: float | None = option(None, "listnet: temperature of the rewards.")
    compat: Literal["none", "official"] = option(
        "none", "official: the meaning of the authors' code, quirks included (pro only)."
    )
    loss_impl: Literal["auto", "triton", "cuda", "cpu", "torch", "reference"] = option(
        "auto",
        "The fused loss with this backend (auto: the fastest usable), or the plain PyTorch "
        "reference.",
    )
    budget_mb: int | None = option(
        None, "MiB the fused loss may take beyond the gradients. Default: an eighth of the memory."
    )

    def check_loss_options(self) -> None:
        """Raise ValueError for an option out of range, or of another loss."""
        check_choices(self, LossOptions)
        own = self._own_options()
        if self.compat == "official" and self.loss_type != "pro":
            raise ValueError(
                f"compat='official' is a meaning of loss_type='pro', got {self.loss_type!r}"
            )
        check_positive(self, "budget_mb")
        self.fixed_temperature()
        if self.temperature is not None:
            self.temperature = str(self.temperature)
        for name in LOSS_SETTINGS:
            if getattr(self, name) is not None and name not in own:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is no option of loss_type={self.loss_type!r}, "
                    f"which has {', '.join(own)}"
                )
        self._try_out()

    def _try_out(self) -> None:
        """Let the loss check its options, on one list of two."""
        import torch

        import pro_kernels as pk

        logps = torch.tensor([[-1.0, -2.0]])
        pk.losses.get_loss(self.loss_type)(
            logps,
            torch.ones_like(logps),
            rewards=torch.tensor([[1.0, 0.0]]),
            ref_logps=logps,
            **self.given(),
        )

    def _own_options(self) -> dict[str, Any]:
        """What the loss can be told beside its inputs, with its defaults."""
        import inspect

        import pro_kernels as pk

        parameters = inspect.signature(pk.losses.get_loss(self.loss_type)).parameters
        return {name: p.default for name, p in parameters.items() if name not in _INPUTS}

    def given(self) -> dict[str, Any]:
        """The options of the loss that were given, as it takes them."""
        found = {name: getattr(self, name) for name in LOSS_SETTINGS}
        if self.temperature is not None:
            found["temperature"] = self.fixed_temperature() or "reward"
        return {name: value for name, value in found.items() if value is not None}

    def scores_are_means(self) -> bool:
        """Whether the loss, and so the ranking, is on mean log-probabilities of a token."""
        own = self._own_options()
        return bool(self.given().get("length_normalize", own.get("length_normalize", True)))

    def reward_fault(self, rewards: Sequence[float]) -> str | None:
        """Why the loss cannot take these rewards of a list, or None."""
        if self.ranks_only():
            return None
        from pro_kernels.losses import MAX_EXPONENT, gap_fault

        exponents = self.loss_type == "lipo_lambda" and self.gain != "linear"
        if exponents and max(rewards) > MAX_EXPONENT:
            return (
                f"too large for the gain 2^reward of lipo_lambda, which takes {MAX_EXPONENT} at "
                "most: scale them to [0, 1], or give gain='linear'"
            )
        return gap_fault(max(rewards) - min(rewards), self.reward_scale or 1.0)

    def ranks_only(self) -> bool:
        """Whether the loss takes only the order from rewards, and not their gaps."""
        if self.loss_type == "pro":
            return self.compat == "none" and self.fixed_temperature() is not None
        return self.loss_type not in ("listnet", "lipo_lambda")

    def fixed_temperature(self) -> float | None:
        """The temperature where it is a number; None under ``'reward'``."""
        if self.temperature in (None, "reward"):
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


# What each loss may be told, its own defaults aside.
LOSS_SETTINGS = tuple(
    name for name, f in LossOptions.__dataclass_fields__.items() if f.default is None
    and name != "budget_mb"
)  # fmt: skip


@dataclass
class StepOptions:
    """How lists become rows, what is compared with, and what is shown on the way."""

    group: ClassVar[str] = "batch"

    prefix_sharing: Literal["auto", "on", "off"] = option(
        "auto",
        "Run each prompt once for all its candidates: where the cost model says it pays (auto), "
        "always (on: an error for models that cannot), or never.",
    )
    packing: bool = option(
        False, "Where prefixes are not shared: sequences end to end in one row instead of padded."
    )
    disable_dropout: bool = option(True, "Train without dropout.")
    precompute_ref_log_probs: bool = option(
        False,
        f"Score the lists by the reference model ({', '.join(NEEDS_REFERENCE)}) once, before "
        "training, and keep the scores in output_dir; then no second model stays in memory.",
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
