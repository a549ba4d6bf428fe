"""The thin (N, H) sides of the head matmuls: hidden states gathered, gradients scattered.

By the backend's own kernels where it has them, else in plain PyTorch.

Legend: ``N`` scored rows, ``R`` rows of the hidden states, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pro_kernels.fused import matmul
from pro_kernels.fused.call import Call


class Inputs(NamedTuple):
    """What goes into the head: some tokens, and what their hidden states are multiplied by.

    A ``logit_scale`` of each token acts here, on the thin sides of all three matmuls: the head sees
    ``s X``, so no pass over logits knows of it. Where 16-bit operands give fp32 logits, ``s X``
    would round what those are there for, and the logits' own matmul takes the scale (``late``).
    """

    call: Call
    hidden: Tensor  # (R, H)
    weight: Tensor  # (V, H) and
    bias: Tensor | None  # (V,) in compute_dtype; None both in a backward that multiplies by neither
    rows: Tensor  # (N,) int64: which row of hidden a token reads
    targets: Tensor  # (N,)
    scale: Tensor | None = None  # (N,) fp32 (fp64); None: 1

    @property
    def tokens(self) -> int:
        """N."""
        return self.rows.shape[0]

    def part(self, at: slice) -> Inputs:
        """Some of the tokens; itself where they are all, as a single chunk has it."""
        if at.stop - at.start == self.tokens:
            return self
        scale = None if self.scale is None else self.scale[at]
        return self._replace(rows=self.rows[at], targets=self.targets[at], scale=scale)

    @property
    def late(self) -> Tensor | None:
        """The scale that logits get after their matmul."""
        return self.scale if self.call.wide_logits else None

    @property
    def operand_dtype(self) -> torch.dtype:
        """Dtype in which the matmuls really run."""
        upcasts = matmul.upcasts(self.call.compute_dtype, self.hidden.device.type)
        return torch.float32 if upcasts else self.call.compute_dtype

    def times(self, weights: Tensor) -> Tensor:
        """``weights`` (N,) times the scale."""
        return weights if self.scale is None else weights * self.scale

    def x(self) -> Tensor:
        """The hidden states, in the dtype of the matmuls; scaled, unless logits are."""
        scale = None if self.call.wide_logits else self.scale
        return self._gathered(scale, self.call.compute_dtype)

    def weighted(self, weights: Tensor) -> Tensor:
        """``w * X`` for the dW matmul, rounded once, and only as far as that matmul reads it."""
        return self._gathered(self.times(weights), self.operand_dtype)

    def _gathered(self, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        gather = self.call.kernels.gather_rows
        if gather:
            return gather(self.hidden, self.rows, weights, dtype)
        x = self.hidden.index_select(0, self.rows)
        if weights is not None:
            x = x.to(weights.dtype).mul_(weights[:, None])
        return x.to(dtype)

    def target_logits(self, x: Tensor, targets: Tensor) -> Tensor | None:
        """Raw target logits as fp32 dot products, where the logits themselves are rounded."""
        if not self.call.rounds_logits:
            return None
        if own := self.call.kernels.target_logits:
            return own(x, self.weight, self.bias, targets)
        exact = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        for i in range(0, x.shape[0], 1024):
            at = slice(i, i + 1024)
            w = self.weight.index_select(0, targets[at]).float()
            torch.sum(w.mul_(x[at]), 1, out=exact[at])
        return exact if self.bias is None else exact + self.bias[targets].float()

    def scatter(self, side: Tensor, weights: Tensor, out: Tensor) -> None:
        """``out[rows] += weights * side``, (R, H) and (N, H); out holds zeros on entry.

        In fp32, in a fixed order, where rows are shared.
        """
        shared, rows, weights = self.call.shared_rows, self.rows, self.times(weights)
        if own := self.call.kernels.scatter_rows:
            own(side, weights, rows, out, shared)
            return
        acc = out.float() if shared and out.itemsize < 4 else out
        for i in range(0, rows.shape[0], 4096):
            at = slice(i, i + 4096)
            part = (side[at].to(weights.dtype) * weights[at, None]).to(acc.dtype)
            if shared:
                _sum_rows(acc, rows[at], part)
            else:
                acc.index_copy_(0, rows[at], part)
        if acc is not out:
            out.copy_(acc)


def add_rows(
    out: Tensor,  # (R, D)
    rows: Tensor,  # (N,)
    weights: Tensor,  # (N,) fp32, or fp64
    x: Tensor,  # (N, D)
) -> None:
    """``out[rows] += weights * x``: what rows share is summed in fp32, and rounded once.

    A row's terms are added in a fixed order.
    """
    n, width = x.shape
    if not n:
        return
    ordered, order = rows.sort(stable=True)
    group = torch.nn.functional.pad((ordered.diff() != 0).cumsum(0), (1, 0))
    x, weights = x[order], weights[order, None]
    step = max(1, matmul.workspace(x.device.type) // (2 * weights.itemsize * n))
    for i in range(0, width, step):
        at = slice(i, i + step)
        part = weights * x[:, at]
        sums = torch.zeros_like(part)
        _sum_rows(sums, group, part)
        # All rows of a group write the same.
        total = torch.index_select(sums, 0, group, out=part).add_(out[ordered, at])
        out[:, at].index_copy_(0, ordered, total.to(out.dtype))


def _sum_rows(out: Tensor, rows: Tensor, x: Tensor) -> None:
    """``out[rows] += x``, in a fixed order."""
    if out.is_cuda:  # sorted; index_add_ would be atomic there
        out.index_put_((rows,), x, accumulate=True)
    else:  # row after row; index_put_ is atomic here
        out.index_add_(0, rows, x)


def empty_rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised ``(rows, columns)``, the rows 16 bytes apart or a multiple of it.

    What cuBLAS and vector loads are fast with, and what makes the CUDA kernels split every row
    alike: a row's bits must not depend on where it stands.
    """
    step = max(1, 16 // dtype.itemsize)
    memory = in_huge_pages(like.new_empty((rows, -(-columns // step) * step), dtype=dtype))
    clear_behind(memory, columns)
    return memory[:, :columns]


def clear_behind(memory: Tensor, columns: int) -> None:
    """Zeros behind the first ``columns`` of each row, where they are to be multiplied on a CPU.

    oneDNN's bf16 matmul on AMX reads what lies between rows, and times 0 a NaN there is a NaN.
    """
    if memory.device.type == "cpu" and memory.shape[1] > columns:
        memory[:, columns : columns + 64 // memory.itemsize] = 0  # a row of an AMX tile


# A fresh buffer is zeroed by the system page by page when it is first written. In pages of 4 KB a
# bf16 loss took 1.16 of its matmuls' time, in those of 2 MB 1.06 (1024 rows, H 576, V 49152, one
# thread of an AMD EPYC).
_WORTH, _PAGE, _HUGE = 8 << 20, 2 << 20, 14  # the last: MADV_HUGEPAGE


def in_huge_pages(x: Tensor) -> Tensor:
    """``x``, new memory on a CPU; where the system has no huge pages nothing changes."""
    if x.device.type == "cpu" and type(x) is Tensor and x.nbytes >= _WORTH and _advise():
        start = -(-x.data_ptr() // _PAGE) * _PAGE
        end = (x.data_ptr() + x.nbytes) // _PAGE * _PAGE
        _advise()(start, end - start, _HUGE)  # type: ignore[misc]
    return x


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
