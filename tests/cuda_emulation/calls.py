"""The emulated CUDA library, with the functions of ``backends/torch.py``.

Those of ``backends/cuda.py`` but for the stream; the sides without its checks and copies, so that
tests choose every pointer and stride.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import contextmanager

import torch
from torch import Tensor

from cuda_emulation import build
from pro_kernels.backends import cuda, native

DTYPES = native.DTYPES


@functools.cache
def library() -> ctypes.CDLL:
    """The library with its signatures."""
    loaded, reason = native.open_library(build.library(), "cuda", cuda._SIGNATURES)
    assert loaded is not None, reason
    return loaded


@contextmanager
def device(major: int, backward: bool = False, max_cluster: int = 8):
    """Emulate a compute capability; threads and blocks in ascending or descending order."""
    library().pk_emulation_set(major, int(backward), max_cluster)
    try:
        yield
    finally:
        library().pk_emulation_set(9, 0, 8)


def _call(name: str, x: Tensor | None, *arguments) -> None:
    raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    code = getattr(library(), name)(*raw, None)
    if code:
        raise RuntimeError(f"pk_cuda_{name}: {library().error(code).decode()}")


_kernels = native.Kernels(_call)
logp, residual_, logits_grad = _kernels.logp, _kernels.residual_, _kernels.logits_grad
ranking = _kernels.ranking


def gather_rows(source, rows, weights, dtype, out=None):
    out = torch.empty(len(rows), source.shape[1], dtype=dtype) if out is None else out
    _call("gather_rows", source, *cuda._matrices(source, out), rows, weights)
    return out


def scatter_rows(side, weights, rows, out, by_row=None):
    _call("scatter_rows", side, *cuda._matrices(side, out), rows, weights, by_row)


def target_logits(x, weight, bias, targets):
    out = torch.empty(x.shape[0])
    _call("target_logits", x, *cuda._matrices(x, weight), bias, targets, out)
    return out
