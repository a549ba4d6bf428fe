"""Policy-gradient losses on the log-probs of tokens: GRPO and its relatives.

``B`` completions of ``T`` positions. With l the log-prob of a token now, l_old when it was sampled,
l_ref under a reference model and A the advantage, a token's term is

    -min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(l_ref - l) - (l_ref - l) - 1)

with w = exp(l - l_old), or exp of the completion's mean of l - l_old. What ``loss_type`` changes,
and who published it: docs/losses.md. Names are those of TRL's ``GRPOConfig``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pro_kernels import validate
from pro_kernels.option_types import Limits
from pro_kernels.options import Checked, Options, declare

_NOT_NEGATIVE, _POSITIVE = Limits(at_least=0), Limits(above=0)


@dataclass(frozen=True)
class PolicyOptions(Checked):
    """The scalars of a policy loss."""

    loss_type: Annotated[
        Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"],
        "A token's term, and what the sum of all is divided by (docs/losses.md).",
    ] = "dapo"
    importance_sampling_level: Annotated[
        Literal["token", "sequence"], '"sequence": a completion has one ratio (GSPO).'
    ] = "token"
    beta: Annotated[float, _NOT_NEGATIVE, "Weight of the KL term."] = 0.0
    epsilon: Annotated[float, _NOT_NEGATIVE, "Ratios are clipped below 1 - epsilon."] = 0.2
    epsilon_high: Annotated[
        float | None,
        _NOT_NEGATIVE,
        'And above 1 + epsilon_high; None: epsilon. With "cispo" the largest ratio itself.',
    ] = None
    delta: Annotated[float | None, _POSITIVE, "Bound of the ratio that is not clipped."] = None
    use_bias_correction_kl: Annotated[bool, "Multiply the KL term by the ratio."] = False
    max_completion_length: Annotated[int | None, Limits(at_least=1), 'Of "dr_grpo".'] = None
    top_entropy_quantile: Annotated[
        float, Limits(at_least=0, at_most=1), "The share of tokens, by entropy, that A acts on."
    ] = 1.0
    entropy_coef: Annotated[float, "Factor of the mean entropy, which is subtracted."] = 0.0
    sapo_temperature_pos: Annotated[float, _POSITIVE, 'Of "sapo", where A > 0.'] = 1.0
    sapo_temperature_neg: Annotated[float, _POSITIVE, 'Of "sapo", where A <= 0.'] = 1.05


declare(PolicyOptions)
_POLICY = Options(PolicyOptions)


@_POLICY
def policy_loss(
    logps: Tensor,  # (B, T)
    old_logps: Tensor | None,  # (B, T)
    advantages: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    *,
    ref_logps: Tensor | None = None,  # (B, T)
    entropies: Tensor | None = None,  # (B, T)
    importance_sampling_ratio: Tensor | None = None,  # (B, T) or (B, 1)
    num_items_in_batch: Tensor | float | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of GRPO, Dr. GRPO, DAPO, GSPO and the like, and TRL's metrics, on one rank.

    What stands where ``mask`` is False is never read. Completions without a token add 0, and count
    in means over completions.

    Args:
        logps: (B, T) floating point, as of ``linear_token_logps``; differentiable.
        old_logps: (B, T), when the tokens were sampled; None: now, so that every ratio is 1.
        advantages: (B,), or (B, T) for each token.
        mask: (B, T) bool, the tokens that count.
        ref_logps: (B, T), under the reference model.
        entropies: (B, T), differentiable.
        importance_sampling_ratio: (B, T) or (B, 1), a factor on all but the KL term: probability
            under the model over that under the engine that sampled.
        num_items_in_batch: what "dapo" and "cispo" divide by: tokens of the accumulated batch, over
            the number of ranks where these average gradients. None: tokens of the mask.
        **options: of the call.

    Returns:
        Scalar fp32 (fp64 for fp64 ``logps``), and detached fp32 metrics: "kl", "entropy",
        "policy_loss" (without an entropy term), "clip_ratio/low_mean" and so on.

    Raises:
        TypeError, ValueError: an argument or option that cannot be, or that another one needs.
    """
    (how,) = _POLICY.split(options)
    tensors = {"old_logps": old_logps, "ref_logps": ref_logps, "entropies": entropies}
    tensors |= {"importance_sampling_ratio": importance_sampling_ratio}
    _check(how, logps, advantages, mask, tensors, num_items_in_batch)
    dtype = torch.promote_types(logps.dtype, torch.float32)
    metrics: dict[str, Tensor] = {}

    def scored(values: Tensor, otherwise: float = 0.0) -> Tensor:
        return torch.where(mask, values.to(dtype), otherwise)

    def mean(values: Tensor) -> Tensor:
        """Of tokens, or of completions where these have one value each."""
        found = values.detach().float()
        return found.mean() if found.shape[1] < mask.shape[1] else (found * mask).sum() / tokens

    logps, kept = scored(logps), mask
    counts, tokens = mask.sum(1, keepdim=True).clamp(min=1), mask.sum().clamp(min=1)
    log_ratio = logps - (logps if old_logps is None else scored(old_logps)).detach()
    if how.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / counts
    # An infinite ratio would make a gradient of 0 NaN.
    ratio = log_ratio.clamp(max=math.log(torch.finfo(dtype).max) - 1).exp()
    a = scored(advantages) if advantages.dim() == 2 else advantages.to(dtype)[:, None]
    a, high = a.detach(), how.epsilon if how.epsilon_high is None else how.epsilon_high
    if how.loss_type == "cispo":
        terms = -ratio.clamp(max=high).detach() * a * logps
        metrics["cispo_clip_ratio"] = mean((ratio > high) & (a > 0))
    elif how.loss_type == "sapo":
        t = torch.full_like(a, how.sapo_temperature_pos).where(a > 0, how.sapo_temperature_neg)
        terms = -torch.sigmoid(t * (ratio - 1)) * 4 / t * a
    else:
        bounded = ratio if how.delta is None else ratio.clamp(max=how.delta)
        terms = -torch.min(bounded * a, ratio.clamp(1 - how.epsilon, 1 + high) * a)
        low, above = (bounded < 1 - how.epsilon) & (a < 0), (bounded > 1 + high) & (a > 0)
        for name, found in (("low", low), ("high", above), ("region", low | above)):
            metrics[f"clip_ratio/{name}_mean"] = mean(found)
    if entropies is not None:
        metrics["entropy"] = mean(scored(entropies))
        if how.top_entropy_quantile < 1:
            seen = scored(entropies.detach(), torch.nan)
            kept = seen >= torch.nanquantile(seen, 1 - how.top_entropy_quantile)
            terms = terms * kept
    if importance_sampling_ratio is not None:
        terms = terms * importance_sampling_ratio.detach().to(dtype)
    if ref_logps is not None:
        gap = scored(ref_logps).detach() - logps
        kl = (torch.expm1(gap) - gap) * (ratio if how.use_bias_correction_kl else 1)
        metrics["kl"] = mean(kl)
        terms = terms + how.beta * kl if how.beta else terms
    rows = scored(terms).sum(1, keepdim=True)
    if how.loss_type in ("grpo", "sapo"):
        loss = (rows / counts).mean()
    elif how.loss_type in ("dr_grpo", "luspo"):
        loss = rows.mean() / (how.max_completion_length if how.loss_type == "dr_grpo" else 1)
    elif how.loss_type == "bnpo" or num_items_in_batch is None:
        loss = rows.sum() / tokens
    else:
        loss = rows.sum() / (num_items_in_batch + (num_items_in_batch == 0))
    if how.entropy_coef and entropies is not None:
        metrics["policy_loss"] = loss.detach().float()
        bonus = torch.where(kept, entropies.to(dtype), 0.0).sum() / kept.sum().clamp(min=1)
        loss = loss - how.entropy_coef * bonus
    return loss, metrics


def group_advantages(
    rewards: Tensor,  # (B, n)
    scale_rewards: Literal["group", "batch", "none"] = "group",
) -> Tensor:
    """Rewards less their prompt's mean, divided by a standard deviation + 1e-4.

    Args:
        rewards: (B, n), of n completions of B prompts; NaN: this one has none.
        scale_rewards: the deviation is that of the prompt's rewards ("group", arXiv 2402.03300) or
            of all ("batch", 2508.08221); "none": nothing is divided (Dr. GRPO, 2503.20783).

    Returns:
        (B, n) fp32 (fp64 for fp64 rewards), 0 where a reward is NaN.

    Raises:
        TypeError, ValueError: another shape, dtype or choice; on the CPU infinite rewards.
    """
    validate.check_choice("scale_rewards", scale_rewards, ("group", "batch", "none"))
    if validate.check_real("rewards", rewards).dim() != 2:
        raise ValueError(f"rewards must have shape (B, n), got {tuple(rewards.shape)}")
    values, there = rewards.detach().double(), ~rewards.isnan()
    if validate.readable(rewards):
        validate.check_finite("rewards", rewards, there)

    def centred(*dims: int) -> tuple[Tensor, Tensor]:
        """Less their mean, and the standard deviation of a sample."""
        count = there.sum(dims, keepdim=True)
        less = values - values.nansum(dims, keepdim=True) / count.clamp(min=1)
        return less, (less.square().nansum(dims, keepdim=True) / (count - 1).clamp(min=1)).sqrt()

    advantages, deviation = centred(1)
    if scale_rewards == "batch":
        deviation = centred(0, 1)[1]
    if scale_rewards != "none":
        advantages = advantages / (deviation + 1e-4)
    return advantages.nan_to_num(0.0).to(torch.promote_types(rewards.dtype, torch.float32))


def _check(
    how: PolicyOptions,
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    tensors: dict[str, Tensor | None],
    items: Tensor | float | None,
) -> None:
    """Raise TypeError or ValueError for what ``policy_loss`` cannot take."""
    shape = tuple(validate.check_float("logps", logps).shape)
    if logps.dim() != 2 or not logps.numel():
        raise ValueError(f"logps must have shape (B, T) with B, T >= 1, got {shape}")
    validate.check_mask("mask", mask)
    validate.check_real("advantages", advantages)
    also = {"advantages": shape[:1], "importance_sampling_ratio": (shape[0], 1)}
    for name, value in {"mask": mask, "advantages": advantages, **tensors}.items():
        if value is not None:
            if name not in ("mask", "advantages"):
                validate.check_float(name, value)
            if value.shape not in (shape, also.get(name)):
                either = " or ".join(str(x) for x in (shape, also.get(name)) if x)
                raise ValueError(f"{name} must have shape {either}, got {tuple(value.shape)}")
            validate.check_device(name, value, "logps", logps)
    if isinstance(items, Tensor):
        validate.check_same_shape("num_items_in_batch", items, (), "()")
    elif items is not None:
        validate.check_number("num_items_in_batch", items, at_least=0)
    if validate.readable(advantages):
        values = (advantages if advantages.dim() == 2 else advantages[:, None]).expand(shape)
        validate.check_all(
            "advantages must be finite where a token counts",
            values.isfinite() | ~mask,
            lambda b, t: f", got {values[b, t]} for completion {b}",
        )
    have = vars(how) | tensors
    for option, wanted, needed in (
        ("beta", how.beta, "ref_logps"),
        ("entropy_coef", how.entropy_coef, "entropies"),
        ("top_entropy_quantile", how.top_entropy_quantile < 1, "entropies"),
        ("loss_type", how.loss_type == "dr_grpo", "max_completion_length"),
        ("loss_type", how.loss_type == "cispo", "epsilon_high"),
    ):
        if wanted and have[needed] is None:
            raise ValueError(f"{option}={have[option]!r} needs {needed}, got None")
