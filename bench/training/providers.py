"""The contenders: the same lists, model and optimizer; each builds one training step.

Random token ids, random weights. The optimizer's learning rate is 0: AdamW does all of its
arithmetic and leaves the weights as they are, so every step of every provider is the same problem.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bench.training.cases import TrainingCase

# The authors' forwards return all hidden states, of which only the dtype is read.
_AS_PUBLISHED = {"output_hidden_states": True, "use_cache": True}


class Workload:
    """Model, optimizer and lists of a case, shared by its providers."""

    def __init__(self, case: TrainingCase, device: torch.device, seed: int = 0) -> None:
        """Make all of it; the same seed gives the same numbers."""
        self.case, self.device = case, device
        self.features = make_features(case, seed)
        self.model = make_model(case, seed).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    @cached_property
    def config(self):  # noqa: ANN201
        """The trainer's options: ``compat="official"``, all else default."""
        from pro_trainer.config import LossOptions

        return LossOptions(compat="official")

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch where the model is."""
        return {name: value.to(self.device) for name, value in batch.items()}

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients now held."""
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)


@dataclass(frozen=True)
class Timed:
    """What one call gave.

    Attributes:
        gradient_seconds: forward and backward.
        optimizer_seconds: AdamW; 0 for the floor.
        loss: None for the floor.
    """

    gradient_seconds: float
    optimizer_seconds: float
    loss: float | None

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.gradient_seconds + self.optimizer_seconds


@dataclass(frozen=True)
class TrainingStep:
    """One timed unit.

    Attributes:
        loss: forward of one batch.
        work: its model and optimizer.
        checkpointed: with gradient checkpointing.
        collate: makes the batch, as a data loader would; None where there is nothing to make.
        detail: what is worth a note.
    """

    loss: Callable[[], Tensor]
    work: Workload
    checkpointed: bool = False
    collate: Callable[[], Any] | None = None
    detail: str = ""

    def run(self, keep_gradients: bool = False) -> Timed:
        """Forward, backward, AdamW; gradients are dropped afterwards, outside the timing."""
        model = self.work.model
        if self.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        _wait(self.work.device)
        start = time.perf_counter()
        loss = self.loss()
        loss.backward()
        _wait(self.work.device)
        middle = time.perf_counter()
        self.work.optimizer.step()
        _wait(self.work.device)
        end = time.perf_counter()
        if self.checkpointed:
            model.gradient_checkpointing_disable()
        if not keep_gradients:
            self.work.clear()
        return Timed(middle - start, end - middle, loss.item())


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
        linear = [m for m in self.work.model.modules() if isinstance(m, torch.nn.Linear)]
        return [
            (case.scored if layer is head else case.needed, layer.weight.detach())
            for layer in linear
        ]

    @cached_property
    def operands(self) -> dict[tuple[int, int], Tensor]:
        """Random inputs and output gradients by shape."""
        g = torch.Generator(self.work.device).manual_seed(0)
        sizes = {(rows, width) for rows, w in self.shapes for width in w.shape}
        return {size: torch.randn(size, generator=g, device=self.work.device) for size in sizes}

    def run(self, keep_gradients: bool = False) -> Timed:
        """All matmuls once."""
        operands = self.operands
        _wait(self.work.device)
        start = time.perf_counter()
        for rows, weight in self.shapes:
            out, into = weight.shape
            x, gradient = operands[rows, into], operands[rows, out]
            torch.mm(x, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)
        _wait(self.work.device)
        return Timed(time.perf_counter() - start, 0.0, None)


@dataclass(frozen=True)
class Provider:
    """One way to make the step.

    Attributes:
        name: as on the command line and in the JSON.
        label: as in tables and plots.
        build: workload -> step.
    """

    name: str
    label: str
    build: Callable[[Workload], TrainingStep | Floor]

    @property
    def is_floor(self) -> bool:
        """Whether it is a bound, not a step."""
        return self.name == "floor"


def make_features(case: TrainingCase, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenised lists of a case: random ids, rewards descending within [0, 1]."""
    g = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, case.shape.V, (length,), generator=g).tolist()

    return [
        {
            "prompts": [tokens(case.P)],
            "completions": [tokens(case.R) for _ in range(case.n)],
            "rewards": torch.rand(case.n, generator=g).sort(descending=True).values.tolist(),
            "sft_index": 0,
        }
        for _ in range(case.B)
    ]


def make_model(case: TrainingCase, seed: int = 0):  # noqa: ANN201
    """The case's model, random weights, fp32, sdpa attention, ready to train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = case.shape
    config = LlamaConfig(
        vocab_size=shape.V, hidden_size=shape.H, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=1, pad_token_id=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).train()


def all_providers() -> dict[str, Provider]:
    """Every provider by name, in the order of the tables."""
    table = [
        Provider("floor", "floor: matmuls of the linear layers", Floor),
        Provider("official", "official procedure", _official),
        Provider(
            "official-published",
            "official, hidden states and cache kept as published",
            partial(_official, **_AS_PUBLISHED),
        ),
        Provider(
            "official-checkpointed",
            "official, gradient checkpointing",
            partial(_official, checkpointed=True),
        ),
        Provider("ours-padded", "pro_trainer, padded", partial(_ours, form="padded")),
        Provider("ours-shared", "pro_trainer, prefix shared", partial(_ours, form="shared")),
        Provider("ours-auto", "pro_trainer, auto", partial(_ours, form="auto")),
        Provider(
            "ours-auto-checkpointed",
            "pro_trainer, auto, gradient checkpointing",
            partial(_ours, form="auto", checkpointed=True),
        ),
    ]
    return {provider.name: provider for provider in table}


def select(only: tuple[str, ...], wanted: tuple[str, ...]) -> list[Provider]:
    """Providers of a case: its own list, narrowed to those asked for.

    Raises:
        ValueError: a name that no provider has.
    """
    table = all_providers()
    unknown = sorted(set(wanted) - set(table))
    if unknown:
        raise ValueError(f"provider must be one of {list(table)}, got {unknown}")
    return [c for c in table.values() if c.name in only and (not wanted or c.name in wanted)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _official(work: Workload, checkpointed: bool = False, **forward: Any) -> TrainingStep:
    from pro_trainer.official import official_batch, official_loss

    pad = work.model.config.pad_token_id
    batch = work.on_device(official_batch(work.features, pad))
    forward = {"use_cache": False, **forward}
    return TrainingStep(
        lambda: official_loss(work.model, batch, **forward).loss,
        work,
        checkpointed,
        lambda: official_batch(work.features, pad),
    )


def _ours(work: Workload, form: str, checkpointed: bool = False) -> TrainingStep:
    from pro_trainer.collate import PROCollator
    from pro_trainer.objective import batch_loss
    from pro_trainer.prefix_cost import SharingCost

    cost = SharingCost.from_model(work.model)
    collator = PROCollator(work.model.config.pad_token_id, form=form, cost=cost, official=True)
    batch = work.on_device(collator(work.features))
    chosen = "shared" if "segments" in batch else "padded"
    return TrainingStep(
        lambda: batch_loss(work.model, batch, work.config).loss,
        work,
        checkpointed,
        lambda: collator(work.features),
        f"chose {chosen}" if form == "auto" else "",
    )
