"""Exact attention over a ``TokenTree``: each segment sees its ancestors and, causally, itself.

A segment's descendants follow it in the row. So all that attend to it beside itself are one run of
queries, and keys and values are copied for nobody:

    queries of the segment      keys of the segment, causal
    queries of its descendants  keys of the segment, all

Parts of one softmax are put together by their log-sum-exp, and the backward gives each part the
gradient it has under the whole softmax (FlashAttention-2, arXiv 2307.08691, section 3.1; the same
over devices: ring attention, arXiv 2310.01889). Where a layer has a sliding window, parts are a
segment with one ancestor each, cut to what the window lets through.

On a CPU the C++ library does it in one call (csrc/cpu/attention.h), where there is one. On a GPU
one varlen call with keys and values gathered, or FlexAttention, does the same.

Legend: ``S`` tokens of the row, ``h`` heads, ``g`` heads of keys and values, ``d`` size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pro_kernels.backends import cpu
from pro_kernels.distinct.tree import paths

_NAMESPACE = __name__.split(".")[0]
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Scores that the plain form holds at a time, of all heads.
_SCORES = 1 << 22
# Queries of a block that has a mask, at most: so that masks stay small.
_MASKED = 512


class Block(NamedTuple):
    """Queries [a, b) attend to keys [c, d) of the row."""

    queries: slice
    keys: slice
    causal: bool = False
    # (queries, keys): position of the first; keys from ``window`` before a query on are not seen.
    positions: tuple[int, int] | None = None
    window: int = 0

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores; None: nothing."""
        if self.positions is None:
            return None
        count = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        first, second = (
            torch.arange(p, p + n, dtype=torch.int32)
            for p, n in zip(self.positions, count, strict=True)
        )
        distance = first[:, None] - second
        hidden = (distance < 0) | (distance >= self.window)
        return torch.zeros(count, dtype=dtype).masked_fill_(hidden, -torch.inf)


def blocks(segments: list[list[int]], window: int | None) -> Iterator[Block]:
    """What attends to what; those of a query's own segment first."""
    longest = max(position + end - first for first, end, _, position in segments)
    if window is None or window >= longest:
        for first, end, _, _ in segments:
            yield Block(slice(first, end), slice(first, end), causal=True)
        for first, end, last, _ in segments:
            if last > end:
                yield Block(slice(end, last), slice(first, end))
        return
    for first, end, _, position in segments:
        for start in range(first, end, _MASKED):
            stop, since = min(start + _MASKED, end), max(first, start - window + 1)
            at = position + start - first, position + since - first
            yield Block(slice(start, stop), slice(since, stop), False, at, window)
    for (first, end, _, position), path in zip(segments, paths(segments), strict=True):
        for begin, until, _, place in (segments[k] for k in path[:-1]):
            keys_end = place + until - begin  # position after its last key
            stop = min(end, first + keys_end + window - 1 - position)
            for start in range(first, stop, _MASKED):
                since = max(place, position + start - first - window + 1)
                at = position + start - first, since
                queries = slice(start, min(start + _MASKED, stop))
                yield Block(queries, slice(begin + since - place, until), False, at, window)


@torch.library.custom_op(f"{_NAMESPACE}::tree_attention", mutates_args=())
def tree_attention(
    query: Tensor,  # (1, h, S, d)
    key: Tensor,  # (1, g, S, d)
    value: Tensor,  # (1, g, S, e)
    sinks: Tensor | None,  # (h,): a further logit in each softmax, of no value
    segments: Tensor,  # (..., K, 4), on the CPU
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(1, S, h, e), as the output projection takes it, and the log-sum-exp (1, S, h) in fp32."""
    segments = segments.view(-1, 4)
    if _takes_cpu(query):
        found, lse = cpu.tree_attention(
            query, key, value, cpu.Tree(segments, scale, softcap, window)
        )
        return _with_sinks(found, lse, sinks, value.dtype)
    out = value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    lse = torch.empty(out.shape[:3], dtype=_wide(query), device=query.device)
    seen_out, seen_lse = out.transpose(1, 2), lse.transpose(1, 2)
    reached = 0
    for block in blocks(segments.tolist(), window):
        found, sums = _attend(query, key, value, block, scale, softcap)
        mine, mine_lse = seen_out[:, :, block.queries], seen_lse[:, :, block.queries]
        if block.queries.start >= reached:  # nothing is there yet
            reached = block.queries.stop
            mine.copy_(found)
            mine_lse.copy_(sums)
        else:
            share = torch.sigmoid(sums - mine_lse)[..., None]
            mine.copy_(torch.lerp(mine.to(lse.dtype), found.to(lse.dtype), share))
            mine_lse.copy_(torch.logaddexp(mine_lse, sums))
    return _with_sinks(out, lse, sinks, value.dtype)


def _with_sinks(
    out: Tensor, lse: Tensor, sinks: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks.to(lse.dtype))
        out, lse = out * torch.exp(lse - whole)[..., None], whole
    return out.to(dtype), lse


@tree_attention.register_fake
def _(query, key, value, sinks, segments, scale, softcap, window):
    shape = (1, query.shape[2], query.shape[1])
    return value.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=_wide(query))


@torch.library.custom_op(f"{_NAMESPACE}::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    grad: Tensor,  # (1, S, h, e)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,  # (1, S, h, e)
    lse: Tensor,  # (1, S, h)
    segments: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    segments = segments.view(-1, 4)
    if _takes_cpu(query):
        tree = cpu.Tree(segments, scale, softcap, window)
        whole = cpu.tree_attention_backward(grad, query, key, value, out, lse, tree)
        return tuple(x.to(query.dtype) for x in whole)  # type: ignore[return-value]
    grad, out, lse = (x.transpose(1, 2) for x in (grad, out, lse))
    grads = [
        torch.zeros_like(x.transpose(1, 2), dtype=lse.dtype, memory_format=torch.contiguous_format)
        for x in (query, key, value)
    ]
    grads = [x.transpose(1, 2) for x in grads]
    for block in blocks(segments.tolist(), window):
        found = _attend_backward(grad, query, key, value, out, lse, block, scale, softcap)
        places = (block.queries, block.keys, block.keys)
        for every, place, part in zip(grads, places, found, strict=True):
            if block.causal:  # of each segment itself: the first part of its tokens
                every[:, :, place] = part
            else:
                every[:, :, place] += part
    return tuple(x.to(query.dtype) for x in grads)  # type: ignore[return-value]


@tree_attention_backward.register_fake
def _(grad, query, key, value, out, lse, segments, scale, softcap, window):
    laid_out = (x.new_empty(x.transpose(1, 2).shape) for x in (query, key, value))
    return tuple(x.transpose(1, 2) for x in laid_out)


def _save(ctx, inputs, output):  # noqa: ANN001, ANN202
    query, key, value, sinks, segments, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, sinks, segments, *output)


def _backward(ctx, grad, _):  # noqa: ANN001, ANN202
    query, key, value, sinks, segments, out, lse = ctx.saved_tensors
    grads = tree_attention_backward(grad, query, key, value, out, lse, segments, *ctx.options)
    of_sinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        inner = (grad.to(lse.dtype) * out).sum(-1)
        of_sinks = -(torch.exp(sinks.to(lse.dtype) - lse) * inner).sum((0, 1)).to(sinks.dtype)
    return *grads, of_sinks, None, None, None, None


tree_attention.register_autograd(_backward, setup_context=_save)


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _takes_cpu(query: Tensor) -> bool:
    return query.dtype in cpu.DTYPES and cpu.unusable(query.device) is None


# ---- one block


def _takes_flash(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    return query.device.type == "cpu" and softcap is None and query.shape[3] == value.shape[3]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """A block's own softmax: (1, h, queries, e) and its log-sum-exp (1, h, queries)."""
    q, (k, v) = query[:, :, block.queries], (x[:, :, block.keys] for x in (key, value))
    if _takes_flash(q, v, softcap):
        mask = block.mask(q.dtype)
        return _FLASH(q, k, v, 0.0, block.causal, attn_mask=mask, scale=scale)
    outs, sums = [], []
    for part, scores, _ in _scores(q, k, block, scale, softcap):
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse[..., None])
        outs.append(_by_key_head(weights, v) @ v.to(weights.dtype))
        sums.append(lse)
        outs[-1] = outs[-1].view(1, q.shape[1], part.stop - part.start, -1)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    block: Block, scale: float, softcap: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A block's share of the gradients, under the whole softmax that ``out`` and ``lse`` are of."""
    q, g, o, s = (x[:, :, block.queries] for x in (query, grad, out, lse))
    k, v = (x[:, :, block.keys] for x in (key, value))
    if _takes_flash(q, v, softcap):
        q, k, v, g, o = (x.to(lse.dtype) for x in (q, k, v, g, o))
        mask = block.mask(q.dtype)
        return _FLASH_BACKWARD(g, q, k, v, o, s, 0.0, block.causal, attn_mask=mask, scale=scale)
    dtype = lse.dtype
    of_q = []
    of_k, of_v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    inner = (g.to(dtype) * o).sum(-1, keepdim=True)
    for part, scores, slope in _scores(q, k, block, scale, softcap):
        weights = torch.exp(scores - s[:, :, part, None])
        grads = g[:, :, part].to(dtype)
        grouped = _by_key_head(grads, v)
        of_v += _by_key_head(weights, v).transpose(2, 3) @ grouped
        of_weights = (grouped @ v.to(dtype).transpose(2, 3)).view_as(weights)
        of_scores = weights * (of_weights - inner[:, :, part]) * scale
        if slope is not None:
            of_scores *= slope
        of_scores = _by_key_head(of_scores, k)
        of_q.append((of_scores @ k.to(dtype)).view(1, q.shape[1], part.stop - part.start, -1))
        of_k += of_scores.transpose(2, 3) @ _by_key_head(q[:, :, part].to(dtype), k)
    return torch.cat(of_q, 2), of_k, of_v


def _scores(
    q: Tensor, k: Tensor, block: Block, scale: float, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Some queries, their scores (1, h, queries, keys), and the slope of a softcap."""
    dtype, keys = _wide(q), k.to(_wide(q)).transpose(2, 3)
    mask = block.mask(dtype)
    step = max(1, _SCORES // (q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        part = slice(start, min(start + step, q.shape[2]))
        queries = q[:, :, part].to(dtype)
        scores = (_by_key_head(queries, k) @ keys).view(1, q.shape[1], -1, k.shape[2]) * scale
        slope = None
        if softcap is not None:
            bent = torch.tanh(scores / softcap)
            scores, slope = bent * softcap, 1 - bent * bent
        if mask is not None:
            scores = scores + mask[part].to(scores.device)
        elif block.causal:
            at = torch.arange(part.start, part.stop, device=q.device)
            later = torch.arange(k.shape[2], device=q.device) > at[:, None]
            scores = scores.masked_fill(later, -torch.inf)
        yield part, scores, slope


def _by_key_head(x: Tensor, key: Tensor) -> Tensor:
    """(1, h, n, m) as (1, g, n h / g, m): the heads of a group one after another."""
    return x.reshape(1, key.shape[1], -1, x.shape[3])
