"""Passes over dZ0 for ``grad_filter``; what is not here is plain PyTorch (fused/column_groups.py).

Legend: ``R`` rows, ``V`` columns, ``G`` groups of rows; ``b`` bytes of an element. Bytes moved:

    count_large   R V b                  one program a row
    sums          R V b + 4 G V          one program a group and BLOCK columns
    compact_      R V (b + 9)            one program a row; and twice b for each kept entry

All arithmetic is fp32. Never run on a GPU: compiled ahead of time, and run interpreted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pro_kernels.backends.triton import configs
from pro_kernels.backends.triton.launch import _launch, _read, _written


@triton.jit(do_not_specialize=["threshold"])
def count_kernel(dz, need_ptr, threshold, V, BLOCK: tl.constexpr):
    """Count the entries of a row that are larger."""
    dz_ptr, stride = dz
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(dz_ptr + row * stride + cols, mask=cols < V, other=0.0).to(tl.float32)
        count += (tl.abs(x) > threshold).to(tl.int32)
    tl.store(need_ptr + row, tl.sum(count).to(tl.int64))


@triton.jit(do_not_specialize=["R", "SIZE"])
def sums_kernel(dz, order_ptr, sums_ptr, R, V, SIZE, BLOCK: tl.constexpr):
    """Sum some columns over the rows of a group."""
    dz_ptr, stride = dz
    group = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(group * SIZE, tl.minimum(R, group * SIZE + SIZE)):
        row = tl.load(order_ptr + i)
        x = tl.load(dz_ptr + row * stride + cols, mask=cols < V, other=0.0).to(tl.float32)
        total += tl.abs(x)
    tl.store(sums_ptr + group * V + cols, total, mask=cols < V)


@triton.jit(do_not_specialize=["R", "SIZE"])
def compact_kernel(
    dz,  # pointer to (R, V) and its row stride
    order_ptr,  # (R,) int64
    starts_ptr,  # (G + 1,) int64
    columns_ptr,  # (starts[-1],) int32
    kept_ptr,  # (G, V) uint8
    weights_ptr,  # (2, V) fp32
    lost_ptr,  # (3, R) fp32
    R,
    V,
    SIZE,
    MOVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum what a row loses, and move what it keeps to its front."""
    dz_ptr, stride = dz
    i = tl.program_id(0).to(tl.int64)
    row, group = tl.load(order_ptr + i), i // SIZE
    dz_ptr += row * stride
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.zeros([BLOCK], dtype=tl.float32)
    second = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        kept = tl.load(kept_ptr + group * V + cols, mask=cols < V, other=1)
        x = tl.load(dz_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        x = tl.where(kept == 0, tl.abs(x), 0.0)
        mass += x
        first += x * tl.load(weights_ptr + cols, mask=cols < V, other=0.0)
        second += x * tl.load(weights_ptr + V + cols, mask=cols < V, other=0.0)
    tl.store(lost_ptr + row, tl.sum(mass))
    tl.store(lost_ptr + R + row, tl.sum(first))
    tl.store(lost_ptr + 2 * R + row, tl.sum(second))
    if MOVE:
        begin = tl.load(starts_ptr + group)
        count = tl.load(starts_ptr + group + 1) - begin
        # Columns ascend, so no block writes what a later one reads; the barriers keep the threads
        # of one block from writing before all have read.
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            cols = tl.load(columns_ptr + begin + place, mask=place < count, other=0)
            x = tl.load(dz_ptr + cols, mask=place < count, other=0.0)
            tl.debug_barrier()
            tl.store(dz_ptr + place, x, mask=place < count)
            tl.debug_barrier()


def count_large(dz: Tensor, threshold: float) -> Tensor:
    """How many entries of each row are larger, (R,) int64."""
    need = dz.new_empty(dz.shape[0], dtype=torch.int64)
    grid, numbers = (dz.shape[0],), (threshold, dz.shape[1])
    _launch(
        count_kernel, dz.device, grid, (_read(dz),), (need,), numbers, BLOCK=configs.FILTER_BLOCK
    )
    return need


def sums(dz: Tensor, order: Tensor, size: int) -> Tensor:
    """Sums of the entries of each group of rows, (G, V) fp32."""
    rows, vocab = dz.shape
    out = dz.new_empty((-(-rows // size), vocab), dtype=torch.float32)
    grid, numbers = (out.shape[0], -(-vocab // configs.FILTER_BLOCK)), (rows, vocab, size)
    _launch(
        sums_kernel,
        dz.device,
        grid,
        (_read(dz),),
        (order, out),
        numbers,
        BLOCK=configs.FILTER_BLOCK,
    )
    return out


def compact_(dz: Tensor, groups: Any, weights: Tensor, move: bool = True) -> Tensor:
    """Move what is kept to the front of each row, and tell what leaves, (3, R) fp32."""
    rows, vocab = dz.shape
    lost = dz.new_empty((3, rows), dtype=torch.float32)
    starts = groups.starts.to(dz.device, non_blocking=True)
    places = torch.arange(groups.columns.shape[0], device=dz.device)
    group = torch.searchsorted(starts, places, right=True) - 1
    kept = dz.new_zeros((len(starts) - 1, vocab), dtype=torch.uint8)
    kept.view(-1).index_fill_(0, group * vocab + groups.columns, 1)
    vectors = groups.order, starts, groups.columns, kept, weights, lost
    numbers = rows, vocab, groups.size
    _launch(
        compact_kernel, dz.device, (rows,), (_written("dz", dz),), vectors, numbers,
        MOVE=move, BLOCK=configs.FILTER_BLOCK, num_warps=8,
    )  # fmt: skip
    return lost
