"""The authors' formulation of the loss, and their training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.engine.step import TrainingStep, Workload
from bench.engine.timing import Refused, Step, backward_step
from bench.engine.truth import Inputs, case_loss
from bench.providers.base import Provider, capped
from pro_trainer.train.official import (
    loss_of_logits,
    official_batch,
    official_logps,
    official_loss,
)

# The authors' forwards return all hidden states, of which only the dtype is read.
_AS_PUBLISHED = {"output_hidden_states": True, "use_cache": True}


def providers(_: torch.device) -> list[Provider]:

    def of_step(name: str, label: str, **options: Any) -> Provider:
        return Provider(name, label, partial(step, **options), suite="step")

    return [
        Provider("official", "official formulation", official, (12, 6)),
        Provider("official-compiled", "official, torch.compile", partial(official, compiled=True),
                 (12, 6), compiles=True),
        of_step("official", "official procedure"),
        of_step("official-published", "official, hidden states and cache kept as published",
                **_AS_PUBLISHED),
        of_step("official-checkpointed", "official, gradient checkpointing", checkpointed=True),
    ]  # fmt: skip


def official(inputs: Inputs, compiled: bool = False) -> Step:
    """The authors' formulation (``pro_trainer.train.official``)."""
    if inputs.logps is not None:
        raise Refused("makes its own log-probs")

    def candidates(
        hidden: Tensor | None, weight: Tensor | None, logits: Tensor | None
    ) -> Callable[[int], Tensor]:
        if logits is not None:
            return lambda i: logits[:, i]
        return lambda i: capped(inputs, hidden[:, i] @ weight.t())

    def logps() -> Tensor:
        of = candidates(inputs.hidden, inputs.weight, inputs.logits)
        return torch.stack(official_logps(of, inputs.targets), 1)

    def function(hidden, weight, logits, targets, rewards) -> Tensor:  # noqa: ANN001
        of = candidates(hidden, weight, logits)
        if inputs.case.kind == "ce":
            return case_loss(inputs, torch.stack(official_logps(of, targets), 1))
        return loss_of_logits(of, targets, rewards).loss

    call = torch.compile(function, dynamic=False) if compiled else function
    arguments = (inputs.hidden, inputs.weight, inputs.logits, inputs.targets, inputs.rewards)
    return backward_step(
        partial(call, *arguments), inputs.leaves, grad=inputs.case.kind != "score", logps=logps
    )


def step(work: Workload, checkpointed: bool = False, **forward: Any) -> TrainingStep:
    batch = work.on_device(official_batch(work.features, work.pad))
    forward = {"use_cache": False, **forward}
    return TrainingStep(
        lambda model: official_loss(model, batch, **forward).loss,
        work,
        checkpointed,
        lambda: official_batch(work.features, work.pad),
    )
