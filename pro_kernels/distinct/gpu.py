"""Attention over a ``TokenTree`` on a GPU: one varlen call, or FlexAttention for what that lacks.

A varlen kernel takes sequences of queries and of keys, causal from the lower right: a segment's
queries, and the keys of its ancestors and its own, gathered once. FlexAttention takes the row as it
is and a ``BlockMask`` made from the segments; no mask of S x S is.

Legend: as in ``attention.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pro_kernels.distinct.attention import tree_attention
from pro_kernels.distinct.tree import paths, runs

BLOCK = 128  # of FlexAttention's masks


class Gathered(NamedTuple):
    """What a varlen call is given: rows of the keys, bounds of the sequences, longest ones."""

    keys: Tensor  # places of the ancestors' tokens and the segment's own, segment by segment
    query_bounds: Tensor  # (K + 1,) int32
    key_bounds: Tensor  # (K + 1,) int32
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, segments: Tensor, device: torch.device) -> Gathered:
        """For segments (..., K, 4) on the CPU."""
        rows = segments.view(-1, 4).tolist()
        lengths = [end - first for first, end, *_ in rows]
        spans, counts = [], []
        for path in paths(rows):
            spans += [(rows[k][0], lengths[k]) for k in path]
            counts.append(sum(lengths[k] for k in path))

        def bounds(sizes: list[int]) -> Tensor:
            ends = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
            return ends.to(device, non_blocking=True)

        places = torch.from_numpy(runs(*np.array(spans).T)).to(device, non_blocking=True)
        return cls(places, bounds(lengths), bounds(counts), max(lengths), max(counts))


@functools.cache
def varlen() -> Callable[..., Tensor] | None:
    """A function of query, key, value (tokens, heads, d), ``Gathered``, scale and window, or None.

    PyTorch's, from the version on that has windows and grouped queries; else flash-attention's.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        pass
    else:
        if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():

            def of_torch(q, k, v, rows: Gathered, scale, window):  # noqa: ANN001, ANN202
                left = -1 if window is None else window - 1
                return varlen_attn(
                    q, k, v, *rows[1:], scale=scale, window_size=(left, 0), enable_gqa=True
                )

            return of_torch
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def of_flash(q, k, v, rows: Gathered, scale, window):  # noqa: ANN001, ANN202
        left = -1 if window is None else window - 1
        return flash_attn_varlen_func(
            q, k, v, *rows[1:], softmax_scale=scale, causal=True, window_size=(left, 0)
        )

    return of_flash


def takes_varlen(
    query: Tensor, value: Tensor, sinks: Tensor | None, softcap: float | None, window: int | None
) -> bool:
    """Whether a varlen kernel can do it, and does it right on this device."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[3] == value.shape[3] <= 256
        and sinks is None
        and softcap is None
        and varlen() is not None
        and _varlen_is_right(query.device, query.dtype, query.shape[3], window is not None)
    )


@functools.cache
def _varlen_is_right(device: torch.device, dtype: torch.dtype, size: int, windowed: bool) -> bool:
    """A kernel may be of another version, or not for this card: it is tried on a small tree."""
    segments = torch.tensor([[0, 12, 28, 0], [12, 21, 21, 12], [21, 28, 28, 12]])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 28, size, generator=generator) for n in (4, 2, 2))
    window = 5 if windowed else None
    exact, _ = tree_attention(q, k, v, None, segments, size**-0.5, None, window)
    try:
        q, k, v = (x.to(device, dtype) for x in (q, k, v))
        found = by_varlen(q, k, v, segments, size**-0.5, window)
    except RuntimeError:
        return False
    off = (found.cpu().float() - exact).norm() / exact.norm()
    return bool(off < 8 * torch.finfo(dtype).eps)


def by_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float, window: int | None
) -> Tensor:
    """(1, S, h, d)."""
    rows = _untraced()(
        segments, ("varlen", query.device), lambda: Gathered.of(segments, query.device)
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen()(q, k[rows.keys], v[rows.keys], rows, scale, window)  # type: ignore[misc]
    return out[None]


def by_flex(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, segments: Tensor,
    scale: float, softcap: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """(1, S, h, e)."""
    from torch.nn.attention.flex_attention import AuxRequest

    mask = _untraced()(
        segments, ("flex", window, query.device), lambda: block_mask(segments, window, query.device)
    )

    def bent(score, *_):  # noqa: ANN001, ANN002, ANN202
        return softcap * torch.tanh(score / softcap)

    out, aux = _flex(query.device.type)(
        query, key, value, score_mod=None if softcap is None else bent, block_mask=mask,
        scale=scale, enable_gqa=query.shape[1] != key.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is not None:
        out = out * torch.sigmoid(aux.lse - sinks[:, None])[..., None].to(out.dtype)
    return out.transpose(1, 2)


def block_mask(segments: Tensor, window: int | None, device: torch.device | str) -> Any:
    """The ``BlockMask`` of a row: from bounds of each 128 tokens, of which no pair is looked at."""
    from torch.nn.attention.flex_attention import BlockMask

    first, end, last, position = segments.view(-1, 4).cpu().T
    of_token = torch.repeat_interleave(torch.arange(len(first)), end - first)
    length = len(of_token)
    lasts = last[of_token]
    positions = torch.arange(length) + (position - first)[of_token]
    count = -(-length // BLOCK)

    def each(x: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, count * BLOCK - length), value=fill).view(count, -1)

    # A block of keys is seen by a block of queries where a descendant of one of them begins late
    # enough, and by all of them where each key's descendants go beyond the last query.
    at = torch.arange(count)
    query, key = at[:, None], at[None]
    some = (key <= query) & (each(lasts, 0).amax(1)[None] > query * BLOCK)
    ends = torch.minimum((at + 1) * BLOCK, torch.tensor(length))
    full = (key < query) & (each(lasts, length + 1).amin(1)[None] >= ends[:, None])
    if window is not None:
        low, high = each(positions, 1 << 60).amin(1), each(positions, -1).amax(1)
        some &= low[:, None] - high[None] < window
        full &= high[:, None] - low[None] < window
    partial, full = (x[None, None].to(torch.int32) for x in (some & ~full, full))
    lasts, positions = lasts.to(device), positions.to(device)

    def sees(_, __, q, k):  # noqa: ANN001, ANN202
        seen = (k <= q) & (q < lasts[k])
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return blocks.sum(-1, dtype=torch.int32).to(device), order.to(device)

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


@functools.cache
def _flex(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Not compiled it computes every score; on a CPU the compiled one has no backward.
    return flex_attention if device_type == "cpu" else torch.compile(flex_attention, dynamic=True)


def _kept(segments: Tensor, key: tuple, make: Callable[[], Any]) -> Any:
    """What all layers of a forward need alike, kept on the tensor that they all get."""
    kept = segments.__dict__.setdefault("_pro_kernels", {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


@functools.cache
def _untraced() -> Any:
    """``_kept`` out of a compiler's sight; not at import, as that imports the compiler."""
    return torch.compiler.disable(_kept)
