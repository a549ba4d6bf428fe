"""The autograd Functions: each pairs a forward op with its backward op.

A Function gets its tensors first and the ``Call`` last, so every backward returns one gradient per
tensor and trailing ``None``s. Gradients are of first order: ``create_graph=True`` is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pro_kernels.fused import ops, shards
from pro_kernels.fused.call import Call
from pro_kernels.fused.registry import run
from pro_kernels.layout import by_token


def first_order(backward: Callable) -> Callable:
    """A backward that has none itself, and says so.

    ``once_differentiable`` alone is silent where the upstream gradient is a constant: of a penalty
    on gradients that is added to the loss, nothing would be left.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx, *grads):  # noqa: ANN001, ANN002, ANN202
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "pro_kernels has gradients of first order only (create_graph=True was asked for); "
                "compute the loss from plain logits for a gradient of a gradient"
            )
        return once(ctx, *grads)

    return checked


class Head(torch.autograd.Function):
    """From hidden states and head weight: log-probs (N,) of the scored rows, differentiable.

    Then ``dropped`` (3, N) of ``columns.Kept``, or nothing of it, and the further outputs (N,) that
    the call names, of which entropies and log-sum-exps are differentiable too.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, call: Call):  # noqa: D102
        values, saved = _head_forward(ctx, hidden, weight, bias, rows, targets, call)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        dropped, *others = saved[-1], *(values[i] for i in range(1, len(call.outputs)))
        named = zip(call.outputs[1:], others, strict=True)
        ctx.mark_non_differentiable(
            dropped, *(x for name, x in named if name not in ("entropy", "lse"))
        )
        return values[0], dropped, *others

    @staticmethod
    @first_order
    def backward(ctx, grad, _dropped, *others):  # noqa: D102
        named = dict(zip(ctx.call.outputs[1:], others, strict=True))
        more = [named.get(name) for name in ("entropy", "lse")]
        if all(x is None for x in (grad, *more)):
            return (None,) * 6
        saved = ctx.saved_tensors
        if grad is None:
            grad = saved[5].new_zeros(saved[4].shape)
        grads = _head_backward(ctx, (grad, *more), saved)
        return *_needed(grads, ctx.needs_input_grad), None, None, None


class Logps(torch.autograd.Function):
    """Log-probs ``(N,)`` of the targets from logits ``(N, V)``; entropies (N,), or none, (0,)."""

    @staticmethod
    def forward(ctx, logits, targets, inplace: bool, call: Call):  # noqa: D102
        logps, lse, entropies = run(ops.logps, logits, targets, call)
        ctx.save_for_backward(logits, lse, targets, entropies)
        ctx.call, ctx.inplace = call, inplace
        ctx.set_materialize_grads(False)
        return logps, entropies

    @staticmethod
    @first_order
    def backward(ctx, grad, entropy_grad):  # noqa: D102
        if not ctx.call.entropy:
            entropy_grad = None
        if grad is None and entropy_grad is None:
            return (None,) * 4
        logits, lse, targets, entropies = ctx.saved_tensors
        weights = torch.zeros_like(lse) if grad is None else grad.contiguous().to(lse.dtype)
        by = None if entropy_grad is None else entropy_grad.contiguous().to(lse.dtype)
        args = (logits, lse, targets, weights, None if by is None else entropies, by, ctx.call)
        if not ctx.inplace:
            return run(ops.logits_grad, *args), None, None, None
        run(ops.logits_grad_, *args)
        return logits, None, None, None


class Ranking(torch.autograd.Function):
    """Weighted sum of the loss terms and the terms, from log-probs; sequence sums, row weights."""

    @staticmethod
    def forward(  # noqa: D102
        ctx, logps, offsets, lengths, order, rewards, sft_rank, weights, call: Call
    ):
        candidates = (offsets, lengths, order, rewards, sft_rank, weights)
        terms, sums, row_weights = run(ops.ranking, logps, *candidates, call)
        ctx.save_for_backward(row_weights)
        return _loss(ctx, weights, terms, call, sums, row_weights)

    @staticmethod
    @first_order
    def backward(ctx, grad, *_others):  # noqa: D102
        if grad is None:
            return (None,) * 8
        (row_weights,) = ctx.saved_tensors
        return grad.to(row_weights.dtype) * row_weights, *[None] * 7


class SequenceSums(torch.autograd.Function):
    """Log-probs and tokens of each candidate over the ranks of ``group``: ``(B n,)`` each.

    Every rank makes the same loss of them, so its gradient is that of its own tokens as it stands:
    the backward asks no other rank.
    """

    @staticmethod
    def forward(ctx, logps, offsets, lengths, sequences, group, call: Call):  # noqa: D102
        none = offsets.new_empty(0)  # no prompts: sums are all that is made
        candidates = (offsets, lengths, none.view(0, 1), None, none, logps.new_empty(0))
        _, own, _ = run(ops.ranking, logps, *candidates, call)
        at = sequences.clamp_min(0)
        parts = torch.stack([own[at], lengths[at].to(own.dtype)])
        sums, counts = shards.sum_(torch.where(sequences >= 0, parts, 0.0), group).flatten(1)
        counts = counts.long()
        ctx.save_for_backward(offsets, sequences)
        ctx.tokens = logps.shape[0]
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return sums, counts

    @staticmethod
    @first_order
    def backward(ctx, grad, _counts):  # noqa: D102
        if grad is None:
            return (None,) * 6
        return by_token(grad, *ctx.saved_tensors, ctx.tokens), *[None] * 5


class LinearPRO(torch.autograd.Function):
    """The scalar loss from hidden states; in tier T2 its gradients are made in the forward.

    Head and ranking in one: each Function and its node cost a small batch much. Outputs as of
    ``Ranking``, then ``dropped`` as of ``Head``.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx, hidden, weight, bias, rows, targets,
        offsets, lengths, order, rewards, sft_rank, weights, call: Call,
    ):  # fmt: skip
        tensors = (hidden, weight, bias, rows, targets)
        candidates = (offsets, lengths, order, rewards, sft_rank, weights)
        ctx.call = call
        if call.plan.tier == "T2":
            need_bias = bias is not None and ctx.needs_input_grad[2]
            terms, sums, *grads, row_weights, dropped = run(
                ops.linear_pro, *tensors, candidates, need_bias, call
            )
            ctx.save_for_backward(*grads)
        else:
            values, saved = _head_forward(ctx, *tensors, call)
            terms, sums, row_weights = run(ops.ranking, values[0], *candidates, call)
            ctx.save_for_backward(*saved, row_weights)
            dropped = saved[-1]
        return _loss(ctx, weights, terms, call, sums, row_weights, dropped)

    @staticmethod
    @first_order
    def backward(ctx, grad, *_others):  # noqa: D102
        call = ctx.call
        if grad is None:
            return (None,) * 12
        if call.plan.tier == "T2":
            # Out of place: a second backward through a retained graph must find them unscaled.
            grads = [run(ops.scaled, g, grad, call) for g in ctx.saved_tensors]
            grads[2] = grads[2].to(call.weight_dtype)  # dbias, in fp32 so far
        else:
            *saved, row_weights = ctx.saved_tensors
            grad = grad.to(row_weights.dtype) * row_weights
            grads = _head_backward(ctx, (grad, None, None), saved)
        return *_needed(grads, ctx.needs_input_grad), *[None] * 9


def _head_forward(
    ctx, hidden, weight, bias, rows, targets, call: Call
) -> tuple[Tensor, list[Tensor | None]]:
    """``values`` of ``head_forward``, and what ``_head_backward`` is to find saved."""
    values, *made = run(ops.head_forward, hidden, weight, bias, rows, targets, call)
    ctx.call = call
    # All of dZ0 at hand: the backward does without the weight, which may be re-sharded by then.
    again = call.needs_head_again(targets.shape[0]) or call.lse
    head = (weight, bias) if again else (None, None)
    return values, [hidden, *head, rows, targets, *made]


def _head_backward(
    ctx, grads: Sequence[Tensor | None], saved: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias from those of log-probs, entropies, log-sum-exps."""
    upstream = (None if x is None else x.contiguous() for x in grads)
    needs = list(ctx.needs_input_grad[:3])
    return run(ops.head_backward, *upstream, *saved[:5], list(saved[5:]), needs, ctx.call)


def _loss(ctx, weights: Tensor, terms: Tensor, call: Call, *others: Tensor) -> tuple[Tensor, ...]:
    """The loss, its terms ``(n,)`` as sums over prompts, and the others, without a gradient."""
    # Not a matmul: autocast would round it.
    per_rank = (weights.unsqueeze(1) * terms).sum(0)
    if call.final_dtype is not None:
        per_rank = per_rank.to(call.final_dtype)
    ctx.mark_non_differentiable(per_rank, *others)
    ctx.set_materialize_grads(False)
    return per_rank.sum(), per_rank, *others


def _needed(grads, needs) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(grads, needs[:3], strict=True))
