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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pro_kernels.backends import native
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


def _call(name: str, _: Tensor | None, *arguments: object) -> None:
    """Run on as many threads as torch does."""
    getattr(library.get(), name)(*arguments, torch.get_num_threads())


_kernels = native.Kernels(_call)
logp, residual_, logits_grad = _kernels.logp, _kernels.residual_, _kernels.logits_grad
ranking = _kernels.ranking
gather_rows = scatter_rows = target_logits = score = scores_fused = None  # as PyTorch has them


# ---- the columns that groups of rows keep (fused/column_groups.py)


class Filtered:
    """Arguments and results are those of ``column_groups`` (csrc/cpu/filter.h)."""

    def row_sum(self, weight: Tensor) -> Tensor:
        """The sum of the rows."""
        centre = weight.new_empty(weight.shape[1], dtype=torch.float32)
        self._run("centre", None, None, weight, columns=weight.shape[0], centre=centre)
        return centre

    def squared_distances(self, weight: Tensor, centre: Tensor) -> Tensor:
        """Of each row from the centre."""
        squares = weight.new_empty(weight.shape[0], dtype=torch.float32)
        centre = centre.float()
        self._run("distances", None, None, weight, columns=len(weight), centre=centre, sums=squares)
        return squares

    def count_large(self, dz: Tensor, threshold: float) -> Tensor:
        """How many entries of each row are larger."""
        need = dz.new_empty(dz.shape[0], dtype=torch.int64)
        self._run("count", dz, threshold=threshold, need=need)
        return need

    def sums(self, dz: Tensor, order: Tensor, size: int) -> Tensor:
        """Sums of the entries of each group of rows."""
        out = dz.new_empty((-(-dz.shape[0] // size), dz.shape[1]), dtype=torch.float32)
        self._run("sums", dz, order=order, group_rows=size, sums=out)
        return out

    def compact_(self, dz: Tensor, groups: Any, weights: Tensor, move: bool = True) -> Tensor:
        """Move what is kept to the front of each row, and tell what leaves."""
        lost = dz.new_empty((3, dz.shape[0]), dtype=torch.float32)
        self._run("compact", dz, groups, weights=weights, lost=lost, move=int(move))
        return lost

    def hidden_grad(
        self, dz: Tensor, groups: Any, weight: Tensor, centre: Tensor, stand_ins: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        """``dz weight``, to which the centre is added in fp32."""
        more: dict[str, Any] = {"centre": centre.float(), "stand_ins": stand_ins}
        more["columns"] = weight.shape[0]
        self._run("hidden_grad", dz, groups, weight, out, **more)

    def weight_grad(
        self, dz: Tensor, groups: Any, x: Tensor, out: Tensor, accumulate: bool
    ) -> None:
        """``dz^T x``."""
        more = {"columns": out.shape[0], "accumulate": int(accumulate)}
        self._run("weight_grad", dz, groups, x, out, **more)

    def _run(
        self,
        name: str,
        dz: Tensor | None,
        groups: Any = None,
        operand: Tensor | None = None,
        out: Tensor | None = None,
        **others: Any,
    ) -> None:
        given: dict[str, Any] = {}
        if dz is not None:
            names = "entries", "dtype", "rows", "columns", "stride"
            given |= zip(names, native.matrix(dz), strict=True)
        if groups is not None:
            others |= {"order": groups.order, "starts": groups.starts, "kept": groups.columns}
            given["group_rows"] = groups.size
        if operand is not None:
            operand = native.unit_stride(operand)
            given |= {"operand_dtype": native.CODES[operand.dtype], "hidden": operand.shape[1]}
            given["operand_stride"] = operand.stride(0)
            others["operand"] = operand
        if out is not None:
            given |= {"out_dtype": native.CODES[out.dtype], "out_stride": out.stride(0)}
            others["out"] = out
        for key, value in others.items():  # held by the caller, or by ``others``
            given[key] = value.data_ptr() if isinstance(value, Tensor) else value
        _call(f"filter_{name}", dz, native.ColumnFilter(**given))


filtered = Filtered()


# ---- attention over a tree (distinct/attention.py): S tokens, h heads, g of keys and values

_ENOUGH = 32  # pieces of work of a backward


class Tree(NamedTuple):
    """What attention goes over, and how."""

    segments: Tensor  # (K, 4)
    scale: float
    softcap: float | None
    window: int | None


def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """(1, S, h, e) and the log-sum-exp (1, S, h), in fp32; of (1, h, S, d) and two of g heads."""
    tensors = {"query": _by_token(query), "values": _by_token(value)}
    tensors["keys_across"] = _across(key, tree.scale)
    out = torch.empty(*tensors["query"].shape[:2], tensors["values"].shape[2])
    lse = out.new_empty(out.shape[:2])
    _attend("tree_attention", tree, {**tensors, "out": out, "lse": lse})
    return out[None, ..., : value.shape[3]].contiguous(), lse[None]


def tree_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, tree: Tree
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in fp32."""
    tensors = {
        "query": _by_token(query), "keys": _by_token(key), "keys_across": _across(key, tree.scale),
        "values_across": _across(value), "lse": lse[0].contiguous(),
        "out": _by_token(out.transpose(1, 2)), "grad": _by_token(grad.transpose(1, 2)),
    }  # fmt: skip
    heads, groups = query.shape[1], key.shape[1]
    # Of a tree and a head of keys one thread adds up the gradients. Where these are few, it is of
    # each head of queries, whose sums are added after.
    roots = int((tree.segments[:, 3] == 0).sum())
    sums = groups if roots * groups >= _ENOUGH else heads
    tokens, of_query = query.shape[2], torch.empty_like(tensors["query"])
    of_key, of_value = (
        of_query.new_zeros(tokens, sums, tensors[x].shape[2]) for x in ("keys", "out")
    )
    grads = {"query_grad": of_query, "key_grad": of_key, "value_grad": of_value}
    _attend("tree_attention_backward", tree, tensors | grads)
    if sums > groups:
        of_key, of_value = (x.unflatten(1, (groups, -1)).sum(2) for x in (of_key, of_value))
    of_query, of_key = of_query.mul_(tree.scale), of_key.mul_(tree.scale)
    return tuple(  # type: ignore[return-value]
        x[None, ..., : like.shape[3]].contiguous().transpose(1, 2)
        for x, like in ((of_query, query), (of_key, key), (of_value, value))
    )


def _attend(name: str, tree: Tree, tensors: dict[str, Tensor]) -> None:
    segments = tree.segments.contiguous()
    tokens, heads, size = tensors["query"].shape
    groups, _, columns = tensors["keys_across"].shape
    sums = tensors["key_grad"].shape[1] if "key_grad" in tensors else groups
    arguments = native.TreeAttention(
        segments.data_ptr(), segments.shape[0], tokens, columns, heads, groups, sums, size,
        tensors["out"].shape[2], tree.window or tokens, tree.softcap or 0.0,
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
