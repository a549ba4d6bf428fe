"""QuACK's cross-entropy kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.engine.timing import Step
from bench.engine.truth import Inputs
from bench.providers.base import Provider, logps_step, mean_step, refuse, rows_step


def providers(_: torch.device) -> list[Provider]:
    return [
        Provider("quack", "QuACK 0.6 cross-entropy", quack, (0, 2), compiles=True),
        Provider("quack-mean", "QuACK 0.6 linear CE (mean)", quack_mean, compiles=True),
    ]


def quack(inputs: Inputs) -> Step:
    """QuACK's cross-entropy kernel, per token, in place, behind one matmul on the scored rows."""
    refuse(inputs, "ranking", softcap=True, gpu=True, package="quack-kernels")
    from quack.cross_entropy import cross_entropy

    def of_rows(x: Tensor, labels: Tensor) -> Tensor:
        logits = x @ inputs.weight.t()
        return -cross_entropy(logits, labels, reduction="none", inplace_backward=True)

    def of_logits() -> Tensor:
        flat = inputs.logits.flatten(0, 2)
        loss = cross_entropy(flat, inputs.targets.reshape(-1), reduction="none")
        return -loss.view(inputs.targets.shape)

    return rows_step(inputs, of_rows) if inputs.logits is None else logps_step(inputs, of_logits)


def quack_mean(inputs: Inputs) -> Step:
    """QuACK's chunked linear cross-entropy, a mean: it has no gradient per token."""
    refuse(inputs, "ranking", "logits", "score", softcap=True, scalar=True, gpu=True,
           package="quack-kernels")  # fmt: skip
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def of_rows(x: Tensor, y: Tensor) -> Tensor:
        extra = -len(y) % 8  # it takes multiples of 8 rows
        x, y = F.pad(x, (0, 0, 0, extra)), F.pad(y, (0, extra), value=-100)
        return chunked_linear_cross_entropy(x, inputs.weight, y)

    return mean_step(inputs, of_rows)
