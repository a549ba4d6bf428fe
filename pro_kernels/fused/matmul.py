"""The three head matmuls, each by the fastest route the platform has.

    logits  = X W^T (+ bias)      (R, V)
    dHidden = dZ W                (R, H)
    dW      = dZ^T X              (V, H)

On a CPU with matrix units (AMX) for the dtype, or an AMD one with bf16 dot products, that is
``torch.mm`` as it stands. On other x86 CPUs the low-precision matmul is slower than the fp32 one
(measured in docs/design.md), so the operands are upcast tile by tile and multiplied in fp32: no
more memory than ``WORKSPACE``, the same or a smaller rounding error. On an NVIDIA GPU a 16-bit
matmul sums in fp32 and may leave the sums as they are (``out_dtype``): fp32 logits, dZ W and the dW
of several chunks are made that way, from 16-bit operands and with no pass after them.

Legend: ``R`` rows, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pro_kernels.options import constant_while_compiling, setting

# Bytes of fp32 workspace a blocked matmul may use.
WORKSPACE = 16 << 20
# The same on a GPU, where small blocks cost launches.
GPU_WORKSPACE = 256 << 20
# Rows per tile: enough to keep fp32 matmuls at full rate, few enough for wide column blocks.
TILE_ROWS = 4096
# Rows of every matmul of a batch-invariant call.
INVARIANT_ROWS = 128
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
    choice = setting("PRO_KERNELS_MATMUL", ("auto", "native", "fp32"), "auto")
    if choice != "auto":
        return choice == "fp32"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if dtype == torch.float16:
        return not _has("_is_amx_fp16_supported")
    fast_dot = _has("_is_avx512_bf16_supported") and _is_amd()
    return not (fast_dot or _has("_is_amx_tile_supported"))


def _has(check: str) -> bool:
    """What torch says of this CPU; an older one that does not know: no."""
    return bool(getattr(torch.cpu, check, lambda: False)())


def _is_amd() -> bool:
    """Zen 4 and newer do two bf16 multiplications in the time of one in fp32, Intel's do not."""
    try:
        with open("/proc/cpuinfo") as f:
            return "AuthenticAMD" in f.read()
    except OSError:  # not Linux
        return "AuthenticAMD" in platform.processor()


@constant_while_compiling
def leaves_sums(dtype: torch.dtype, device_type: str) -> bool:
    """Whether a matmul of this dtype can write its fp32 sums unrounded.

    ``aten::mm.dtype_out`` and ``aten::addmm.dtype_out`` exist for CUDA only and want compute
    capability 8.0: both operands of one 16-bit dtype, ``out`` and the input of ``addmm`` fp32.
    """
    if dtype not in _LOW or device_type != "cuda" or not _ampere_or_newer():
        return False
    return not _refused(accumulate=False)


@functools.cache
def _ampere_or_newer() -> bool:
    """Every card here; True where there is none, as plans for one are made then."""
    if torch.version.hip is not None:
        return False
    cards = range(torch.cuda.device_count())
    return all(torch.cuda.get_device_capability(i) >= (8, 0) for i in cards)


@functools.cache
def _refused(accumulate: bool) -> bool:
    """Whether this PyTorch refuses such a matmul: it says so before anything is launched."""
    if not torch.cuda.is_available():  # a plan for a card that is not here
        return False
    with _disable_current_modes():  # fake tensors, while compiling, would not tell
        operand = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
        out = torch.zeros(16, 16, device="cuda")
        try:
            _mm_fp32(operand, operand, out, accumulate)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError):
            return True
    return False


def mm_fp32(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """``out = a b`` or ``out += a b``, out fp32, where ``leaves_sums``."""
    if not (accumulate and _refused(accumulate=True)):
        return _mm_fp32(a, b, out, accumulate)
    step = max(64, workspace(out.device.type) // (4 * max(1, out.shape[1])))
    for rows in _slices(out.shape[0], step):
        out[rows] += torch.mm(a[rows], b, out_dtype=torch.float32)
    return out


def _mm_fp32(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    if accumulate:  # beta = 1: out is read and written once, by the matmul's epilogue
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def workspace(device_type: str) -> int:
    """Bytes that fp32 copies of 16-bit operands may take at a time."""
    return GPU_WORKSPACE if device_type == "cuda" else WORKSPACE


def column_block(rows: int, hidden: int, vocab: int, device_type: str = "cpu") -> int:
    """Vocabulary columns per block so that the fp32 operands of one tile fit the workspace."""
    block = workspace(device_type) // (4 * (min(rows, TILE_ROWS) + hidden)) // 64 * 64
    return max(64, min(block, vocab))


def logits_into(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    """``out[R, V] = x weight^T + bias`` in out's dtype (fp32 from low inputs is fp32 maths).

    ``scale`` (R,): factors of the rows of fp32 logits from 16-bit operands; then there is no bias.
    """
    native = x.dtype == weight.dtype and not upcasts(x.dtype, x.device.type)
    if native and out.dtype == x.dtype:
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    if native and out.dtype == torch.float32 and leaves_sums(x.dtype, x.device.type):
        mm_fp32(x, weight.t(), out)
        if scale is not None:
            out.mul_(scale[:, None])
        return out if bias is None else out.add_(bias)
    work = _Workspace(x, weight.shape[0])
    for rows in work.tiles:
        tile = x[rows].float()
        if scale is not None:
            tile = tile * scale[rows, None]
        for cols in work.blocks:
            part = torch.mm(tile, work.wide(weight[cols]).t(), out=work.rows(rows, cols))
            if bias is not None:
                part += bias[cols]
            out[rows, cols] = part
    return out


def logits_by_tiles(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    """``logits_into`` by matmuls of ``INVARIANT_ROWS`` rows each; fewer rows are filled with zeros.

    Libraries choose their kernel, and so the order of a sum, by the shape: of one shape a row's
    sums do not depend on how many others there are. The last tile repeats rows of that before.
    """
    n = x.shape[0]
    if n < INVARIANT_ROWS:
        more = INVARIANT_ROWS - n
        x = torch.nn.functional.pad(x, (0, 0, 0, more))
        scale = None if scale is None else torch.nn.functional.pad(scale, (0, more))
        filled = out.new_empty(INVARIANT_ROWS, out.shape[1])
        return out.copy_(logits_into(filled, x, weight, bias, scale)[:n])
    for i in range(0, n, INVARIANT_ROWS):
        first = min(i, n - INVARIANT_ROWS)
        rows = slice(first, first + INVARIANT_ROWS)
        logits_into(out[rows], x[rows], weight, bias, None if scale is None else scale[rows])
    return out


def sums_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Dtype of ``dz weight``: fp32 where the sums can be had unrounded."""
    sums = upcasts(dtype, device_type) or leaves_sums(dtype, device_type)
    return torch.float32 if sums else dtype


def hidden_grad(dz: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``out[R, H] = dz weight``, in the ``sums_dtype`` of dz."""
    if out is None:
        dtype = sums_dtype(dz.dtype, dz.device.type)
        out = dz.new_empty((dz.shape[0], weight.shape[1]), dtype=dtype)
    if upcasts(dz.dtype, dz.device.type):
        out.zero_()
        work = _Workspace(out, dz.shape[1])
        for rows in work.tiles:
            for cols in work.blocks:
                part = work.rows(rows, cols).copy_(dz[rows, cols])
                out[rows].addmm_(part, work.wide(weight[cols]))
        return out
    if out.dtype == dz.dtype:
        return torch.mm(dz, weight, out=out)
    return mm_fp32(dz, weight, out)


def weight_grad(dz: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """``out = dz^T x``, or ``out += dz^T x``; accumulation needs an fp32 (or wider) ``out``."""
    device = dz.device.type
    if upcasts(dz.dtype, device):
        return _weight_grad_by_tiles(dz, x, out, accumulate)
    if dz.dtype == x.dtype == out.dtype:
        return out.addmm_(dz.t(), x) if accumulate else torch.mm(dz.t(), x, out=out)
    if dz.dtype == x.dtype and out.dtype == torch.float32 and leaves_sums(x.dtype, device):
        return mm_fp32(dz.t(), x, out, accumulate)
    # Operands or result of another dtype: by blocks of columns, so that the copies stay small.
    for cols in _slices(dz.shape[1], column_block(x.shape[0], x.shape[1], dz.shape[1], device)):
        part = torch.mm(dz[:, cols].t().to(x.dtype), x)
        out[cols] = out[cols] + part if accumulate else part
    return out


def _weight_grad_by_tiles(dz: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    work = _Workspace(x, dz.shape[1])
    for cols in work.blocks:
        total = out[cols] if out.dtype == torch.float32 else work.columns(cols)
        for rows in work.tiles:
            part = work.rows(rows, cols).copy_(dz[rows, cols]).t()
            # beta = 0 ignores what the buffer holds, NaN included.
            total.addmm_(part, x[rows].float(), beta=float(accumulate or rows.start > 0))
        if out.dtype != torch.float32:
            out[cols] = total
    return out


def _slices(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


class _Workspace:
    """Two fp32 buffers for a tile of rows by a block of columns, reused from block to block."""

    def __init__(self, side: Tensor, vocab: int) -> None:
        n, width = side.shape
        block = column_block(n, width, vocab, side.device.type)
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
