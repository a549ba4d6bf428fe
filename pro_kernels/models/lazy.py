"""Logits that are not there: what a model that is called without labels returns under ``attach``.

``LazyLogits`` has the shape, dtype and device of the logits, and holds hidden states and head
instead. What is asked of it is answered by the fused path where ``answers.py`` knows how. All else
makes the logits of just those rows, and says so once. So nothing is wrong, only not always faster.

Legend: ``N`` rows of hidden states, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pro_kernels.api import linear_token_logps
from pro_kernels.fused.autograd import first_order
from pro_kernels.fused.thin import ChosenLogits, mean_column, mean_logits
from pro_kernels.models import COUNTS
from pro_kernels.models.head import HeadInputs
from pro_kernels.options import LogitOptions

# Without gradients logits smaller than this are made: generation, a look at some rows.
_FEW = 64 << 20
_BLOCK = 64 << 20  # bytes of logits at a time, where a number is made of whole rows
NO_TARGET = -(1 << 31)  # no id of a token, so that -100 is refused as plain logits refuse it
# Attributes and methods of a tensor that do not look at its values.
_VALUES = {"T", "mT", "H", "mH", "real", "imag", "data"}
_METADATA = {
    *"size dim ndimension numel nelement element_size stride storage_offset is_contiguous".split(),
    *"is_floating_point is_complex is_signed is_same_size get_device is_inference".split(),
    *"is_shared is_conj is_neg _is_view __len__ __hash__ __format__".split(),
}
# By the name of an operation; what it cannot answer, it answers with NotImplemented.
ANSWERS: dict[str, Callable[..., Any]] = {}
_said: set[str] = set()
_OF_SHAPE = {*"squeeze_ unsqueeze_ transpose_ t_ detach_ resize_ set_ swapaxes_".split()}
_NOT_IN_PLACE = (
    "cannot be done in place to the logits of an attached model; do it out of place, or "
    "attach(model, lazy_logits=False)"
)


@dataclass(eq=False)
class Source:
    """Rows that views share, as views of one tensor share its memory."""

    head: HeadInputs
    numbers: Tensor  # (N,), of the rows
    places: Tensor | None  # (N,), of each row in the hidden states; None: row i is the i-th
    dtype: torch.dtype  # in which the head would leave logits
    autocast: torch.dtype | None
    options: dict[str, Any]  # of the calls that answer for them
    habits: dict[str, Any]  # what was asked of logits of this model before
    base: Tensor  # (count,) contiguous: the rows of its memory, of which views are made
    graph: bool  # whether its logits have a gradient
    divisor: float = 1.0
    changes: int = 0  # names the last operation in place
    real: Tensor | None = None  # (count, V), where one of them has no other answer
    hooks: list[Callable[[Tensor], Any]] = field(default_factory=list)
    shared: dict[Any, Tensor] = field(default_factory=dict)  # with copies, of the same rows
    watched: tuple[tuple[Tensor, int], ...] = ()  # what logits are made of, and its version
    parts: tuple[tuple[Tensor, int], ...] = ()  # that were handed out, and their versions

    def __post_init__(self) -> None:
        if not self.watched:
            given = (x for x in self.head[:3] if x is not None and not x.is_inference())
            self.watched = tuple((x, x._version) for x in given)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Autocast as when the model ran; RuntimeError where head or shared parts changed since."""
        if any(x._version != version for x, version in self.parts):
            raise RuntimeError(
                "columns of the logits of an attached model were changed in place, which does not "
                "reach the logits: write logits[..., ids] = value instead of "
                "logits[..., ids].fill_(value), or attach(model, lazy_logits=False)"
            )
        if any(x._version != version for x, version in self.watched):
            raise RuntimeError(
                "the logits of an attached model are asked for after its head was changed, by an "
                "optimizer's step: ask before that, or attach(model, lazy_logits=False)"
            )
        on = self.autocast is not None
        with torch.autocast(self.head.hidden.device.type, dtype=self.autocast, enabled=on):
            yield

    def hand_out(self, part: Tensor) -> Tensor:
        """Columns, of which plain logits would give a view: a write to them must not be lost."""
        if not part.is_inference():
            self.parts += ((part.detach(), part._version),)
        return part

    def mean_logit(self) -> Tensor:
        """(N,) fp32 (fp64 of such), of raw logits."""
        key = torch.is_grad_enabled()
        if key not in self.shared:
            with self.computing():
                mean = mean_logits(self.head.hidden, mean_column(*self.head[1:3]))
            self.shared[key] = self.at(mean, self.numbers)
        return self.shared[key]

    def but(self, **changes: Any) -> Source:
        """The same with other values of some fields: ``replace``, in a fraction of its time."""
        made = object.__new__(Source)
        vars(made).update(vars(self), **changes)
        return made

    def put(self, hidden: Tensor) -> None:
        """Other hidden states (N, H) for the rows, in place."""
        self.head = self.head._replace(hidden=hidden)
        self.places, self.shared = None, {}

    def at(self, x: Tensor, rows: Tensor) -> Tensor:
        """What belongs to these rows, of something by hidden state."""
        return x[rows if self.places is None else self.places[rows]]


@dataclass(eq=False)
class Pass:
    """One run of the head over some rows; 0 at the others."""

    key: tuple[float, int]
    ids: Tensor  # (N,)
    logps: Tensor  # (N,)
    lse: Tensor  # (N,)
    entropy: Tensor | None  # (N,)


class LazyLogits(Tensor):
    """Logits, log-probs or probabilities (..., V) of some rows, not yet made."""

    source: Source
    rows: Tensor  # (...) int64, each at most once
    what: str  # "logits", "log_probs", "probs", and of their products "p_log_p", "p_logits"
    divisor: float  # by which they were divided, beside the source's
    parent: LazyLogits | None  # whose rows these are among
    scope: LazyLogits | None  # with what it was split off, all of which will be asked for
    passes: list[Pass]
    which: object  # the same of tensors of the same rows
    fixed: Tensor | None  # the real one, where somebody wants its gradient

    @property
    def key(self) -> tuple[float, int]:
        """What results of these rows go by."""
        return self.divisor * self.source.divisor, self.source.changes

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN206, D102
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        attribute = func.__self__.__name__ if name == "__get__" else None
        if attribute == "grad" and args[0].fixed is not None:
            return args[0].fixed.grad
        if attribute and attribute not in _VALUES or name in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        return _answer(func, name, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN206, D102
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, what={self.what!r})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return real(self).detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return real(self).__deepcopy__(memo)


@torch._disable_dynamo
def _answer(func: Callable[..., Any], name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        if name in ANSWERS and not _any_wrapped(args, kwargs):
            with contextlib.suppress(TypeError):  # a form of the call that is not known here
                found = ANSWERS[name](*args, **kwargs)
                if found is not NotImplemented:
                    return found
        return _plainly(func, name, args, kwargs)


def lazy_logits(
    head: HeadInputs,  # of the call; hidden (..., H), of the logits or, with ``places``, (S, H)
    options: dict[str, Any],  # of the calls that answer for them
    habits: dict[str, Any],  # of the model, to be kept from call to call
    made: torch.dtype,  # in which the head would leave them
    dtype: torch.dtype,  # in which they would be returned; of an fp32 head both are fp32
    places: Tensor | None = None,  # (...), which hidden state each of the logits' rows is of
) -> LazyLogits:
    """The logits of a head's call, not made."""
    kind = head.hidden.device.type
    shape = head.hidden.shape[:-1] if places is None else places.shape
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if options.get("head_dtype"):
        made, dtype, autocast = torch.float32, torch.float32, None
    head = head._replace(hidden=head.hidden.reshape(-1, head.hidden.shape[-1]))
    places = None if places is None else places.reshape(-1)
    rows = torch.arange(shape.numel(), device=head.hidden.device)
    COUNTS["lazy_rows"] += rows.numel()
    inputs = [x for x in head[:3] if x is not None]
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    source = Source(head, rows, places, made, autocast, options, habits, rows, graph)
    return _view(source, rows=rows.view(shape), dtype=dtype)


def worth(hidden: Tensor, weight: Tensor) -> bool:
    """Whether logits of these hidden states are better not made."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return True
    return hidden[..., 0].numel() * weight.shape[0] * hidden.itemsize > _FEW


# ---- views


class _Made(torch.autograd.Function):
    """A view, in the graph: what knows nothing of it gets dense gradients to it right, too."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, dtype, fields):  # noqa: D102
        shape = (*fields["rows"].shape, weight.shape[0])
        made = Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=hidden.device)
        vars(made).update(fields)
        ctx.fields, ctx.dtype = fields, dtype
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    @first_order
    def backward(ctx, grad):  # noqa: D102
        if grad is None:
            return (None,) * 5
        source, rows = ctx.fields["source"], ctx.fields["rows"]

        def values(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            head = source.head._replace(hidden=hidden, weight=weight, bias=bias)
            changed = source.but(head=head)
            return _values({**ctx.fields, "source": changed}, rows, ctx.dtype)

        return *_again(ctx, source.head, values, grad), None, None


def _again(
    ctx: Any, head: HeadInputs, values: Callable[..., Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of hidden states, weight and bias, through ``values`` of them run once more."""
    inputs = [None if x is None else x.detach() for x in head[:3]]
    with torch.enable_grad():
        needs = zip(inputs, ctx.needs_input_grad, strict=False)
        wanted = [x.requires_grad_() for x, need in needs if need and x is not None]
        found = torch.autograd.grad(values(*inputs), wanted, grad)
    by_input = {id(x): y for x, y in zip(wanted, found, strict=True)}
    return [by_input.get(id(x)) for x in inputs]


def _view(source: Source, *, dtype: torch.dtype, **fields: Any) -> LazyLogits:
    known: dict[str, Any] = {"what": "logits", "divisor": 1.0, "parent": None, "scope": None}
    known |= {"fixed": None, "which": object()}
    fields = {**known, "passes": [], **fields, "source": source}
    return _Made.apply(*source.head[:3], dtype, fields)


def like(x: LazyLogits, rows: Tensor | None = None, **changes: Any) -> LazyLogits:
    """A view of ``x`` with these rows; without them, or of rows of their own, another tensor."""
    fields: dict[str, Any] = {"dtype": x.dtype, "what": x.what, "divisor": x.divisor}
    fields |= {"parent": x, "scope": x.scope, **changes}
    if rows is None:
        fields["which"] = x.which
    source = x.source
    if rows is None or rows.untyped_storage().data_ptr() != x.rows.untyped_storage().data_ptr():
        rows = (x.rows if rows is None else rows).contiguous()
        graph = source.graph and torch.is_grad_enabled()
        source = source.but(base=rows.view(-1), graph=graph)
    with computing_grad(x):
        return _view(source, rows=rows, **fields)


def apart(x: LazyLogits, hidden: Tensor) -> LazyLogits:
    """The same of hidden states (..., H) of its own, which the graph of x's leads to."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows, head = torch.arange(flat.shape[0], device=flat.device), x.source.head
    source = x.source.but(
        head=head._replace(hidden=flat), numbers=rows, places=None, base=rows, shared={},
        graph=x.source.graph and torch.is_grad_enabled(),
    )  # fmt: skip
    rows = rows.view(hidden.shape[:-1])
    with computing_grad(x):
        return _view(source, rows=rows, dtype=x.dtype, what=x.what, divisor=x.divisor)


def computing_grad(x: LazyLogits) -> torch.set_grad_enabled:
    """Gradients are on, where they are now and ``x`` has one."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad)


def is_whole(x: LazyLogits) -> bool:
    """Whether its rows are those of the source, one after another."""
    rows, numbers = x.rows, x.source.numbers
    same = rows.data_ptr() == numbers.data_ptr() and rows.numel() == numbers.numel()
    return same and rows.is_contiguous()


def hidden_of(x: LazyLogits) -> Tensor:
    """(..., H)."""
    hidden = x.source.head.hidden if x.requires_grad else x.source.head.hidden.detach()
    if is_whole(x) and x.source.places is None:
        return hidden.view(*x.rows.shape, -1)
    return x.source.at(hidden, x.rows)


# ---- the real thing


def real(x: LazyLogits) -> Tensor:
    """What ``x`` stands for, as a plain tensor, differentiable."""
    if x.fixed is not None:
        return x.fixed
    with computing_grad(x):
        if x.source.real is None:
            COUNTS["made_rows"] += x.rows.numel()
            return _values(vars(x), x.rows, x.dtype)
    view = _in_memory(x, x.source.real)
    return view if x.requires_grad else view.detach()


def _in_memory(x: LazyLogits, memory: Tensor) -> Tensor:
    """The part of its source's real logits that a view is."""
    shift, vocab = x.rows.storage_offset() - x.source.base.storage_offset(), memory.shape[-1]
    strides = [n * vocab for n in x.rows.stride()]
    return memory.as_strided((*x.rows.shape, vocab), (*strides, 1), shift * vocab)


def _values(view: dict[str, Any], rows: Tensor, dtype: torch.dtype) -> Tensor:
    source: Source = view["source"]
    head = source.head._replace(hidden=source.at(source.head.hidden, rows))
    with source.computing():
        wide = torch.float32 if source.options.get("head_dtype") else None
        z = head.after(head.raw_logits(wide)).to(source.dtype).to(dtype)
    divisor, what = view["divisor"] * source.divisor, view["what"]
    z = z if divisor == 1.0 else z / divisor
    if what in ("logits", "log_probs"):
        return z if what == "logits" else z.log_softmax(-1)
    factor = {"probs": 1, "p_logits": z}.get(what)
    return z.softmax(-1) * (z.log_softmax(-1) if factor is None else factor)


def by_blocks(x: LazyLogits, number: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    """Tensors that ``number`` makes of the real rows, some at a time, without gradient."""
    flat = x.rows.reshape(-1)
    size = max(1, _BLOCK // (x.shape[-1] * x.dtype.itemsize))
    with torch.no_grad():
        parts = [number(_values(vars(x), at, x.dtype)) for at in flat.split(size)]
    whole = [torch.cat(column) for column in zip(*parts, strict=True)]
    return [y.view(*x.rows.shape, *y.shape[1:]) for y in whole]


def _plain(x: Any) -> Any:
    return real(x) if isinstance(x, LazyLogits) else x


def _any_wrapped(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether another autograd Function returned one of them, which has to see its gradient."""
    for x in (*args, *kwargs.values()):
        if any(map(_is_wrapped, x)) if isinstance(x, list | tuple) else _is_wrapped(x):
            return True
    return False


def _is_wrapped(x: Any) -> bool:
    node = x.grad_fn if isinstance(x, LazyLogits) else None
    if node is None or isinstance(node, _Made._backward_cls):
        return False
    module = getattr(node, "ddp_weakref", lambda: None)()
    if module is None or module.static_graph or x.parent is None:
        return True
    x.source = x.parent.source  # DDP cloned it, which only a static graph has to see a gradient of
    return False


def _plainly(func: Callable[..., Any], name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The operation on real logits."""
    first = args[0] if args else None
    wrapped = _any_wrapped(args, kwargs)
    if isinstance(first, LazyLogits):
        _say(name, first)
        inner = name.strip("_")
        if name == "__setitem__" or name == f"{inner}_" or name == f"__{inner}__" and (
            inner[0] == "i" and inner not in ("invert", "int", "index")
        ):  # fmt: skip
            if wrapped or name in _OF_SHAPE:
                raise RuntimeError(f"{name} {_NOT_IN_PLACE}")
            return _in_place(first, func, args[1:], kwargs)
    if isinstance(kwargs.get("out"), LazyLogits):
        raise RuntimeError(f"{name}(out=...) {_NOT_IN_PLACE}")
    if wrapped:  # through the graph, below which logits are made
        return func(*args, **kwargs)
    made = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    if isinstance(first, LazyLogits) and first.source.real is None:
        for x in made if isinstance(made, list | tuple) else (made,):
            if isinstance(x, Tensor) and x._is_view():  # of real logits that are nobody's now
                first.source.hand_out(x)
    return made


def _in_place(x: LazyLogits, func: Callable[..., Any], args: tuple, kwargs: dict) -> LazyLogits:
    source = x.source
    args, kwargs = tree_map(_plain, args), tree_map(_plain, kwargs)
    if source.real is None:
        COUNTS["made_rows"] += source.base.numel()
        with torch.set_grad_enabled(source.graph):
            source.real = _values(vars(x), source.base, x.dtype).clone()
    view = _in_memory(x, source.real)
    func(view if x.requires_grad or not source.graph else view.detach(), *args, **kwargs)
    return x


def fix(x: LazyLogits) -> Tensor:
    """The real one from now on."""
    if x.fixed is None:
        x.fixed = real(x)
    return x.fixed


def _say(name: str, x: LazyLogits) -> None:
    explain = os.environ.get("PRO_KERNELS_EXPLAIN") == "1"
    if name in _said and not explain:
        return
    _said.add(name)
    text = f"{x.what} of shape {tuple(x.shape)} were made for {name}"
    if not explain:
        warnings.warn(
            f"{text}, to which pro_kernels has no faster answer (PRO_KERNELS_EXPLAIN=1 shows "
            "where)",
            stacklevel=4,
        )
        return
    stack = traceback.extract_stack()
    frames = [f for f in stack if f"{os.sep}torch{os.sep}" not in f.filename]
    shown = traceback.format_list([f for f in frames if f.filename != __file__][-3:])
    print(f"pro_kernels: {text}:\n{''.join(shown)}", end="", file=sys.stderr)


# ---- numbers of whole rows, in fp32


def _of_rows(x: LazyLogits, full: Tensor) -> Tensor:
    """What stands in (N,) for the rows, in their shape."""
    out = full.view(x.rows.shape) if is_whole(x) else full[x.rows]
    out = out if x.requires_grad else out.detach()
    for hook in x.source.hooks:
        if out.requires_grad:
            out.register_hook(hook)
    return out


def log_probs(x: LazyLogits, ids: Tensor, keep: bool = True) -> tuple[Tensor, Tensor]:
    """Of one id a row, and the log-sum-exps."""
    made = run_head(x, ids, keep=keep)
    return _of_rows(x, made.logps), _of_rows(x, made.lse)


def target_logits_of(x: LazyLogits, ids: Tensor) -> Tensor:
    """Of one id a row, in one pass with the log-sum-exp of the row."""
    made = run_head(x, ids)
    return _of_rows(x, made.logps + made.lse)


def logits_of(x: LazyLogits, ids: Tensor) -> Tensor:
    """Of ids (..., k) of each row."""
    rows = x.rows.reshape(-1)
    places = rows if x.source.places is None else x.source.places[rows]
    if ids.numel() and not 0 <= ids.min() <= ids.max() < x.shape[-1]:
        raise IndexError(f"index must lie in [0, {x.shape[-1]}), got {ids.min()} to {ids.max()}")
    head = x.source.head
    dtype = x.source.autocast or torch.promote_types(head.hidden.dtype, head.weight.dtype)
    options = LogitOptions(head.softcap, head.logit_scale)
    with computing_grad(x), x.source.computing():
        ids = ids.reshape(-1, ids.shape[-1])
        found = ChosenLogits.apply(*head[:3], places, ids, dtype, options)
    return found.view(*x.rows.shape, -1) / x.key[0]


def logsumexp(x: LazyLogits) -> Tensor:
    """Of each row."""
    return _of_rows(x, run_head(x).lse)


def entropy(x: LazyLogits) -> Tensor:
    """Of each row, in nats."""
    found = run_head(x, entropy=True).entropy
    assert found is not None
    return _of_rows(x, found)


def mean(x: LazyLogits, by: Tensor | None = None) -> Tensor | None:
    """The mean of each row's logits, times ``by`` (V,); None where a softcap makes it another."""
    head = x.source.head
    if head.softcap is not None:
        return None
    with computing_grad(x):
        if by is None:
            found = _of_rows(x, x.source.mean_logit())
        else:
            found = mean_logits(hidden_of(x), mean_column(*head[1:3], by))
    return found * (head.logit_scale / x.key[0])


def run_head(
    x: LazyLogits,
    ids: Tensor | None = None,  # of each row's target; None: any
    entropy: bool = False,
    keep: bool = True,  # it may serve later; not where some rows have no target
) -> Pass:
    """A pass over the rows of ``x``, or one of before that serves."""
    known, head = _known(x, ids), x.source.head
    for made in known:
        if not entropy or made.entropy is not None:
            return made
    habits = x.source.habits
    if entropy and known:  # the next time it comes with the log-probs
        habits["entropy"] = True
    over = x
    if ids is None and x.scope is not None and x.scope.key == x.key and (
        x.scope.source.head.hidden is head.hidden and x.scope.requires_grad == x.requires_grad
    ):  # fmt: skip
        over = x.scope
    if ids is None and known:
        targets = known[0].ids
    else:
        targets = torch.full_like(x.source.numbers, NO_TARGET)
        targets[over.rows] = 0 if ids is None else ids
    by = x.key[0]
    options: dict[str, Any] = {
        "ignore_index": NO_TARGET,
        "logit_scale": head.logit_scale / by,
        # cap(z) / T = (c / T) tanh((z / T) / (c / T))
        "softcap": None if head.softcap is None else head.softcap / by,
        **x.source.options,
    }
    # All rows once, then the ones that have a gradient thrice; or all of them thrice.
    late = keep and habits.get("live", 0.0) < 2 / 3
    if late:
        entropy = entropy or "entropy" in habits
    with computing_grad(x):
        made = _run(x.source, targets, x.key, options, entropy, late)
    if keep:
        over.passes.append(made)
    return made


def _run(
    source: Source, targets: Tensor, key: tuple, options: dict[str, Any], entropy: bool, late: bool
) -> Pass:
    hidden, ids, at = source.head.hidden, targets, None
    if source.places is not None:  # each hidden state with each of its ids once
        at = (targets != NO_TARGET).nonzero()[:, 0]
        vocab = source.head.weight.shape[0]
        ids = targets[at]
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
            raise IndexError(f"index must lie in [0, {vocab}), got {ids.min()} to {ids.max()}")
        codes, inverse = (source.places[at] * vocab + ids).unique(return_inverse=True)
        hidden, ids = hidden[codes // vocab], codes % vocab

    def run(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, entropy: bool = entropy
    ) -> tuple[Tensor, ...]:
        more: dict[str, Any] = {"return_lse": True, "return_entropy": entropy, **options}
        with source.computing():
            found: Any = linear_token_logps(hidden, weight, ids, bias=bias, **more)
        return found

    _, weight, bias = source.head[:3]
    if late:
        numbers = _Late.apply(hidden, weight, bias, run, ids, source)
    else:
        numbers = run(hidden, weight, bias, ids)
    if at is not None:
        zeros = numbers[0].new_zeros(targets.shape)
        numbers = tuple(zeros.index_copy(0, at, y[inverse]) for y in numbers)
    return Pass(key, targets, *numbers, *[None] * (not entropy))


class _Late(torch.autograd.Function):
    """Numbers of rows; the backward computes the rows again that have a gradient, and only those.

    A trainer asks for all rows and masks most of them afterwards: prompts and padding.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, run, ids, source):  # noqa: D102
        ctx.save_for_backward(hidden, weight, bias)
        ctx.given = run, ids, source
        ctx.set_materialize_grads(False)
        return run(hidden, weight, bias, ids)

    @staticmethod
    @first_order
    def backward(ctx, *grads):  # noqa: D102
        run, ids, source = ctx.given
        given = [g for g in grads if g is not None]
        if not given:
            return (None,) * 6
        live = functools.reduce(torch.logical_or, [g != 0 for g in given])
        source.habits["live"] = (live.sum() / (ids != NO_TARGET).sum()).item()
        ids = torch.where(live, ids, NO_TARGET)
        hidden, *others = ctx.saved_tensors

        def total(*inputs: Any) -> Tensor:
            found = run(*inputs, ids, entropy=len(grads) > 2 and grads[2] is not None)
            parts = [(x * g).sum() for x, g in zip(found, grads, strict=False) if g is not None]
            return sum(parts[1:], parts[0])

        head = source.head._replace(hidden=hidden)
        return *_again(ctx, head, total, torch.ones_like(given[0][0])), None, None, None


def _known(x: LazyLogits, ids: Tensor | None) -> list[Pass]:
    """Passes over the rows of ``x`` that were run for it or for what it is a part of."""
    found, memory = [], x.source.head.hidden.data_ptr()
    view: LazyLogits | None = x
    while view is not None and view.source.head.hidden.data_ptr() == memory:
        for made in view.passes:
            lost = torch.is_grad_enabled() and x.requires_grad and not made.logps.requires_grad
            if not lost and made.key == x.key and (
                ids is None or torch.equal(made.ids[x.rows], ids)
            ):  # fmt: skip
                found.append(made)
        view = view.parent
    return found
