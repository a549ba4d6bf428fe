"""The thin (N, H) sides of the head matmuls: hidden states gathered, gradients scattered.

By the backend's own kernels where it has them, else in plain PyTorch.

Legend: ``N`` scored rows, ``R`` rows of the hidden states, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pro_kernels.fused import matmul
from pro_kernels.fused.call import Call
from pro_kernels.fused.pages import in_huge_pages


@dataclass(frozen=True)
class Rows:
    """Which rows of the hidden states tokens read, and by what they multiply them.

    A ``logit_scale`` of each token acts here, on the thin sides of all three matmuls: the head sees
    ``s X``, so no pass over logits knows of it. Where 16-bit operands give fp32 logits, ``s X``
    would round what those are there for, and the logits' own matmul takes the scale (``late``).
    """

    at: Tensor  # (N,) int64
    scale: Tensor | None = None  # (N,) fp32 (fp64); None: 1

    def __len__(self) -> int:
        return self.at.shape[0]

    def __getitem__(self, tokens: slice) -> Rows:
        return Rows(self.at[tokens], None if self.scale is None else self.scale[tokens])

    def late(self, call: Call) -> Tensor | None:
        """The scale that logits get after their matmul."""
        return self.scale if call.wide_logits else None

    def times(self, weights: Tensor) -> Tensor:
        """``weights`` (N,) times the scale."""
        return weights if self.scale is None else weights * self.scale


def operand_dtype(call: Call, like: Tensor) -> torch.dtype:
    """Dtype in which the matmuls really run."""
    upcasts = matmul.upcasts(call.compute_dtype, like.device.type)
    return torch.float32 if upcasts else call.compute_dtype


def side_dtype(call: Call, like: Tensor) -> torch.dtype:
    """Dtype of dZ0 W: fp32 where the matmul can leave its sums so, rounded with w once."""
    return matmul.sums_dtype(call.compute_dtype, like.device.type)


def rows_of(call: Call, hidden: Tensor, rows: Rows) -> Tensor:
    """The hidden states of these rows, in the dtype of the matmuls; scaled, unless logits are."""
    scale = None if call.wide_logits else rows.scale
    return _gathered(call, hidden, rows.at, scale, call.compute_dtype)


def weighted_rows(call: Call, hidden: Tensor, rows: Rows, weights: Tensor) -> Tensor:
    """``w * X`` for the dW matmul, rounded once, and only as far as that matmul reads it."""
    return _gathered(call, hidden, rows.at, rows.times(weights), operand_dtype(call, hidden))


def _gathered(
    call: Call, hidden: Tensor, rows: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if call.kernels.gather_rows:
        return call.kernels.gather_rows(hidden, rows, weights, dtype)
    x = hidden.index_select(0, rows)
    return x.to(dtype) if weights is None else x.to(weights.dtype).mul_(weights[:, None]).to(dtype)


def target_logits(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor | None:
    """Raw target logits as fp32 dot products, where the logits themselves are rounded."""
    if not call.rounds_logits:
        return None
    if call.kernels.target_logits:
        return call.kernels.target_logits(x, weight, bias, targets)
    exact = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    for i in range(0, x.shape[0], 1024):
        at = slice(i, i + 1024)
        w = weight.index_select(0, targets[at]).float()
        torch.sum(w.mul_(x[at]), 1, out=exact[at])
    return exact if bias is None else exact + bias[targets].float()


def scatter_rows(
    call: Call,
    side: Tensor,  # (N, H): dZ0 W
    weights: Tensor,  # (N,)
    tokens: Rows,
    out: Tensor,  # (R, H), zeros on entry
) -> None:
    """``out[rows] += weights * side``; in fp32, in a fixed order, where rows are shared."""
    shared, rows, weights = call.shared_rows, tokens.at, tokens.times(weights)
    if call.kernels.scatter_rows:
        call.kernels.scatter_rows(side, weights, rows, out, shared)
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
