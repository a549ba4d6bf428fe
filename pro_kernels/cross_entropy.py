"""Cross-entropy with all that ``torch.nn.functional.cross_entropy`` has, from hidden states.

Of target t with class weight w and smoothing e (Szegedy et al., arXiv 1512.00567, section 7), over
a vocabulary of V,

    loss = -(1 - e) w_t log p_t - e / V sum_v w_v log p_v

and the sum is the log-sum-exp times the weights' sum, less the logits' weighted sum: by linearity
one logit, of the head's weighted mean row. So there are three head matmuls as without.

Legend: ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from pro_kernels import validate
from pro_kernels.api import scored_targets, token_stats
from pro_kernels.fused import shards
from pro_kernels.fused.thin import mean_column, mean_logits
from pro_kernels.options import CallOptions, CrossEntropyOptions, LogitOptions, Options, row_scale
from pro_kernels.output import CrossEntropyOutput

_CROSS_ENTROPY = Options(
    CrossEntropyOptions, LogitOptions, CallOptions, without=("inplace_backward", "sequence_group")
)


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    return_stats: Literal[True],
    **options: Any,
) -> CrossEntropyOutput: ...
@_CROSS_ENTROPY
def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    return_stats: bool = False,
    **options: Any,
) -> Tensor | CrossEntropyOutput:
    """``torch.nn.functional.cross_entropy`` of ``head(hidden)``, logits never all held.

    Three head matmuls with any of the options and any upstream gradient; rows whose target is
    ``ignore_index`` never reach the head.

    Args:
        hidden: (..., H), as in ``linear_token_logps``.
        weight: (V, H), likewise.
        targets: (...), integer.
        bias: (V,) or None, possibly a DTensor.
        class_weight: (V,) floats, what a token of each class counts; a mean is divided by their
            sum over the tokens. None: 1.
        return_stats: return ``CrossEntropyOutput``, the loss among other numbers.
        **options: of the call.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs): a scalar, or with ``reduction="none"`` (...), 0 where
        the target is ``ignore_index``. A mean over no tokens is 0 (in PyTorch NaN).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: as ``linear_token_logps``; a class weight of another shape or device, or one
            that wants a gradient; ``label_smoothing`` with a softcap, under which a mean of logits
            is no logit of a mean; ``label_smoothing``, ``class_weight`` or ``return_stats`` with a
            ``process_group``.
    """
    found = token_losses(
        hidden, weight, targets, bias=bias, class_weight=class_weight,
        outputs=("lse", "top_ids") if return_stats else (), **options,
    )  # fmt: skip
    terms, *_ = _CROSS_ENTROPY.split(options)
    loss, z_loss = found.reduced(terms.reduction)
    if not return_stats:
        return loss
    logps, lse, ids = found.stats.values()
    return CrossEntropyOutput(loss, z_loss.detach(), logps, lse, ids[..., 0])


class TokenLosses(NamedTuple):
    """The cross-entropy of each token (...) and what it is made of; 0 where nothing is scored."""

    losses: Tensor  # without z-loss
    weights: Tensor  # of each token in a mean
    z_losses: Tensor
    scored: Tensor  # 1 or 0
    stats: dict[str, Tensor]  # of ``token_stats``

    def reduced(self, reduction: str, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """The loss with its z-loss, and that; ``factor``: of each token."""
        z_losses = _reduced(factor * self.z_losses, self.scored, reduction)
        return _reduced(factor * self.losses, self.weights, reduction) + z_losses, z_losses


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    outputs: tuple[str, ...] = (),  # further ones of ``token_stats``
    **options: Any,
) -> TokenLosses:
    """What ``linear_cross_entropy`` reduces; arguments and errors as there."""
    smoothing, softcap = options.get("label_smoothing"), options.get("softcap")
    weight, bias, group = shards.head_here(weight, bias, options.get("process_group"))
    alone = {
        "label_smoothing": smoothing,
        "class_weight": class_weight is not None,
        "return_stats": "top_ids" in outputs,
    }
    if refused := [name for name, on in alone.items() if on and group is not None]:
        raise ValueError(f"{' and '.join(refused)} cannot be had with a process_group")
    if smoothing and softcap is not None:
        raise ValueError(
            "label_smoothing cannot be had with a softcap, under which the mean of logits is no "
            f"logit of the weight's mean, got label_smoothing={smoothing} and softcap={softcap}"
        )
    column = None
    if class_weight is not None or smoothing:
        validate.check_head(hidden, weight, bias, options.get("head_dtype"))
    if class_weight is not None:
        validate.check_float("class_weight", class_weight)
        validate.check_same_shape("class_weight", class_weight, (weight.shape[0],), "(V,)")
        validate.check_device("class_weight", class_weight, "weight", weight)
        if class_weight.requires_grad:
            raise ValueError("class_weight must not require a gradient, which it does not get")
    if smoothing:  # before the head, to whose dW its own is then added in place
        column = mean_column(weight, bias, class_weight)
    names = ("lse",) if smoothing or options.get("z_loss") else ()
    wanted = tuple(dict.fromkeys(("logps", *names, *outputs)))
    stats, _ = token_stats(hidden, weight, targets, bias, (_CROSS_ENTROPY, options), wanted)
    terms, logits, how = _CROSS_ENTROPY.split(options)
    targets = scored_targets(targets, how)
    scored, lse, mean = targets != how.ignore_index, stats.get("lse"), None
    if column is not None:
        mean = mean_logits(torch.where(scored[..., None], hidden, 0), column)
        by_row = row_scale(options)
        mean = mean * (logits.logit_scale if by_row is None else torch.where(scored, by_row, 0))
    losses, weights = class_losses(
        stats["logps"], targets, scored, class_weight, terms.label_smoothing, lse, mean
    )
    z_losses = torch.zeros_like(losses)
    if terms.z_loss and lse is not None:
        z_losses = terms.z_loss * lse.square()
    return TokenLosses(losses, weights, z_losses, scored.to(losses.dtype), stats)


def class_losses(
    logps: Tensor,  # (...) of the targets
    targets: Tensor,  # (...)
    scored: Tensor,  # (...) bool
    class_weight: Tensor | None,  # (V,)
    smoothing: float,
    lse: Tensor | None,  # (...); this and the next only with smoothing
    mean: Tensor | None,  # (...) of each row's logits, times their class weights
) -> tuple[Tensor, Tensor]:
    """Losses (...) and what each counts in a mean, 0 where not scored."""
    weights, of_all = scored.to(logps.dtype), logps.new_ones(())
    if class_weight is not None:
        class_weight = class_weight.to(logps.dtype)
        weights = weights * class_weight[torch.where(scored, targets, 0)]
        of_all = class_weight.mean()
    losses = -logps * weights
    if smoothing:
        assert lse is not None and mean is not None
        uniform = torch.where(scored, of_all * lse - mean, 0.0)
        losses = (1 - smoothing) * losses + smoothing * uniform
    return losses, weights


def _reduced(losses: Tensor, weights: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = weights.sum()
    return losses.sum() / (torch.where(total == 0, 1, total) if reduction == "mean" else 1)
