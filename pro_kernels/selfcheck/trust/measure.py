"""The rows: ours, plain PyTorch, the official formulation and peers against fp64."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pro_kernels import backends, reference
from pro_kernels.fused import matmul
from pro_kernels.selfcheck.trust.cases import CASES, Case, Problem, make_problem
from pro_kernels.selfcheck.trust.evaluate import (
    Options,
    Quantities,
    by_tier,
    describe,
    error_of,
    evaluate,
    ours,
)

# Positions up to which a batch is run through an interpreter: more take minutes each.
INTERPRETED_POSITIONS = 128
# What our error may exceed that of plain PyTorch by: a few roundings.
FLOOR = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}

# ``bench.trust.compare``: problem -> by name of a formulation what it gives, or why nothing.
Peers = Callable[[Problem], dict[str, Quantities | str]]
# Problem -> by name of an entrance the options that lead there; a problem with none is not run.
Entrances = Callable[[Problem], dict[str, Options]]


@dataclass(frozen=True)
class Row:
    """One quantity of one backend, dtype, batch and entrance, against fp64."""

    device: str
    dtype: str
    backend: str
    case: str
    kind: str
    entrance: str
    quantity: str
    error: float  # ours: of log-probs the largest, absolute (nats); of the rest in norm, relative
    plain: float  # the same of plain PyTorch (the reference) in that dtype
    floor: float  # what ours may exceed it by
    allowance: float  # factor on ``plain``, for gradients behind native 16-bit matmuls
    passed: bool  # whether error <= allowance * plain + floor
    scale: float  # the largest log-prob in absolute value; 1 for errors that are relative
    others: dict[str, float]  # of the official formulation and each peer that gives this quantity
    note: str = ""  # why ours has no number

    @property
    def by_allowance(self) -> bool:
        """Whether the row holds, and only by its allowance."""
        return self.passed and self.error > self.plain + self.floor


@dataclass(frozen=True)
class Refusal:
    """Why a formulation or peer has no number in a batch."""

    who: str
    device: str
    dtype: str
    case: str
    kind: str
    reason: str


@dataclass
class Measured:
    """What came out."""

    rows: list[Row] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def measure(
    peers: Peers | None,
    cases: Sequence[Case] = CASES,
    dtypes: Sequence[torch.dtype] = tuple(FLOOR),
    entrances: Entrances = by_tier,
    progress: bool = True,
) -> Measured:
    """Everything on every device of this machine; progress goes to stderr."""
    measured = Measured()
    for device in devices():
        for dtype in dtypes:
            if progress:
                print(f"{device.type} {label(dtype)} ...", file=sys.stderr, flush=True)
            for seed, case in enumerate(cases):
                with threads(torch.get_num_threads() if case.threads else 1):
                    for kind in case.kinds:
                        problem = make_problem(case, kind, device, dtype, seed)
                        if found := entrances(problem):
                            _measure_problem(problem, peers, found, measured)
    return measured


def devices() -> list[torch.device]:
    """The devices of this machine: the CPU, and the GPU where there is one."""
    names = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [torch.device(name) for name in names]


def label(dtype: torch.dtype) -> str:
    """``float32`` and the like."""
    return str(dtype).removeprefix("torch.")


def interpreted(backend: str, device: torch.device) -> bool:
    """Whether a backend's kernels run through an interpreter there: Triton's on CPU tensors."""
    return device.type == "cpu" and backends.not_by_itself(backend, device) is not None


def allowance(of: str, dtype: torch.dtype, device: str) -> float:
    """How many times plain PyTorch's error a gradient may have, by the roundings to 16 bits.

    Plain PyTorch rounds the gradient of the logits and the result. With fp32 matmuls so do we; with
    fp32 sums dW has one rounding more, of w X (independent, of the same size: sqrt(3/2)). Native
    matmuls without fp32 sums round dZ0 W too, and plain PyTorch's share may be down to one of
    three: sqrt(3).
    """
    if dtype.itemsize > 2 or matmul.upcasts(dtype, device):
        return 1.0
    if matmul.leaves_sums(dtype, device):
        return 1.5**0.5 if "weight" in of else 1.0
    return 3**0.5


def _measure_problem(
    problem: Problem, peers: Peers | None, entrances: dict[str, Options], measured: Measured
) -> None:
    truth = evaluate(problem, reference, torch.float64)
    plain = evaluate(problem, reference, problem.dtype)
    others: dict[str, Quantities] = {}
    for who, found in _compared(peers, problem).items():
        if isinstance(found, str):
            measured.refusals.append(Refusal(who, *_where(problem), found))
        else:
            others[who] = found
    for name in backends.ORDER:
        small = problem.targets.numel() <= INTERPRETED_POSITIONS
        refusal = backends.refusal(name, problem.device, problem.dtype, problem.case.n)
        if refusal is None and (small or not interpreted(name, problem.device)):
            for entrance, options in entrances.items():
                got = ours(problem, name, options)
                measured.rows += _rows(problem, name, entrance, got, plain, truth, others)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's threads inside: between few rows threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compared(peers: Peers | None, problem: Problem) -> dict[str, Quantities | str]:
    if peers is None:
        return {}
    try:
        return peers(problem)
    except Exception as error:  # whatever happens there, no row of ours is lost
        return {"all peers": describe(error)}


def _where(problem: Problem) -> tuple[str, str, str, str]:
    return problem.device.type, label(problem.dtype), problem.case.name, problem.kind


def _rows(
    problem: Problem,
    backend: str,
    entrance: str,
    got: Quantities | str,  # a str: why there are none
    plain: Quantities,
    truth: Quantities,
    others: dict[str, Quantities],
) -> list[Row]:
    """A row for each quantity of the truth; one that ours does not give fails."""
    found = []
    note = got if isinstance(got, str) else ""
    given = {"ours": {} if isinstance(got, str) else got, "plain": plain, **others}
    for quantity, exact in truth.items():
        errors = {
            who: error_of(quantity, x[quantity], exact) for who, x in given.items() if quantity in x
        }
        error, limit = errors.pop("ours", float("nan")), errors.pop("plain")
        scale = float(exact.abs().max()) if quantity == "log-probs" else 1.0
        factor, floor = 1.0, FLOOR[problem.dtype] * scale
        if quantity.startswith("gradient") and not problem.from_logits:
            factor = allowance(quantity, problem.dtype, problem.device.type)
        passed = error <= factor * limit + floor  # False for NaN
        device, dtype, case, kind = _where(problem)
        found.append(
            Row(
                device, dtype, backend, case, kind, entrance, quantity, error, limit, floor,
                factor, passed, scale, errors, note,
            )
        )  # fmt: skip
    return found
