"""Who the contract is tested on: every implementation of a backend's functions that runs here.

A backend is found by its place in ``backends.ORDER``. Those that have more than one way to run on
CPU tensors have them in ``WAYS``; how exact one's row sums are is in ``ROUNDINGS``. On a GPU the
same tests run there, marked ``gpu``. The fixture ``subject`` (conftest.py) takes one into use.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch

from cases import CPU, DTYPES, IDS
from cuda_emulation import build, emulation
from pro_kernels import backends
from pro_kernels.selfcheck.trust.measure import threads

ISAS = ("avx512bf16", "avx512", "avx2", "neon", "generic")
# Roundings of fp32 that a row's sums may carry, and those of each nat of an exponent, for the
# statistics and for the gradient. Others are held to Triton's.
ROUNDINGS = {"cpu": (5, 1, 16, 1), "cuda": (10, 3, 14, 2.5)}


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """The C++ library on one instruction set."""
    cpu = backends.get("cpu")
    cpu.set_isa(name)
    try:
        yield
    finally:
        cpu.set_isa(None)


@functools.cache
def isas() -> list[str]:
    """Instruction sets that the C++ library has and this machine runs, the best first."""
    found = []
    for name in ISAS if backends.refusal("cpu", CPU, torch.float32) is None else ():
        with contextlib.suppress(ValueError), isa(name):
            found.append(name)
    return found


# Backend -> its ways on CPU tensors. The two majors differ in how ``residual_`` takes a row.
WAYS: dict[str, Callable[[], dict[str, Callable[[], AbstractContextManager]]]] = {
    "cpu": lambda: {name: functools.partial(isa, name) for name in isas()},
    "cuda": lambda: {
        f"emulated sm_{major}0": functools.partial(emulation.serving, major) for major in (9, 8)
    },
}
# Backend -> runs that must give the same bits: once each and in this order.
REPEATS: dict[str, list[Callable[[], AbstractContextManager]]] = {
    "cpu": [functools.partial(threads, n) for n in (1, 2, 3, 2)],
    "cuda": [functools.partial(emulation.ordered, backward) for backward in (False, True, False)],
}


@dataclass(frozen=True)
class Subject:
    """A backend in one of its ways; its functions are attributes as they are the backend's."""

    name: str
    way: str = ""
    device: str = "cpu"

    def __getattr__(self, name: str):
        return getattr(backends.get(self.name), name)

    def __str__(self) -> str:
        where = "on the GPU" if self.device == "cuda" else ""
        return " ".join(filter(None, (self.name, self.way, where)))

    @property
    def interpreted(self) -> bool:
        """Slow: one launch takes a tenth of a second."""
        return self.name == "triton" and self.device == "cpu"

    @property
    def repeats(self) -> list[Callable[[], AbstractContextManager]]:
        here = REPEATS.get(self.name, []) if self.device == "cpu" else []
        return here or [contextlib.nullcontext] * 2

    def roundings(self, columns: int) -> tuple[float, ...]:
        return ROUNDINGS.get(self.name, (24 + columns / 1024, 4) * 2)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """In this way, and new tensors on its device; skips what cannot run here."""
        way = WAYS.get(self.name, dict)().get(self.way, contextlib.nullcontext)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(way())
            except build.NoCompiler as error:
                pytest.skip(str(error))
            if reason := backends.refusal(self.name, torch.device(self.device), torch.float32):
                pytest.skip(reason)
            if self.device != "cpu":
                stack.enter_context(torch.device(self.device))
            yield


def _has(name: str, function: str) -> bool:
    try:
        return getattr(backends.get(name), function) is not None
    except ImportError:  # of Triton: it is skipped with the reason
        return True


def subjects(every_way: bool = True, having: str = "logp") -> list:
    """Parameters for ``subject``: of each backend with the function ``having``, all ways or one."""
    found = []
    for name in backends.ORDER:
        if not _has(name, having):
            continue
        ways = list(WAYS.get(name, dict)()) or [""]
        found += [Subject(name, way) for way in (ways if every_way else ways[:1])]
        if name != "cpu":
            found.append(Subject(name, device="cuda"))
    return [
        pytest.param(x, id=str(x), marks=[pytest.mark.gpu] if x.device == "cuda" else [])
        for x in found
    ]


def every_subject(**chosen) -> pytest.MarkDecorator:
    """Runs a test on those that ``subjects`` gives."""
    return pytest.mark.parametrize("subject", subjects(**chosen), indirect=True)


def every_subject_and_dtype(interpreted: tuple[torch.dtype, ...] = tuple(DTYPES), **chosen):
    """In each dtype as well; what is interpreted only in some, as it is slow."""
    pairs = [
        pytest.param(x.values[0], dtype, id=f"{name}-{x.id}", marks=x.marks)
        for dtype, name in zip(DTYPES, IDS, strict=True)
        for x in subjects(**chosen)
        if dtype in (interpreted if x.values[0].interpreted else x.values[0].DTYPES)
    ]
    return pytest.mark.parametrize(("subject", "dtype"), pairs, indirect=["subject"])


def every_case(cases: list, **chosen) -> pytest.MarkDecorator:
    """Each case on every subject in each dtype; what is interpreted takes turns with the dtypes."""
    return pytest.mark.parametrize(
        ("subject", "dtype", "case"),
        [
            pytest.param(x.values[0], dtype, case, id=f"{case.name}-{name}-{x.id}", marks=x.marks)
            for i, case in enumerate(cases)
            for j, (dtype, name) in enumerate(zip(DTYPES, IDS, strict=True))
            for x in subjects(every_way=False, **chosen)
            if dtype in x.values[0].DTYPES and (not x.values[0].interpreted or i % 3 == j)
        ],
        indirect=["subject"],
    )
