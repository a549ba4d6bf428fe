"""What PyTorch itself offers: log_softmax in fp32, and ``linear_cross_entropy``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.engine.losses import plain_logps
from bench.engine.timing import Refused, Step, backward_step
from bench.engine.truth import Inputs, case_loss
from bench.providers.base import Provider, capped, mean_step, refuse, rows_step


def providers(_: torch.device) -> list[Provider]:
    return [
        Provider("plain-fp32", "plain PyTorch, fp32 log_softmax", plain, (16, 16)),
        Provider("plain-compiled", "plain PyTorch, torch.compile", partial(plain, compiled=True),
                 (16, 16), compiles=True),
        Provider("torch-lce", "PyTorch linear_cross_entropy", torch_linear, (12, 6)),
        Provider("torch-lce-chunked", "PyTorch linear_cross_entropy, chunked",
                 partial(torch_linear, chunked=True)),
        Provider("torch-lce-mean", "PyTorch linear_cross_entropy, chunked (mean)",
                 partial(torch_linear, mean=True)),
    ]  # fmt: skip


def plain(inputs: Inputs, compiled: bool = False) -> Step:
    """fp32 log_softmax over every token, then the loss."""

    def logps() -> Tensor:
        if inputs.logps is not None:
            return inputs.logps
        logits = inputs.logits
        if logits is None:
            logits = capped(inputs, inputs.hidden @ inputs.weight.t())
        return plain_logps(logits, inputs.targets)

    def loss() -> Tensor:
        return case_loss(inputs, logps())

    run = torch.compile(loss, dynamic=False) if compiled else loss
    return backward_step(run, inputs.leaves, grad=inputs.case.kind != "score", logps=logps)


def torch_linear(inputs: Inputs, chunked: bool = False, mean: bool = False) -> Step:
    """PyTorch's ``linear_cross_entropy`` on the scored rows, per token or their mean."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Refused(f"torch {torch.__version__} has no linear_cross_entropy")
    refuse(inputs, "ranking", "logits", softcap=True, scalar=mean)
    chunks = torch.nn.LinearCrossEntropyOptions() if chunked or mean else None

    def logps(x: Tensor, y: Tensor) -> Tensor:
        return -function(x, inputs.weight, y, reduction="none", options=chunks).float()

    if mean:
        return mean_step(inputs, lambda x, y: function(x, inputs.weight, y, options=chunks))
    return rows_step(inputs, logps)
