"""What these checks share: parts of a case, the rule of ``cases`` for ranks, plans, traffic."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2]))  # bench is not installed
import torch
import torch.distributed as dist
from torch import Tensor

import pro_kernels as pk
from cases import Case, Result, assert_no_worse, run
from pro_kernels.fused import call
from pro_kernels.fused.planner import Plan

FROZEN = (), ("weight", "bias"), ("hidden",), ("hidden", "weight", "bias")
made: list[Plan] = []
plans: set[tuple[str, str, bool]] = set()  # tier, retained rows, whether in several chunks


def watch_plans() -> None:
    original = call.make_plan

    def noted(rows, *args, **kwargs):
        plan = original(rows, *args, **kwargs)
        kept = "all" if plan.retained >= rows else "some" if plan.retained else "none"
        plans.add((plan.tier, kept, plan.chunk < rows))
        made.append(plan)
        return plan

    call.make_plan = noted


def log_probs(function: Callable) -> Callable:
    """Such a function with a loss of its log-probs (and entropies), for ``cases.run``."""

    def pro_loss(hidden, weight, targets, _, **options):
        found = function(hidden, weight, targets, **options)
        found = found if isinstance(found, tuple) else (found,)
        g = torch.Generator().manual_seed(5)
        loss = sum((x * torch.randn(x.shape, generator=g)).sum() for x in found)
        return SimpleNamespace(loss=loss, values=found)

    return pro_loss


PRO = pk.linear_pro_loss, pk.reference.linear_pro_loss
LOG_PROBS = log_probs(pk.linear_token_logps), log_probs(pk.reference.linear_token_logps)
LSE = tuple(log_probs(functools.partial(x, return_lse=True)) for x in
            (pk.linear_token_logps, pk.reference.linear_token_logps))  # fmt: skip
CROSS_ENTROPY = log_probs(pk.linear_cross_entropy), log_probs(pk.reference.linear_cross_entropy)


def values(result: Result) -> list[Tensor]:
    out = result.output
    found = (out.loss, out.scores, out.logps) if isinstance(out, pk.PROOutput) else out.values
    return [x.detach() for x in found]


def held(case: Case, head: Callable, hidden: Callable = lambda x: x) -> Case:
    """The case with ``head`` of the head's weight and bias: their rows here, or DTensors."""
    x, weight, bias, *rest = case.tensors()
    mine = dataclasses.replace(case)
    mine.tensors = lambda: (hidden(x), head(weight), bias if bias is None else head(bias), *rest)
    return mine


def references(function: Callable, case: Case, dtype: torch.dtype, **options) -> list[Result]:
    """In ``dtype``, and in fp64 on the inputs as ``dtype`` rounds them."""
    return [run(function, case, dtype, kind=kind, **options) for kind in (None, torch.float64)]


def bounds(vocab: int, world: int) -> list[int]:
    """Uneven parts: the last rank has most."""
    step = vocab // (world + 1)
    return [step * i for i in range(world)] + [vocab]


def few_ranks() -> bool:
    """Whether to check what does not depend on their number, too."""
    return dist.get_world_size() == 2


def gathered(x, group) -> list:
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, x, group=group)
    return parts


def same_everywhere(x, group) -> None:
    equal = torch.equal if isinstance(x, Tensor) else operator.eq
    assert all(equal(x, other) for other in gathered(x, group)), "ranks differ"


def judge(what: str, dtype, results, grads, known: dict[str, float]) -> None:
    """Values and whole gradients by name: of the ranks, of plain PyTorch, exact.

    ``known``: errors that gradients may have beside those of plain PyTorch.
    """
    for sides in zip(*map(values, results), strict=True):
        assert_no_worse(*sides, dtype, what, norm=False)
    ours, plain, exact = grads
    assert ours.keys() >= exact.keys(), what
    for name, grad in ours.items():
        if name not in exact:  # nothing is scored: the reference has no graph
            assert not grad.any(), f"{what}: {name}"
            continue
        sides = grad, plain[name], exact[name]
        allowed = known.get(name, 0.0)
        assert_no_worse(*sides, dtype, f"{what}: {name}", norm=True, known=allowed)


def close(what: str, got: dict, want: dict, rtol: float = 1e-4) -> None:
    """Gradients by name in fp32, to within rounding."""
    assert got.keys() == want.keys(), what
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], rtol=rtol, atol=1e-5, msg=f"{what}: {name}")


def refused(expected: str, function: Callable, **options) -> None:
    try:
        function(**options)
        said = ""
    except (ValueError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
    assert said and expected in said, f"expected {expected!r}, got {said!r}"


# By older and newer names; the newer ones are what the older call.
_GATHERS = ("all_gather_into_tensor", "all_gather_single")
_SCATTERS = ("reduce_scatter_tensor", "reduce_scatter_single")
_OTHERS = ("broadcast", "reduce", "scatter", "gather", "all_to_all", "all_to_all_single",
           "reduce_scatter", "send", "recv", "isend", "irecv", "all_gather_object",
           "all_gather_coalesced", "all_reduce_coalesced")  # fmt: skip


@contextlib.contextmanager
def collectives() -> Iterator[list[tuple[str, str, int]]]:
    """Count the calls to ``torch.distributed`` within; one that is not known here raises."""
    found: list[tuple[str, str, int]] = []

    def reduced(tensor, op=dist.ReduceOp.SUM, *_, **__):
        return "all_reduce", "max" if op == dist.ReduceOp.MAX else "sum", tensor.nbytes

    def gathered(output_tensor, input_tensor, *_, **__):
        parts = output_tensor if isinstance(output_tensor, list) else [output_tensor]
        return "all_gather", "", sum(x.nbytes for x in parts)

    def scattered(output, input, *_, **__):
        return "reduce_scatter", "sum", input.nbytes

    def counted(name: str, note, original):
        def call(*args, **kwargs):
            assert note is not None, f"{name} is not counted"
            found.append(note(*args, **kwargs))
            return original(*args, **kwargs)

        return call

    notes = {"all_reduce": reduced, "all_gather": gathered} | dict.fromkeys(_OTHERS)
    notes |= dict.fromkeys(_GATHERS, gathered) | dict.fromkeys(_SCATTERS, scattered)
    with contextlib.ExitStack() as patched:
        for name, note in notes.items():
            if original := getattr(dist, name, None):
                new = counted(name, note, original)
                patched.enter_context(mock.patch.object(dist, name, new))
        yield found
