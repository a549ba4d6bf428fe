"""What every loss shares: validation, ranking the candidates, pair masks, means and metrics.

Shapes: ``B`` prompts, ``n`` candidates a prompt. After :func:`rank_candidates` column 0 is the
best candidate and the absent ones come last; "absent" is mask False or no scored token.
Arithmetic is fp32, or fp64 where the log-probs are fp64; rewards are compared and subtracted before
they are rounded to that. Rewards and reference log-probs are constants. The checks that read values
run for CPU tensors only, so a GPU is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pro_kernels.options import check_total, size_fault

SFT_REDUCTIONS = ("sum", "mean", "tokens")
PAIRS = ("all", "best")


@dataclass(frozen=True)
class Ranked:
    """A batch with the candidates of each prompt ordered best to worst, absent ones last."""

    logps: Tensor  # (B, n) S_i, 0 where absent
    lengths: Tensor  # (B, n) m_i, 1 where absent
    valid: Tensor  # (B, n) bool
    order: Tensor  # (B, n) original column of each place
    rewards: Tensor | None  # (B, n) as exact as given, fp32, fp64 or int64; 0 where absent
    ref_logps: Tensor | None  # (B, n) 0 where absent

    @property
    def counts(self) -> Tensor:
        """Valid candidates of each prompt, (B,)."""
        return self.valid.sum(1)

    def scores(self, length_normalize: bool) -> Tensor:
        """S_i / m_i, or S_i: (B, n)."""
        return self.logps / self.lengths if length_normalize else self.logps

    def log_ratios(self) -> Tensor:
        """S_i - S_ref,i (S_i where no reference was given): (B, n)."""
        return self.logps if self.ref_logps is None else self.logps - self.ref_logps

    def better(self, pairs: str = "all") -> Tensor:
        """Which (i, j) have i strictly better than j; "best" keeps i = 0 only: (B, n, n) bool."""
        selected = (self.valid[:, :, None] & self.valid[:, None, :]).triu(1)
        if self.rewards is not None:
            selected = selected & (differences(self.rewards) > 0)
        if pairs == "best":
            selected = (
                selected
                & (torch.arange(selected.shape[1], device=selected.device) == 0)[None, :, None]
            )
        return selected

    def shares(self, prompt_weights: Tensor | None = None) -> Tensor:
        """Each prompt's share of the batch mean; 0 where it has no candidate: (B,)."""
        weights = self.valid.any(1).to(self.logps.dtype)
        if prompt_weights is not None:
            given = torch.where(weights > 0, prompt_weights.detach(), 0)
            weights = given.to(weights.dtype)
            if readable(weights):
                check_total(given, weights)
        total = weights.sum()
        return weights / torch.where(total > 0, total, 1.0)

    def mean(self, per_prompt: Tensor) -> Tensor:
        """Mean of a (B,) term over the prompts with at least one valid candidate."""
        return (per_prompt * self.shares()).sum()

    def sft(self, reduction: str) -> Tensor:
        """Negative log-likelihood of the best candidate, (B,).

        "sum": -S; "mean": -S/m; "tokens": the prompts' mean is the mean over all scored tokens of
        the batch's best candidates, as TRL computes it.
        """
        best, length = -self.logps[:, 0], self.lengths[:, 0]
        if reduction == "sum":
            return best
        if reduction == "mean":
            return best / length
        present = self.valid[:, 0]
        return best * present.sum() / torch.where(present, length, 0.0).sum().clamp(min=1)


def rank_candidates(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    *,
    rewards: Tensor | None,  # (B, n)
    ref_logps: Tensor | None,  # (B, n)
    mask: Tensor | None,  # (B, n)
    needs: tuple[str, ...] = (),
    loss: str = "this loss",
) -> Ranked:
    """Validate the inputs of a loss and order the candidates of each prompt best to worst.

    ``needs`` names the optional inputs that ``loss`` cannot do without. Equal rewards keep their
    column order.
    """
    for name, value in (("rewards", rewards), ("ref_logps", ref_logps)):
        if name in needs and value is None:
            raise ValueError(f"{loss} needs {name}: expected a (B, n) tensor, got None")
    _check_inputs(logps, lengths, rewards, ref_logps, mask)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32

    valid = lengths > 0
    if mask is not None:
        valid = valid & mask
    if rewards is None:
        order = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)
    else:
        exact = torch.int64
        if rewards.is_floating_point():
            exact = torch.promote_types(rewards.dtype, torch.float32)
        rewards = torch.where(valid, rewards.detach().to(exact), 0)
        if readable(rewards):
            rows = _rows(~torch.isfinite(rewards).all(1))
            if rows:
                raise ValueError(f"rewards must be finite, got NaN or infinity in rows {rows}")
        keys = rewards.masked_fill(
            ~valid, -math.inf if rewards.is_floating_point() else torch.iinfo(exact).min
        )
        order = torch.argsort(keys, dim=1, descending=True, stable=True)

    valid = valid.gather(1, order)

    def ranked(values: Tensor, absent: float = 0.0) -> Tensor:
        return torch.where(valid, values.gather(1, order), absent)

    return Ranked(
        logps=ranked(logps.to(dtype)),
        lengths=ranked(lengths.detach().to(dtype), 1.0),
        valid=valid,
        order=order,
        rewards=None if rewards is None else ranked(rewards, 0),
        ref_logps=None if ref_logps is None else ranked(ref_logps.detach().to(dtype)),
    )


def differences(values: Tensor) -> Tensor:
    """(B, n) -> (B, n, n): entry (i, j) is value i minus value j."""
    return values[:, :, None] - values[:, None, :]


def pair_mean(values: Tensor, pairs: Tensor) -> Tensor:
    """Mean of (B, n, n) values over each prompt's pairs; 0 where it has none: (B,)."""
    return torch.where(pairs, values, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def preference_metrics(
    ranked: Ranked,
    implicit_rewards: Tensor,  # (B, n) what the loss compares
    pairs: Tensor | None = None,  # (B, n, n); default every untied pair
) -> dict[str, Tensor]:
    """TRL's metrics: the mean over a prompt's pairs, then over the prompts that have a pair."""
    pairs = ranked.better() if pairs is None else pairs
    counting = pairs.any(2).any(1)

    def average(values: Tensor) -> Tensor:
        return (pair_mean(values, pairs).sum() / counting.sum().clamp(min=1)).float()

    rewards, logps = implicit_rewards.detach(), ranked.logps.detach()
    margins = differences(rewards)
    return {
        "rewards/chosen": average(rewards[:, :, None]),
        "rewards/rejected": average(rewards[:, None, :]),
        "rewards/accuracies": average((margins > 0).to(rewards.dtype)),
        "rewards/margins": average(margins),
        "logps/chosen": average(logps[:, :, None]),
        "logps/rejected": average(logps[:, None, :]),
    }


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is in range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    limits = (
        ("> ", above, lambda limit: value > limit),
        (">= ", at_least, lambda limit: value >= limit),
        ("<= ", at_most, lambda limit: value <= limit),
    )
    expected = [f"{sign}{limit}" for sign, limit, _ in limits if limit is not None]
    in_range = all(holds(limit) for _, limit, holds in limits if limit is not None)
    if not abs(value) < math.inf or not in_range:
        raise ValueError(f"{name} must be {' and '.join(['finite', *expected])}, got {value!r}")
    if wrong := size_fault(value):
        raise ValueError(f"{name} must {wrong}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")


def check_top_k(value: object) -> None:
    """Raise unless ``value`` is None or a positive integer."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"top_k must be an integer or None, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"top_k must be >= 1, got {value}")


def check_tensor(
    name: str, value: object, like: Tensor, shape: tuple[int, ...], kind: str = "real"
) -> None:
    """Raise unless ``value`` is a tensor of ``shape`` on the device of ``like``.

    ``kind`` is the dtype expected: "real" (integer or floating point), "float", "bool" or "int64".
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as logps is, got {value.device}")
    accepted = {
        "real": value.dtype != torch.bool and not value.dtype.is_complex,
        "float": value.dtype.is_floating_point,
        "bool": value.dtype == torch.bool,
        "int64": value.dtype == torch.int64,
    }
    if not accepted[kind]:
        raise TypeError(f"{name} must have a {kind} dtype, got {value.dtype}")


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: on the CPU (no device sync) and not while tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _rows(bad: Tensor) -> list[int]:
    return bad.nonzero()[:, 0].tolist()


def _check_inputs(
    logps: Tensor,
    lengths: Tensor,
    rewards: Tensor | None,
    ref_logps: Tensor | None,
    mask: Tensor | None,
) -> None:
    if not isinstance(logps, Tensor):
        raise TypeError(f"logps must be a torch.Tensor, got {type(logps).__name__}")
    if logps.dim() != 2 or logps.shape[1] == 0:
        raise ValueError(f"logps must have shape (B, n) with n >= 1, got {tuple(logps.shape)}")
    shape = tuple(logps.shape)
    check_tensor("logps", logps, logps, shape, "float")
    check_tensor("lengths", lengths, logps, shape)
    if rewards is not None:
        check_tensor("rewards", rewards, logps, shape)
    if ref_logps is not None:
        check_tensor("ref_logps", ref_logps, logps, shape, "float")
    if mask is not None:
        check_tensor("mask", mask, logps, shape, "bool")
    if readable(lengths):
        rows = _rows((lengths < 0).any(1))
        if rows:
            raise ValueError(f"lengths must be >= 0, got a negative one in rows {rows}")
