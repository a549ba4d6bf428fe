"""The gradients of hidden states, weight and bias from what ``head.forward`` left.

Formulas and legend are those of ``head.py``; ``S`` sequences, ``B`` prompts, ``n`` candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pro_kernels.backends.protocol import Candidates
from pro_kernels.fused import matmul
from pro_kernels.fused.call import Call, acc_dtype
from pro_kernels.fused.column_groups import Groups
from pro_kernels.fused.columns import Centre, Kept, functions
from pro_kernels.fused.gather_scatter import Inputs, empty_rows
from pro_kernels.fused.head import Saved, chunks_of, clear_targets, forward
from pro_kernels.fused.target_columns import TargetColumns

# dHidden (R, H), dW (V, H) and dbias (V,); None of what is not wanted.
Gradients = Sequence[Tensor | None]


def backward(
    given: Inputs,
    saved: Saved,
    upstream: Sequence[Tensor | None],  # (N,) gradient of each log-prob; of each entropy
    columns: TargetColumns | None,  # that dZ0 leaves out
    out: Gradients,  # to fill
) -> None:
    """The gradients, but for what ``columns`` add to dW and dbias.

    By blocks of columns, because then each dW block is one matmul over all rows: the fp32 sum over
    rows stays inside the matmul and no fp32 copy of dW is needed.

    Where the entropy has a gradient too, dZ is divided by a power of two of each row, which the
    sides get back: so it keeps the range of probabilities whatever the upstream gradient is, and
    fp16 does not underflow. The kept logits stay as they are, for a second backward.
    """
    call, n, w = given.call, given.tokens, upstream[0]
    assert w is not None
    d_hidden, d_weight, d_bias = out
    scaled, side = None, None
    if call.entropy:
        w = _powers_of_two(*upstream)
        scaled = [None if x is None else x / w for x in upstream]
        if d_hidden is not None and _block(given) < call.vocab:  # a sum over blocks
            shape = n, given.hidden.shape[1]
            side = given.hidden.new_zeros(shape, dtype=acc_dtype(call.logits_dtype))
    elif d_hidden is not None:
        _hidden_grad(given, saved.side[:n], w, columns, d_hidden)
        if call.shard is not None:
            call.shard.sum_(d_hidden)
    if d_weight is None and d_bias is None and not call.entropy:
        return
    xw = None if d_weight is None else given.weighted(w)
    if call.grad_filter is not None and n:
        _kept_backward(given, saved, (w, xw), out)
        return
    for cols, dz in _blocks(given, saved, scaled):
        if call.entropy:
            dz = dz.to(call.compute_dtype)
            if d_hidden is not None:
                part = matmul.hidden_grad(dz, given.weight[cols])
                side = part if side is None else side.add_(part)
        if d_weight is not None and xw is not None:
            matmul.weight_grad(dz, xw, d_weight[cols], accumulate=False)
        if d_bias is not None:
            d_bias[cols] = bias_grad(dz, w)
    if side is not None and d_hidden is not None:
        _hidden_grad(given, side, w, columns, d_hidden)


def _hidden_grad(
    given: Inputs, side: Tensor, weights: Tensor, columns: TargetColumns | None, out: Tensor
) -> None:
    """``weights * side``, and what ``columns`` add, as (R, H)."""
    if columns is not None:
        side, weights = columns.hidden_side(side, weights), torch.ones_like(weights)
    given.scatter(side, weights, out.zero_())


def _block(given: Inputs) -> int:
    """How many columns of all rows are a chunk's worth of logits."""
    call, n = given.call, given.tokens
    if call.plan.chunk >= n:
        return call.vocab
    block = call.plan.chunk * call.vocab // n
    if not call.entropy:
        block = block * call.compute_dtype.itemsize // call.logits_dtype.itemsize
    return max(64, block // 64 * 64)


def _blocks(
    given: Inputs,
    saved: Saved,
    upstream: Sequence[Tensor | None] | None,  # None: dZ0
) -> Iterator[tuple[slice, Tensor]]:
    """DZ of all rows by blocks of columns: from what was kept, the others computed again."""
    call, n, block = given.call, given.tokens, _block(given)
    retained = min(saved.kept.shape[0], n)
    if retained == n and not call.entropy:
        yield slice(None), saved.kept[:n]
        return
    weights, by = (None, None) if upstream is None else upstream
    again = given.part(slice(retained, n))
    if retained < n:
        x = again.x().to(given.operand_dtype)
    # Logits in the dtype they had: one rounded differently would no longer fit its lse.
    buffer = empty_rows(saved.kept, n, min(block, call.vocab), call.logits_dtype)

    def gradient(z: Tensor, at: slice, first: int, out: Tensor) -> None:
        t = given.targets[at]
        call.kernels.logits_grad(
            call.rows(z, t, saved.exact(call, at)),
            saved.stats[0, at],
            None if weights is None else weights[at],
            first_column=first + (call.shard.first if call.shard else 0),
            out=out,
            entropy=None if by is None else (saved.stats[1, at], by[at]),
        )
        if call.lse:
            clear_targets(call, out, t, first)

    for first in range(0, call.vocab, block):
        cols = slice(first, min(first + block, call.vocab))
        dz = buffer[:, : cols.stop - first]
        kept = saved.kept[:retained, cols]
        if not call.entropy:
            dz[:retained] = kept
        elif retained:
            gradient(kept, slice(0, retained), first, dz[:retained])
        if retained < n:
            z, bias = dz[retained:], None if given.bias is None else given.bias[cols]
            matmul.logits_into(z, x, given.weight[cols], bias, again.late)
            gradient(z, slice(retained, n), first, z)
        yield cols, dz


def _kept_backward(
    given: Inputs,
    saved: Saved,
    weighted: tuple[Tensor, Tensor | None],  # the row weights, and X times them
    out: Gradients,
) -> None:
    """DW and dbias of the columns that each chunk kept."""
    n = given.tokens
    chunks = chunks_of(n, given.call.plan.chunk, min(saved.kept.shape[0], n))
    sums = [_sum_for(x, len(chunks) > 1) for x in out[1:]]
    for i, at in enumerate(chunks):
        groups, here = saved.filter.of(i, at), given.part(at)
        again = at.start >= saved.kept.shape[0]
        dz = _kept_again(here, saved, at, groups) if again else saved.kept[at]
        w, xw = (None if x is None else x[at] for x in weighted)
        assert w is not None
        add_columns(given.call, groups, dz, xw, w, sums, accumulate=i > 0)
    for grad, total in zip(out[1:], sums, strict=True):
        if grad is not None and total is not None and total is not grad:
            grad.copy_(total)


def _kept_again(here: Inputs, saved: Saved, at: slice, groups: Groups | None) -> Tensor:
    """DZ0 of a chunk that was not retained, compact, computed again group by group."""
    call, x = here.call, here.x()
    widest = call.vocab if groups is None else groups.widest
    dz = empty_rows(saved.kept, here.tokens, widest, call.logits_dtype)
    exact_logits, lses = saved.exact(call, at), saved.stats[0, at]
    every: tuple[Any, None] = slice(None), None
    for some, columns in [every] if groups is None else groups:
        t, lse = here.targets[some], lses[some]
        exact, late = (None if x is None else x[some] for x in (exact_logits, here.late))
        z, weight, bias = dz, here.weight, here.bias
        if columns is not None:
            z = empty_rows(saved.kept, len(some), columns.shape[0], call.logits_dtype)
            t = torch.searchsorted(columns, t.to(columns.dtype))
            weight = weight.index_select(0, columns)
            bias = None if bias is None else bias.index_select(0, columns)
        matmul.logits_into(z, x[some], weight, bias, late)
        call.kernels.logits_grad(call.rows(z, t, exact), lse, None, out=z)
        if call.lse:
            clear_targets(call, z, t)
        if z is not dz:
            dz[:, : z.shape[1]].index_copy_(0, some, z)
    return dz.to(call.compute_dtype)


def add_columns(
    call: Call,
    groups: Groups | None,  # None: all columns
    dz: Tensor,  # (rows, V), compact
    xw: Tensor | None,  # (rows, H), where dW is wanted
    weights: Tensor,  # (rows,)
    sums: Sequence[Tensor | None],  # dW (V, H) and dbias (V,), in fp32 or wider to be added to
    accumulate: bool,
) -> None:
    """A chunk's dW and dbias, of the columns that it kept."""
    d_weight, d_bias = sums
    if d_weight is not None and xw is not None:
        if groups is None:
            matmul.weight_grad(dz, xw, d_weight, accumulate)
        else:
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


# ---- tier T2: a scalar loss over prompts, whose gradients are made in the forward


def pro_forward(
    given: Inputs,
    candidates: Candidates,
    tokens: Sequence[int],  # of each chunk
    out: Gradients,  # zeros; those of the head fp32 or wider
    kept: Kept,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tier T2: loss terms and all gradients in one pass over prompt-aligned chunks.

    Returns ``terms`` (B, n), ``sums`` (S,) as the backends' ``ranking`` does, and the row weights
    (N,).
    """
    call, hidden, weight = given[:3]
    d_hidden, d_weight, d_bias = out
    most = max(tokens, default=0)
    buffer = empty_rows(weight, most, call.vocab, weight.dtype)
    values = weight.new_zeros((1, given.tokens), dtype=call.acc_dtype)
    stats = values.new_empty(2, most)
    terms, sums = [], values.new_zeros(candidates.lengths.shape)
    weights = values.new_zeros(given.tokens)
    if kept.tau is not None:
        kept.centre = Centre.of(call, weight)
    side_dtype = matmul.sums_dtype(call.compute_dtype, hidden.device.type)
    prompt = start = 0
    for i, (count, size) in enumerate(zip(call.plan.prompt_chunks, tokens, strict=True)):
        at = slice(start, start + size)
        wide = 0 if d_hidden is None else size
        side = buffer.new_empty(wide, hidden.shape[1], dtype=side_dtype)
        own = kept if kept.tau is None else kept.part(i, at)
        saved = Saved(stats[:, :size], buffer[:size], side, own)
        one = call.but(plan=replace(call.plan, chunk=max(1, size)))
        here = given._replace(call=one).part(at)
        forward(here, values[:, at], saved)
        # Later log-probs are still 0: after the last chunk the sums are whole.
        prompts = slice(prompt, prompt + count)
        part, sums, row_weights = call.rank(values[0], candidates.part(prompts))
        terms.append(part)
        if size:
            w = weights[at] = row_weights[at]
            groups = own.of(0, slice(0, size))
            xw, sums_of = here.weighted(w), (d_weight, d_bias)
            add_columns(call, groups, buffer[:size], xw, w, sums_of, accumulate=True)
            if d_hidden is not None:
                here.scatter(side, w, d_hidden)
        prompt, start = prompt + count, start + size
    return torch.cat(terms), sums, weights


def chunk_tokens(call: Call) -> list[int]:
    """Tokens of each chunk of tier T2."""
    sizes, prompt = [], 0
    for count in call.plan.prompt_chunks:
        sizes.append(sum(call.prompt_tokens[prompt : prompt + count]))
        prompt += count
    return sizes
