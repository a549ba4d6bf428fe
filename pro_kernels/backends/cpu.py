"""The CPU backend: C++ (csrc/cpu) behind a plain C ABI, loaded with ctypes.

The functions are those of ``backends/torch.py``; what they mean is written there. The library is
found by its path inside the package, so one build serves every torch version. It must be loaded
after torch: both then run on one OpenMP pool (``libgomp.so.1`` is already in the process).

``PRO_KERNELS_CPU_ISA`` forces an instruction set (``avx512``, ``avx2``, ``neon``, ``generic``).
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

import pro_kernels.backends.native as native
from pro_kernels.options import LogitOptions, RankingOptions, setting

NAME = "cpu"
DTYPES = native.DTYPES
MAX_CANDIDATES = None  # any n

_LIB = native.LIB

# The C ABI (csrc/cpu/pro_kernels_cpu.h); see native.open_library.
_ABI = 2
_SIGNATURES = {
    "pk_cpu_abi": ("i", ""),
    "pk_cpu_isa": ("s", ""),
    "pk_cpu_set_isa": ("i", "s"),
    # dtype, logits, N, V, row stride, targets, target logits, scale, softcap, logp, lse, entropy,
    # threads
    "pk_cpu_logp": (None, "iplllppffpppi"),
    # ..., logp, lse, threads
    "pk_cpu_residual": (None, "iplllppffppi"),
    # dtype, logits, N, V, row stride, lse, targets, weights, target logits, entropy, its weights,
    # first column, scale, softcap, out, out row stride, threads
    "pk_cpu_logits_grad": (None, "iplllpppppplffpli"),
    # logps, N, offsets, lengths, S, order, B, n, rewards, sft rank, prompt weights, the options in
    # the order of RankingOptions, terms, sums, row weights, threads
    "pk_cpu_ranking": (None, "plpplpllpppididdilipppi"),
}


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device`` (None: it can)."""
    if device.type != "cpu":
        return f"tensors are on {device.type}, not on the CPU"
    return _load()[1]


def library_path() -> Path:
    """Where the library is, or would be."""
    return _LIB / "libpro_kernels_cpu.so"


def build_info() -> dict:
    """How the library was built, or why not: compiler, flags, instruction sets, reason."""
    return native.build_info(_LIB, "cpu")


def details() -> dict[str, str]:
    """What ``pro-kernels env`` shows: the library, how it was built, what it runs on."""
    info = build_info()
    if _load()[1] is not None:
        return {"library": "none", "reason": str(_load()[1])}
    return {
        "library": str(library_path()),
        "compiler": info.get("version", "unknown"),
        "instruction set": f"{isa()} (built: {', '.join(info.get('isas', []))})",
        "openmp": str(info.get("openmp")),
    }


def isa() -> str:
    """The instruction set in use."""
    return _library().pk_cpu_isa().decode()


def set_isa(name: str | None) -> None:
    """Use instruction set ``name`` from now on, in the whole process; None: the best one.

    Raises:
        ValueError: this machine or this build does not have it.
    """
    if _library().pk_cpu_set_isa(name.encode() if name is not None else None):
        raise ValueError(
            f"instruction set {name!r} is not available: built {build_info().get('isas')}, and this"
            " processor may lack it"
        )


def logp(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) int64
    *,
    target_logits: Tensor | None = None,  # (N,) fp32
    options: LogitOptions,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read-only statistics of each row: ``(logp, lse, entropy or None)``, each ``(N,)`` fp32."""
    logits = native.unit_stride(logits)
    targets = native.vector(targets, torch.int64, logits)
    exact = native.optional(target_logits, torch.float32, logits)
    out = [native.empty(logits) for _ in range(3 if entropy else 2)]
    _library().pk_cpu_logp(
        *native.matrix(logits),
        targets.data_ptr(),
        native.pointer(exact),
        options.logit_scale,
        options.softcap or 0.0,
        out[0].data_ptr(),
        out[1].data_ptr(),
        out[2].data_ptr() if entropy else None,
        torch.get_num_threads(),
    )
    return out[0], out[1], out[2] if entropy else None


def residual_(
    logits: Tensor,  # (N, V), overwritten
    targets: Tensor,  # (N,)
    *,
    target_logits: Tensor | None = None,
    options: LogitOptions,
) -> tuple[Tensor, Tensor]:
    """Overwrite ``logits`` with ``d logp / d raw`` (unweighted); return ``(logp, lse)``."""
    native.check_writable("logits", logits)
    targets = native.vector(targets, torch.int64, logits)
    exact = native.optional(target_logits, torch.float32, logits)
    logps, lse = native.empty(logits), native.empty(logits)
    _library().pk_cpu_residual(
        *native.matrix(logits),
        targets.data_ptr(),
        native.pointer(exact),
        options.logit_scale,
        options.softcap or 0.0,
        logps.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return logps, lse


def logits_grad(
    logits: Tensor,  # (N, V): columns first_column ... first_column + V of the vocabulary
    lse: Tensor,  # (N,) fp32, over the whole vocabulary
    targets: Tensor,  # (N,), in terms of the whole vocabulary
    weights: Tensor | None,  # (N,) fp32; None = 1
    *,
    target_logits: Tensor | None = None,
    first_column: int = 0,
    options: LogitOptions,
    out: Tensor | None = None,  # may be ``logits`` itself
    entropy: tuple[Tensor, Tensor] | None = None,  # (N,) fp32 each: entropy, its weights
) -> Tensor:
    """``weights * d logp / d raw`` for these columns; rows with a negative target become 0.

    With ``entropy``, plus the second weights times ``d entropy / d raw``.
    """
    if out is None:
        out = logits.new_empty(logits.shape)
    native.check_gradient(out, logits)
    logits = native.unit_stride(logits)
    lse = native.vector(lse, torch.float32, logits)
    targets = native.vector(targets, torch.int64, logits)
    weights = native.optional(weights, torch.float32, logits)
    exact = native.optional(target_logits, torch.float32, logits)
    value, by = (native.optional(x, torch.float32, logits) for x in entropy or (None, None))
    _library().pk_cpu_logits_grad(
        *native.matrix(logits),
        lse.data_ptr(),
        targets.data_ptr(),
        native.pointer(weights),
        native.pointer(exact),
        native.pointer(value),
        native.pointer(by),
        first_column,
        options.logit_scale,
        options.softcap or 0.0,
        out.data_ptr(),
        out.stride(0),
        torch.get_num_threads(),
    )
    return out


def ranking(
    logps: Tensor,  # (N,) fp32; the tokens of a sequence are contiguous, unscored ones hold 0
    offsets: Tensor,  # (S + 1,) int64
    lengths: Tensor,  # (S,) int64
    order: Tensor,  # (B, n) int64; -1 after the last candidate
    rewards: Tensor | None,  # (B, n) fp32
    sft_rank: Tensor,  # (B,) int64; -1 for none
    prompt_weights: Tensor,  # (B,) fp32
    *,
    options: RankingOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ranking loss and its closed-form gradient: terms (B, n), sums (S,), row weights (N,)."""
    call = native.ranking_call(
        logps, offsets, lengths, order, rewards, sft_rank, prompt_weights, options
    )
    _library().pk_cpu_ranking(*call.arguments, torch.get_num_threads())
    return call.outputs


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library with its signatures, or why there is none."""
    path = library_path()
    if not path.exists():
        return None, f"{path.name} was not built: {build_info().get('reason', 'unknown reason')}"
    library, reason = native.open_library(path, _SIGNATURES, "pk_cpu_abi", _ABI)
    if library is None:
        return None, reason
    if os.environ.get("PRO_KERNELS_CPU_ISA"):
        here = [x for x in build_info()["isas"] if not library.pk_cpu_set_isa(x.encode())]
        library.pk_cpu_set_isa(setting("PRO_KERNELS_CPU_ISA", here, "").encode())
    return library, None


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library
