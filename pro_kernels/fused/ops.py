"""The ops: what runs inside each, and its fake implementation; backends load when first used.

Sizes of outputs never depend on data: a call without a compact layout (``rows=None``) gets outputs
for all N tokens and drops the unscored ones inside. Gradients are wired in ``autograd.py``.

Legend: ``R`` rows of the hidden states, ``N`` tokens, ``H`` hidden, ``V`` vocabulary, ``S``
sequences, ``B`` prompts, ``n`` candidates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pro_kernels.backends.protocol import Candidates
from pro_kernels.fused import backward, head, matmul
from pro_kernels.fused.call import Call, acc_dtype
from pro_kernels.fused.columns import Kept
from pro_kernels.fused.gather_scatter import Inputs, empty_rows, in_huge_pages
from pro_kernels.fused.registry import fake, op
from pro_kernels.fused.target_columns import TargetColumns
from pro_kernels.layout import raise_bad_target
from pro_kernels.options import IGNORE_INDEX


@op()
def logps(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,), IGNORE_INDEX where not scored
    scale: Tensor | None,  # (N,) fp32, of each row's logits
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each target, log-sum-exp and entropy (or nothing) of each row, ``(N,)`` fp32."""
    check_range(targets, logits.shape[1])
    found = [
        call.kernels.logp(call.rows(z, targets[at]), call.entropy)
        for at, z in _times(logits, scale)
    ]
    parts: Any = found[0] if len(found) == 1 else [
        None if x[0] is None else torch.cat(x) for x in zip(*found, strict=True)
    ]  # fmt: skip
    return *parts[:2], parts[1].new_empty(0) if parts[2] is None else parts[2]


@fake(logps)
def _(logits, targets, scale, call):
    out = logits.new_empty(targets.shape, dtype=acc_dtype(logits.dtype))
    return out, torch.empty_like(out), out.new_empty(out.shape if call.entropy else 0)


@op()
def logits_grad(
    logits: Tensor,  # (N, V)
    lse: Tensor,  # (N,)
    targets: Tensor,  # (N,)
    weights: Tensor,  # (N,) upstream gradient of each log-prob
    entropy: Tensor | None,  # (N,)
    entropy_weights: Tensor | None,  # (N,) upstream gradient of each entropy
    scale: Tensor | None,  # (N,)
    call: Call,
) -> Tensor:
    """Gradient with respect to the logits; rows that are not scored become 0 without being read."""
    rows = (lse, targets, weights, entropy, entropy_weights, scale)
    return _logits_grad(logits, *rows, call, out=None)


@fake(logits_grad)
def _(logits, lse, targets, weights, entropy, entropy_weights, scale, call):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@op(mutates_args=("logits",))
def logits_grad_(
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    weights: Tensor,
    entropy: Tensor | None,
    entropy_weights: Tensor | None,
    scale: Tensor | None,
    call: Call,
) -> None:
    """``logits_grad`` written over the logits."""
    rows = (lse, targets, weights, entropy, entropy_weights, scale)
    _logits_grad(logits, *rows, call, out=logits)
    # Kernels write through pointers, which autograd does not see; it must find logits that another
    # node saved, or a second backward of this one, changed.
    if not logits.is_inference():
        torch.autograd.graph.increment_version(logits)


@fake(logits_grad_)
def _(logits, lse, targets, weights, entropy, entropy_weights, scale, call):
    return None


def _logits_grad(logits, lse, targets, weights, entropy, by, scale, call, out):
    if scale is None:
        both = None if entropy is None else (entropy, by)
        rows = call.rows(logits, targets)
        return call.kernels.logits_grad(rows, lse, weights, out=out, entropy=both)
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = lse, targets, weights * scale, entropy, None if by is None else by * scale
    for at, z in _times(logits, scale):
        some = (None if x is None else x[at] for x in rows)
        out[at] = _logits_grad(z, *some, None, call, out=z)
    return out


def _times(logits: Tensor, scale: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """``scale`` times the logits of some rows at a time, in fp32 (fp64); themselves without one.

    Each in the memory of those before.
    """
    if scale is None:
        yield slice(None), logits
        return
    n, vocab = logits.shape
    step = max(1, matmul.workspace(logits.device.type) // (scale.itemsize * vocab))
    memory = empty_rows(scale, min(n, step), vocab, scale.dtype)
    for i in range(0, max(1, n), step):
        at = slice(i, i + step)
        yield at, torch.mul(logits[at], scale[at, None], out=memory[: min(n, i + step) - i])


@op()
def ranking(
    logps: Tensor,  # (N,) fp32
    offsets: Tensor,  # (S + 1,)
    lengths: Tensor,  # (S,)
    order: Tensor,  # (B, n)
    rewards: Tensor | None,  # (B, n)
    sft_rank: Tensor,  # (B,)
    weights: Tensor,  # (B,)
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss terms (B, n), sequence sums (S,) and ``d loss / d logps`` (N,); see the backends."""
    return call.rank(logps, Candidates(offsets, lengths, order, rewards, sft_rank, weights))


@fake(ranking)
def _(logps, offsets, lengths, order, rewards, sft_rank, weights, call):
    return (
        logps.new_empty(order.shape),
        logps.new_empty(lengths.shape),
        logps.new_empty(logps.shape),
    )


# ``head``, but the module has that name.
@op()
def head_forward(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,); None: token i is row i, unscored ones are dropped here
    targets: Tensor,  # (N,)
    scale: Tensor | None,  # (R,) fp32, of each row's logits
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of the scored rows, and what the backward needs.

    Returns ``values`` (sum of sizes, N), which ``call.outputs`` names: "logps", "entropy", "lse"
    and, without gradient, "log_sum_sq_probs", "mean_logits", and of the ``call.top`` most likely
    tokens "top_logps" and 1 + their "top_ids". Then ``head.Saved``, whose rows are in compact
    order.
    """
    with _autocast_off(hidden):
        if not call.targets_checked:
            check_range(targets, call.shard.vocab if call.shard else call.vocab)
        values, saved = _head_buffers(hidden, targets, call)
        live, tokens = _compact(rows, targets)
        given = _inputs(call, hidden, weight, bias, tokens, scale)
        n = given.tokens
        compact = values if live is None else values.new_empty(values.shape[0], n)
        head.forward(given, compact, saved._replace(stats=saved.stats[:, :n]))
        if live is not None:
            values.zero_().index_copy_(1, live, compact)
            saved.filter.spread_dropped(live)
        return values, *saved.tensors


@fake(head_forward)
def _(hidden, weight, bias, rows, targets, scale, call):
    values, saved = _head_buffers(hidden, targets, call)
    return values, *saved.tensors


@op()
def head_backward(
    grad: Tensor,  # (N,) upstream gradient of each log-prob
    entropy_grad: Tensor | None,  # (N,) of each entropy
    lse_grad: Tensor | None,  # (N,) of each log-sum-exp
    hidden: Tensor,  # (R, H)
    weight: Tensor | None,  # (V, H); None where all of dZ0 was retained
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,)
    targets: Tensor,  # (N,)
    scale: Tensor | None,  # (R,)
    saved: Sequence[Tensor],  # of ``head_forward``
    needs: Sequence[bool],  # whether dHidden, dW and dbias are wanted
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """DHidden (R, H), dW (V, H) and dbias (V,); those not needed are empty."""
    with _autocast_off(hidden):
        grads = _grad_buffers(hidden, call, needs)
        live, tokens = _compact(rows, targets)
        again = call.needs_head_again(tokens[0].shape[0])
        given = _inputs(call, hidden, *((weight, bias) if again else (None, None)), tokens, scale)
        every = slice(None) if live is None else live
        w, by, of_lse = upstream = [
            None if x is None else x.to(call.acc_dtype)[every]
            for x in (grad, entropy_grad, lse_grad)
        ]
        kept = head.Saved.of(saved, call)
        kept = kept._replace(stats=kept.stats[:, : given.tokens])
        wanted = [x if need else None for x, need in zip(grads, needs, strict=True)]
        columns = None
        if call.lse:
            assert weight is not None and w is not None
            columns = TargetColumns.of(given, weight, kept, upstream)
            w = w if of_lse is None else w - of_lse
            if wanted[2] is not None:  # its terms are rounded once
                wanted[2] = wanted[2].to(call.acc_dtype)
        backward.backward(given, kept, (w, by), columns, wanted)
        if columns is not None:
            columns.add_to(*wanted[1:])
        if wanted[2] is not None and wanted[2] is not grads[2]:
            grads[2].copy_(wanted[2])
        return grads


@fake(head_backward)
def _(grad, entropy_grad, lse_grad, hidden, weight, bias, rows, targets, scale, saved, needs, call):
    return _grad_buffers(hidden, call, needs)


@op()
def linear_pro(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,)
    targets: Tensor,  # (N,)
    scale: Tensor | None,  # (R,)
    candidates: Sequence[Tensor | None],  # of ``call.Candidates``
    need_bias: bool,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tier T2: loss terms (B, n), sequence sums (S,), and dHidden, dW, dbias of the loss.

    Then the row weights (N,) and, with a filter, ``dropped`` of ``columns.Kept``.
    """
    with _autocast_off(hidden):
        if not call.targets_checked:
            check_range(targets, call.vocab)
        needs = call.plan.need_hidden, True, need_bias
        grads = _grad_buffers(hidden, call, needs, call.acc_dtype)
        ranked = Candidates(*candidates)  # type: ignore[arg-type]
        live, tokens = _compact(rows, targets)
        given = _inputs(call, hidden, weight, bias, tokens, scale)
        sizes = backward.chunk_tokens(call)
        if live is not None:  # dense: the token list shrinks, and the offsets with it
            before = torch.nn.functional.pad((targets >= 0).cumsum(0), (1, 0))
            ends = torch.tensor([0, *sizes], device=before.device).cumsum(0)
            ranked = ranked._replace(offsets=before[ranked.offsets])
            sizes = before[ends].diff().tolist()
        chunks = len(sizes), max(sizes, default=0)
        kept = Kept.empty(call.grad_filter, *chunks, call.vocab, targets.shape[0], hidden)
        out = [x.zero_() if x.numel() else None for x in grads]
        terms, sums, row_weights = backward.pro_forward(given, ranked, sizes, out, kept)
        if live is not None:
            compact, row_weights = row_weights, row_weights.new_zeros(targets.shape[0])
            row_weights.index_copy_(0, live, compact)
            kept.spread_dropped(live)
        d_hidden, d_weight, d_bias = grads
        # dbias is small: it stays in fp32 until it is scaled, and is rounded once.
        made = (d_hidden, d_weight.to(call.weight_dtype), d_bias)
        return terms, sums, *made, row_weights, kept.dropped


@fake(linear_pro)
def _(hidden, weight, bias, rows, targets, scale, candidates, need_bias, call):
    acc, n = call.acc_dtype, targets.shape[0]
    needs = call.plan.need_hidden, True, need_bias
    d_hidden, d_weight, d_bias = _grad_buffers(hidden, call, needs)
    ranked = Candidates(*candidates)
    return (
        hidden.new_empty(ranked.order.shape, dtype=acc),
        hidden.new_empty(ranked.lengths.shape, dtype=acc),
        *(d_hidden, d_weight, d_bias.to(acc)),
        hidden.new_empty(n, dtype=acc),
        hidden.new_empty((4, 0 if call.grad_filter is None else n), dtype=torch.float32),
    )


@op()
def scaled(x: Tensor, by: Tensor, call: Call) -> Tensor:
    """``by * x`` in x's dtype, multiplied in fp32 (fp64): neither factor is rounded before."""
    acc = acc_dtype(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat, source = out.view(-1), x.reshape(-1)
    for i in range(0, flat.numel(), 1 << 22):
        at = slice(i, i + (1 << 22))
        flat[at] = source[at].to(acc) * by.to(acc)
    return out


@fake(scaled)
def _(x, by, call):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check_range(targets: Tensor, vocab: int) -> None:
    """Raise ValueError for a target outside [0, V) that is not IGNORE_INDEX.

    On a GPU the check is queued with ``torch._assert_async`` (as ``cross_entropy`` does with its
    device-side assertion): nothing waits, and the error surfaces at the next synchronisation.
    """
    on_cpu = targets.device.type == "cpu"
    if on_cpu and targets.numel():
        low, high = map(int, targets.aminmax())
        if low >= 0 and high < vocab:
            return
    bad = (targets >= vocab) | ((targets < 0) & (targets != IGNORE_INDEX))
    if on_cpu:
        if bad.any():
            raise_bad_target(targets, int(bad.nonzero()[0]), vocab, IGNORE_INDEX)
    elif targets.device.type != "meta":
        torch._assert_async(~bad.any(), f"targets must lie in [0, {vocab})")


def _head_buffers(hidden: Tensor, targets: Tensor, call: Call) -> tuple[Tensor, head.Saved]:
    n, plan, acc = targets.shape[0], call.plan, call.acc_dtype
    chunks = -(-plan.retained // plan.chunk) - (-n // plan.chunk) + 1
    statistics = 1 + call.entropy + call.lse + call.rounds_logits
    kept_dtype = call.logits_dtype if call.entropy else call.compute_dtype
    side = n if plan.need_hidden and not call.entropy else 0
    side_dtype = matmul.sums_dtype(call.compute_dtype, hidden.device.type)
    return hidden.new_empty((sum(call.sizes), n), dtype=acc), head.Saved(
        hidden.new_empty((statistics, n), dtype=acc),
        empty_rows(hidden, plan.retained, call.vocab, kept_dtype),
        hidden.new_empty((side, hidden.shape[1]), dtype=side_dtype),
        Kept.empty(call.grad_filter, chunks, min(n, plan.chunk), call.vocab, n, hidden),
    )


def _grad_buffers(
    hidden: Tensor, call: Call, needs: Sequence[bool], weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    width, dtype = hidden.shape[1], weight_dtype or call.weight_dtype
    need_hidden, need_weight, need_bias = needs
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0, width)),
        in_huge_pages(hidden.new_empty((call.vocab if need_weight else 0, width), dtype=dtype)),
        hidden.new_empty(call.vocab if need_bias else 0, dtype=dtype),
    )


def _compact(rows: Tensor | None, targets: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """Positions of live tokens (None: all of them); their rows and their targets."""
    if rows is not None:
        return None, (rows, targets)
    live = (targets >= 0).nonzero()[:, 0]
    return live, (live, targets[live])


def _inputs(
    call: Call,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tokens: tuple[Tensor, Tensor],  # rows and targets
    scale: Tensor | None,  # of each row
) -> Inputs:
    """Weight and bias in the dtype of the matmuls, the scale of each token."""
    w: Any = None if weight is None else weight.to(call.compute_dtype)
    b = None if bias is None else bias.to(call.compute_dtype)
    return Inputs(call, hidden, w, b, *tokens, None if scale is None else scale[tokens[0]])


def _autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    """Dtypes are chosen before the op; autocast must not change them again inside."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
