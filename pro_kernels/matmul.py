"""The three head matmuls, each by the fastest route the platform has.

    logits  = X W^T (+ bias)      (R, V)
    dHidden = dZ W                (R, H)
    dW      = dZ^T X              (V, H)

On a GPU, and on a CPU with matrix units (AMX) for the dtype, that is ``torch.mm`` as it stands. On
an x86 CPU without them the low-precision matmul is slower than the fp32 one (measured in
docs/design.md), so the operands are upcast tile by tile and multiplied in fp32: no more memory
than ``WORKSPACE``, the same or a smaller rounding error.

Legend: ``R`` rows, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
import os
import platform

import torch
from torch import Tensor

from pro_kernels.options import constant_while_compiling

# Bytes of fp32 workspace a blocked matmul may use; the planner counts it outside the budget.
WORKSPACE = 16 << 20
# Rows per tile: enough to keep fp32 matmuls at full rate, few enough for wide column blocks.
TILE_ROWS = 4096
_LOW = (torch.bfloat16, torch.float16)


@constant_while_compiling
def upcasts(dtype: torch.dtype, device_type: str) -> bool:
    """Whether matmuls of this dtype run in fp32 by blocks on this device.

    ``PRO_KERNELS_MATMUL=native|fp32`` overrides it (read once per process).
    """
    return _upcasts(dtype, device_type)


@functools.cache
def _upcasts(dtype: torch.dtype, device_type: str) -> bool:
    if dtype not in _LOW or device_type != "cpu":
        return False
    choice = os.environ.get("PRO_KERNELS_MATMUL", "auto")
    if choice not in ("auto", "native", "fp32"):
        raise ValueError(f"PRO_KERNELS_MATMUL must be auto, native or fp32, got {choice!r}")
    if choice != "auto":
        return choice == "fp32"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    has_amx = "_is_amx_tile_supported" if dtype == torch.bfloat16 else "_is_amx_fp16_supported"
    return not getattr(torch.cpu, has_amx, lambda: False)()


def column_block(rows: int, hidden: int, vocab: int) -> int:
    """Vocabulary columns per block so that the fp32 operands of one tile fit the workspace."""
    block = WORKSPACE // (4 * (min(rows, TILE_ROWS) + hidden)) // 64 * 64
    return max(64, min(block, vocab))


def logits_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``out[R, V] = x weight^T + bias`` in out's dtype (fp32 from low inputs is fp32 maths)."""
    if out.dtype == x.dtype == weight.dtype and not upcasts(x.dtype, x.device.type):
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    work = _Workspace(x, weight.shape[0])
    for rows in work.tiles:
        tile = x[rows].float()
        for cols in work.blocks:
            part = torch.mm(tile, work.wide(weight[cols]).t(), out=work.rows(rows, cols))
            if bias is not None:
                part += bias[cols]
            out[rows, cols] = part
    return out


def hidden_grad(dz: Tensor, weight: Tensor) -> Tensor:
    """``dz weight`` as ``(R, H)``: fp32 where the maths is fp32, else the weight's dtype."""
    if not upcasts(dz.dtype, dz.device.type):
        return torch.mm(dz, weight)
    out = dz.new_zeros((dz.shape[0], weight.shape[1]), dtype=torch.float32)
    work = _Workspace(out, dz.shape[1])
    for rows in work.tiles:
        for cols in work.blocks:
            part = work.rows(rows, cols).copy_(dz[rows, cols])
            out[rows].addmm_(part, work.wide(weight[cols]))
    return out


def weight_grad(dz: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """``out = dz^T x``, or ``out += dz^T x``; accumulation needs an fp32 (or wider) ``out``."""
    if upcasts(dz.dtype, dz.device.type):
        return _weight_grad_by_tiles(dz, x, out, accumulate)
    if dz.dtype == x.dtype == out.dtype:
        return out.addmm_(dz.t(), x) if accumulate else torch.mm(dz.t(), x, out=out)
    # A wider out: by blocks of columns, so that the product beside it stays small.
    for cols in _slices(dz.shape[1], column_block(x.shape[0], x.shape[1], dz.shape[1])):
        part = _mm_fp32(dz[:, cols].t().to(x.dtype), x)
        out[cols] = out[cols] + part if accumulate else part
    return out


def _weight_grad_by_tiles(dz: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    work = _Workspace(x, dz.shape[1])
    for cols in work.blocks:
        total = work.columns(cols)
        for rows in work.tiles:
            part = work.rows(rows, cols).copy_(dz[rows, cols]).t()
            # beta = 0 ignores what the buffer holds, NaN included.
            total.addmm_(part, x[rows].float(), beta=float(rows.start > 0))
        out[cols] = out[cols] + total if accumulate else total
    return out


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, on a GPU with the fp32 sums unrounded (elsewhere no such output is to be had)."""
    if a.is_cuda and a.dtype in _LOW:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


class _Workspace:
    """Two fp32 buffers for a tile of rows by a block of columns, reused from block to block."""

    def __init__(self, side: Tensor, vocab: int) -> None:
        n, width = side.shape
        block = column_block(n, width, vocab)
        self.blocks = _slices(vocab, block)
        # No rows are one empty tile: sums over them are 0.
        self.tiles = _slices(n, TILE_ROWS) or [slice(0, 0)]
        block = min(block, vocab)
        self._rows = side.new_empty(min(n, TILE_ROWS) * block, dtype=torch.float32)
        self._columns = side.new_empty((block, width), dtype=torch.float32)

    def rows(self, rows: slice, cols: slice) -> Tensor:
        """(tile, block)."""
        shape = rows.stop - rows.start, cols.stop - cols.start
        return self._rows[: shape[0] * shape[1]].view(shape)

    def columns(self, cols: slice) -> Tensor:
        """(block, H)."""
        return self._columns[: cols.stop - cols.start]

    def wide(self, weight: Tensor) -> Tensor:
        """The weight's block (block, H) in fp32."""
        return self._columns[: weight.shape[0]].copy_(weight)
