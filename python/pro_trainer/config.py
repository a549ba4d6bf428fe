"""Options of the two commands: each field is a flag, its help text and its default."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

_OPTIONAL = ("steps", "lr", "eval_every")


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class EvalConfig:
    """What evaluation needs; training adds to it."""

    model: str | None = _option(
        None, "Folder (or hub name) of a transformers causal LM with its LM head."
    )
    tokenizer: str | None = _option(None, "Folder of the tokenizer. Default: the model's.")
    data: list[str] = _option(
        [], "JSON Lines files, plain or .gz: prompt/completions[/rewards] or chosen/rejected."
    )
    on_bad_line: Literal["error", "skip"] = _option(
        "error", "A malformed line stops the run (error), or is counted and reported (skip)."
    )
    all_equal: Literal["drop", "error", "order"] = _option(
        "drop",
        "A list whose rewards are all equal ranks nothing: drop it and count it, stop with an "
        "error, or take the order of its completions, best first, as the ranking.",
    )
    num_candidates: int | None = _option(
        None,
        "At most this many candidates a list: the best, the worst and those evenly between them. "
        "Default: all.",
    )
    reward_scale: float = _option(1.0, "Rewards are multiplied by this number (> 0).")
    max_length: int = _option(
        512, "Tokens of prompt and completion together. A longer completion loses its end and EOS."
    )
    max_prompt_length: int | None = _option(
        None, "Tokens of the prompt; a longer one loses its beginning. Default: half of max_length."
    )
    too_long: Literal["truncate", "drop"] = _option(
        "truncate", "What happens to a list that does not fit: cut it as above, or drop it."
    )
    batch_size: int = _option(8, "Prompts a batch; each comes with all its candidates.")
    length_normalize: bool = _option(
        True, "Score is the mean log-probability a token (the paper) instead of the sum."
    )
    temperature: str = _option(
        "reward",
        "'reward': reward differences are the inverse temperatures (the paper). A number T: 1 / T "
        "for every pair, rewards only order the list. Lists without rewards use T = 1 under "
        "'reward'.",
    )
    ties: Literal["zero", "skip"] = _option(
        "zero", "A tied candidate adds exp(0) to the denominator (the paper) or leaves the term."
    )
    eps: float = _option(0.0, "Constant inside the log of each rank term (official code: 1e-10).")
    sft_weight: float = _option(0.05, "Weight of the SFT term on the best candidate.")
    sft_reduction: Literal["sum", "mean"] = _option(
        "sum", "SFT term: log-probabilities of the best candidate summed, or their mean."
    )
    loss_impl: Literal["auto", "cpu", "triton", "torch", "reference"] = _option(
        "auto",
        "The fused loss with this backend (auto: the fastest usable), or the plain PyTorch "
        "reference.",
    )
    dtype: Literal["float32", "bfloat16"] = _option(
        "float32", "Arithmetic of the model and of the loss; weights stay float32 (autocast)."
    )
    device: str = _option("auto", "'cpu', 'cuda', ...; auto: cuda where there is one.")

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "reward_scale", "max_length")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if not 1 <= self.prompt_limit() < self.max_length:
            raise ValueError(
                f"max_prompt_length must lie in [1, max_length={self.max_length}), "
                f"got {self.max_prompt_length}"
            )
        if self.num_candidates is not None and self.num_candidates < 2:
            raise ValueError(f"num_candidates must be at least 2, got {self.num_candidates}")
        if self.temperature != "reward":
            self.fixed_temperature()

    def prompt_limit(self) -> int:
        """Most tokens of a prompt."""
        return self.max_length // 2 if self.max_prompt_length is None else self.max_prompt_length

    def fixed_temperature(self) -> float | None:
        """The temperature where it is a number; None under ``'reward'``."""
        if self.temperature == "reward":
            return None
        try:
            value = float(self.temperature)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"temperature must be 'reward' or a number > 0, got {self.temperature!r}"
            )
        return value


@dataclass
class TrainConfig(EvalConfig):
    """What training needs."""

    demo: bool = _option(
        False,
        "What is not given is supplied: without --model a tiny byte-level Llama made on the spot, "
        "without --data the bundled ranked lists.",
    )
    eval_data: list[str] = _option([], "Held-out files. Default: eval_fraction of the lists.")
    eval_fraction: float = _option(
        0.1,
        "Share of the prompts held out when no eval_data is given (lists with the same prompt stay "
        "together); 0 for none.",
    )
    output_dir: str = _option(
        "runs/pro", "Gets checkpoint/, metrics.json and curves.png. Must be empty or not exist."
    )
    overwrite: bool = _option(
        False, "Replace those three in an output_dir that is not empty; other files are kept."
    )
    epochs: float = _option(1.0, "Passes over the training lists.")
    steps: int | None = _option(
        None, "Optimizer steps; takes the place of epochs. Default for the bundled lists: 150."
    )
    lr: float | None = _option(
        None, "Highest learning rate of AdamW. Default: 1e-5, and 3e-3 for the tiny Llama."
    )
    schedule: Literal["linear", "cosine", "constant"] = _option(
        "cosine", "Course of the learning rate after the warm-up: to 0, or constant."
    )
    warmup_ratio: float = _option(0.05, "Share of the steps with a rising learning rate.")
    weight_decay: float = _option(0.0, "Weight decay of AdamW (not on biases and norms).")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; 0 for no clipping.")
    seed: int = _option(0, "Seed of everything random: weights, order, split, dropout.")
    log_every: int = _option(10, "Steps between progress lines.")
    eval_every: int | None = _option(
        None, "Steps between evaluations. Default: only before and after training."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "epochs", "log_every")
        _positive(self, *(name for name in _OPTIONAL if getattr(self, name) is not None))
        for name in ("eval_fraction", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")

    def learning_rate(self) -> float:
        """The highest learning rate."""
        return self.lr or (3e-3 if self.model is None else 1e-5)

    def num_steps(self, batches_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        if self.steps is None and self.demo and not self.data:
            return 150
        return self.steps or max(1, math.ceil(self.epochs * batches_per_epoch))


def _positive(config: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {getattr(config, name)}")
