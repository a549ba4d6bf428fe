"""The CPU backend: C++ (csrc/cpu) behind a plain C ABI, loaded with ctypes.

How the functions reach the library is written in ``native.py``. The library is found by its path
inside the package, so one build serves every torch version. It must be loaded after torch: both
then run on one OpenMP pool (``libgomp.so.1`` is already in the process).

``PRO_KERNELS_CPU_ISA`` forces an instruction set (``avx512``, ``avx2``, ``neon``, ``generic``).
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_int32
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pro_kernels.backends import native
from pro_kernels.backends.native_filter import Filtered
from pro_kernels.options import setting

NAME = "cpu"
DTYPES = native.DTYPES
MAX_CANDIDATES = None  # any n
VERIFIED = None  # every machine that builds it runs the tests
only_when_named = None

_ON_FILTERS = "centre", "distances", "count", "sums", "compact", "hidden_grad", "weight_grad"


class Library(native.Library):
    """Loaded with the instruction set that the environment asks for."""

    def open(self, path: Path) -> tuple[ctypes.CDLL | None, str | None]:
        """The library at ``path``, or why it cannot be used."""
        found, reason = super().open(path)
        if found is not None and os.environ.get("PRO_KERNELS_CPU_ISA"):
            here = [x for x in self.info["isas"] if not found.set_isa(x.encode())]
            found.set_isa(setting("PRO_KERNELS_CPU_ISA", here, "").encode())
        return found, reason


_TREE = None, (POINTER(native.TreeAttention), c_int32)
_FILTER = None, (POINTER(native.ColumnFilter), c_int32)
library = Library(
    NAME,
    {
        "isa": (c_char_p, ()),
        "set_isa": (c_int32, (c_char_p,)),
        **native.signatures(None, c_int32),  # the last: threads
        **dict.fromkeys(("tree_attention", "tree_attention_backward"), _TREE),
        **{f"filter_{name}": _FILTER for name in _ON_FILTERS},
    },
)


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device`` (None: it can)."""
    if device.type != "cpu":
        return f"tensors are on {device.type}, not on the CPU"
    return library.load()[1]


def details() -> dict[str, str]:
    """What ``pro-kernels env`` shows: the library, how it was built, what it runs on."""
    found, reason = library.load()
    if found is None:
        return {"library": "none", "reason": str(reason)}
    info = library.info
    return {
        "library": str(library.path),
        "compiler": info.get("version", "unknown"),
        "instruction set": f"{isa()} (built: {', '.join(info.get('isas', []))})",
        "openmp": str(info.get("openmp")),
    }


def isa() -> str:
    """The instruction set in use."""
    return library.get().isa().decode()


def set_isa(name: str | None) -> None:
    """Use instruction set ``name`` from now on, in the whole process; None: the best one.

    Raises:
        ValueError: this machine or this build does not have it.
    """
    if library.get().set_isa(name.encode() if name is not None else None):
        raise ValueError(
            f"instruction set {name!r} is not available: built {library.info.get('isas')}, and this"
            " processor may lack it"
        )


def _call(name: str, x: Tensor, *arguments: object) -> None:
    """Run on as many threads as torch does."""
    getattr(library.get(), name)(*arguments, torch.get_num_threads())


_kernels = native.Kernels(_call)
logp, residual_, logits_grad = _kernels.logp, _kernels.residual_, _kernels.logits_grad
ranking = _kernels.ranking
filtered = Filtered(_call)
gather_rows = scatter_rows = target_logits = score = scores_fused = None  # as PyTorch has them


# ---- attention over a tree (distinct/attention.py): S tokens, h heads, g of keys and values

_ENOUGH = 32  # pieces of work of a backward


def tree_attention(
    query: Tensor,  # (1, h, S, d)
    key: Tensor,  # (1, g, S, d)
    value: Tensor,  # (1, g, S, e)
    segments: Tensor,  # (K, 4)
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(1, S, h, e) and the log-sum-exp (1, S, h), in fp32."""
    tensors = {"query": _by_token(query), "values": _by_token(value)}
    tensors["keys_across"] = _across(key, scale)
    out = torch.empty(*tensors["query"].shape[:2], tensors["values"].shape[2])
    lse = out.new_empty(out.shape[:2])
    _attend("tree_attention", segments, softcap, window, {**tensors, "out": out, "lse": lse})
    return out[None, ..., : value.shape[3]].contiguous(), lse[None]


def tree_attention_backward(
    grad: Tensor,  # (1, S, h, e)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,  # (1, S, h, e)
    lse: Tensor,  # (1, S, h)
    segments: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in fp32."""
    tensors = {
        "query": _by_token(query), "keys": _by_token(key), "keys_across": _across(key, scale),
        "values_across": _across(value), "lse": lse[0].contiguous(),
        "out": _by_token(out.transpose(1, 2)), "grad": _by_token(grad.transpose(1, 2)),
    }  # fmt: skip
    heads, groups = query.shape[1], key.shape[1]
    # Of a tree and a head of keys one thread adds up the gradients. Where these are few, it is of
    # each head of queries, whose sums are added after.
    roots = int((segments[:, 3] == 0).sum())
    sums = groups if roots * groups >= _ENOUGH else heads
    tokens, of_query = query.shape[2], torch.empty_like(tensors["query"])
    of_key, of_value = (
        of_query.new_zeros(tokens, sums, tensors[x].shape[2]) for x in ("keys", "out")
    )
    grads = {"query_grad": of_query, "key_grad": of_key, "value_grad": of_value}
    _attend("tree_attention_backward", segments, softcap, window, tensors | grads)
    if sums > groups:
        of_key, of_value = (x.unflatten(1, (groups, -1)).sum(2) for x in (of_key, of_value))
    of_query, of_key = of_query.mul_(scale), of_key.mul_(scale)
    return tuple(  # type: ignore[return-value]
        x[None, ..., : like.shape[3]].contiguous().transpose(1, 2)
        for x, like in ((of_query, query), (of_key, key), (of_value, value))
    )


def _attend(
    name: str, segments: Tensor, softcap: float | None, window: int | None,
    tensors: dict[str, Tensor],
) -> None:  # fmt: skip
    segments = segments.contiguous()
    tokens, heads, size = tensors["query"].shape
    groups, _, columns = tensors["keys_across"].shape
    sums = tensors["key_grad"].shape[1] if "key_grad" in tensors else groups
    arguments = native.TreeAttention(
        segments.data_ptr(), segments.shape[0], tokens, columns, heads, groups, sums, size,
        tensors["out"].shape[2], window or tokens, softcap or 0.0,
        **{name: x.data_ptr() for name, x in tensors.items()},
    )  # fmt: skip
    _call(name, tensors["query"], arguments)


def _by_token(x: Tensor) -> Tensor:
    """(1, heads, S, size) as (S, heads, size) in fp32, zeros up to a multiple of 32 in the last."""
    x, less = x[0].transpose(0, 1).float(), -x.shape[3] % 32
    return (F.pad(x, (0, less)) if less else x).contiguous()


def _across(x: Tensor, scale: float = 1.0) -> Tensor:
    """(1, heads, S, size) as (heads, size, columns), times the scale.

    There are 32 columns or more behind the tokens, and an odd multiple of 16 in all: of rows 4096
    bytes apart the cache of a processor keeps only a few.
    """
    x = _by_token(x)
    tokens, heads, size = x.shape
    across = x.new_empty(heads, size, tokens + 32 + (16 - tokens) % 32)
    torch.mul(x.permute(1, 2, 0), scale, out=across[..., :tokens])
    return across
