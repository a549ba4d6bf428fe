"""What ``LazyLogits`` answers without making logits.

Operations on rows act on row numbers, or on the hidden states where a row may come twice.
``log_softmax`` and ``softmax`` stay lazy. ``gather`` and ``logsumexp`` of the same rows share one
pass of the head, as a log-prob and a product of two vectors a row.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pro_kernels.cross_entropy import class_losses
from pro_kernels.models import lazy
from pro_kernels.models.lazy import ANSWERS, LazyLogits, like

_ANY = ("logits", "log_probs", "probs", "p_log_p", "p_logits")
# Ids a row, above which the products with them are no longer cheap.
_MANY = 64
_changes = itertools.count(1)


def _answers(*names: str, of: tuple[str, ...] = ("logits",)) -> Callable[[Callable], Callable]:
    """Register what answers these operations, of such that were not changed in place."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def answer(x: Any, *args: Any, **kwargs: Any) -> Any:
            return function(x, *args, **kwargs) if _is_open(x, *of) else NotImplemented

        ANSWERS.update(dict.fromkeys(names, answer))
        return function

    return register


def _is_open(x: Any, *kinds: str) -> bool:
    """Whether it is of these kinds, has rows, and nothing made it real."""
    if not isinstance(x, LazyLogits) or x.what not in kinds or not x.rows.numel():
        return False
    return x.source.real is None and x.fixed is None


def _is_last(x: LazyLogits, dim: Any) -> bool:
    """Whether that dimension is the vocabulary."""
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    return type(dim) is int and dim in (-1, x.rows.dim())


def _number(x: LazyLogits, value: Tensor, keepdim: bool = False) -> Tensor:
    """The value of each row, as plain logits would give it."""
    return (value[..., None] if keepdim else value).to(x.dtype)


# ---- rows

# Where the arguments of each, after the tensor, say which dimensions.
_DIMS = {
    "split": (1,), "chunk": (1,), "unbind": (0,), "select": (0,), "narrow": (0,),
    "squeeze": (0,), "unsqueeze": (0,), "transpose": (0, 1), "flatten": (0, 1),
}  # fmt: skip


def _on_rows(name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on leading dimensions."""
    if not isinstance(x, LazyLogits) or x.fixed is not None or not x.rows.dim():
        return NotImplemented
    given, last = list(args), x.rows.dim()
    names = [k for k in kwargs if "dim" in k]
    places: list[tuple[Any, Any]] = [(given, i) for i in _DIMS[name] if i < len(given)] + [
        (kwargs, k) for k in names
    ]
    for holder, at in places:
        if type(holder[at]) is not int:
            return NotImplemented
        dim = holder[at] + last + 1 + (name == "unsqueeze") if holder[at] < 0 else holder[at]
        if not 0 <= dim < last + (name == "unsqueeze"):
            return NotImplemented
        holder[at] = dim
    if name == "flatten" and len(places) < 2:  # to the end
        return NotImplemented
    rows = getattr(x.rows, name)(*given, **kwargs)
    if isinstance(rows, Tensor):
        return like(x, rows)
    scope = x if x.scope is None else x.scope
    return tuple(like(x, part, scope=scope) for part in rows)


ANSWERS.update({name: functools.partial(_on_rows, name) for name in _DIMS})


@_answers("view", "reshape", of=_ANY)
def _reshaped(x: LazyLogits, *shape: Any, **named: Any) -> Any:
    sizes = named.get("shape", named.get("size", shape))
    sizes = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if not isinstance(sizes, tuple | list):
        return NotImplemented
    *lead, last = sizes
    if last == -1 and -1 not in lead and math.prod(lead) == x.rows.numel():
        last = x.shape[-1]
    return like(x, x.rows.reshape(lead)) if last == x.shape[-1] else NotImplemented


@_answers("__getitem__", of=_ANY)
def _indexed(x: LazyLogits, index: Any) -> Any:
    index = list(index) if isinstance(index, tuple) else [index]
    plain = (int, slice, Tensor, type(None), type(Ellipsis))
    if not all(isinstance(i, plain) and not isinstance(i, bool) for i in index):
        return NotImplemented
    if any(isinstance(i, Tensor) and i.dtype not in (torch.bool, torch.int64) for i in index):
        return NotImplemented
    masks = [isinstance(i, Tensor) and i.dtype == torch.bool for i in index]
    dims = [i.dim() if mask else i is not None and i is not Ellipsis
            for i, mask in zip(index, masks, strict=True)]  # fmt: skip
    missing = x.rows.dim() + 1 - sum(dims)
    if dots := [k for k, i in enumerate(index) if i is Ellipsis]:
        index[dots[0] : dots[0] + 1] = [slice(None)] * missing
        missing = 0
    column = slice(None) if missing else index.pop()
    if column is None:
        return NotImplemented
    if not isinstance(column, slice):
        return _columns(x, index, column)
    if column != slice(None):
        return NotImplemented
    if sum(isinstance(i, Tensor) for i in index) == sum(masks):  # each row at most once
        return like(x, x.rows[tuple(index)])
    return lazy.apart(x, lazy.hidden_of(x)[tuple(index)])


def _columns(x: LazyLogits, index: list[Any], column: Any) -> Any:
    """One number a row: ``x[rows, ids]``, ``x[..., id]``."""
    if isinstance(column, int):
        x = like(x, x.rows[tuple(index)])
        column = column + x.shape[-1] if column < 0 else column
        if x.what != "logits" or not 0 <= column < x.shape[-1]:
            return NotImplemented
        found = lazy.logits_of(x, torch.full_like(x.rows, column)[..., None])[..., 0]
        return x.source.hand_out(_number(x, found))
    if isinstance(column, Tensor) and column.dim() and column.dtype == torch.int64:
        if not all(isinstance(i, int | Tensor) for i in index):
            return NotImplemented
        rows, column = torch.broadcast_tensors(x.rows[tuple(index)], column)
        if not (lazy.is_whole(x) and rows.shape == x.rows.shape and torch.equal(rows, x.rows)):
            x = lazy.apart(x, x.source.at(x.source.head.hidden, rows))
    else:
        return NotImplemented
    ids = torch.where(column < 0, column + x.shape[-1], column)
    found = ANSWERS["gather"](x, -1, ids[..., None])
    return found if found is NotImplemented else found[..., 0]


@_answers("index_select", of=_ANY)
def _index_select(x: LazyLogits, dim: int, index: Tensor) -> Any:
    at = dim + x.rows.dim() + 1 if dim < 0 else dim
    if at >= x.rows.dim():
        return NotImplemented
    return lazy.apart(x, lazy.hidden_of(x).index_select(at, index))


def _joined(name: str, tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]

    def fits(x: Any) -> bool:
        return (
            _is_open(x, "logits") and not x.source.hooks
            and x.requires_grad == first.requires_grad
            and (x.key[0], x.dtype, x.source.dtype, x.source.autocast)
            == (first.key[0], first.dtype, first.source.dtype, first.source.autocast)
            and all(a is b for a, b in zip(x.source.head[1:], first.source.head[1:], strict=True))
        )  # fmt: skip

    if not all(map(fits, tensors)):
        return NotImplemented
    leading = first.rows.dim() + (name == "stack")
    at = dim + leading + 1 if dim < 0 else dim
    if at >= leading:
        return NotImplemented
    return lazy.apart(first, getattr(torch, name)([lazy.hidden_of(x) for x in tensors], at))


ANSWERS.update({name: functools.partial(_joined, name) for name in ("cat", "stack")})


# ---- the same as another tensor


@_answers("contiguous", of=_ANY)
def _contiguous(x: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return NotImplemented
    return x if x.rows.is_contiguous() else like(x)


@_answers("clone", of=_ANY)
def _cloned(x: LazyLogits, *, memory_format: Any = None) -> LazyLogits:
    return like(x)


@_answers("detach", of=_ANY)
def _detached(x: LazyLogits) -> LazyLogits:
    with torch.no_grad():
        return like(x, x.rows)


@_answers("to", of=_ANY)
def _to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    args = tuple(a.dtype if isinstance(a, LazyLogits) else a for a in args)
    if "copy" in kwargs or sum(isinstance(a, bool) for a in args) > 1:
        return NotImplemented
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device not in (x.device, torch.device(x.device.type)):
        return NotImplemented
    return NotImplemented if layout is not None else _cast(x, dtype)


@_answers("cpu", of=_ANY)
def _cpu(x: LazyLogits) -> Any:
    return x if x.device.type == "cpu" else NotImplemented


def _cast(x: LazyLogits, dtype: torch.dtype | None) -> Any:
    """Of a wider dtype: a narrower one would round what no number is rounded to."""
    if dtype is None or dtype == x.dtype:
        return x
    wider = dtype.is_floating_point and torch.promote_types(dtype, x.dtype) == dtype
    return like(x, dtype=dtype) if wider else NotImplemented


for _name, _dtype in (("float", torch.float32), ("double", torch.float64)):
    _answers(_name, of=_ANY)(functools.partial(_cast, dtype=_dtype))


@_answers("div", "true_divide", "__truediv__")
def _divided(x: LazyLogits, other: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    if isinstance(other, int | float):
        return like(x, divisor=x.divisor * other) if _is_scale(x, other) else NotImplemented
    hidden = _cooled(x, other)
    return NotImplemented if hidden is None else lazy.apart(x, hidden)


@_answers("div_", "__itruediv__")
def _divided_(x: LazyLogits, other: Any) -> Any:
    source, number = x.source, isinstance(other, int | float)
    if number and other == 1:
        return x
    if source.graph and not (x.requires_grad and torch.is_grad_enabled()):
        return NotImplemented
    if number and x.rows.numel() == source.base.numel() and _is_scale(x, other):
        source.divisor *= other
    else:  # for these rows alone
        hidden = _cooled(x, torch.tensor(other, dtype=x.dtype) if number else other)
        if hidden is None:
            return NotImplemented
        before = source.at(source.head.hidden, source.numbers).to(hidden.dtype)
        source.put(before.index_put((x.rows,), hidden))
    source.changes = next(_changes)
    return x


def _is_scale(x: LazyLogits, by: float) -> bool:
    """Whether logits may be divided by it before they are made."""
    fits = 1e-4 < abs(by * x.key[0]) < 1e4
    return fits and (by > 0 or x.source.head.softcap is None)


def _cooled(x: LazyLogits, by: Any) -> Tensor | None:
    """Hidden states over temperatures (..., 1) of their rows; None where that is not the same.

    In 16 bits that rounds less than it does to round logits, and then their quotients
    (docs/logprobs.md); those of an fp32 head become fp32.
    """
    head, shape = x.source.head, (*x.rows.shape, 1)
    if not isinstance(by, Tensor) or isinstance(by, LazyLogits) or by.dim() > len(shape):
        return None
    if head.softcap is not None or head.bias is not None or by.dtype != x.dtype:
        return None
    if torch.broadcast_shapes(by.shape, shape) != shape or not bool((by != 0).all()):
        return None
    cooled = lazy.hidden_of(x).to(torch.promote_types(x.dtype, head.hidden.dtype)) / by
    return cooled if x.source.options.get("head_dtype") else cooled.to(head.hidden.dtype)


@_answers("mul", "__mul__", "__rmul__", of=("logits", "log_probs", "probs"))
def _multiplied(x: LazyLogits, other: Any) -> Any:
    if isinstance(other, int | float):
        scaled = x.what == "logits" and other and _is_scale(x, 1 / other)
        return like(x, divisor=x.divisor / other) if scaled else NotImplemented
    if not _is_open(other, "logits", "log_probs", "probs") or x.which is not other.which:
        return NotImplemented
    kinds = {x.what, other.what} - {"probs"}
    if len(kinds) != 1 or "probs" not in (x.what, other.what):
        return NotImplemented
    same = (x.key, x.dtype, x.requires_grad) == (other.key, other.dtype, other.requires_grad)
    same = same and x.source.head.hidden is other.source.head.hidden
    product = "p_log_p" if kinds == {"log_probs"} else "p_logits"
    return like(x, what=product) if same else NotImplemented


# ---- distributions


def _normalised(
    x: LazyLogits, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None, *, what: str
) -> Any:
    if isinstance(_stacklevel, torch.dtype):  # ``torch.softmax(x, dim, dtype)``
        dtype = _stacklevel
    if dtype is None and x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32
    x = _cast(x, dtype)
    return like(x, what=what) if x is not NotImplemented and _is_last(x, dim) else NotImplemented


_answers("log_softmax")(functools.partial(_normalised, what="log_probs"))
_answers("softmax")(functools.partial(_normalised, what="probs"))


@_answers("exp", of=("log_probs",))
def _exp(x: LazyLogits) -> LazyLogits:
    return like(x, what="probs")


# ---- numbers


@_answers("gather", of=("logits", "log_probs"))
def _gather(x: LazyLogits, dim: Any, index: Tensor, *, sparse_grad: bool = False) -> Any:
    if not _is_last(x, dim) or index.dtype != torch.int64 or index.dim() != x.rows.dim() + 1:
        return NotImplemented
    if not 0 < index.shape[-1] <= _MANY or not index.numel():
        return NotImplemented
    if index.shape[:-1] != x.rows.shape:  # of fewer rows
        x = like(x, x.rows[tuple(slice(n) for n in index.shape[:-1])])
    if index.shape[:-1] != x.rows.shape:
        return NotImplemented
    if index.shape[-1] == 1 and x.what == "log_probs":
        return _number(x, lazy.log_probs(x, index[..., 0])[0], keepdim=True)
    if index.shape[-1] == 1:
        return _number(x, lazy.target_logits_of(x, index[..., 0]), keepdim=True)
    chosen = lazy.logits_of(x, index)
    return (chosen if x.what == "logits" else chosen - lazy.logsumexp(x)[..., None]).to(x.dtype)


@_answers("logsumexp")
def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    return _number(x, lazy.logsumexp(x), keepdim) if _is_last(x, dim) else NotImplemented


@_answers("cross_entropy")
def _cross_entropy(
    input: LazyLogits,  # noqa: A002
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    x, eps = input, label_smoothing
    if (size_average, reduce) != (None, None) or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    if x.rows.dim() > 1 or target.dtype != torch.int64 or target.shape != x.rows.shape:
        return NotImplemented
    if weight is not None and (
        weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.requires_grad
    ):
        return NotImplemented
    average = lazy.mean(x, weight) if eps else None
    if eps and (average is None or not 0 < eps <= 1):
        return NotImplemented
    if torch.is_autocast_enabled(x.device.type):
        x = _cast(x, torch.promote_types(x.dtype, torch.float32))
    counted = target != ignore_index
    # Rows that do not count are left out.
    logps, lse = lazy.log_probs(x, torch.where(counted, target, lazy.NO_TARGET), keep=False)
    losses, weights = class_losses(logps, target, counted, weight, eps, lse, average)
    if reduction == "none":
        return losses.to(x.dtype)
    total = losses.sum()
    return (total / weights.sum() if reduction == "mean" else total).to(x.dtype)


@_answers("nll_loss", of=("log_probs",))
def _nll_loss(input: LazyLogits, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    return _cross_entropy(like(input, what="logits"), *args, **kwargs)


@_answers("sum", of=("logits", "log_probs", "p_log_p", "p_logits"))
def _sum(x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not _is_last(x, dim) or dtype not in (None, x.dtype):
        return NotImplemented
    if x.what == "p_log_p":
        return _number(x, -lazy.entropy(x), keepdim)
    if x.what == "p_logits":
        return _number(x, lazy.logsumexp(x) - lazy.entropy(x), keepdim)
    average = _average(x)
    return NotImplemented if average is None else _number(x, average * x.shape[-1], keepdim)


@_answers("mean", of=("logits", "log_probs"))
def _mean(x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if dtype not in (None, x.dtype) or not (dim is None or _is_last(x, dim)):
        return NotImplemented
    average = _average(x)
    if average is None:
        return NotImplemented
    return average.mean().to(x.dtype) if dim is None else _number(x, average, keepdim)


def _average(x: LazyLogits) -> Tensor | None:
    """The mean of each row, or None."""
    average = lazy.mean(x)
    if average is None and not x.requires_grad:
        wide = torch.promote_types(x.dtype, torch.float32)
        return lazy.by_blocks(x, lambda z: (z.mean(-1, dtype=wide),))[0]
    return average if average is None or x.what == "logits" else average - lazy.logsumexp(x)


@_answers("argmax", of=("logits", "log_probs", "probs"))
def _argmax(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is_last(x, dim):
        return NotImplemented
    return lazy.by_blocks(x, lambda z: (z.argmax(-1, keepdim),))[0]


@_answers("max")
def _max(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is_last(x, dim):
        return NotImplemented
    found = _largest(x, lambda z: tuple(z.max(-1, keepdim=True)))
    return torch.return_types.max(found if keepdim else tuple(y[..., 0] for y in found))


@_answers("topk")
def _topk(x: LazyLogits, k: int, dim: Any = -1, largest: bool = True, sorted: bool = True) -> Any:  # noqa: A002
    if not _is_last(x, dim) or not 0 < k <= _MANY:
        return NotImplemented
    return torch.return_types.topk(_largest(x, lambda z: tuple(z.topk(k, -1, largest, sorted))))


def _largest(x: LazyLogits, number: Callable[[Tensor], Any]) -> Any:
    """Values, differentiable, and their indices."""
    values, ids = lazy.by_blocks(x, number)
    if x.requires_grad and torch.is_grad_enabled():
        values = lazy.logits_of(x, ids).to(x.dtype)
    return values, ids


@_answers("register_hook", of=_ANY)
def _register_hook(x: LazyLogits, hook: Callable[[Tensor], Any]) -> Any:
    """FSDP's waits for any gradient of an output and hands it on; others see the real one."""
    if not getattr(hook, "__module__", "").startswith("torch.distributed."):
        if x.passes:
            raise RuntimeError("register_hook comes after these logits were used; do it before")
        return lazy.fix(x).register_hook(hook)
    x.source.hooks.append(hook)
    return None


@_answers("retain_grad", of=_ANY)
def _retain_grad(x: LazyLogits) -> None:
    lazy.fix(x).retain_grad()


@_answers("requires_grad_", of=_ANY)
def _requires_grad_(x: LazyLogits, requires_grad: bool = True) -> Tensor:
    return x if x.requires_grad == requires_grad else lazy.real(x).requires_grad_(requires_grad)
