"""The three head matmuls, each by the fastest route the platform has.

    logits  = X W^T (+ bias)      (R, V)
    dHidden = dZ W                (R, H)
    dW      = dZ^T X              (V, H)

On a GPU, and on a CPU with matrix units (AMX) for the dtype, that is ``torch.mm`` as it stands. On
an x86 CPU without them the low-precision matmul is slower than the fp32 one (measured in
docs/design.md), so the operands are upcast a block of vocabulary columns at a time and multiplied
in
fp32: no more memory than ``WORKSPACE``, the same or a smaller rounding error.

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
WORKSPACE = 32 << 20
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
    """Vocabulary columns per block so that the fp32 operands fit the workspace."""
    block = WORKSPACE // (4 * (rows + hidden)) // 64 * 64
    return max(64, min(block, vocab))


def logits_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``out[R, V] = x weight^T + bias`` in out's dtype (fp32 from low inputs is fp32 maths)."""
    if out.dtype == x.dtype and not upcasts(x.dtype, x.device.type):
        torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(
            bias, x, weight.t(), out=out
        )
        return out
    x = x.float()
    for cols, w in _upcast_blocks(weight, x.shape[0]):
        part = torch.mm(x, w.t())
        if bias is not None:
            part += bias[cols]
        out[:, cols] = part
    return out


def hidden_grad(dz: Tensor, weight: Tensor) -> Tensor:
    """``dz weight`` as ``(R, H)``: fp32 where the maths is fp32, else the weight's dtype."""
    if not upcasts(dz.dtype, dz.device.type):
        return torch.mm(dz, weight)
    out = torch.zeros(dz.shape[0], weight.shape[1], dtype=torch.float32)
    for cols, w in _upcast_blocks(weight, dz.shape[0]):
        out.addmm_(dz[:, cols].float(), w)
    return out


def weight_grad(dz: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """``out = dz^T x``, or ``out += dz^T x``; accumulation needs an fp32 (or wider) ``out``."""
    if not upcasts(dz.dtype, dz.device.type) and dz.dtype == out.dtype:
        return out.addmm_(dz.t(), x) if accumulate else torch.mm(dz.t(), x, out=out)
    if upcasts(dz.dtype, dz.device.type):
        x = x.float()
    for cols in _column_slices(dz.shape[1], column_block(x.shape[0], x.shape[1], dz.shape[1])):
        part = torch.mm(dz[:, cols].t().to(x.dtype), x)
        out[cols] = out[cols] + part if accumulate else part
    return out


def _upcast_blocks(weight: Tensor, rows: int):  # noqa: ANN202
    vocab, hidden = weight.shape
    for cols in _column_slices(vocab, column_block(rows, hidden, vocab)):
        yield cols, weight[cols].float()


def _column_slices(vocab: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, vocab)) for i in range(0, vocab, block)]
