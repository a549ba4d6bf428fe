"""Liger's fused losses on the fused kernels, so that ``use_liger_kernel`` switches these on.

Liger's preference losses and its fused linear cross-entropy are classes and functions around one
``torch.autograd.Function`` each, which takes hidden states and the head's weight. ``apply()`` puts
Functions made of these in their place, in all loaded modules. Names, signatures, options and
outputs stay Liger's, and so does the formula of each loss on log-probs. The log-probs and their
gradients are ``linear_token_logps``: one call for the whole batch, and none of its positions that
are not scored reach the head.

Source: liger-kernel 0.8, ``liger_kernel.chunked_loss`` and ``liger_kernel.ops``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pro_kernels.api import linear_token_logps
from pro_kernels.cross_entropy import token_losses
from pro_kernels.integrations.switch import Pair, Switch
from pro_kernels.models.head import head_for

Result = tuple[Any, ...]
_IGNORED = -100
# Loss types of GRPO that leave out what the mask does; "luspo" counts every position.
_MASKED = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
_switch = Switch(__name__, "liger-kernel", "Liger's losses are computed here")


def apply() -> None:
    """Compute Liger's fused losses here, in this process; ``restore()`` undoes it.

    These are ``LigerFusedLinearDPOLoss``, ``...ORPOLoss``, ``...CPOLoss``, ``...SimPOLoss``,
    ``...KTOLoss`` and ``...GRPOLoss`` of ``liger_kernel.chunked_loss`` with all their options;
    ``LigerFusedLinearCrossEntropyLoss``, ``liger_fused_linear_cross_entropy`` and with them
    ``LigerForCausalLMLoss``; and the functions that these are made of. Code that has imported them
    already is served too. Hidden states are (..., H), a weight is (V, H), in float32/16 or
    bfloat16, as Liger takes them; losses are fp32. ``compiled``, ``chunk_size`` and ``accum_dtype``
    do not matter here.

    What the kernels cannot do stays Liger's own, and a warning says why: label smoothing under a
    softcap, a chosen implementation of the cross-entropy, ``kl`` of KTO for each row, and a weight
    that DeepSpeed ZeRO-3 has split.

    Raises:
        ImportError: liger-kernel is missing.
        ValueError: it was called before.
    """
    names = ("chunked_loss.functional", *_FUNCTIONS)
    functional, *modules = _switch.modules(*(f"liger_kernel.{name}" for name in names))
    pairs: list[Pair] = []
    for module, (name, compute, own) in zip(modules, _FUNCTIONS.values(), strict=True):
        theirs = getattr(module, name)
        if (ours := _made_of(theirs, compute, own)) is None:
            continue
        pairs.append((theirs, ours))
        short = name.removeprefix("LigerFusedLinear").removesuffix("Function").lower()
        if bound := getattr(functional, f"liger_fused_linear_{short}", None):
            pairs.append((bound, ours.apply))
    _switch.exchange(pairs)


def restore() -> None:
    """Undo ``apply``; nothing happens where it was not called."""
    _switch.restore()


def _made_of(theirs: Any, compute: Callable[..., Result], own: str) -> Any:
    """A Function with Liger's forward for what ``compute`` does not do; None if it is unknown."""
    signature = inspect.signature(theirs.forward)
    known = own.split()
    formula = inspect.signature(_formula(theirs)).parameters if _formula(theirs) else ()
    if unknown := [x for x in list(signature.parameters)[1:] if x not in (*known, *formula)]:
        warnings.warn(
            f"{theirs.__name__} takes {', '.join(unknown)}, which is not known here; it stays "
            "Liger's own",
            stacklevel=3,
        )
        return None
    base = inspect.signature(theirs.__base__.forward).parameters
    defaults = {x: base[x].default for x in known if x in base and x not in signature.parameters}

    class Fused(theirs):
        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(None, *args, **kwargs)
            bound.apply_defaults()
            given = defaults | bound.arguments
            if why := _left_to_liger(given):
                warnings.warn(
                    f"{theirs.__name__} with {why} is computed by Liger itself", stacklevel=2
                )
                return super().apply(*args, **kwargs)
            options = {x: given[x] for x in list(signature.parameters)[1:] if x not in known}
            return compute(_formula(cls), SimpleNamespace(**given), options)

    Fused.__name__, Fused.__qualname__ = theirs.__name__, theirs.__qualname__
    return Fused


def _formula(function: Any) -> Any:
    """A loss as a function of log-probs, where a Function has one."""
    return getattr(function, "preference_loss_fn", getattr(function, "ppo_loss_fn", None))


def _left_to_liger(given: dict[str, Any]) -> str | None:
    """What of a call is not computed here."""
    if any(hasattr(given.get(x), "ds_id") for x in ("weight", "ref_weight")):
        return "a weight that ZeRO-3 has split"  # it is whole in the forward only
    if (smoothing := given.get("label_smoothing")) and (softcap := given.get("softcap")):
        return f"label_smoothing={smoothing} and softcap={softcap}"
    if implementation := given.get("ce_impl") or given.get("ce_mode"):
        return f"the implementation {implementation}"
    kl = given.get("kl")
    return "kl for each row" if isinstance(kl, Tensor) and kl.numel() > 1 else None


def _token_logps(x: Any, of: str, target: Tensor, rows: slice = slice(None), **options: Any) -> Any:
    """Log-probs (R, T) of targets under the model, or under the reference (``of="ref_"``)."""
    hidden = getattr(x, f"{of or '_'}input")[rows]
    weight, bias = head_for(hidden, getattr(x, f"{of}weight"), getattr(x, f"{of}bias"))
    return linear_token_logps(hidden, weight, target[rows], bias=bias, **options)


def _row_logps(x: Any, of: str = "") -> tuple[Tensor, Tensor]:
    """Sums over the scored tokens of each row (R,), and what the formula takes: these or means."""
    sums = _token_logps(x, of, x.target, ignore_index=x.ignore_index).sum(-1)
    counts = (x.target != x.ignore_index).sum(-1)
    return sums, sums / counts if x.average_log_prob else sums


def _reference(x: Any) -> Tensor | None:
    with torch.no_grad():
        return _row_logps(x, "ref_")[1] if x.use_ref_model else None


@torch.no_grad()
def _logit_sums(x: Any) -> Tensor:
    """Sum of all logits of each row (R,), scored or not, which Liger reports; no logits needed."""
    weight = x.weight.sum(0, dtype=torch.float32)
    sums = (x._input.sum(1, dtype=torch.float32) * weight).sum(-1)
    return sums if x.bias is None else sums + x._input.shape[1] * x.bias.sum(dtype=torch.float32)


def _detached(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(value.detach() for value in values)


def _pairs(formula: Callable[..., Any], x: Any, options: dict[str, Any]) -> Result:
    """DPO, ORPO, CPO and SimPO: chosen rows, then as many rejected ones."""
    n = x.target.shape[0] // 2
    sums, logps = _row_logps(x)
    if (reference := _reference(x)) is not None:
        options |= {"ref_chosen_logps": reference[:n], "ref_rejected_logps": reference[n:]}
    loss, *more = formula(logps[:n], logps[n:], x.target, **options)
    nll, chosen = sums.new_zeros(()), sums[:n]
    if x.compute_nll_loss:
        target = x.target
        if x.nll_target is not None:
            target = x.nll_target
            chosen = _token_logps(x, "", target, slice(n), ignore_index=x.ignore_index)
        nll = -chosen.sum() / (target[:n] != x.ignore_index).sum()
    logits = _logit_sums(x) / (n * x.target.shape[1] * x.weight.shape[0])
    means = logits[:n].sum(), logits[n:].sum()
    return loss + x.alpha * nll, _detached(logps[:n], logps[n:], *means, nll, *more)


def _labelled(formula: Callable[..., Any], x: Any, options: dict[str, Any]) -> Result:
    """KTO: rows with a label each, True for those that are wanted.

    The formula gets a row at a time, as by default in Liger: in 0.8.2 its metrics take no more.
    """
    good, (_, logps) = x.preference_labels, _row_logps(x)
    rows = zip(*(v.split(1) for v in (logps, good, _reference(x)) if v is not None), strict=True)
    found = [formula(logp, label, x.target, *ref, **options) for logp, label, *ref in rows]
    loss, *more = (torch.stack(values).sum() for values in zip(*found, strict=True))
    sums = [(values * of).sum() for values in (logps, _logit_sums(x)) for of in (good, ~good)]
    return loss, _detached(*sums, *more)


def _policy(formula: Callable[..., Any], x: Any, options: dict[str, Any]) -> Result:
    """GRPO and its relatives: a formula on the log-prob of each token."""
    kept = x.attention_mask != 0
    if options["loss_type"] not in _MASKED:
        kept = torch.ones_like(kept)
    target = torch.where(kept, x.selected_token_ids, _IGNORED)
    scale = {"logit_scale": 1 / x.temperature}
    logps = _token_logps(x, "", target, **scale)
    reference = x.ref_per_token_logps if x.use_ref_model else None
    if x.use_ref_model and reference is None:
        with torch.no_grad():
            reference = _token_logps(x, "ref_", target, **scale)
    # Log-probs here are 0 where nothing is kept; a ratio to others there could overflow.
    others = {"ref_per_token_logps": reference, "old_per_token_logps": x.old_per_token_logps}
    for name, value in others.items():
        options[name] = None if value is None else torch.where(kept, value.float(), 0.0)
    ratio = options.get("vllm_is_ratio")
    if ratio is not None and ratio.dim() == 1:
        options["vllm_is_ratio"] = ratio[:, None]
    options |= {"attention_mask": x.attention_mask, "full_attention_mask": x.attention_mask}
    loss, metrics = formula(per_token_logps=logps, advantages=x.advantages, **options)
    return loss, _detached(*metrics)


def _cross_entropy(_: None, x: Any, options: dict[str, Any]) -> Result:
    """Of rows (N, H) and targets (N,): loss, z-loss, accuracy and predicted tokens, or Nones."""
    weight, bias = head_for(x._input, x.weight, x.bias)
    found = token_losses(
        x._input, weight, x.target, bias=bias, class_weight=x.ce_weight,
        outputs=("top_ids",) if x.return_token_accuracy or x.return_predicted_tokens else (),
        label_smoothing=x.label_smoothing, z_loss=x.lse_square_scale, softcap=x.softcap,
        ignore_index=x.ignore_index,
    )  # fmt: skip
    certainty = found.stats["logps"].detach().exp() if x.use_token_scaling else 1.0
    loss, z_loss = found.reduced(x.reduction, certainty)
    ids = found.stats.get("top_ids")
    predicted = None if ids is None else ids[..., 0]
    accuracy = None
    if x.return_token_accuracy:
        accuracy = (predicted == x.target).float() * found.scored
        if x.reduction != "none":
            accuracy = accuracy.sum() / found.scored.sum()
    return (
        loss,
        z_loss.detach() if x.return_z_loss else None,
        accuracy,
        predicted if x.return_predicted_tokens else None,
    )


_HEADS = "_input weight bias ref_input ref_weight ref_bias use_ref_model compiled chunk_size "
_ROWS = _HEADS + "target ignore_index average_log_prob "
_PAIRS = _ROWS + "alpha compute_nll_loss nll_target"
# Module below liger_kernel -> a Function in it, what computes it, and which of its arguments that
# takes; the formula takes the others.
_FUNCTIONS: dict[str, tuple[str, Callable[..., Result], str]] = {
    "chunked_loss.dpo_loss": ("LigerFusedLinearDPOFunction", _pairs, _PAIRS),
    "chunked_loss.orpo_loss": ("LigerFusedLinearORPOFunction", _pairs, _PAIRS),
    "chunked_loss.cpo_loss": ("LigerFusedLinearCPOFunction", _pairs, _PAIRS),
    "chunked_loss.simpo_loss": ("LigerFusedLinearSimPOFunction", _pairs, _PAIRS),
    "chunked_loss.kto_loss": (
        "LigerFusedLinearKTOFunction", _labelled, _ROWS + "preference_labels",
    ),
    "chunked_loss.grpo_loss": (
        "LigerFusedLinearGRPOFunction", _policy,
        _HEADS + "selected_token_ids attention_mask advantages ref_per_token_logps "
        "old_per_token_logps temperature",
    ),
    "ops": (
        "LigerFusedLinearCrossEntropyFunction", _cross_entropy,
        "_input weight target bias ce_weight ignore_index lse_square_scale label_smoothing "
        "reduction softcap return_z_loss accum_dtype use_token_scaling return_token_accuracy "
        "return_predicted_tokens ce_impl ce_mode chunk_mem_const",
    ),
}  # fmt: skip
