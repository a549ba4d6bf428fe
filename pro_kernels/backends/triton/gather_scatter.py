"""Kernels of the thin (N, H) sides: gather with weights, scatter with a sum, the target's logit.

Legend: ``N`` scored rows, ``R`` rows of the hidden states, ``H`` hidden, ``V`` vocabulary; ``b``
bytes of an element. One program takes a row (``scatter_rows``: BLOCK columns of it). Bytes moved:

    gather_rows    N H (b + b_out)
    scatter_rows   N H b + R' H b_out           R' distinct rows; twice that where rows are shared
    target_logits  2 N H b

All arithmetic is fp32, rounded once; sums run in an order that depends on H and on the positions
of equal rows only. Nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pro_kernels.backends.triton.elementwise import rounded

_UNALIGNED = ["rows_ptr", "weights_ptr", "by_row_ptr", "targets_ptr", "bias_ptr", "result_ptr"]


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def gather_kernel(
    source,  # pointer to (R, H) and its row stride
    rows_ptr,  # (N,) int64
    weights_ptr,  # (N,) fp32 or None
    out_ptr,  # (N, H), contiguous
    H,
    BLOCK: tl.constexpr,
):
    """Write ``weights * source[rows]``."""
    source_ptr, stride = source
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + i)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(source_ptr + row * stride + cols, mask=cols < H, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            x *= weight
        tl.store(out_ptr + i * H + cols, rounded(x, out_ptr.dtype.element_ty), mask=cols < H)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=_UNALIGNED)
def scatter_kernel(
    side,  # pointer to (N, H) and its row stride
    out,  # pointer to (R, H) and its row stride
    weights_ptr,  # (N,) fp32
    rows_ptr,  # (N,) int64, sorted where by_row is given
    by_row_ptr,  # (N,) int64, the position of each in side and weights; None: rows are distinct
    N,
    H,
    BLOCK: tl.constexpr,
):
    """Add ``weights * side`` to the rows of out; equal rows are one program's, in their order."""
    side_ptr, stride = side
    out_ptr, out_stride = out
    i = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < H
    row = tl.load(rows_ptr + i)
    if by_row_ptr is None:
        total = _weighted(side_ptr + i * stride, weights_ptr + i, cols, inside)
        total = rounded(total, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_stride + cols, total, mask=inside)
    else:
        before = tl.load(rows_ptr + i - 1, mask=i > 0, other=-1)
        if before != row:
            at = out_ptr + row * out_stride + cols
            total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            last = i
            current = row
            while current == row:
                j = tl.load(by_row_ptr + last)
                total += _weighted(side_ptr + j * stride, weights_ptr + j, cols, inside)
                last += 1
                current = tl.load(rows_ptr + last, mask=last < N, other=-1)
            tl.store(at, rounded(total, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def target_logits_kernel(
    x,  # pointer to (N, H) and its row stride
    weight,  # pointer to (V, H) and its row stride
    bias_ptr,  # (V,) or None
    targets_ptr,  # (N,) int64
    result_ptr,  # (N,) fp32
    V,
    H,
    BLOCK: tl.constexpr,
):
    """Write each row's dot product with its target's weight; NaN, not a stray read, beyond V."""
    x_ptr, stride = x
    weight_ptr, weight_stride = weight
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + i)
    result = 0.0
    if target >= V:
        result = float("nan")
    elif target >= 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            left = tl.load(x_ptr + i * stride + cols, mask=cols < H, other=0.0)
            right = tl.load(weight_ptr + target * weight_stride + cols, mask=cols < H, other=0.0)
            total += left.to(tl.float32) * right.to(tl.float32)
        result = tl.sum(total, axis=0)
        if bias_ptr is not None:
            result += tl.load(bias_ptr + target).to(tl.float32)
    tl.store(result_ptr + i, result)


@triton.jit
def _weighted(row_ptr, weight_ptr, cols, inside):
    return tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32) * tl.load(weight_ptr)
