"""The columns that groups of rows of dZ0 keep, and their two matmuls, in plain PyTorch.

A backend may have faster ones (``filtered`` of ``backends/protocol.py``): the functions here are
what each has to do.

Legend: ``R`` rows of a chunk, ``V`` vocabulary, ``H`` hidden, ``G`` groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pro_kernels.fused import matmul


@dataclass(frozen=True)
class Groups:
    """Which rows make a group, and which columns each keeps."""

    order: Tensor  # (R,) int64: the rows of the first group, of the second, ...
    size: int  # rows of a group; the last may have fewer
    starts: Tensor  # (G + 1,) int64 on the CPU: where each group begins in ``columns``
    columns: Tensor  # (starts[-1],) int32, ascending in each group

    @property
    def widest(self) -> int:
        """The most columns that a group keeps."""
        return int(self.starts.diff().max()) if len(self.starts) > 1 else 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and columns of each group."""
        starts = self.starts.tolist()
        for g, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            yield self.order[g * self.size : (g + 1) * self.size], self.columns[start:stop]


def row_sum(weight: Tensor) -> Tensor:
    """The sum of the rows of ``weight (V, H)``, (H,), in fp32 (fp64)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.new_zeros(weight.shape[1], dtype=wide)
    for x in _blocks(weight):
        total.addmv_(x.to(wide).t(), total.new_ones(x.shape[0]))
    return total


def squared_distances(weight: Tensor, centre: Tensor) -> Tensor:
    """Of each row of ``weight (V, H)`` from ``centre (H,)``: (V,), in fp32 (fp64)."""
    centre = centre.to(torch.promote_types(weight.dtype, torch.float32))
    ones = torch.ones_like(centre)
    return torch.cat([torch.mv(torch.sub(x, centre).square_(), ones) for x in _blocks(weight)])


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows that stay in a processor's cache, or are few launches."""
    room = matmul.workspace(weight.device.type) // 32
    return weight.split(max(1, room // max(1, weight.shape[1])))


def count_large(dz: Tensor, threshold: float) -> Tensor:
    """How many entries of each row of ``dz (R, V)`` are larger, (R,) int64."""
    return torch.cat([(x.abs() > threshold).sum(1) for x in dz.split(64)])


def sums(dz: Tensor, order: Tensor, size: int) -> Tensor:
    """Sums of ``|dz|`` over the rows of each group, (G, V) fp32."""
    parts = [dz.index_select(0, rows).float().abs_().sum(0) for rows in order.split(size)]
    return torch.stack(parts)


def compact_(
    dz: Tensor,  # (R, V)
    groups: Groups,  # of its rows
    weights: Tensor,  # (2, V) fp32, contiguous
    move: bool = True,  # whether to move anything
) -> Tensor:
    """Move the columns that each row keeps to its front, and tell what it loses.

    (3, R) fp32: the sum of ``|dz|`` over the columns that leave, and of it times each weight.
    """
    lost = dz.new_empty((3, dz.shape[0]), dtype=torch.float32)
    for rows, columns in groups:
        part = dz.index_select(0, rows)
        kept = part.index_select(1, columns)
        left = part.float().abs_().index_fill_(1, columns.long(), 0.0)
        weighted = [(left * w).sum(1) for w in weights]
        lost.index_copy_(1, rows, torch.stack([left.sum(1), *weighted]))
        if move:
            dz[:, : kept.shape[1]].index_copy_(0, rows, kept)
    return lost


def hidden_grad(
    dz: Tensor,  # (R, V), compact
    groups: Groups,
    weight: Tensor,  # (V, H)
    centre: Tensor,  # (H,)
    stand_ins: Tensor,  # (R,) fp32
    out: Tensor,  # (R, H)
) -> None:
    """``out = dz weight`` of the kept columns, plus ``stand_ins`` times the centre.

    They go through the same matmul, in columns behind the kept ones: so what cancels does so before
    a result is rounded to 16 bits.
    """
    parts = split(stand_ins, weight.dtype)
    for rows, columns in groups:
        count = columns.shape[0]
        part = dz[:, :count].index_select(0, rows).to(weight.dtype)
        own = weight.new_empty(count + parts.shape[1], weight.shape[1])
        torch.index_select(weight, 0, columns, out=own[:count])
        own[count:] = centre
        side = matmul.hidden_grad(torch.cat([part, parts[rows]], 1), own)
        out.index_copy_(0, rows, side.to(out.dtype))


def weight_grad(dz: Tensor, groups: Groups, x: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (V, H) = dz^T x`` of the kept columns, ``x (R, H)``; or ``+=``, in fp32 or wider."""
    total = out if out.itemsize >= 4 else torch.zeros_like(out, dtype=torch.float32)
    if total is out and not accumulate:
        out.zero_()
    for rows, columns in groups:
        part = dz[:, : columns.shape[0]].index_select(0, rows)
        own = total.new_empty(columns.shape[0], x.shape[1])
        total.index_add_(0, columns, matmul.weight_grad(part, x[rows], own, accumulate=False))
    if total is not out:
        out.copy_(total)


def split(total: Tensor, dtype: torch.dtype) -> Tensor:
    """``total (R,)`` as a sum of two numbers of ``dtype``, (R, 2)."""
    high = total.to(dtype)
    return torch.stack([high, (total - high).to(dtype)], 1)
