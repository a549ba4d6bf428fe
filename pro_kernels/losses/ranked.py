"""A batch in rank order: what every loss is a formula on.

Shapes: ``B`` prompts, ``n`` candidates a prompt. Column 0 is the best candidate and the absent ones
come last; "absent" is mask False or no scored token. Arithmetic is fp32, or fp64 where the
log-probs are fp64; rewards are compared and subtracted before they are rounded to that. Rewards and
reference log-probs are constants. The checks that read values run for CPU tensors only, so a GPU is
never waited for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pro_kernels import validate
from pro_kernels.ranking import later_pairs, mean_weights, rank_of

Result = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Ranked:
    """A batch with the candidates of each prompt ordered best to worst, absent ones last."""

    logps: Tensor  # (B, n) S_i, 0 where absent
    lengths: Tensor  # (B, n) m_i, 1 where absent
    valid: Tensor  # (B, n) bool
    order: Tensor  # (B, n) original column of each place
    rewards: Tensor | None  # (B, n) as exact as given, fp32, fp64 or int64; 0 where absent
    ref_logps: Tensor | None  # (B, n) 0 where absent
    shares: Tensor  # (B,) of each prompt in the mean, 0 where none of its candidates is valid

    @property
    def shape(self) -> tuple[int, int]:
        """(B, n)."""
        return self.logps.shape[0], self.logps.shape[1]

    @property
    def first(self) -> Tensor:
        """Which place is that of the best, (n,) bool."""
        return torch.arange(self.shape[1], device=self.valid.device) == 0

    @property
    def counts(self) -> Tensor:
        """Valid candidates of each prompt, (B,)."""
        return self.valid.sum(1)

    def scores(self, length_normalize: bool = True) -> Tensor:
        """S_i / m_i, or S_i: (B, n)."""
        return self.logps / self.lengths if length_normalize else self.logps

    def log_ratios(self) -> Tensor:
        """S_i - S_ref,i (S_i where no reference was given): (B, n)."""
        return self.logps if self.ref_logps is None else self.logps - self.ref_logps

    def better(self, pairs: str = "all") -> Tensor:
        """Which (i, j) have i strictly better than j; "best" keeps i = 0 only: (B, n, n) bool."""
        selected = later_pairs(self.valid)
        if self.rewards is not None:
            selected = selected & (differences(self.rewards) > 0)
        if pairs == "best":
            selected = selected & self.first[:, None]
        return selected

    def best(self) -> Tensor:
        """Which candidates none is better than: (B, n) bool."""
        if self.rewards is not None:
            return self.valid & (self.rewards == self.rewards[:, :1])
        return self.valid & self.first

    def gaps(self) -> Tensor:
        """How far each reward lies below the best one, 0 where absent: (B, n)."""
        assert self.rewards is not None
        below = (self.rewards - self.rewards[:, :1]).to(self.logps.dtype)
        return torch.where(self.valid, below, 0.0)

    def log_softmax(self, values: Tensor) -> Tensor:
        """Over the valid candidates, 0 where absent: (B, n)."""
        # An empty prompt keeps its first place, so that no softmax is over nothing.
        absent = ~(self.valid | self.first)
        return values.masked_fill(absent, -math.inf).log_softmax(1).masked_fill(absent, 0.0)

    def softmax(self, values: Tensor) -> Tensor:
        """Over the valid candidates, 0 where absent: (B, n)."""
        return torch.where(self.valid, self.log_softmax(values).exp(), 0.0)

    def reward_softmax(self, temperature: float) -> Tensor:
        """softmax(r / temperature); with 0, equal shares for the best candidates: (B, n)."""
        if temperature > 0:
            return self.softmax(self.gaps() / temperature)
        best = self.best().to(self.logps.dtype)
        return best / best.sum(1, keepdim=True).clamp(min=1)

    def mean(self, per_prompt: Tensor) -> Tensor:
        """Mean of a (B,) term over the prompts with at least one valid candidate."""
        return (per_prompt * self.shares).sum()

    def nll(self, reduction: str, on: str = "best") -> Tensor:
        """Negative log-likelihood of the best candidate, or the mean of ``on="all"``: (B,).

        "sum": -S; "mean": -S/m; "tokens": the prompts' mean is the mean over all tokens of these
        candidates in the batch, as TRL computes it.
        """
        chosen = self.valid if on == "all" else self.valid & self.first
        of_each = -self.scores(reduction == "mean")
        total = torch.where(chosen, of_each, 0.0).sum(1)
        if reduction == "tokens":
            return total / self.mean(torch.where(chosen, self.lengths, 0.0).sum(1)).clamp(min=1)
        return total / chosen.sum(1).clamp(min=1)

    def result(
        self,
        losses: Tensor,  # (B,)
        implicit_rewards: Tensor,  # (B, n) what the loss compares
        pairs: Tensor | None = None,  # (B, n, n), as of ``better``; None: every untied pair
    ) -> Result:
        """What a loss returns: the mean over prompts of ``losses``, and the metrics."""
        return self.mean(losses), preference_metrics(self, implicit_rewards, pairs)

    def over_pairs(self, losses: Tensor, implicit_rewards: Tensor, pairs: str) -> Result:
        """``result`` of losses of pairs (B, n, n), "all" or of the "best" with the rest."""
        selected = self.better(pairs)
        return self.result(pair_mean(losses, selected), implicit_rewards, selected)


def ranked_batch(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    rewards: Tensor | None,  # (B, n)
    ref_logps: Tensor | None,  # (B, n)
    mask: Tensor | None,  # (B, n)
    prompt_weights: Tensor | None = None,  # (B,)
) -> Ranked:
    """Check the inputs of a loss and order the candidates of each prompt best to worst.

    Equal rewards keep their column order.
    """
    given = {"lengths": lengths, "rewards": rewards, "ref_logps": ref_logps, "mask": mask}
    _check_inputs(logps, **given, prompt_weights=prompt_weights)
    if validate.readable(lengths):
        rows = (lengths < 0).any(1).nonzero()[:, 0].tolist()
        if rows:
            raise ValueError(f"lengths must be >= 0, got a negative one in rows {rows}")
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    valid = lengths > 0
    if mask is not None:
        valid = valid & mask
    present = valid.any(1)
    if validate.readable(valid):
        validate.check_of_prompts(prompt_weights, None, valid.shape[1], dtype, present)
    if rewards is not None:
        held = torch.int64
        if rewards.is_floating_point():
            held = torch.promote_types(rewards.dtype, torch.float32)
        rewards = torch.where(valid, rewards.detach().to(held), 0)
        if validate.readable(rewards):
            validate.check_finite("rewards", rewards, valid)
    order = rank_of(valid, rewards)
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
        shares=mean_weights(present, prompt_weights, dtype),
    )


def differences(values: Tensor) -> Tensor:
    """(B, n) -> (B, n, n): entry (i, j) is value i minus value j."""
    return values[:, :, None] - values[:, None, :]


def pair_mean(values: Tensor, pairs: Tensor) -> Tensor:
    """Mean of (B, n, n) values over each prompt's pairs; 0 where it has none: (B,)."""
    return pair_sum(values, pairs) / pairs.sum((1, 2)).clamp(min=1)


def pair_sum(values: Tensor, pairs: Tensor) -> Tensor:
    """Sum of (B, n, n) values over each prompt's pairs: (B,)."""
    return torch.where(pairs, values, 0.0).sum((1, 2))


def logistic(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−(1−ε) log σ(margin) − ε log σ(−margin)."""
    losses = -logsigmoid(margins)
    if label_smoothing == 0:
        return losses
    return (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-margins)


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


def _check_inputs(logps: Tensor, **others: Tensor | None) -> None:
    validate.check_float("logps", logps)
    if logps.dim() != 2 or logps.shape[1] == 0:
        raise ValueError(f"logps must have shape (B, n) with n >= 1, got {tuple(logps.shape)}")
    shape = tuple(logps.shape)
    checks = {"ref_logps": validate.check_float, "mask": validate.check_mask}
    for name, value in others.items():
        if value is not None:
            value = checks.get(name, validate.check_real)(name, value)
            of = (shape[:1], "(B,)") if name == "prompt_weights" else (shape, "(B, n)")
            validate.check_same_shape(name, value, *of)
            validate.check_device(name, value, "logps", logps)
