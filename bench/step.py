"""What a provider hands to the runner: one closure that runs forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Refused(Exception):
    """A provider does not apply to a case; the message is the reason shown in its row."""


@dataclass(frozen=True)
class Step:
    """One timed unit.

    Attributes:
        run: does the work; returns the detached loss, or for a floor what it made.
        leaves: tensors whose ``.grad`` it fills; cleared outside the timing.
        logps: its log-prob of every position (B, n, T), any value where nothing is scored; for the
            errors, never timed. None where it gives none.
    """

    run: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    logps: Callable[[], Tensor] | None = None

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients made."""
        return sum(x.grad.nbytes for x in self.leaves if x.grad is not None)


def backward_step(
    loss: Callable[[], Tensor],
    leaves: tuple[Tensor, ...],
    grad: bool = True,
    logps: Callable[[], Tensor] | None = None,
) -> Step:
    """Forward and backward of ``loss``; forward alone, without autograd, where not ``grad``."""

    def run() -> Tensor:
        with torch.set_grad_enabled(grad):
            value = loss()
        if grad:
            value.backward()
        return value.detach()

    return Step(run, leaves if grad else (), logps)


def describe(error: Exception) -> str:
    """An exception in one line of a table."""
    if isinstance(error, Refused):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
