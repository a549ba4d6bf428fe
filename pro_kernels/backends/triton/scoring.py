"""Score only: log-probs straight from hidden states and weight, no logit written to memory.

Legend: ``N`` rows, ``V`` vocabulary, ``H`` hidden; tiles of BLOCK_N x BLOCK_V logits, ``T`` tiles
of columns. A program makes one tile by tensor-core products over H, summed in fp32, and keeps of
each row of it only ``(max, sum exp(z - max))``; the second kernel merges the T pairs of a row from
first to last. 2 N V H flops; besides the operands 16 N T bytes move, against 2 N V b for a matmul
that writes its logits and a row kernel that reads them (b bytes each).

The target's column takes the exact dot product of ``target_logits``, so ``logp <= 0``. A row's sums
depend on V, H and the dtype only, not on N or on its neighbours. A row of -inf gives lse = -inf,
NaN reaches the sum (``rows.py``). No TF32: fp32 operands are multiplied as IEEE fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pro_kernels.backends.triton.elementwise import (
    FLOAT_MAX,
    INTERPRETED,
    at_most_zero,
    exp,
    transform,
)

_UNALIGNED = ["targets_ptr", "exact_ptr", "bias_ptr", "tops_ptr", "totals_ptr"]


@triton.jit(
    do_not_specialize=["N", "tiles"],
    do_not_specialize_on_alignment=_UNALIGNED,
)
def score_kernel(
    x,  # pointer to (N, H) and its row stride
    weight,  # pointer to (V, H) and its row stride
    bias_ptr,  # (V,) or None
    targets_ptr,  # (N,) int64
    exact_ptr,  # (N,) fp32, raw target logits
    tops_ptr,  # (N, T) fp32
    totals_ptr,  # (N, T) fp32
    N,
    V,
    H,
    tiles,  # T
    option,  # LogitOptions, see ``elementwise.transform``
    CONFIG: tl.constexpr,  # configs.ScoreConfig
):
    """Write the maximum and the sum of one tile, for each of its rows."""
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_V: tl.constexpr = CONFIG.block_v
    BLOCK_H: tl.constexpr = CONFIG.block_h
    GROUP: tl.constexpr = CONFIG.group
    x_ptr, stride = x
    weight_ptr, weight_stride = weight
    # GROUP tiles of rows go through the columns together: each weight tile is read once for them.
    program = tl.program_id(0)
    row_tiles = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * tiles) * GROUP
    width = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * tiles)
    tile = within // width
    row = (first + within % width) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    live = row < N
    # Beyond the end the last row and column are read again: no mask on them in the loop.
    row64 = tl.minimum(row, N - 1).to(tl.int64)
    at_x = x_ptr + row64[:, None] * stride
    at_w = weight_ptr + tl.minimum(column, V - 1).to(tl.int64)[None, :] * weight_stride
    inner = tl.arange(0, BLOCK_H)
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + inner
        x_tile = tl.load(at_x + h[None, :], mask=h[None, :] < H, other=0.0)
        w_tile = tl.load(at_w + h[:, None], mask=h[:, None] < H, other=0.0)
        z = _add_product(z, x_tile, w_tile)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < V, other=0.0)
        z += bias.to(tl.float32)[None, :]
    target = tl.load(targets_ptr + row, mask=live, other=-1)
    exact = tl.load(exact_ptr + row, mask=live, other=0.0)
    z = tl.where(column[None, :] == target[:, None], exact[:, None], z)
    z, _ = transform(z, option)
    z = tl.where(column[None, :] < V, z, -float("inf"))
    top, total = _sums(z)
    at = row64 * tiles + tile
    tl.store(tops_ptr + at, top, mask=live)
    tl.store(totals_ptr + at, total, mask=live)


@triton.jit(
    do_not_specialize=["tiles"],
    do_not_specialize_on_alignment=[*_UNALIGNED, "logp_ptr", "lse_ptr"],
)
def merge_kernel(
    tops_ptr,  # (N, T) fp32
    totals_ptr,  # (N, T) fp32
    targets_ptr,  # (N,) int64
    exact_ptr,  # (N,) fp32
    logp_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp32
    tiles,  # T
    option,
    BLOCK: tl.constexpr,
):
    """Merge the pairs of one row: lane after lane, then a tree over the lanes."""
    row = tl.program_id(0).to(tl.int64)
    logp = 0.0
    lse = 0.0
    if tl.load(targets_ptr + row) >= 0:
        row_top, total = _merged(tops_ptr + row * tiles, totals_ptr + row * tiles, tiles, BLOCK)
        log_total = tl.log(total)
        z_t, _ = transform(tl.load(exact_ptr + row), option)
        logp = at_most_zero((z_t - row_top) - log_total)
        lse = row_top + log_total
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _add_product(z, x, w):
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter would multiply bits as integers
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, z, input_precision="ieee")


@triton.jit
def _sums(z):
    # Kept finite, as in rows.py: (-inf) - (-inf) never occurs.
    top = tl.minimum(tl.maximum(tl.max(z, axis=1), -FLOAT_MAX), FLOAT_MAX)
    return top, tl.sum(exp(z - top[:, None]), axis=1)


@triton.jit
def _merged(tops_ptr, totals_ptr, tiles, BLOCK: tl.constexpr):
    top = tl.full((BLOCK,), -FLOAT_MAX, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tops = tl.load(tops_ptr + tile, mask=tile < tiles, other=-FLOAT_MAX)
        totals = tl.load(totals_ptr + tile, mask=tile < tiles, other=0.0)
        new_top = tl.maximum(top, tops)
        # Bounded, as exp(-1e4) is 0: a difference from -FLOAT_MAX would overflow.
        total *= exp(tl.maximum(top - new_top, -1e4))
        total += totals * exp(tl.maximum(tops - new_top, -1e4))
        top = new_top
    row_top = tl.max(top, axis=0)
    return row_top, tl.sum(total * exp(tl.maximum(top - row_top, -1e4)), axis=0)
