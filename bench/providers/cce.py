"""CCE's per-token losses, then the plain ranking loss."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.engine.timing import Step
from bench.engine.truth import Inputs
from bench.providers.base import Provider, logps_step, refuse


def providers(_: torch.device) -> list[Provider]:
    return [Provider("cce", "CCE 25.1", cce, (12, 8), compiles=True)]


def cce(inputs: Inputs) -> Step:
    """CCE's per-token losses (``torch_compile`` where its kernels cannot run), plain ranking."""
    refuse(inputs, "ranking", "logits", package="cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if inputs.device.type == "cuda" else "torch_compile"
    options = {"softcap": inputs.case.softcap, "reduction": "none", "impl": impl}

    def logps() -> Tensor:
        return -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, **options)

    return logps_step(inputs, lambda: logps().float())
