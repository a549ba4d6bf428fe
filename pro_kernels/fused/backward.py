"""The gradients of hidden states, weight and bias from what ``head.forward`` left.

Its formulas are in ``head.py``. Legend: ``N`` scored rows, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pro_kernels.fused import matmul
from pro_kernels.fused.call import Call, acc_dtype
from pro_kernels.fused.column_groups import Groups
from pro_kernels.fused.columns import functions
from pro_kernels.fused.gather_scatter import (
    Rows,
    empty_rows,
    operand_dtype,
    rows_of,
    scatter_rows,
    weighted_rows,
)
from pro_kernels.fused.head import Saved, chunks_of, clear_targets
from pro_kernels.fused.target_columns import TargetColumns

# dHidden (R, H), dW (V, H) and dbias (V,); None of what is not wanted.
Gradients = Sequence[Tensor | None]


def backward(
    call: Call,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Rows,
    targets: Tensor,
    saved: Saved,
    upstream: Sequence[Tensor | None],  # (N,) gradient of each log-prob; of each entropy
    columns: TargetColumns | None,  # that dZ0 leaves out
    out: Gradients,  # to fill
) -> None:
    """The gradients, but for what ``columns`` add to dW and dbias.

    Rows that were not retained are computed again, a block of columns a time. By columns, because
    then each dW block is one matmul over all rows: the fp32 sum over rows stays inside the matmul
    and no fp32 copy of dW is needed.
    """
    w, n = upstream[0], len(rows)
    assert w is not None
    d_hidden, d_weight, d_bias = out
    if d_hidden is not None:
        _hidden_grad(call, saved.side[:n], w, rows, columns, d_hidden)
        if call.shard is not None:
            call.shard.sum_(d_hidden)
    if d_weight is None and d_bias is None:
        return
    xw = weighted_rows(call, hidden, rows, w)
    retained = min(saved.kept.shape[0], n)
    if call.grad_filter is not None:
        _kept_backward(call, hidden, weight, bias, rows, targets, saved, (w, xw), out)
        return
    if retained == n:
        blocks: Iterator[tuple[slice, Tensor]] = iter([(slice(None), saved.kept[:n])])
    else:
        size = call.compute_dtype.itemsize
        block = max(64, call.plan.chunk * call.vocab // n * size // call.logits_dtype.itemsize)
        assert weight is not None
        x = rows_of(call, hidden, rows[retained:]).to(operand_dtype(call, hidden))
        again = x, rows[retained:].late(call)
        blocks = _blocks(call, weight, bias, again, targets, saved, block)
    for cols, dz in blocks:
        if d_weight is not None:
            matmul.weight_grad(dz, xw, d_weight[cols], accumulate=False)
        if d_bias is not None:
            d_bias[cols] = bias_grad(dz, w)


def backward_of_both(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    targets: Tensor,
    saved: Saved,
    upstream: Sequence[Tensor | None],
    columns: TargetColumns | None,
    out: Gradients,
) -> None:
    """The same where the entropy has a gradient too.

    dZ is divided by a power of two of each row, which the sides get back: so it keeps the range of
    probabilities whatever the upstream gradient is, and fp16 does not underflow. The kept logits
    stay as they are, for a second backward.
    """
    d_hidden, d_weight, d_bias = out
    n, vocab, chunk = len(rows), call.vocab, call.plan.chunk
    retained = min(saved.kept.shape[0], n)
    scale = _powers_of_two(*upstream)
    scaled = [None if x is None else x / scale for x in upstream]
    block = vocab if chunk >= n else max(64, chunk * vocab // n // 64 * 64)
    again = None
    if retained < n:
        x = rows_of(call, hidden, rows[retained:]).to(operand_dtype(call, hidden))
        again = x, rows[retained:].late(call)
    if d_weight is not None:
        xw = weighted_rows(call, hidden, rows, scale)
    side = None
    if d_hidden is not None and block < vocab:  # a sum over blocks
        side = hidden.new_zeros((n, hidden.shape[1]), dtype=acc_dtype(call.logits_dtype))
    for cols, dz in _blocks(call, weight, bias, again, targets, saved, block, scaled):
        dz = dz.to(call.compute_dtype)
        if d_hidden is not None:
            part = matmul.hidden_grad(dz, weight[cols])
            side = part if side is None else side.add_(part)
        if d_weight is not None:
            matmul.weight_grad(dz, xw, d_weight[cols], accumulate=False)
        if d_bias is not None:
            d_bias[cols] = bias_grad(dz, scale)
    if d_hidden is not None and side is not None:
        _hidden_grad(call, side, scale, rows, columns, d_hidden)


def _hidden_grad(
    call: Call,
    side: Tensor,
    weights: Tensor,
    rows: Rows,
    columns: TargetColumns | None,
    out: Tensor,
) -> None:
    """``weights * side``, and what ``columns`` add, as (R, H)."""
    if columns is not None:
        side, weights = columns.hidden_side(side, weights), torch.ones_like(weights)
    scatter_rows(call, side, weights, rows, out.zero_())


def _blocks(
    call: Call,
    weight: Tensor,
    bias: Tensor | None,
    # Hidden states of the rows that were not retained, and what scales their logits.
    again: tuple[Tensor, Tensor | None] | None,
    targets: Tensor,
    saved: Saved,
    block: int,  # columns
    upstream: Sequence[Tensor | None] | None = None,  # None: dZ0
) -> Iterator[tuple[slice, Tensor]]:
    """DZ of all rows by blocks of columns: from what was kept, the others computed again."""
    n, vocab = targets.shape[0], call.vocab
    retained = min(saved.kept.shape[0], n)
    weights, by = (None, None) if upstream is None else upstream
    # Logits in the dtype they had: one rounded differently would no longer fit its lse.
    buffer = empty_rows(saved.kept, n, min(block, vocab), call.logits_dtype)

    def gradient(z: Tensor, at: slice, first: int, out: Tensor) -> None:
        call.kernels.logits_grad(
            z,
            saved.stats[0, at],
            targets[at],
            None if weights is None else weights[at],
            target_logits=saved.exact(call, at),
            first_column=first + (call.shard.first if call.shard else 0),
            options=call.logits,
            out=out,
            entropy=None if by is None else (saved.stats[1, at], by[at]),
        )
        if call.lse:
            clear_targets(call, out, targets[at], first)

    for first in range(0, vocab, block):
        cols = slice(first, min(first + block, vocab))
        dz = buffer[:, : cols.stop - first]
        kept = saved.kept[:retained, cols]
        if not call.entropy:
            dz[:retained] = kept
        elif retained:
            gradient(kept, slice(0, retained), first, dz[:retained])
        if again is not None:
            z, (x, late) = dz[retained:], again
            matmul.logits_into(z, x, weight[cols], None if bias is None else bias[cols], late)
            gradient(z, slice(retained, n), first, z)
        yield cols, dz


def _kept_backward(
    call: Call,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Rows,
    targets: Tensor,
    saved: Saved,
    weighted: tuple[Tensor, Tensor],  # the row weights, and X times them
    out: Gradients,
) -> None:
    """DW and dbias of the columns that each chunk kept."""
    n = len(rows)
    chunks = chunks_of(n, call.plan.chunk, min(saved.kept.shape[0], n))
    sums = [_sum_for(x, len(chunks) > 1) for x in out[1:]]
    w, xw = weighted
    if not n:  # no chunk writes into them
        for total in sums:
            if total is not None:
                total.zero_()
    for i, (start, stop) in enumerate(chunks):
        at = slice(start, stop)
        groups = saved.filter.of(i, at)
        if start < saved.kept.shape[0]:
            dz = saved.kept[at]
        else:
            assert weight is not None
            dz = _kept_again(call, hidden, weight, bias, rows[at], targets[at], saved, at, groups)
        add_columns(call, groups, dz, xw[at], w[at], sums, accumulate=i > 0)
    for grad, total in zip(out[1:], sums, strict=True):
        if grad is not None and total is not None and total is not grad:
            grad.copy_(total)


def _kept_again(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,  # of a chunk that was not retained
    targets: Tensor,
    saved: Saved,
    at: slice,
    groups: Groups | None,
) -> Tensor:
    """The chunk's dZ0, compact, computed again group by group."""
    x, late = rows_of(call, hidden, rows), rows.late(call)
    widest = call.vocab if groups is None else groups.widest
    dz = empty_rows(saved.kept, len(rows), widest, call.logits_dtype)
    exact, lse = saved.exact(call, at), saved.stats[0, at]
    every: tuple[Any, None] = (slice(None), None)
    for some, columns in [every] if groups is None else groups:
        x_some, t = x[some], targets[some]
        z = dz
        if columns is not None:
            z = empty_rows(saved.kept, len(some), columns.shape[0], call.logits_dtype)
            t = torch.searchsorted(columns, t.to(columns.dtype))
        matmul.logits_into(
            z, x_some, _take(weight, columns), None if bias is None else _take(bias, columns),
            None if late is None else late[some],
        )  # fmt: skip
        call.kernels.logits_grad(
            z, lse[some], t, None, target_logits=None if exact is None else exact[some],
            options=call.logits, out=z,
        )  # fmt: skip
        if call.lse:
            clear_targets(call, z, t)
        if z is not dz:
            dz[:, : z.shape[1]].index_copy_(0, some, z)
    return dz.to(call.compute_dtype)


def add_columns(
    call: Call,
    groups: Groups | None,  # None: all columns
    dz: Tensor,  # (rows, V), compact
    xw: Tensor,  # (rows, H)
    weights: Tensor,  # (rows,)
    sums: Sequence[Tensor | None],  # dW (V, H) and dbias (V,), in fp32 or wider to be added to
    accumulate: bool,
) -> None:
    """A chunk's dW and dbias, of the columns that it kept."""
    d_weight, d_bias = sums
    if d_weight is not None and groups is None:
        matmul.weight_grad(dz, xw, d_weight, accumulate)
    elif d_weight is not None:
        functions(call, dz.device).weight_grad(dz, groups, xw, d_weight, accumulate)
    if d_bias is None:
        return
    if not accumulate:
        d_bias.zero_()
    if groups is None:
        d_bias += bias_grad(dz, weights).to(d_bias.dtype)
    for rows, columns in groups or ():
        part = bias_grad(dz[:, : columns.shape[0]].index_select(0, rows), weights[rows])
        d_bias.index_add_(0, columns, part.to(d_bias.dtype))


def bias_grad(dz: Tensor, weights: Tensor) -> Tensor:
    """``dz^T w`` summed in fp32."""
    out = weights.new_empty(dz.shape[1])
    step = max(64, matmul.workspace(dz.device.type) // (4 * max(1, dz.shape[0])))
    for i in range(0, dz.shape[1], step):
        torch.mv(dz[:, i : i + step].to(weights.dtype).t(), weights, out=out[i : i + step])
    return out


def _powers_of_two(*weights: Tensor | None) -> Tensor:
    """The power of two at or above the larger of each row's upstream gradients; 1 where all are 0.

    Dividing by it rounds nothing.
    """
    given = [x.abs() for x in weights if x is not None]
    largest = functools.reduce(torch.maximum, given)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


def _sum_for(out: Tensor | None, several: bool) -> Tensor | None:
    """``out`` itself; where several 16-bit terms are to be added, an fp32 tensor."""
    if out is None or out.dtype == acc_dtype(out.dtype) or (not several and out.dim() > 1):
        return out
    return torch.empty_like(out, dtype=acc_dtype(out.dtype))


def _take(x: Tensor, columns: Tensor | None) -> Tensor:
    """The rows ``columns`` of ``x (V, ...)``; None: all."""
    return x if columns is None else x.index_select(0, columns)
