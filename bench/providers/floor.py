"""The matmuls that no exact method avoids; else the bytes moved."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.engine.step import Floor
from bench.engine.timing import Refused, Step
from bench.engine.truth import Inputs
from bench.providers.base import Provider


def providers(_: torch.device) -> list[Provider]:

    wide = partial(floor, upcast=True)
    return [
        Provider("floor", "floor: head matmuls", floor),
        Provider("floor-fp32", "floor: head matmuls, fp32 operands", wide),
        Provider("floor", "floor: matmuls of the linear layers", Floor, suite="step"),
    ]


def floor(inputs: Inputs, upcast: bool = False) -> Step:
    """The matmuls that no exact method avoids, on the scored rows; else the bytes moved."""
    case = inputs.case
    if upcast and (case.dtype == "fp32" or case.flops is None):
        raise Refused("the same as the floor here")
    if inputs.logps is not None:
        logps = inputs.logps.detach()
        return Step(logps.clone)
    if inputs.logits is not None:
        return _copy_floor(inputs)
    dtype = torch.float32 if upcast else case.torch_dtype
    assert inputs.weight is not None
    x, w = inputs.scored_hidden().to(dtype), inputs.weight.detach().to(dtype)

    def run() -> tuple[Tensor, ...]:
        logits = torch.mm(x, w.t())
        if case.kind == "score":
            return (logits,)
        d_hidden = torch.mm(logits, w)
        if case.kind == "frozen":
            return logits, d_hidden
        return logits, d_hidden, torch.mm(logits.t(), x)

    return Step(run)


def _copy_floor(inputs: Inputs) -> Step:
    """A gradient buffer made: scored rows read once and written, the others zeroed."""
    assert inputs.logits is not None
    logits = inputs.logits.detach().flatten(0, 1)
    live = (inputs.targets != -100).flatten(0, 1)
    starts = live.to(torch.int8).argmax(1).tolist()  # one completion a row, without holes
    ends = [a + m for a, m in zip(starts, live.sum(1).tolist(), strict=True)]

    def run() -> Tensor:
        out = torch.empty_like(logits)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            out[i, :start].zero_()
            out[i, start:end].copy_(logits[i, start:end])
            out[i, end:].zero_()
        return out

    return Step(run)
