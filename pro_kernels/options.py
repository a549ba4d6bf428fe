"""Options that travel through every layer as frozen dataclasses.

``PROOptions`` is the loss as its caller describes it, ``RankingOptions`` as the kernels take it,
``LogitOptions`` what the model does to its logits. Ops flatten them, as their schemas must.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

IGNORE_INDEX = -100
OFFICIAL_EPS = 1e-10
# Of options, and of a prompt's largest reward gap, scaled: fp32 holds them and their products.
SIZES = 1e-30, 1e30
# A row of logits may reach 1e9; beyond that AVX-512 loses its sum.
LARGEST_SCALE = 1e6


def gap_fault(gap: float, reward_scale: float = 1.0) -> str | None:
    """Why PRO cannot take rewards whose largest gap is this; None of one that it can, or of 0."""
    smallest, largest = SIZES
    if gap == 0 or smallest <= gap * reward_scale <= largest:
        return None
    how = "close together" if gap > 0 and gap * reward_scale < smallest else "far apart"
    return (
        f"too {how}: the largest gap is {gap:g}, which times reward_scale={reward_scale:g} must "
        f"lie in [{smallest:g}, {largest:g}]"
    )


def setting(name: str, choices: Sequence[str], default: str) -> str:
    """The environment variable ``name``, one of ``choices``; unset or empty: ``default``."""
    choice = os.environ.get(name) or default
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
    return choice


Function = TypeVar("Function", bound=Callable)


def constant_while_compiling(function: Function) -> Function:
    """Let ``torch.compile`` call this function of constants while tracing, and keep its result.

    What ``torch.compiler.assume_constant_result`` does, without importing the whole compiler (and
    Triton) the moment this package is imported; tests/test_ops.py would show it if that changed.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class LogitOptions:
    """What the model does to raw logits before the softmax.

    ``z = softcap * tanh(logit_scale * raw / softcap)``; without a softcap ``z = logit_scale * raw``
    (Gemma 2 report, arXiv 2408.00118, section 2, for the cap; Cohere and Granite for the scale).
    The cap lies in [1e-30, 1e30], the scale's size in [1e-30, 1e6].
    """

    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None:
            _positive("softcap", self.softcap)
        _finite("logit_scale", self.logit_scale, LARGEST_SCALE)
        if self.logit_scale == 0:
            raise ValueError("logit_scale must not be 0")


@dataclass(frozen=True)
class RankingOptions:
    """Options of the ranking loss on scores (one prompt: n candidates, best first).

    Attributes:
        length_normalize: score is ``S / m`` (the paper) instead of ``S``.
        tau: inverse temperature of every term when no rewards are given.
        skip_ties: a candidate tied with candidate k leaves term k instead of adding ``exp(0)``.
        eps: constant inside the log, kept as one more log-sum-exp entry; 0 leaves it out.
        sft_weight: weight of the SFT term, times ``(n - 1)**2``.
        sft_mean: SFT uses ``S / m`` of the best candidate instead of ``S``.
        top_k: only the first ``top_k`` rank terms; None for all ``n - 1``.
        single_sft: a prompt with one candidate is pure SFT (factor 1 instead of ``(n-1)**2 = 0``).
    """

    length_normalize: bool = True
    tau: float = 1.0
    skip_ties: bool = False
    eps: float = 0.0
    sft_weight: float = 0.05
    sft_mean: bool = False
    top_k: int | None = None
    single_sft: bool = True

    def __post_init__(self) -> None:
        _positive("tau", self.tau)
        _finite("eps", self.eps)
        if self.eps < 0:
            raise ValueError(f"eps must be >= 0, got {self.eps!r}")
        _finite("sft_weight", self.sft_weight)
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be None or an integer >= 1, got {self.top_k!r}")


@dataclass(frozen=True)
class PROOptions:
    """The loss as its caller describes it; ``functional.linear_pro_loss`` documents each field."""

    sft_weight: float = 0.05
    sft_reduction: str | None = None
    length_normalize: bool = True
    temperature: str | float = "reward"
    reward_scale: float = 1.0
    ties: str = "zero"
    eps: float = 0.0
    top_k: int | None = None
    compat: str | None = None
    final_dtype: torch.dtype | None = None
    _ranking: RankingOptions = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sft_reduction is None:
            object.__setattr__(self, "sft_reduction", "sum" if self.official else "mean")
        _choice("sft_reduction", self.sft_reduction, ("sum", "mean"))
        _choice("ties", self.ties, ("zero", "skip"))
        _choice("compat", self.compat, (None, "official"))
        if isinstance(self.temperature, str):
            _choice("temperature", self.temperature, ("reward",))
        _positive("reward_scale", self.reward_scale)
        if not hasattr(self.length_normalize, "__bool__"):
            raise TypeError(f"length_normalize must be a bool, got {self.length_normalize!r}")
        object.__setattr__(self, "_ranking", self._to_ranking())

    @property
    def official(self) -> bool:
        """Whether the meaning is that of the authors' code."""
        return self.compat == "official"

    def ranking(self) -> RankingOptions:
        """The same as the kernels take it."""
        return self._ranking

    def _to_ranking(self) -> RankingOptions:
        options = RankingOptions(
            length_normalize=bool(self.length_normalize),
            skip_ties=self.ties == "skip",
            eps=self.eps,
            sft_weight=self.sft_weight,
            sft_mean=self.sft_reduction == "mean",
            top_k=self.top_k,
        )
        if not isinstance(self.temperature, str):
            _positive("temperature", self.temperature)
            options = replace(options, tau=max(SIZES[0], 1.0 / self.temperature))
        if self.official:
            options = replace(options, eps=OFFICIAL_EPS, single_sft=False)
        return options


def _choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def _positive(name: str, value: object) -> None:
    _finite(name, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be > 0, got {value!r}")


def _finite(name: str, value: object, largest: float = SIZES[1]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if wrong := size_fault(value, largest):
        raise ValueError(f"{name} must {wrong}, got {value!r}")


def size_fault(value: float, largest: float = SIZES[1]) -> str | None:
    """What an option of this value must be and is not; None of one that is right, or 0.

    By comparisons alone, which ``torch.compile`` knows of numbers that change between calls.
    """
    if value == 0 or SIZES[0] <= abs(value) <= largest:
        return None
    return f"be of a size in [{SIZES[0]:g}, {largest:g}]"


def check_total(given: Tensor, cast: Tensor) -> None:
    """Raise ValueError where prompt weights lose their sum in ``cast``, what is computed with."""
    limits, total = torch.finfo(cast.dtype), cast.sum()
    if given.any() and not limits.tiny <= total <= limits.max:
        raise ValueError(
            f"prompt_weights must be 0 or add up to a number in [{limits.tiny:.2g}, "
            f"{limits.max:.2g}], what {cast.dtype} holds, got {given.tolist()}"
        )
