"""What this machine can do at most: a large copy, large matmuls, on random data.

copy:   bytes read and written a second
matmul: flops a second, for each dtype; the ceiling of a 16-bit case is the faster of its own
and fp32 (on a CPU without 16-bit matrix units that is fp32)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from bench.engine.case import DTYPES, Case
from bench.engine.timing import Step, Timer, summary

_ROUNDS = 7


@dataclass(frozen=True)
class Sizes:
    """Bytes of the copied tensor; (N, H, V) of the matmul."""

    copy_bytes: int
    matmul: tuple[int, int, int]


SIZES = {
    "cuda": Sizes(4 << 30, (8192, 8192, 16384)),
    "cpu": Sizes(512 << 20, (1024, 1024, 32768)),
}


def measure(device: torch.device, dtypes: Iterable[str], sizes: Sizes | None = None) -> dict:
    """``{"copy": {...}, "matmul": {dtype: {...}}}``, each with its rate and quartiles."""
    sizes = sizes or SIZES[device.type]
    names = dict.fromkeys(["fp32", *dtypes])
    matmuls = {name: _matmul(device, sizes.matmul, name) for name in names}
    return {"copy": _copy(device, sizes.copy_bytes), "matmul": matmuls, "sizes": asdict(sizes)}


def of_case(ceilings: dict | None, case: Case) -> float | None:
    """The rate a case is held against, in its own unit; None where none was measured."""
    if not ceilings:
        return None
    if case.flops is None:
        return ceilings["copy"]["rate"]
    return max(ceilings["matmul"][dtype]["rate"] for dtype in (case.dtype, "fp32"))


def _copy(device: torch.device, size: int) -> dict:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return _rate(Timer(device), Step(lambda: target.copy_(source)), 2 * size)


def _matmul(device: torch.device, shape: tuple[int, int, int], dtype: str) -> dict:
    N, H, V = shape
    x, w = (torch.randn(k, H, device=device).to(DTYPES[dtype]) for k in (N, V))
    return _rate(Timer(device), Step(lambda: torch.mm(x, w.t())), 2 * N * H * V)


def _rate(timer: Timer, step: Step, amount: int) -> dict:
    timer(step)
    taken = [timer(step) for _ in range(_ROUNDS)]
    # A ceiling is what the machine can do: the fastest round.
    return {"rate": amount / min(taken), **summary(taken)}
