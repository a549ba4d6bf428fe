"""The CUDA backend: C++ (csrc/cuda) behind a plain C ABI, loaded with ctypes.

State: the tests passed on an H200 (sm_90a). For sm_80, sm_100 and PTX compute_100 the kernels
compile; what they compute is checked on the CPU too, where the tests compile the same sources
against an emulation of CUDA (tests/cuda_emulation).

How the functions reach the library is written in ``native.py``. Work goes to the current stream of
the tensors' device; nothing here waits for it or looks at its data.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int32, c_void_p

import torch
from torch import Tensor

from pro_kernels.backends import native

NAME = "cuda"
DTYPES = native.DTYPES
MAX_CANDIDATES = 1024  # a block holds a prompt's scores in shared memory
# Architecture -> the card of it that the gpu tests passed on.
VERIFIED: dict[str, str] = {"sm_90": "NVIDIA H200"}
only_when_named = None

_MAX_COLUMNS = (1 << 31) - (1 << 20) - 1  # columns of a row are counted in 32 bits
_MIN_CAPABILITY = (8, 0)

_MATRIX = POINTER(native.Matrix)
_SIGNATURES: native.Signatures = {
    "targets": (c_char_p, ()),
    "error": (c_char_p, (c_int32,)),
    "ready": (c_int32, ()),
    **native.signatures(c_int32, c_void_p),  # the last: the stream
    "gather_rows": (c_int32, (_MATRIX, _MATRIX, *[c_void_p] * 3)),
    "scatter_rows": (c_int32, (_MATRIX, _MATRIX, *[c_void_p] * 4)),
    "target_logits": (c_int32, (_MATRIX, _MATRIX, *[c_void_p] * 4)),
}
library = native.Library(NAME, _SIGNATURES)


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device`` (None: it can)."""
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on a CUDA device"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    found, reason = library.load()
    if found is None:
        return reason
    index = torch.cuda.current_device() if device.index is None else device.index
    return _no_code(index)


def details() -> dict[str, str]:
    """What ``pro-kernels env`` shows: state, library, how it was built, for what."""
    ran = ", ".join(f"{card} ({arch})" for arch, card in VERIFIED.items())
    state = {"state": f"tests passed on {ran}; elsewhere compiled, and emulated on the CPU"}
    found, reason = library.load()
    if found is None:
        return {**state, "library": "none", "reason": str(reason)}
    return {
        **state,
        "library": str(library.path),
        "compiler": library.info.get("version", "unknown"),
        "targets": found.targets().decode(),
    }


def gather_rows(source: Tensor, rows: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weighted rows of ``source``."""
    source = native.unit_stride(source if source.dtype in DTYPES else source.float())
    rows = native.dense(rows, torch.int64)
    weights = native.vector(weights, torch.float32, rows)
    out = source.new_empty((rows.shape[0], source.shape[1]), dtype=dtype)
    _call("gather_rows", source, *_matrices(source, out), *native.pointers(rows, weights))
    return out


def scatter_rows(side: Tensor, weights: Tensor, rows: Tensor, out: Tensor, shared: bool) -> None:
    """Weighted rows of ``side`` into ``out``; not ``shared``: what it holds does not count."""
    side = native.unit_stride(side)
    weights, rows = native.dense(weights, torch.float32), native.dense(rows, torch.int64)
    native.check_writable("out", out)
    by_row = torch.sort(rows, stable=True).indices if shared else None
    numbers = native.pointers(rows, weights, by_row)
    _call("scatter_rows", side, *_matrices(side, out), *numbers)


def target_logits(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The raw logit of each target, exact; ``weight`` and ``bias`` have the dtype of ``x``."""
    x, weight = native.unit_stride(x), native.unit_stride(weight)
    index = native.vector(targets, torch.int64, x)
    bias = None if bias is None else native.dense(bias, x.dtype)
    out = native.empty(x)
    _call("target_logits", x, *_matrices(x, weight), *native.pointers(bias, index, out))
    return out


@functools.cache
def _no_code(index: int) -> str | None:
    """Why the library has nothing for this device (None: it has)."""
    capability = torch.cuda.get_device_capability(index)
    if capability < _MIN_CAPABILITY:
        found, least = (".".join(map(str, c)) for c in (capability, _MIN_CAPABILITY))
        return f"compute capability is {found}; it needs {least} or newer"
    kernels = library.get()
    with torch.cuda.device(index):
        code = kernels.ready()
    if not code:
        return None
    return (
        f"the library has no code for compute capability {'.'.join(map(str, capability))} "
        f"({kernels.error(code).decode()}); built for {kernels.targets().decode()}"
    )


@contextlib.contextmanager
def _stream_of(x: Tensor) -> Iterator[int | None]:
    """The current stream of the tensor's device, which is made the current one."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream().cuda_stream


def _call(name: str, x: Tensor, *arguments: object) -> None:
    """Launch on the current stream of ``x``'s device."""
    found = library.get()
    with _stream_of(x) as stream:
        code = getattr(found, name)(*arguments, stream)
    if code:
        raise RuntimeError(f"pk_cuda_{name} failed: {found.error(code).decode()} ({code})")


def _matrices(*tensors: Tensor) -> list[native.Matrix]:
    return [native.Matrix(*native.matrix(x)) for x in tensors]


_kernels = native.Kernels(_call, _MAX_COLUMNS)
logp, residual_, logits_grad = _kernels.logp, _kernels.residual_, _kernels.logits_grad
ranking = _kernels.ranking
score = scores_fused = None  # log-probs come from logits
filtered = None  # as PyTorch has them
