"""How a function on tensors and a ``Call`` becomes a ``torch.library`` op, and how it is called.

A body takes tensors and, last, its ``Call``; the op of its name takes the call encoded, as plain
text and numbers, so ``torch.compile`` sees one opaque node each and ``opcheck`` can test them.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pro_kernels.fused.call import Call, decode, encode

# Not ``torch.library.custom_op``: its Python wrappers cost more than a small batch's arithmetic.
# Named by the package: a copy under another name (tools/hub_kernel.py) has ops of its own.
_NAMESPACE = __name__.split(".")[0]
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")
# What is inside each op.
BODIES: dict[torch._ops.OpOverload, Callable] = {}
# How allocators say that there is no memory: PyTorch's on a CPU, C++, CUDA, Triton, cuBLAS.
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|out of memory|ALLOC_FAILED", re.IGNORECASE
)
# Types of arguments that nobody but the body wants to see.
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, tuple, list, Call}
# What an op takes in place of its body's call.
_ENCODED = [
    inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
    for name, kind in (("call", str), ("floats", Sequence[float]), ("integers", Sequence[int]))
]


def op(mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], torch._ops.OpOverload]:
    """Register a body as the op of its name, on every device; the op stands in its place."""

    def register(function: Callable) -> torch._ops.OpOverload:
        name, own = function.__name__, inspect.signature(function)
        on_encoded = _naming_the_budget(_decoding(function))
        on_encoded.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*list(own.parameters.values())[:-1], *_ENCODED]
        )
        schema = torch.library.infer_schema(on_encoded, mutates_args=mutates_args)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, on_encoded, "CompositeExplicitAutograd")
        made = getattr(getattr(torch.ops, _NAMESPACE), name).default
        BODIES[made] = _naming_the_budget(function)
        return made

    return register


def fake(of: torch._ops.OpOverload) -> Callable[[Callable], Callable]:
    """Register a function as the fake implementation of an op: shapes and dtypes only."""
    return lambda function: torch.library.register_fake(
        of.name(), _decoding(function), lib=_LIBRARY
    )


def _decoding(function: Callable) -> Callable:
    """``function`` of a call that comes encoded."""
    return functools.wraps(function)(lambda *args: function(*args[:-3], decode(*args[-3:])))


def _naming_the_budget(function: Callable) -> Callable:
    """``function`` whose out-of-memory error says which budget to lower.

    An op that takes a budget writes to nothing but its own outputs: an error drops them.
    """
    # Where Dynamo is on and an op runs between graphs, it would trace into the body.
    untraced = torch._disable_dynamo(function)

    @functools.wraps(function)
    def run(*args):
        # ``untraced`` imports Dynamo, a second of work: not for those who do not compile.
        body = untraced if "torch._dynamo" in sys.modules else function
        try:
            return body(*args)
        except (RuntimeError, MemoryError) as error:
            call = args[-1] if isinstance(args[-1], Call) else decode(*args[-3:])
            text, budget = str(error), call.plan.budget
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if (known or _NO_MEMORY.search(text)) and budget:
                error.args = (
                    f"{text}\n{_NAMESPACE}::{function.__name__} ran with a budget of "
                    f"{budget} bytes: lower it by budget= or PRO_KERNELS_BUDGET",
                )
            raise

    return run


def run(made: torch._ops.OpOverload, *args: Any) -> Any:
    """An op on tensors and, last, a ``Call``, below autograd: its body if nothing would notice.

    The way through the dispatcher takes some 20 us of the host for the ops of the head, together a
    tenth of a batch of two prompts. It is needed where a compiler, a mode, a profiler or a kind of
    tensor wants to see the op.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch.autograd.profiler._is_profiler_enabled
        or args[0].is_meta
        or not _PLAIN.issuperset(map(type, args))
    )
    if watched:
        return made(*args[:-1], *encode(args[-1]))
    return BODIES[made](*args)
