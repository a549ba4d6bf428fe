"""The CPU backend: C++ (csrc/cpu) behind a plain C ABI, loaded with ctypes.

How the functions reach the library is written in ``native.py``. The library is found by its path
inside the package, so one build serves every torch version. It must be loaded after torch: both
then run on one OpenMP pool (``libgomp.so.1`` is already in the process).

``PRO_KERNELS_CPU_ISA`` forces an instruction set (``avx512``, ``avx2``, ``neon``, ``generic``).
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import c_char_p, c_int32
from pathlib import Path

import torch
from torch import Tensor

import pro_kernels.backends.native as native
from pro_kernels.options import setting

NAME = "cpu"
DTYPES = native.DTYPES
MAX_CANDIDATES = None  # any n
VERIFIED = None  # every machine that builds it runs the tests
only_when_named = None

_LIB = native.LIB
_SIGNATURES: native.Signatures = {
    "isa": (c_char_p, ()),
    "set_isa": (c_int32, (c_char_p,)),
    **native.signatures(None, c_int32),  # the last: threads
}


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device`` (None: it can)."""
    if device.type != "cpu":
        return f"tensors are on {device.type}, not on the CPU"
    return _load()[1]


def library_path() -> Path:
    """Where the library is, or would be."""
    return native.library_path(_LIB, NAME)


def build_info() -> dict:
    """How the library was built, or why not: compiler, flags, instruction sets, reason."""
    return native.build_info(_LIB, NAME)


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
    return _library().isa().decode()


def set_isa(name: str | None) -> None:
    """Use instruction set ``name`` from now on, in the whole process; None: the best one.

    Raises:
        ValueError: this machine or this build does not have it.
    """
    if _library().set_isa(name.encode() if name is not None else None):
        raise ValueError(
            f"instruction set {name!r} is not available: built {build_info().get('isas')}, and this"
            " processor may lack it"
        )


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library with its signatures, or why there is none."""
    library, reason = native.load(_LIB, NAME, _SIGNATURES)
    if library is not None and os.environ.get("PRO_KERNELS_CPU_ISA"):
        here = [x for x in build_info()["isas"] if not library.set_isa(x.encode())]
        library.set_isa(setting("PRO_KERNELS_CPU_ISA", here, "").encode())
    return library, reason


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def _call(name: str, x: Tensor, *arguments: object) -> None:
    """Run on as many threads as torch does."""
    getattr(_library(), name)(*arguments, torch.get_num_threads())


_kernels = native.Kernels(_call)
logp, residual_, logits_grad = _kernels.logp, _kernels.residual_, _kernels.logits_grad
ranking = _kernels.ranking
gather_rows = scatter_rows = target_logits = score = scores_fused = None  # as PyTorch has them
