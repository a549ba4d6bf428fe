"""What the two backends behind a C ABI share: loading a library, and tensors as its arguments.

Legend: ``N`` rows, ``V`` columns.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pro_kernels.options import RankingOptions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # DType in csrc/cpu/dtype.h
LIB = Path(__file__).resolve().parent.parent / "lib"

_TYPES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "s": ctypes.c_char_p,
}

Signatures = dict[str, tuple["str | None", str]]  # name -> (result, arguments)


def build_info(folder: Path, part: str) -> dict:
    """How a library was built, or why not: what setup.py wrote about ``part``."""
    try:
        return json.loads((folder / "build.json").read_text())[part]
    except (FileNotFoundError, KeyError):
        command = "python setup.py build_native --inplace"
        return {"reason": f"never built ({command}, or pip install)"}


def open_library(
    path: Path, signatures: Signatures, abi_function: str, abi: int
) -> tuple[ctypes.CDLL | None, str | None]:
    """The library at ``path``, or why it cannot be used.

    Args:
        path: the shared library.
        signatures: name -> (result, arguments), letters of ``_TYPES``; a pointer is "p".
        abi_function: name of the function that tells the version of the ABI.
        abi: the version these signatures are of.
    """
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype = _TYPES[result] if result else None
            function.argtypes = [_TYPES[a] for a in arguments]
    except (OSError, AttributeError) as error:
        return None, f"{path} does not load: {error}"
    found = getattr(library, abi_function)()
    if found != abi:
        return None, f"{path} is of another version (ABI {found}, need {abi})"
    return library, None


def matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    """Arguments that describe logits: dtype, pointer, rows, columns, row stride."""
    rows, columns = x.shape
    return CODES[x.dtype], x.data_ptr(), rows, columns, x.stride(0)


def unit_stride(x: Tensor) -> Tensor:
    """``x`` itself, or a copy, with unit stride along V."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def check_writable(name: str, x: Tensor) -> None:
    """Raise ValueError where rows of ``x`` cannot be written in place."""
    rows, columns = x.shape
    if (columns > 1 and x.stride(1) != 1) or (rows > 1 and x.stride(0) < columns):
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} must have unit stride along V and rows that do not "
            f"overlap, got strides {x.stride()}"
        )


def check_gradient(out: Tensor, logits: Tensor) -> None:
    """Raise ValueError where the gradient of ``logits`` cannot be written to ``out``."""
    check_writable("out", out)
    if out.shape != logits.shape or out.dtype != logits.dtype:
        raise ValueError(
            f"out must be {tuple(logits.shape)} {logits.dtype} like logits, got "
            f"{tuple(out.shape)} {out.dtype}"
        )


def vector(x: Tensor, dtype: torch.dtype, logits: Tensor) -> Tensor:
    """One number a row of ``logits``, dense, of ``dtype``."""
    assert x.shape[0] == logits.shape[0] and x.dim() == 1, (x.shape, logits.shape)
    return dense(x, dtype)


def optional(x: Tensor | None, dtype: torch.dtype, logits: Tensor) -> Tensor | None:
    """The same, or None."""
    return None if x is None else vector(x, dtype, logits)


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as a contiguous tensor of ``dtype``."""
    return x.contiguous() if x.dtype == dtype else x.to(dtype).contiguous()


def empty(logits: Tensor) -> Tensor:
    """Room for one fp32 number a row of ``logits``."""
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def pointer(x: Tensor | None) -> int | None:
    """The data pointer; null for None."""
    return None if x is None else x.data_ptr()


@dataclass(frozen=True)
class RankingCall:
    """Arguments of a library's ranking function but the last; ``held`` keeps their memory."""

    arguments: tuple
    outputs: tuple[Tensor, Tensor, Tensor]  # terms (B, n), sums (S,), row weights (N,)
    held: tuple


def ranking_call(
    logps: Tensor,  # (N,)
    offsets: Tensor,  # (S + 1,)
    lengths: Tensor,  # (S,)
    order: Tensor,  # (B, n)
    rewards: Tensor | None,  # (B, n)
    sft_rank: Tensor,  # (B,)
    prompt_weights: Tensor,  # (B,)
    options: RankingOptions,
) -> RankingCall:
    """Dense inputs of the right dtypes, and outputs made like ``logps``, in fp32."""
    logps, prompt_weights = (dense(x, torch.float32) for x in (logps, prompt_weights))
    offsets, lengths = dense(offsets, torch.int64), dense(lengths, torch.int64)
    order, sft_rank = dense(order, torch.int64), dense(sft_rank, torch.int64)
    rewards = None if rewards is None else dense(rewards, torch.float32)
    prompts, n = order.shape
    sequences = lengths.shape[0]
    assert offsets.shape == (sequences + 1,), (offsets.shape, lengths.shape)
    assert sft_rank.shape == prompt_weights.shape == (prompts,), (sft_rank.shape, order.shape)
    assert rewards is None or rewards.shape == order.shape, order.shape
    # Made like logps, whatever torch's default dtype and device are.
    outputs = logps.new_empty(prompts, n), logps.new_empty(sequences), torch.empty_like(logps)
    o = options
    arguments = (
        logps.data_ptr(),
        logps.shape[0],
        offsets.data_ptr(),
        lengths.data_ptr(),
        sequences,
        order.data_ptr(),
        prompts,
        n,
        pointer(rewards),
        sft_rank.data_ptr(),
        prompt_weights.data_ptr(),
        o.length_normalize,
        o.tau,
        o.skip_ties,
        o.eps,
        o.sft_weight,
        o.sft_mean,
        -1 if o.top_k is None else o.top_k,
        o.single_sft,
        *(x.data_ptr() for x in outputs),
    )
    held = (logps, offsets, lengths, order, rewards, sft_rank, prompt_weights)
    return RankingCall(arguments, outputs, held)
