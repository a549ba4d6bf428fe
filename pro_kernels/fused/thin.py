"""Differentiable numbers of rows of logits that take no head matmul: some columns, and their mean.

Legend: ``N`` rows, ``R`` rows of the hidden states, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pro_kernels.fused.autograd import first_order
from pro_kernels.fused.gather_scatter import add_rows
from pro_kernels.options import LogitOptions

_ROWS = 4096  # of a weight in a wide dtype at a time


class ChosenLogits(torch.autograd.Function):
    """Logits (N, k) of columns ``ids (N, k)`` of the hidden states at ``places (N,)``, in fp32.

    ``dtype``: in which the head would multiply.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx, hidden, weight, bias, places, ids, dtype: torch.dtype, options: LogitOptions
    ):
        ctx.save_for_backward(hidden, weight, bias, places, ids)
        ctx.given = dtype, options
        return _chosen(hidden, weight, bias, places, ids, dtype, options)[2]

    @staticmethod
    @first_order
    def backward(ctx, grad):  # noqa: D102
        hidden, weight, bias, places, ids = ctx.saved_tensors
        x, w, z, slope = _chosen(*ctx.saved_tensors, *ctx.given)
        needs, by = ctx.needs_input_grad, (grad * slope).to(z.dtype)
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(t) if need else None
            for t, need in zip((hidden, weight, bias), needs[:3], strict=True)
        )
        flat = ids.flatten(), by.flatten()
        if d_hidden is not None:
            one = torch.ones_like(by[:, 0])
            add_rows(d_hidden, places, one, torch.einsum("nk,nkh->nh", by, w.to(by.dtype)))
        if d_weight is not None:
            add_rows(d_weight, *flat, x.expand_as(w).flatten(0, 1))
        if d_bias is not None:
            add_rows(d_bias[:, None], *flat, torch.ones_like(flat[1])[:, None])
        return d_hidden, d_weight, d_bias, *[None] * 4


def _chosen(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Tensor,
    ids: Tensor,
    dtype: torch.dtype,
    options: LogitOptions,
) -> tuple[Tensor, ...]:
    """What is multiplied, the logits, and their slope by the raw ones."""
    x, w = hidden[places].to(dtype)[:, None], weight[ids].to(dtype)
    raw = (x.to(torch.promote_types(dtype, torch.float32)) * w).sum(-1)
    raw = raw if bias is None else raw + bias[ids].to(dtype)
    slope = torch.full_like(raw, options.logit_scale)
    return x, w, options.transform(raw, slope=slope), slope


def mean_column(
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    by: Tensor | None = None,  # (V,)
) -> tuple[Tensor, Tensor | float]:
    """The column (H,) of the head, and its bias, whose raw logit is the mean of all times ``by``.

    In fp32 (fp64 of such). The weight's gradient has its size only where ``by`` is given.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    by = None if by is None else by.to(wide)
    column = _MeanRow.apply(weight, by, wide)
    if bias is None:
        return column, 0.0
    return column, (bias.to(wide) if by is None else bias.to(wide) * by).mean()


def mean_logits(
    hidden: Tensor,  # (..., H)
    column: tuple[Tensor, Tensor | float],  # of ``mean_column``
) -> Tensor:
    """The mean of each row's raw logits."""
    weight, bias = column
    return (hidden.to(weight.dtype) * weight).sum(-1) + bias  # autocast would round a matmul


class _MeanRow(torch.autograd.Function):
    """The mean row (H,) of a weight (V, H), each row times ``by`` (V,); None: 1."""

    @staticmethod
    def forward(ctx, weight, by, dtype: torch.dtype):  # noqa: D102
        ctx.by, ctx.shape, ctx.dtype = by, weight.shape, weight.dtype
        total = weight.new_zeros(weight.shape[1], dtype=dtype)
        for i in range(0, weight.shape[0], _ROWS):
            rows = weight[i : i + _ROWS]
            total += (rows if by is None else by[i : i + _ROWS, None] * rows).sum(0, dtype=dtype)
        return total / weight.shape[0]

    @staticmethod
    @first_order
    def backward(ctx, grad):  # noqa: D102
        row = grad / ctx.shape[0]
        if ctx.by is None:  # one row stands for all of them
            return row.to(ctx.dtype).expand(ctx.shape), None, None
        out = row.new_empty(ctx.shape, dtype=ctx.dtype)
        for i in range(0, ctx.shape[0], _ROWS):
            out[i : i + _ROWS] = ctx.by[i : i + _ROWS, None] * row
        return out, None, None
