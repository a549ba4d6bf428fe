"""verl's fused linear cross-entropy, then the plain ranking loss."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.engine.timing import Step
from bench.engine.truth import Inputs
from bench.providers.base import Provider, refuse, rows_step


def providers(_: torch.device) -> list[Provider]:
    return [Provider("verl", "verl 0.9 fused linear CE", verl, compiles=True)]


def verl(inputs: Inputs) -> Step:
    """Verl's fused linear cross-entropy (Triton), per token, on the scored rows."""
    refuse(inputs, "ranking", "logits", softcap=True, gpu=True, package="verl")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def of_rows(x: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, inputs.weight, labels, 1.0)[0].float()

    return rows_step(inputs, of_rows)
