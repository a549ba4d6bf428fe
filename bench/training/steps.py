"""The timed units: a training step, its head alone, and the floor under both."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench.training.workload import Workload

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Timed:
    """What one call gave.

    Attributes:
        gradient_seconds: forward and backward.
        optimizer_seconds: AdamW; 0 for the floor.
        loss: None for the floor.
        head_seconds: of the head alone, run after the step; None where that is not measured.
    """

    gradient_seconds: float
    optimizer_seconds: float
    loss: float | None
    head_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.gradient_seconds + self.optimizer_seconds


@dataclass(frozen=True)
class TrainingStep:
    """One timed unit.

    Attributes:
        loss: model -> forward of one batch.
        work: its model and optimizer.
        checkpointed: with gradient checkpointing.
        collate: makes the batch, as a data loader would; None where there is nothing to make.
        detail: what is worth a note.
        around: what the model is made to do meanwhile (distinct rows), outside the timing.
        around_head: the same for the head alone.
    """

    loss: Loss
    work: Workload
    checkpointed: bool = False
    collate: Callable[[], Any] | None = None
    detail: str = ""
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    around_head: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def run(self, keep_gradients: bool = False) -> Timed:
        """Forward, backward, AdamW; gradients are dropped afterwards, outside the timing."""
        with self.around():
            return self._run(keep_gradients)

    def _run(self, keep_gradients: bool) -> Timed:
        model = self.work.model
        if self.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            wait(self.work.device)
            start = time.perf_counter()
            loss = self.loss(model)
            loss.backward()
            wait(self.work.device)
            middle = time.perf_counter()
            self.work.optimizer.step()
            wait(self.work.device)
            end = time.perf_counter()
        finally:  # a step that fails must not leave the others checkpointed
            if self.checkpointed:
                model.gradient_checkpointing_disable()
        if not keep_gradients:
            self.work.clear()
        return Timed(middle - start, end - middle, loss.item())


class HeadAlone:
    """A step from the decoder's hidden states to the loss and back, without the decoder.

    The very same code runs, on a model whose decoder only hands out what it once computed. Back
    means the gradients of those hidden states and of the head's weight.
    """

    def __init__(self, step: TrainingStep) -> None:
        """Run the step's forward once and keep what its head reads."""
        self.step = step
        model = step.work.model
        recorder = _Recorder(model.base_model)
        with torch.no_grad(), step.around():
            step.loss(with_decoder(model, recorder))
        self.decoder = _Replay(model.base_model, recorder.kept)
        self.model = with_decoder(model, self.decoder)

    def run(self) -> Timed:
        """Forward and backward once; no optimizer."""
        with self.step.around_head():
            return self._run()

    def _run(self) -> Timed:
        wait(self.step.work.device)
        start = time.perf_counter()
        loss = self.step.loss(self.model)
        loss.backward()
        wait(self.step.work.device)
        seconds = time.perf_counter() - start
        self.decoder.clear()
        self.step.work.clear()
        return Timed(seconds, 0.0, loss.item())


@dataclass(frozen=True)
class Floor:
    """The matmuls of the linear layers on the positions that the loss depends on, and no more.

    Forward, gradient of the input, gradient of the weight: three each, with the head's on the
    scored tokens only. Attention, norms, embeddings and the optimizer are left out.
    """

    work: Workload
    checkpointed = False
    collate = None
    detail = ""

    @cached_property
    def shapes(self) -> list[tuple[int, Tensor]]:
        """(rows, weight) of every linear layer."""
        case, head = self.work.case, self.work.model.get_output_embeddings()
        linear = [m for m in self.work.model.modules() if isinstance(m, nn.Linear)]
        return [
            (case.scored if layer is head else case.needed, layer.weight.detach())
            for layer in linear
        ]

    @cached_property
    def operands(self) -> dict[tuple[int, int], Tensor]:
        """Random inputs and output gradients by shape."""
        g = torch.Generator(self.work.device).manual_seed(0)
        sizes = {(rows, width) for rows, w in self.shapes for width in w.shape}
        options = {"device": self.work.device, "dtype": self.work.model.dtype}
        return {size: torch.randn(size, generator=g, **options) for size in sizes}

    def run(self, keep_gradients: bool = False) -> Timed:
        """All matmuls once."""
        operands = self.operands
        wait(self.work.device)
        start = time.perf_counter()
        for rows, weight in self.shapes:
            out, into = weight.shape
            x, gradient = operands[rows, into], operands[rows, out]
            torch.mm(x, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)
        wait(self.work.device)
        return Timed(time.perf_counter() - start, 0.0, None)


def wait(device: torch.device) -> None:
    """Until everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def with_decoder(model: nn.Module, decoder: nn.Module) -> nn.Module:
    """The model, its parameters shared, with another decoder under its head."""
    other = copy.copy(model)
    other._modules = {**model._modules, model.base_model_prefix: decoder}
    return other


class _StandIn(nn.Module):
    """Takes a decoder's place under the head; transformers looks for its embedding."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = decoder.get_input_embeddings()


class _Recorder(_StandIn):
    """A decoder that keeps what it gives the head, call by call."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__(decoder)
        self.decoder, self.kept = decoder, []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.decoder(*args, **kwargs)
        self.kept.append(output.last_hidden_state.detach())
        return output


class _Replay(_StandIn):
    """Hands out kept hidden states in their order, over and over, and collects their gradients."""

    def __init__(self, decoder: nn.Module, kept: list[Tensor]) -> None:
        super().__init__(decoder)
        self.kept, self.calls = [x.clone().requires_grad_() for x in kept], 0

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        hidden = self.kept[self.calls % len(self.kept)]
        self.calls += 1
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def clear(self) -> None:
        """Drop the gradients, and begin again with the first."""
        self.calls = 0
        for hidden in self.kept:
            hidden.grad = None
