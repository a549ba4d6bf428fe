"""The CUDA backend: C++ (csrc/cuda) behind a plain C ABI, loaded with ctypes.

State: the tests passed on an H200 (sm_90a). For sm_80, sm_100 and PTX compute_100 the kernels
compile; what they compute is checked on the CPU too, where the tests compile the same sources
against an emulation of CUDA (tests/cuda_emulation).

The functions are those of ``backends/torch.py``; what they mean is written there. Work goes to the
current stream of the tensors' device; nothing here waits for it or looks at its data.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import pro_kernels.backends.native as native
from pro_kernels.options import LogitOptions, RankingOptions

NAME = "cuda"
DTYPES = native.DTYPES
MAX_CANDIDATES = 1024  # a block holds a prompt's scores in shared memory
# Architecture -> the card of it that the gpu tests passed on.
VERIFIED: dict[str, str] = {"sm_90": "NVIDIA H200"}

_LIB = native.LIB
_MAX_COLUMNS = (1 << 31) - (1 << 20) - 1  # columns of a row are counted in 32 bits
_MIN_CAPABILITY = (8, 0)

# The C ABI (csrc/cuda/pro_kernels_cuda.h); see native.open_library. The last pointer is the stream.
_ABI = 3
_SIGNATURES: native.Signatures = {
    "pk_cuda_abi": ("i", ""),
    "pk_cuda_targets": ("s", ""),
    "pk_cuda_error": ("s", "i"),
    "pk_cuda_ready": ("i", ""),
    "pk_cuda_logp": ("i", "iplllppffpppp"),
    "pk_cuda_residual": ("i", "iplllppffppp"),
    "pk_cuda_logits_grad": ("i", "iplllpppppplffplp"),
    "pk_cuda_ranking": ("i", "plpplpllpppididdilipppp"),
    "pk_cuda_gather_rows": ("i", "iplpplliplp"),
    "pk_cuda_scatter_rows": ("i", "iplppplliplp"),
    "pk_cuda_target_logits": ("i", "iplplpplllpp"),
}


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device`` (None: it can)."""
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on a CUDA device"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    library, reason = _load()
    if library is None:
        return reason
    index = torch.cuda.current_device() if device.index is None else device.index
    return _no_code(index)


def library_path() -> Path:
    """Where the library is, or would be."""
    return _LIB / "libpro_kernels_cuda.so"


def build_info() -> dict:
    """How the library was built, or why not: compiler, flags, targets, reason."""
    return native.build_info(_LIB, "cuda")


def details() -> dict[str, str]:
    """What ``pro-kernels env`` shows: state, library, how it was built, for what."""
    ran = ", ".join(f"{card} ({arch})" for arch, card in VERIFIED.items())
    state = {"state": f"tests passed on {ran}; elsewhere compiled, and emulated on the CPU"}
    library, reason = _load()
    if library is None:
        return {**state, "library": "none", "reason": str(reason)}
    return {
        **state,
        "library": str(library_path()),
        "compiler": build_info().get("version", "unknown"),
        "targets": library.pk_cuda_targets().decode(),
    }


def logp(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) int64
    *,
    target_logits: Tensor | None = None,  # (N,) fp32
    options: LogitOptions,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read-only statistics of each row: ``(logp, lse, entropy or None)``, each ``(N,)`` fp32."""
    _check_columns(logits)
    logits = native.unit_stride(logits)
    targets = native.vector(targets, torch.int64, logits)
    exact = native.optional(target_logits, torch.float32, logits)
    out = [native.empty(logits) for _ in range(3 if entropy else 2)]
    _call(
        "pk_cuda_logp",
        logits,
        *native.matrix(logits),
        targets.data_ptr(),
        native.pointer(exact),
        options.logit_scale,
        options.softcap or 0.0,
        out[0].data_ptr(),
        out[1].data_ptr(),
        out[2].data_ptr() if entropy else None,
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
    _check_columns(logits)
    native.check_writable("logits", logits)
    targets = native.vector(targets, torch.int64, logits)
    exact = native.optional(target_logits, torch.float32, logits)
    logps, lse = native.empty(logits), native.empty(logits)
    _call(
        "pk_cuda_residual",
        logits,
        *native.matrix(logits),
        targets.data_ptr(),
        native.pointer(exact),
        options.logit_scale,
        options.softcap or 0.0,
        logps.data_ptr(),
        lse.data_ptr(),
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
    _check_columns(logits)
    if out is None:
        out = logits.new_empty(logits.shape)
    native.check_gradient(out, logits)
    logits = native.unit_stride(logits)
    lse = native.vector(lse, torch.float32, logits)
    targets = native.vector(targets, torch.int64, logits)
    weights = native.optional(weights, torch.float32, logits)
    exact = native.optional(target_logits, torch.float32, logits)
    value, by = (native.optional(x, torch.float32, logits) for x in entropy or (None, None))
    _call(
        "pk_cuda_logits_grad",
        logits,
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
    _call("pk_cuda_ranking", logps, *call.arguments)
    return call.outputs


def gather_rows(
    source: Tensor,  # (R, H)
    rows: Tensor,  # (N,) int64
    weights: Tensor | None,  # (N,) fp32; None = 1
    dtype: torch.dtype,
) -> Tensor:
    """``weights * source[rows]`` (N, H), in fp32, rounded once to ``dtype``."""
    source = native.unit_stride(source if source.dtype in DTYPES else source.float())
    rows = native.dense(rows, torch.int64)
    weights = None if weights is None else native.dense(weights, torch.float32)
    out = source.new_empty((rows.shape[0], source.shape[1]), dtype=dtype)
    _call(
        "pk_cuda_gather_rows",
        source,
        native.CODES[source.dtype],
        source.data_ptr(),
        source.stride(0),
        rows.data_ptr(),
        native.pointer(weights),
        *out.shape,
        native.CODES[dtype],
        out.data_ptr(),
        out.stride(0),
    )
    return out


def scatter_rows(
    side: Tensor,  # (N, H)
    weights: Tensor,  # (N,) fp32
    rows: Tensor,  # (N,) int64
    out: Tensor,  # (R, H), zeros on entry
    shared: bool,
) -> None:
    """``out[rows] += weights * side``, summed in fp32 in the order of the tokens.

    ``shared=False``: no row occurs twice, and what ``out`` holds there does not count.
    """
    side = native.unit_stride(side)
    weights, rows = native.dense(weights, torch.float32), native.dense(rows, torch.int64)
    native.check_writable("out", out)
    by_row = torch.sort(rows, stable=True).indices if shared else None
    _call(
        "pk_cuda_scatter_rows",
        side,
        native.CODES[side.dtype],
        side.data_ptr(),
        side.stride(0),
        weights.data_ptr(),
        rows.data_ptr(),
        native.pointer(by_row),
        *side.shape,
        native.CODES[out.dtype],
        out.data_ptr(),
        out.stride(0),
    )


def target_logits(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H), the dtype of x
    bias: Tensor | None,  # (V,), the dtype of x
    targets: Tensor,  # (N,) int64
) -> Tensor:
    """``x . weight[targets] + bias[targets]``, (N,) fp32."""
    x, weight = native.unit_stride(x), native.unit_stride(weight)
    targets = native.vector(targets, torch.int64, x)
    bias = None if bias is None else native.dense(bias, x.dtype)
    out = native.empty(x)
    _call(
        "pk_cuda_target_logits",
        x,
        native.CODES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        native.pointer(bias),
        targets.data_ptr(),
        x.shape[0],
        *weight.shape,
        out.data_ptr(),
    )
    return out


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library with its signatures, or why there is none."""
    path = library_path()
    if not path.exists():
        return None, f"{path.name} was not built: {build_info().get('reason', 'unknown reason')}"
    return native.open_library(path, _SIGNATURES, "pk_cuda_abi", _ABI)


@functools.cache
def _no_code(index: int) -> str | None:
    """Why the library has nothing for this device (None: it has)."""
    capability = torch.cuda.get_device_capability(index)
    if capability < _MIN_CAPABILITY:
        found, least = (".".join(map(str, c)) for c in (capability, _MIN_CAPABILITY))
        return f"compute capability is {found}; it needs {least} or newer"
    library, _ = _load()
    assert library is not None
    with torch.cuda.device(index):
        code = library.pk_cuda_ready()
    if not code:
        return None
    return (
        f"the library has no code for compute capability {'.'.join(map(str, capability))} "
        f"({library.pk_cuda_error(code).decode()}); built for {library.pk_cuda_targets().decode()}"
    )


@contextlib.contextmanager
def _stream_of(x: Tensor) -> Iterator[int | None]:
    """The current stream of the tensor's device, which is made the current one."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream().cuda_stream


def _call(name: str, x: Tensor, *arguments: object) -> None:
    """Launch on the current stream of ``x``'s device."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    with _stream_of(x) as stream:
        code = getattr(library, name)(*arguments, stream)
    if code:
        raise RuntimeError(f"{name} failed: {library.pk_cuda_error(code).decode()} ({code})")


def _check_columns(logits: Tensor) -> None:
    if logits.shape[1] > _MAX_COLUMNS:
        raise ValueError(f"logits must have at most {_MAX_COLUMNS} columns, got {logits.shape[1]}")
