"""The emulated CUDA library through ctypes, with the functions of ``backends/torch.py``.

Thinner than ``backends/cuda.py`` on purpose: no checks and no copies, so that tests choose every
pointer and stride. Outputs are made by ``torch.empty``.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import contextmanager

import torch
from torch import Tensor

from cuda_emulation import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
SIGNATURES = {
    "pk_cuda_logp": "iplllppffpppp",
    "pk_cuda_residual": "iplllppffppp",
    "pk_cuda_logits_grad": "iplllpppppplffplp",
    "pk_cuda_ranking": "plpplpllpppididdilipppp",
    "pk_cuda_gather_rows": "iplppllipl" + "p",
    "pk_cuda_scatter_rows": "iplpppllipl" + "p",
    "pk_cuda_target_logits": "iplplpplllpp",
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library with its signatures."""
    loaded = ctypes.CDLL(str(build.library()))
    for name, arguments in SIGNATURES.items():
        getattr(loaded, name).argtypes = [_KINDS[a] for a in arguments]
    loaded.pk_cuda_targets.restype = loaded.pk_cuda_error.restype = ctypes.c_char_p
    return loaded


@contextmanager
def device(major: int, backward: bool = False, max_cluster: int = 8):
    """Emulate a compute capability; threads and blocks in ascending or descending order."""
    library().pk_emulation_set(major, int(backward), max_cluster)
    try:
        yield
    finally:
        library().pk_emulation_set(9, 0, 8)


def _call(name: str, *arguments) -> None:
    raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    code = getattr(library(), name)(*raw, None)
    if code:
        raise RuntimeError(f"{name}: {library().pk_cuda_error(code).decode()}")


def _matrix(x: Tensor) -> tuple:
    return DTYPES.index(x.dtype), x, *x.shape, x.stride(0)


def _options(options) -> tuple[float, float]:
    return options.logit_scale, options.softcap or 0.0


def logp(logits, targets, *, target_logits=None, options, entropy=False):
    out = [torch.empty(logits.shape[0]) for _ in range(3 if entropy else 2)]
    third = out[2] if entropy else None
    _call(
        "pk_cuda_logp",
        *_matrix(logits),
        targets,
        target_logits,
        *_options(options),
        *out[:2],
        third,
    )
    return out[0], out[1], third


def residual_(logits, targets, *, target_logits=None, options):
    out = [torch.empty(logits.shape[0]) for _ in range(2)]
    _call("pk_cuda_residual", *_matrix(logits), targets, target_logits, *_options(options), *out)
    return out[0], out[1]


def logits_grad(
    logits,
    lse,
    targets,
    weights,
    *,
    target_logits=None,
    first_column=0,
    options,
    out=None,
    entropy=None,
):
    out = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
    row_numbers = (lse, targets, weights, target_logits, *(entropy or (None, None)))
    _call(
        *("pk_cuda_logits_grad", *_matrix(logits), *row_numbers, first_column, *_options(options)),
        *(out, out.stride(0)),
    )
    return out


def ranking(logps, offsets, lengths, order, rewards, sft_rank, prompt_weights, *, options):
    o = options
    out = [torch.empty(order.shape), torch.empty(len(lengths)), torch.empty(len(logps))]
    _call(
        *("pk_cuda_ranking", logps, len(logps), offsets, lengths, len(lengths), order),
        *(*order.shape, rewards, sft_rank, prompt_weights, o.length_normalize, o.tau, o.skip_ties),
        *(o.eps, o.sft_weight, o.sft_mean, -1 if o.top_k is None else o.top_k, o.single_sft, *out),
    )
    return tuple(out)


def gather_rows(source, rows, weights, dtype, out=None):
    width = source.shape[1]
    out = torch.empty(len(rows), width, dtype=dtype) if out is None else out
    _call(
        *("pk_cuda_gather_rows", DTYPES.index(source.dtype), source, source.stride(0), rows),
        *(weights, len(rows), width, DTYPES.index(out.dtype), out, out.stride(0)),
    )
    return out


def scatter_rows(side, weights, rows, out, by_row=None):
    _call(
        *("pk_cuda_scatter_rows", DTYPES.index(side.dtype), side, side.stride(0), weights, rows),
        *(by_row, *side.shape, DTYPES.index(out.dtype), out, out.stride(0)),
    )


def target_logits(x, weight, bias, targets):
    out = torch.empty(x.shape[0])
    _call(
        *("pk_cuda_target_logits", DTYPES.index(x.dtype), x, x.stride(0), weight),
        *(weight.stride(0), bias, targets, x.shape[0], *weight.shape, out),
    )
    return out
