"""The kernels behind a C ABI: loading a library, its structs, and its functions on tensors.

``csrc/include/pk_abi.h`` defines the structs. Those of options are made here from the dataclasses,
the others are mirrored; a library whose own description of them differs does not load.

What the functions take and give, and in which shapes, is written in ``protocol.py``.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import torch
from torch import Tensor

from pro_kernels.backends import protocol
from pro_kernels.options import LogitOptions, RankingOptions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # DType in csrc/cpu/dtype.h
LIB = Path(__file__).resolve().parent.parent / "lib"

ABI = 1  # kAbi in csrc/include/pk_abi.h
# Type of an option -> its type in C, and what stands for None there.
_OPTION_TYPES: dict[object, tuple[type[ctypes._SimpleCData], float | None]] = {
    bool: (c_int32, None),
    float: (c_double, None),
    float | None: (c_double, 0.0),
    int | None: (c_int64, -1),
}
_TYPE_NAMES = {c_int32: "int32", c_int64: "int64", c_double: "float64", c_void_p: "pointer"}


def _all(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Rows(ctypes.Structure):
    """Rows of logits and what belongs to them."""

    _fields_ = [
        ("logits", c_void_p),
        ("dtype", c_int32),
        *_all(c_int64, "rows columns stride"),
        *_all(c_void_p, "targets target_logits logp lse entropy weights entropy_weights"),
        ("first_column", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    ]


class RankingBatch(ctypes.Structure):
    """Log-probs of tokens, and the sequences and prompts that they make."""

    _fields_ = [
        ("logps", c_void_p),
        ("tokens", c_int64),
        *_all(c_void_p, "offsets lengths"),
        ("sequences", c_int64),
        ("order", c_void_p),
        *_all(c_int64, "prompts candidates"),
        *_all(c_void_p, "rewards sft_rank prompt_weights terms sums row_weights"),
    ]


class Matrix(ctypes.Structure):
    """A matrix whose rows have unit stride."""

    _fields_ = [("data", c_void_p), ("dtype", c_int32), *_all(c_int64, "rows columns stride")]


class TreeAttention(ctypes.Structure):
    """Attention over a tree of segments."""

    _fields_ = [
        ("segments", c_void_p),
        *_all(c_int64, "count tokens columns heads key_heads sums size value_size window"),
        ("softcap", c_double),
        *_all(c_void_p, "query keys_across values out lse"),
        *_all(c_void_p, "keys values_across grad query_grad key_grad value_grad"),
    ]


class ColumnFilter(ctypes.Structure):
    """The columns that groups of rows of dZ0 keep, and the products of them."""

    _fields_ = [
        ("entries", c_void_p),
        ("dtype", c_int32),
        *_all(c_int64, "rows columns stride"),
        ("threshold", c_double),
        *_all(c_void_p, "need order"),
        ("group_rows", c_int64),
        *_all(c_void_p, "sums starts kept weights lost operand"),
        ("operand_dtype", c_int32),
        *_all(c_int64, "hidden operand_stride"),
        *_all(c_void_p, "centre stand_ins out"),
        ("out_dtype", c_int32),
        ("out_stride", c_int64),
        *_all(c_int32, "accumulate move"),
    ]


def _options_struct(name: str, hints: dict[str, object]) -> type[ctypes.Structure]:
    fields = [(field, _OPTION_TYPES[kind][0]) for field, kind in hints.items()]
    fields.sort(key=lambda field: -ctypes.sizeof(field[1]))  # no padding
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_HINTS = {
    options: {f.name: get_type_hints(options)[f.name] for f in fields(options)}
    for options in (LogitOptions, RankingOptions)
}
_OPTIONS = {o: _options_struct(o.__name__, hints) for o, hints in _HINTS.items()}
_STRUCTS: tuple[type[ctypes.Structure], ...] = (
    *_OPTIONS.values(), Rows, RankingBatch, Matrix, TreeAttention, ColumnFilter,
)  # fmt: skip


@functools.lru_cache(maxsize=256)
def in_c(options: LogitOptions | RankingOptions) -> ctypes.Structure:
    """The options as the kernels take them."""
    struct = _OPTIONS[type(options)]()
    for name, kind in _HINTS[type(options)].items():
        value = getattr(options, name)
        setattr(struct, name, _OPTION_TYPES[kind][1] if value is None else value)
    return struct


Signatures = dict[str, tuple["type | None", tuple[type, ...]]]  # name -> (result, arguments)


def signatures(result: type | None, last: type) -> Signatures:
    """What both libraries have; ``last``: the argument that says where the work runs."""
    rows = (result, (POINTER(Rows), POINTER(_OPTIONS[LogitOptions]), last))
    batch = (result, (POINTER(RankingBatch), POINTER(_OPTIONS[RankingOptions]), last))
    return {"logp": rows, "residual": rows, "logits_grad": rows, "ranking": batch}


def layout() -> list[str]:
    """The structs as this side has them, in the words of csrc/include/pk_abi.h."""
    lines = [f"ABI {ABI}"]
    for struct in _STRUCTS:
        name = struct.__name__
        lines.append(f"{name} {ctypes.sizeof(struct)} bytes")
        for field, kind, *_ in struct._fields_:
            offset = getattr(struct, field).offset
            lines.append(f"{name}.{field} {_TYPE_NAMES[kind]} at {offset}")
    return lines


class Library:
    """A library of csrc: how it was built, and its functions, of which each begins ``pk_<part>_``.

    Attributes:
        folder: where it is, or would be.
    """

    def __init__(self, part: str, functions: Signatures) -> None:
        self.part, self.functions, self.folder = part, functions, LIB
        self._loaded: tuple[ctypes.CDLL | None, str | None] | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"libpro_kernels_{self.part}.so"

    @property
    def info(self) -> dict:
        """How it was built, or why not: compiler, flags, targets, reason (of setup.py)."""
        try:
            return json.loads((self.folder / "build.json").read_text())[self.part]
        except (FileNotFoundError, KeyError):
            command = "python setup.py build_native --inplace"
            return {"reason": f"never built ({command}, or pip install)"}

    def load(self) -> tuple[ctypes.CDLL | None, str | None]:
        """The library with its signatures, or why there is none; asked for once."""
        if self._loaded is None:
            if self.path.exists():
                self._loaded = self.open(self.path)
            else:
                reason = self.info.get("reason", "unknown reason")
                self._loaded = None, f"{self.path.name} was not built: {reason}"
        return self._loaded

    def get(self) -> ctypes.CDLL:
        """The library.

        Raises:
            RuntimeError: there is none.
        """
        library, reason = self.load()
        if library is None:
            raise RuntimeError(reason)
        return library

    def open(self, path: Path) -> tuple[ctypes.CDLL | None, str | None]:
        """The library at ``path``, or why it cannot be used."""
        try:
            library = ctypes.CDLL(str(path))
            functions = {"layout": (c_char_p, ()), **self.functions}
            for name, (result, arguments) in functions.items():
                function = getattr(library, f"pk_{self.part}_{name}")
                function.restype, function.argtypes = result, arguments
                setattr(library, name, function)
        except (OSError, AttributeError) as error:
            return None, f"{path} does not load: {error}"
        found = library.layout().decode().splitlines()
        for theirs, ours in itertools.zip_longest(found, layout(), fillvalue="nothing more"):
            if theirs != ours:
                return None, f"{path} is of another version: it has {theirs}, this package {ours}"
        return library, None


def unit_stride(x: Tensor) -> Tensor:
    """``x`` itself, or a copy, with unit stride along V."""
    return x if x.stride()[1] == 1 or x.shape[1] == 1 else x.contiguous()


def check_writable(name: str, x: Tensor) -> None:
    """Raise ValueError where rows of ``x`` cannot be written in place."""
    (rows, columns), (stride, step) = x.shape, x.stride()
    if (columns > 1 and step != 1) or (rows > 1 and stride < columns):
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} must have unit stride along V and rows that do not "
            f"overlap, got strides {x.stride()}"
        )


def vector(x: Tensor | None, dtype: torch.dtype, logits: Tensor) -> Tensor | None:
    """One number a row of ``logits``, dense, of ``dtype``; None stays None."""
    if x is None:
        return None
    assert x.shape[0] == logits.shape[0] and x.dim() == 1, (x.shape, logits.shape)
    return dense(x, dtype)


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as a contiguous tensor of ``dtype``."""
    return x.contiguous() if x.dtype == dtype else x.to(dtype).contiguous()


def empty(logits: Tensor) -> Tensor:
    """Room for one fp32 number a row of ``logits``."""
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """The data pointers; null for None. The caller keeps the tensors while they are in use."""
    return [None if x is None else x.data_ptr() for x in tensors]


def matrix(x: Tensor) -> tuple[int, ...]:
    """The fields of a Matrix, with which Rows begins as well."""
    return x.data_ptr(), CODES[x.dtype], *x.shape, x.stride()[0]


@dataclass(frozen=True)
class Kernels:
    """The functions of ``backends/protocol.py`` by those of a library."""

    # Runs one, given its name, a tensor of the device and all arguments but the last; raises
    # RuntimeError where it fails.
    call: Callable[..., None]
    max_columns: int | None = None  # the most that a row of logits can have

    def logp(self, rows: protocol.Rows, entropy: bool = False) -> protocol.Statistics:
        """Statistics of each row, which is only read."""
        self._check_columns(rows.logits)
        return self._statistics("logp", rows._replace(logits=unit_stride(rows.logits)), entropy)

    def residual_(self, rows: protocol.Rows) -> tuple[Tensor, Tensor]:
        """The first two of them, and in place of the logits the gradient of the log-probs."""
        self._check_columns(rows.logits)
        check_writable("logits", rows.logits)
        return self._statistics("residual", rows, False)[:2]

    def _statistics(self, name: str, rows: protocol.Rows, entropy: bool) -> protocol.Statistics:
        logits = rows.logits
        index = vector(rows.targets, torch.int64, logits)
        exact = vector(rows.exact, torch.float32, logits)
        logps, lse = empty(logits), empty(logits)
        value = empty(logits) if entropy else None
        struct = Rows(*matrix(logits), *pointers(index, exact, logps, lse, value))
        self.call(name, logits, struct, in_c(rows.options))
        return logps, lse, value

    def logits_grad(
        self,
        rows: protocol.Rows,
        lse: Tensor,
        weights: Tensor | None,
        *,
        first_column: int = 0,
        out: Tensor | None = None,
        entropy: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The gradient of logits; rows with a negative target become 0."""
        logits = rows.logits
        self._check_columns(logits)
        if out is None:
            out = logits.new_empty(logits.shape)
        check_writable("out", out)
        if out.shape != logits.shape or out.dtype != logits.dtype:
            raise ValueError(
                f"out must be {tuple(logits.shape)} {logits.dtype} like logits, got "
                f"{tuple(out.shape)} {out.dtype}"
            )
        logits = unit_stride(logits)
        index = vector(rows.targets, torch.int64, logits)
        numbers = rows.exact, lse, weights, *(entropy or (None, None))
        exact, sums, factors, value, by = (vector(x, torch.float32, logits) for x in numbers)
        read = pointers(index, exact, None, sums, value, factors, by)
        struct = Rows(*matrix(logits), *read, first_column, out.data_ptr(), out.stride(0))
        self.call("logits_grad", logits, struct, in_c(rows.options))
        return out

    def ranking(
        self, logps: Tensor, candidates: protocol.Candidates, options: RankingOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ranking loss and its gradient; unscored tokens of ``logps`` hold 0."""
        logps, (prompts, n) = dense(logps, torch.float32), candidates.order.shape
        offsets, lengths, order, rewards, sft_rank, weights = candidates
        integers = offsets, lengths, order, sft_rank
        offsets, lengths, order, sft_rank = (dense(x, torch.int64) for x in integers)
        weights = dense(weights, torch.float32)
        rewards = None if rewards is None else dense(rewards, torch.float32)
        sequences = lengths.shape[0]
        assert offsets.shape == (sequences + 1,), (offsets.shape, lengths.shape)
        assert sft_rank.shape == weights.shape == (prompts,), (sft_rank.shape, order.shape)
        assert rewards is None or rewards.shape == order.shape, order.shape
        # Made like logps, whatever torch's default dtype and device are.
        terms, sums = logps.new_empty(prompts, n), logps.new_empty(sequences)
        row_weights = torch.empty_like(logps)
        tokens = logps.data_ptr(), logps.shape[0]
        spans = *pointers(offsets, lengths), sequences
        ranks = order.data_ptr(), prompts, n
        rest = pointers(rewards, sft_rank, weights, terms, sums, row_weights)
        self.call("ranking", logps, RankingBatch(*tokens, *spans, *ranks, *rest), in_c(options))
        return terms, sums, row_weights

    def _check_columns(self, logits: Tensor) -> None:
        if self.max_columns is not None and logits.shape[1] > self.max_columns:
            raise ValueError(
                f"logits must have at most {self.max_columns} columns, got {logits.shape[1]}"
            )
