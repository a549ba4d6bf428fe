"""The gradients of hidden states, weight and bias from what ``head.forward`` left.

Its formulas are in ``head.py``. Legend: ``N`` scored rows, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pro_kernels.fused import matmul
from pro_kernels.fused.call import Call, acc_dtype
from pro_kernels.fused.gather_scatter import (
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
    rows: Tensor,
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
    w, n = upstream[0], rows.shape[0]
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
        blocks = _blocks(call, weight, bias, x, targets, saved, block)
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
    rows: Tensor,
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
    n, vocab, chunk = rows.shape[0], call.vocab, call.plan.chunk
    retained = min(saved.kept.shape[0], n)
    scale = _powers_of_two(*upstream)
    scaled = [None if x is None else x / scale for x in upstream]
    block = vocab if chunk >= n else max(64, chunk * vocab // n // 64 * 64)
    x = None
    if retained < n:
        x = rows_of(call, hidden, rows[retained:]).to(operand_dtype(call, hidden))
    if d_weight is not None:
        xw = weighted_rows(call, hidden, rows, scale)
    side = None
    if d_hidden is not None and block < vocab:  # a sum over blocks
        side = hidden.new_zeros((n, hidden.shape[1]), dtype=acc_dtype(call.logits_dtype))
    for cols, dz in _blocks(call, weight, bias, x, targets, saved, block, scaled):
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
    rows: Tensor,
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
    x: Tensor | None,  # hidden states of the rows that were not retained
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
        if x is not None:
            z = dz[retained:]
            matmul.logits_into(z, x, weight[cols], None if bias is None else bias[cols])
            gradient(z, slice(retained, n), first, z)
        yield cols, dz


def _kept_backward(
    call: Call,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    saved: Saved,
    weighted: tuple[Tensor, Tensor],  # the row weights, and X times them
    out: Gradients,
) -> None:
    """DW and dbias of the columns that each chunk kept."""
    n = rows.shape[0]
    chunks = chunks_of(n, call.plan.chunk, min(saved.kept.shape[0], n))
    wanted = out[1:]
    sums = [_zeros_for(x, len(chunks) > 1) for x in wanted]  # their sum is fp32
    w, xw = weighted
    for i, (start, stop) in enumerate(chunks):
        at, columns, count = slice(start, stop), saved.filter.of(i), saved.filter.count(i)
        if start < saved.kept.shape[0]:
            dz = saved.kept[at, :count]
        else:
            dz = empty_rows(saved.kept, stop - start, count, call.logits_dtype)
            assert weight is not None
            some = None if bias is None else _take(bias, columns)
            # The copy of the weight is not held beyond this: that of dW comes next.
            x = rows_of(call, hidden, rows[at])
            matmul.logits_into(dz, x, _take(weight, columns), some)
            t = targets[at]
            if columns is not None:
                t = torch.searchsorted(columns, t.to(columns.dtype))
            exact = saved.exact(call, at)
            lse = saved.stats[0, at]
            call.kernels.logits_grad(
                dz, lse, t, None, target_logits=exact, options=call.logits, out=dz
            )
            if call.lse:
                clear_targets(call, dz, t)
            dz = dz.to(call.compute_dtype)
        add_columns(columns, dz, xw[at], w[at], sums)
    for grad, total in zip(wanted, sums, strict=True):
        if grad is not None and total is not None and total is not grad:
            grad.copy_(total)


def add_columns(
    columns: Tensor | None,  # (kept,); None: all
    dz: Tensor,  # (rows, kept)
    xw: Tensor,  # (rows, H)
    weights: Tensor,  # (rows,)
    sums: Sequence[Tensor | None],  # dW (V, H) and dbias (V,)
) -> None:
    """Add a chunk's dW and dbias to the columns it kept, in the dtype of the sums.

    16-bit sums are for a single chunk, and all zeros.
    """
    d_weight, d_bias = sums
    if columns is None:
        if d_weight is not None:
            matmul.weight_grad(dz, xw, d_weight, accumulate=d_weight.itemsize >= 4)
        if d_bias is not None:
            d_bias += bias_grad(dz, weights).to(d_bias.dtype)
        return
    if d_weight is not None:
        part = d_weight.new_empty(columns.shape[0], xw.shape[1])
        d_weight.index_add_(0, columns, matmul.weight_grad(dz, xw, part, accumulate=False))
    if d_bias is not None:
        d_bias.index_add_(0, columns, bias_grad(dz, weights).to(d_bias.dtype))


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


def _zeros_for(out: Tensor | None, several: bool) -> Tensor | None:
    """``out`` itself, cleared; where several 16-bit terms are to be added, an fp32 one."""
    if out is None or not several or out.dtype == acc_dtype(out.dtype):
        return None if out is None else out.zero_()
    return torch.zeros_like(out, dtype=acc_dtype(out.dtype))


def _take(x: Tensor, columns: Tensor | None) -> Tensor:
    """The rows ``columns`` of ``x (V, ...)``; None: all."""
    return x if columns is None else x.index_select(0, columns)
