"""What this machine can do at most: a large copy, large matmuls, on random data.

copy:   bytes read and written a second
matmul: flops a second, for each dtype; the ceiling of a 16-bit case is the faster of its own
and fp32 (on a CPU without 16-bit matrix units that is fp32)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from bench.engine.case import DTYPES, Case
from bench.engine.timing import Step, Timer, summary

_ROUNDS = 7


# Bytes of the copied tensor; N, H and V of the matmul.
SIZES = {
    "cuda": {"copy_bytes": 4 << 30, "matmul": (8192, 8192, 16384)},
    "cpu": {"copy_bytes": 512 << 20, "matmul": (1024, 1024, 32768)},
}


def measure(device: torch.device, dtypes: Iterable[str]) -> dict:
    """``{"copy": {...}, "matmul": {dtype: {...}}}``, each with its rate and quartiles."""
    sizes, timer = SIZES[device.type], Timer(device)
    N, H, V = sizes["matmul"]
    found = {"copy": _rate(timer, copy(device, sizes["copy_bytes"]), 2 * sizes["copy_bytes"])}
    matmuls = {}
    for name in dict.fromkeys(["fp32", *dtypes]):
        x, w = (torch.randn(k, H, device=device).to(DTYPES[name]) for k in (N, V))
        matmuls[name] = _rate(timer, Step(partial(torch.mm, x, w.t())), 2 * N * H * V)
    return found | {"matmul": matmuls, "sizes": sizes}


def copy(device: torch.device, size: int) -> Step:
    """A copy of ``size`` bytes."""
    source = torch.randn(size // 4, device=device)
    return Step(partial(torch.empty_like(source).copy_, source))


def of_case(ceilings: dict | None, case: Case) -> float | None:
    """The rate a case is held against, in its own unit; None where none was measured."""
    if not ceilings:
        return None
    if case.flops is None:
        return ceilings["copy"]["rate"]
    return max(ceilings["matmul"][dtype]["rate"] for dtype in (case.dtype, "fp32"))


def _rate(timer: Timer, step: Step, amount: int) -> dict:
    timer(step)
    taken = [timer(step) for _ in range(_ROUNDS)]
    # A ceiling is what the machine can do: the fastest round.
    return {"rate": amount / min(taken), **summary(taken)}
