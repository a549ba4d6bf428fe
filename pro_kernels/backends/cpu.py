"""The CPU backend: C++ (csrc/cpu) behind a plain C ABI, loaded with ctypes.

The functions are those of ``backends/torch.py``; what they mean is written there. The library is
found by its path inside the package, so one build serves every torch version. It must be loaded
after torch: both then run on one OpenMP pool (``libgomp.so.1`` is already in the process).

``PRO_KERNELS_CPU_ISA`` forces an instruction set (``avx512``, ``avx2``, ``neon``, ``generic``).
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from pro_kernels.options import LogitOptions, RankingOptions

NAME = "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CANDIDATES = None  # any n

_LIB = Path(__file__).resolve().parent.parent / "lib"
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # DType in csrc/cpu/dtype.h

# The C ABI (csrc/cpu/pro_kernels_cpu.h), name -> (result, arguments); "p" is a pointer.
_ABI = 1
_TYPES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "s": ctypes.c_char_p,
}
_SIGNATURES = {
    "pk_cpu_abi": ("i", ""),
    "pk_cpu_isa": ("s", ""),
    "pk_cpu_set_isa": ("i", "s"),
    # dtype, logits, N, V, row stride, targets, target logits, scale, softcap, logp, lse, entropy,
    # threads
    "pk_cpu_logp": (None, "iplllppffpppi"),
    # ..., logp, lse, threads
    "pk_cpu_residual": (None, "iplllppffppi"),
    # dtype, logits, N, V, row stride, lse, targets, weights, target logits, first column, scale,
    # softcap, out, out row stride, threads
    "pk_cpu_logits_grad": (None, "iplllpppplffpli"),
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
    try:
        return json.loads((_LIB / "build.json").read_text())["cpu"]
    except FileNotFoundError:
        command = "python setup.py build_native --inplace"
        return {"reason": f"never built ({command}, or pip install)"}


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
    logits = _unit_stride(logits)
    targets = _vector(targets, torch.int64, logits)
    exact = _optional(target_logits, torch.float32, logits)
    out = [_empty(logits) for _ in range(3 if entropy else 2)]
    _library().pk_cpu_logp(
        *_matrix(logits),
        targets.data_ptr(),
        _pointer(exact),
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
    _check_writable("logits", logits)
    targets = _vector(targets, torch.int64, logits)
    exact = _optional(target_logits, torch.float32, logits)
    logps, lse = _empty(logits), _empty(logits)
    _library().pk_cpu_residual(
        *_matrix(logits),
        targets.data_ptr(),
        _pointer(exact),
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
) -> Tensor:
    """``weights * d logp / d raw`` for these columns; rows with a negative target become 0."""
    if out is None:
        out = logits.new_empty(logits.shape)
    _check_writable("out", out)
    if out.shape != logits.shape or out.dtype != logits.dtype:
        raise ValueError(
            f"out must be {tuple(logits.shape)} {logits.dtype} like logits, got "
            f"{tuple(out.shape)} {out.dtype}"
        )
    logits = _unit_stride(logits)
    lse = _vector(lse, torch.float32, logits)
    targets = _vector(targets, torch.int64, logits)
    weights = _optional(weights, torch.float32, logits)
    exact = _optional(target_logits, torch.float32, logits)
    _library().pk_cpu_logits_grad(
        *_matrix(logits),
        lse.data_ptr(),
        targets.data_ptr(),
        _pointer(weights),
        _pointer(exact),
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
    logps, prompt_weights = _dense(logps, torch.float32), _dense(prompt_weights, torch.float32)
    offsets, lengths = _dense(offsets, torch.int64), _dense(lengths, torch.int64)
    order, sft_rank = _dense(order, torch.int64), _dense(sft_rank, torch.int64)
    rewards = None if rewards is None else _dense(rewards, torch.float32)
    prompts, n = order.shape
    sequences = lengths.shape[0]
    assert offsets.shape == (sequences + 1,), (offsets.shape, lengths.shape)
    assert sft_rank.shape == prompt_weights.shape == (prompts,), (sft_rank.shape, order.shape)
    assert rewards is None or rewards.shape == order.shape, order.shape
    # Made like logps, fp32 on the CPU, whatever torch's default dtype and device are.
    terms = logps.new_empty(prompts, n)
    sums = logps.new_empty(sequences)
    row_weights = logps.new_empty(logps.shape[0])
    o = options
    _library().pk_cpu_ranking(
        logps.data_ptr(),
        logps.shape[0],
        offsets.data_ptr(),
        lengths.data_ptr(),
        sequences,
        order.data_ptr(),
        prompts,
        n,
        _pointer(rewards),
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
        terms.data_ptr(),
        sums.data_ptr(),
        row_weights.data_ptr(),
        torch.get_num_threads(),
    )
    return terms, sums, row_weights


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library with its signatures, or why there is none."""
    path = library_path()
    if not path.exists():
        return None, f"{path.name} was not built: {build_info().get('reason', 'unknown reason')}"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype = _TYPES[result] if result else None
            function.argtypes = [_TYPES[a] for a in arguments]
    except (OSError, AttributeError) as error:
        return None, f"{path} does not load: {error}"
    if library.pk_cpu_abi() != _ABI:
        return None, f"{path} is of another version (ABI {library.pk_cpu_abi()}, need {_ABI})"
    forced = os.environ.get("PRO_KERNELS_CPU_ISA")
    if forced and library.pk_cpu_set_isa(forced.encode()):
        return None, f"PRO_KERNELS_CPU_ISA={forced}: not in this build or not on this processor"
    return library, None


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def _matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    """Arguments that describe logits: dtype, pointer, rows, columns, row stride."""
    rows, columns = x.shape
    return _CODES[x.dtype], x.data_ptr(), rows, columns, x.stride(0)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _check_writable(name: str, x: Tensor) -> None:
    rows, columns = x.shape
    if (columns > 1 and x.stride(1) != 1) or (rows > 1 and x.stride(0) < columns):
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} must have unit stride along V and rows that do not "
            f"overlap, got strides {x.stride()}"
        )


def _vector(x: Tensor, dtype: torch.dtype, logits: Tensor) -> Tensor:
    assert x.shape[0] == logits.shape[0] and x.dim() == 1, (x.shape, logits.shape)
    return _dense(x, dtype)


def _optional(x: Tensor | None, dtype: torch.dtype, logits: Tensor) -> Tensor | None:
    return None if x is None else _vector(x, dtype, logits)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.contiguous() if x.dtype == dtype else x.to(dtype).contiguous()


def _empty(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
