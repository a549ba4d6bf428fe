"""The autograd Functions: each pairs a forward op with its backward op.

A Function gets its tensors first and one frozen call object last, so every backward returns one
gradient per tensor and trailing ``None``s. Gradients are of first order: the backward of the
backward is refused by PyTorch with its own message (``once_differentiable``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pro_kernels import ops, shards
from pro_kernels.options import LogitOptions, RankingOptions
from pro_kernels.planner import Plan
from pro_kernels.shards import Shard


@dataclass(frozen=True)
class HeadCall:
    """What a call through the head is made of besides its tensors."""

    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    options: LogitOptions
    backend: str
    plan: Plan
    shared_rows: bool
    grad_filter: float | None = None
    shard: Shard | None = None

    def config(self) -> tuple:
        """What every op of the head takes, in the order of their schemas."""
        o = self.options
        return self.compute_dtype, self.logits_dtype, o.softcap, o.logit_scale, self.backend

    def sharding(self) -> dict[str, Any]:
        """What the ops of the head take of the shard."""
        if self.shard is None:
            return {}
        return {"group": self.shard.group, "first": self.shard.first}


def ranking_config(options: RankingOptions, backend: str) -> tuple:
    """The options in the order of the ops' schemas."""
    o = options
    return (
        o.length_normalize,
        o.tau,
        o.skip_ties,
        o.eps,
        o.sft_weight,
        o.sft_mean,
        o.top_k,
        o.single_sft,
        backend,
    )


class HeadLogps(torch.autograd.Function):
    """Log-probs ``(N,)`` of the scored rows from hidden states and head weight.

    Then ``dropped`` (3, N) of ``head.Kept``; empty without a filter.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, call: HeadCall):  # noqa: D102
        logps, made, dropped = _head_forward(ctx, hidden, weight, bias, rows, targets, call)
        ctx.save_for_backward(*made, dropped)
        ctx.mark_non_differentiable(dropped)
        ctx.set_materialize_grads(False)
        return logps, dropped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _dropped):  # noqa: D102
        if grad is None:
            return (None,) * 6
        grads = _head_backward(ctx, grad.contiguous(), ctx.saved_tensors)
        return *_needed(grads, ctx.needs_input_grad), None, None, None


class HeadStats(torch.autograd.Function):
    """Log-probs and entropies ``(N,)`` of the scored rows, both differentiable.

    Then (3, N) of ``ops.head_stats``, without a gradient; (0, N) unless asked for.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, call: HeadCall, extra: bool):  # noqa: D102
        plan = call.plan
        values, stats, logits = ops.direct(ops.head_stats, hidden, weight, targets)(
            hidden,
            weight,
            bias,
            rows,
            targets,
            *call.config(),
            plan.chunk,
            plan.retained,
            extra,
            budget=plan.budget,
        )
        ctx.save_for_backward(hidden, weight, bias, rows, targets, stats, logits)
        ctx.call = call
        more = values[2:]
        ctx.mark_non_differentiable(more)
        ctx.set_materialize_grads(False)
        return values[0], values[1], more

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, entropy_grad, _more):  # noqa: D102
        if grad is None and entropy_grad is None:
            return (None,) * 7
        call, saved = ctx.call, ctx.saved_tensors
        n = saved[4].shape
        grads = ops.direct(ops.head_stats_backward, *saved[:2])(
            saved[5].new_zeros(n) if grad is None else grad.contiguous(),
            None if entropy_grad is None else entropy_grad.contiguous(),
            *saved,
            *call.config(),
            call.plan.chunk,
            *ctx.needs_input_grad[:3],
            budget=call.plan.budget,
        )
        return *_needed(grads, ctx.needs_input_grad), *[None] * 4


class Logps(torch.autograd.Function):
    """Log-probs ``(N,)`` of the targets from logits ``(N, V)``; entropies (N,), or none, (0,)."""

    @staticmethod
    def forward(  # noqa: D102
        ctx, logits, targets, options: LogitOptions, backend: str, inplace: bool, entropy: bool
    ):
        config = (options.softcap, options.logit_scale, backend)
        logps, lse, entropies = ops.logps(logits, targets, *config, entropy)
        ctx.save_for_backward(logits, lse, targets, entropies)
        ctx.config = config
        ctx.inplace, ctx.entropy = inplace, entropy
        ctx.set_materialize_grads(False)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, entropy_grad):  # noqa: D102
        if not ctx.entropy:
            entropy_grad = None  # torch.compile fills in what is missing
        if grad is None and entropy_grad is None:
            return (None,) * 6
        logits, lse, targets, entropies = ctx.saved_tensors
        weights = torch.zeros_like(lse) if grad is None else grad.contiguous().to(lse.dtype)
        by = None if entropy_grad is None else entropy_grad.contiguous().to(lse.dtype)
        value = None if by is None else entropies
        args = (logits, lse, targets, weights, value, by, *ctx.config)
        if not ctx.inplace:
            return ops.logits_grad(*args), *[None] * 5
        ops.logits_grad_(*args)
        return logits, *[None] * 5


class Ranking(torch.autograd.Function):
    """Weighted sum of the loss terms and the terms, from log-probs; sequence sums, row weights."""

    @staticmethod
    def forward(  # noqa: D102
        ctx,
        logps,
        offsets,
        lengths,
        order,
        rewards,
        sft_rank,
        weights,
        options: RankingOptions,
        final_dtype,
        backend: str,
    ):
        terms, sums, row_weights = ops.ranking(
            logps,
            offsets,
            lengths,
            order,
            rewards,
            sft_rank,
            weights,
            *ranking_config(options, backend),
        )
        ctx.save_for_backward(row_weights)
        per_rank = _over_prompts(weights, terms, final_dtype)
        ctx.mark_non_differentiable(per_rank, sums, row_weights)
        ctx.set_materialize_grads(False)
        return per_rank.sum(), per_rank, sums, row_weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_others):  # noqa: D102
        if grad is None:
            return (None,) * 10
        (row_weights,) = ctx.saved_tensors
        return grad.to(row_weights.dtype) * row_weights, *[None] * 9


class SequenceSums(torch.autograd.Function):
    """Log-probs and tokens of each candidate over the ranks of ``group``: ``(B n,)`` each.

    Every rank makes the same loss of them, so its gradient is that of its own tokens as it stands:
    the backward asks no other rank.
    """

    @staticmethod
    def forward(ctx, logps, offsets, lengths, sequences, group, backend: str):  # noqa: D102
        none = offsets.new_empty(0)  # no prompts: sums are all that is made
        ranking = (offsets, lengths, none.view(0, 1), None, none, logps.new_empty(0))
        config = ranking_config(RankingOptions(), backend)
        _, own, _ = ops.direct(ops.ranking, logps, offsets)(logps, *ranking, *config)
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
    @once_differentiable
    def backward(ctx, grad, _counts):  # noqa: D102
        if grad is None:
            return (None,) * 6
        return by_token(grad, *ctx.saved_tensors, ctx.tokens), *[None] * 5


def by_token(values: Tensor, offsets: Tensor, sequences: Tensor, tokens: int) -> Tensor:
    """``(N,)`` from a value of each candidate, ``(B n,)``; ``offsets`` cover all tokens."""
    count = offsets.shape[0] - 1
    # Absent candidates write to one slot past the end: no boolean index, hence no device sync.
    slot = torch.where(sequences >= 0, sequences, count).flatten()
    per_sequence = values.new_zeros(count + 1).scatter_(0, slot, values)[:-1]
    return torch.repeat_interleave(per_sequence, offsets.diff(), output_size=tokens)


class LinearPRO(torch.autograd.Function):
    """The scalar loss from hidden states; in tier T2 its gradients are made in the forward.

    Head and ranking in one: each Function and its node cost a small batch much. Outputs as of
    ``Ranking``, then ``dropped`` as of ``HeadLogps``.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx,
        hidden,
        weight,
        bias,
        rows,
        targets,
        offsets,
        lengths,
        order,
        rewards,
        sft_rank,
        weights,
        prompt_tokens,
        options: RankingOptions,
        final_dtype,
        call: HeadCall,
    ):
        tensors = (hidden, weight, bias, rows, targets)
        ranking = (offsets, lengths, order, rewards, sft_rank, weights)
        config = ranking_config(options, call.backend)
        saved: Sequence[Tensor | None]
        if call.plan.tier == "T2":
            ctx.call, ctx.weight_dtype = call, weight.dtype
            need_bias = bias is not None and ctx.needs_input_grad[2]
            terms, sums, *saved, row_weights, dropped = _chunked_forward(
                tensors, ranking, prompt_tokens, config, call, need_bias
            )
        else:
            logps, made, dropped = _head_forward(ctx, *tensors, call)
            run = ops.direct(ops.ranking, logps, offsets)
            terms, sums, row_weights = run(logps, *ranking, *config)
            saved = [*made, dropped, row_weights]
        ctx.save_for_backward(*saved)
        per_rank = _over_prompts(weights, terms, final_dtype)
        ctx.mark_non_differentiable(per_rank, sums, row_weights, dropped)
        ctx.set_materialize_grads(False)
        return per_rank.sum(), per_rank, sums, row_weights, dropped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_others):  # noqa: D102
        if grad is None:
            return (None,) * 15
        if ctx.call.plan.tier == "T2":
            # Out of place: a second backward through a retained graph must find them unscaled.
            budget = ctx.call.plan.budget
            grads = [ops.scaled(g, grad, budget=budget) for g in ctx.saved_tensors]
            grads[2] = grads[2].to(ctx.weight_dtype)  # dbias, in fp32 so far
        else:
            *saved, row_weights = ctx.saved_tensors
            grads = _head_backward(ctx, grad.to(row_weights.dtype) * row_weights, saved)
        return *_needed(grads, ctx.needs_input_grad), *[None] * 12


def _chunked_forward(
    tensors: tuple[Tensor | None, ...],  # as of ``LinearPRO``, up to the targets
    ranking: tuple[Tensor | None, ...],  # from there to the weights
    prompt_tokens: list[int],
    config: tuple,
    call: HeadCall,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """Tier T2: terms, sums, the three gradients, row weights and ``dropped``."""
    return ops.linear_pro(
        *tensors,
        *ranking,
        prompt_tokens,
        call.plan.prompt_chunks,
        call.compute_dtype,
        call.options.softcap,
        call.options.logit_scale,
        *config,
        call.shared_rows,
        call.plan.need_hidden,
        need_bias,
        call.grad_filter,
        budget=call.plan.budget,
    )


def _head_forward(
    ctx, hidden, weight, bias, rows, targets, call: HeadCall
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """Log-probs, and what ``_head_backward`` is to find saved: a list, then ``dropped``."""
    plan = call.plan
    logps, *made, dropped = ops.direct(ops.head_logps, hidden, weight, targets)(
        hidden,
        weight,
        bias,
        rows,
        targets,
        *call.config(),
        plan.chunk,
        plan.retained,
        plan.need_hidden,
        call.grad_filter,
        budget=plan.budget,
        score_only=plan.tier == "T0",
        **call.sharding(),
        **({} if call.shard is None else {"vocab": call.shard.vocab}),
    )
    ctx.call, ctx.vocab, ctx.weight_dtype = call, weight.shape[0], weight.dtype
    # All of dZ0 at hand: the backward does without the weight, which may be re-sharded by then.
    whole = plan.retained >= targets.shape[0] or not plan.need_weight
    head = (None, None) if whole else (weight, bias)
    return logps, [hidden, *head, rows, targets, *made], dropped


def _head_backward(ctx, grad: Tensor, saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias from that of each log-prob; those not needed empty."""
    call = ctx.call
    return ops.direct(ops.head_backward, grad, saved[0])(
        grad,
        *saved,
        call.grad_filter,
        *call.config(),
        call.plan.chunk,
        ctx.vocab,
        ctx.weight_dtype,
        call.shared_rows,
        *ctx.needs_input_grad[:3],
        budget=call.plan.budget,
        **call.sharding(),
    )


def _over_prompts(weights: Tensor, terms: Tensor, final_dtype: torch.dtype | None) -> Tensor:
    """Weighted sums over prompts, ``(n,)``. Not a matmul: autocast would round it."""
    total = (weights.unsqueeze(1) * terms).sum(0)
    return total if final_dtype is None else total.to(final_dtype)


def _needed(grads, needs) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(grads, needs[:3], strict=True))
