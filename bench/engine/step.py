"""A training step as it is timed: model and lists, the step, its head alone, its floor.

Random token ids, random weights. The optimizer's learning rate is 0: AdamW does all of its
arithmetic and leaves the weights as they are, so every step of every provider is the same problem.

Legend: ``B`` prompts, ``n`` candidates, ``P`` prompt tokens, ``R`` tokens of each completion, ``H``
hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

import pro_kernels as pk
from bench.engine import lists
from bench.engine.case import DTYPES, native
from bench.engine.timing import Refused, backward_step, clocked

BETA = 0.1  # of DPO
DPO_NOTE = "another loss: DPO; reference log-probs precomputed"
GROWTH = "growth "  # how the name of a case begins that differs from others in its lists alone


@dataclass(frozen=True)
class ModelShape:
    """A Llama-shaped model with random weights."""

    layers: int
    H: int
    feed_forward: int
    heads: int
    V: int
    tied: bool = False  # the head is the embedding
    kv_heads: int | None = None  # of keys and values; None: as many as heads
    dtype: str = "fp32"  # of the weights, "fp32" or "bf16"
    needs_gpu: bool = False  # too large to be measured on a CPU


MODELS = {
    "tiny": ModelShape(2, 256, 704, 4, 32000),  # the head is most of it
    "small": ModelShape(8, 512, 1408, 8, 32000),
    "large vocabulary": ModelShape(4, 512, 1408, 8, 151936, tied=True),
    # The shape of Qwen2.5-0.5B without its biases: 494 million parameters.
    "0.5B": ModelShape(
        24, 896, 4864, 14, 151936, tied=True, kv_heads=2, dtype="bf16", needs_gpu=True
    ),
    # The shape of SmolLM2-135M.
    "SmolLM2": ModelShape(30, 576, 1536, 9, 49152, tied=True, kv_heads=3, dtype=native()),
    "test": ModelShape(2, 32, 48, 4, 211),
}
_FACTS = ("n", "P", "R", "B", "model", "tokens", "scored", "needed")


@dataclass(frozen=True)
class TrainingCase:
    """Lists of one shape and a model."""

    name: str  # unique within a preset
    n: int
    P: int
    R: int
    B: int = 2
    model: str = "small"  # key of MODELS
    only: tuple[str, ...] = ()  # names of the providers; empty for all
    repeats: int = 5  # rounds
    data: str = ""  # entry of lists.json that the lengths are from; "": all P and R
    memory: bool = True  # weigh it too

    def __post_init__(self) -> None:
        if self.model not in MODELS or self.n < 2 or min(self.P, self.R, self.B) < 1:
            raise ValueError(f"not a case: {self}")

    @property
    def facts(self) -> dict:
        """What a results row says of it."""
        return {key: getattr(self, key) for key in _FACTS} | {"shape": asdict(self.shape)}

    @property
    def group(self) -> str:
        return "growth" if self.name.startswith(GROWTH) else ""

    @property
    def dtype(self) -> str:
        return self.shape.dtype

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model]

    @property
    def is_large(self) -> bool:
        """Whether the plain procedure takes too much memory."""
        return bool(self.data) or self.name.startswith(GROWTH)

    @property
    def lists(self) -> list[tuple[int, list[int]]]:
        """Of each list, tokens of the prompt and of each completion."""
        if self.data:
            entry = lists.load()[self.data]
            return list(zip(entry.prompts, entry.completions, strict=True))
        return [(self.P, [self.R] * self.n)] * self.B

    @property
    def start(self) -> int:
        """Tokens that all prompts begin with."""
        return lists.load()[self.data].start if self.data else 0

    @property
    def tokens(self) -> int:
        return sum(prompt + own for prompt, completions in self.lists for own in completions)

    @property
    def scored(self) -> int:
        return sum(own for _, completions in self.lists for own in completions)

    @property
    def needed(self) -> int:
        """Positions that the loss depends on: each prefix once, no completion's last token."""
        prompts = self.start + sum(prompt - self.start for prompt, _ in self.lists)
        return prompts + self.scored - sum(len(completions) for _, completions in self.lists)


class Workload:
    """Model, optimizer and lists of a case, shared by its providers."""

    def __init__(self, case: TrainingCase, device: torch.device) -> None:
        """Make all of it, always the same numbers."""
        self.case, self.device = case, device
        self.features = make_features(case)
        self.model = make_model(case).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    @property
    def pad(self) -> int:
        return self.model.config.pad_token_id

    def reference_model(self):  # noqa: ANN201
        """A new frozen model of other random weights: what DPO's policy is measured against."""
        model = make_model(self.case, seed=1).to(self.device)
        return model.eval().requires_grad_(False)

    @cached_property
    def reference_scores(self) -> Tensor:
        """(B, n) fp32, S of every completion under the reference model, computed in fp32.

        Of real lists in the model's own dtype, as TRL computes it: their losses would differ by
        that rounding.
        """
        if self.case.data:
            from pro_trainer.batch.collate import PROCollator
            from pro_trainer.train.objective import sequence_logps
            from pro_trainer.train.options import LossOptions

            opened = pk.OpenModel(self.reference_model())
            batch = self.on_device(PROCollator(self.pad)(self.features))
            with torch.no_grad():
                return sequence_logps(opened, batch, LossOptions(loss_type="dpo"))[0]
        with torch.no_grad():
            return plain_scores(self.reference_model().float(), self)

    def exact_model(self):  # noqa: ANN201
        """The model in fp32: itself, or a copy of its rounded weights."""
        fp32 = self.case.shape.dtype == "fp32"
        return self.model if fp32 else copy.deepcopy(self.model).float()

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: x.to(self.device) if hasattr(x, "to") else x for k, x in batch.items()}

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def gradient_bytes(self) -> int:
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)


def make_features(case: TrainingCase, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenised lists of a case: random ids, rewards within [0, 1]."""
    g = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, case.shape.V, (length,), generator=g).tolist()

    start = tokens(case.start)
    made = torch.rand(len(case.lists), case.n, generator=g).sort(descending=True).values.tolist()
    rewards = lists.load()[case.data].unit_rewards if case.data else made
    return [
        {
            "prompts": [start + tokens(prompt - case.start)],
            "completions": [tokens(own) for own in completions],
            "rewards": own_rewards,
            "sft_index": 0,
        }
        for (prompt, completions), own_rewards in zip(case.lists, rewards, strict=True)
    ]


def make_model(case: TrainingCase, seed: int = 0):  # noqa: ANN201
    """The case's model, random weights in its dtype, sdpa attention, ready to train."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = case.shape
    config = LlamaConfig(
        vocab_size=shape.V, hidden_size=shape.H, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
        bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        config, dtype=DTYPES[shape.dtype], attn_implementation="sdpa"
    ).train()


def plain_scores(model, work: Workload) -> Tensor:  # noqa: ANN001
    """(B, n), S by a forward of the whole model a candidate and ``log_softmax`` of all logits."""
    from pro_trainer.train.official import official_batch

    batch = work.on_device(official_batch(work.features, work.pad))
    scores = []
    for i in range(work.case.n):
        ids, attention = batch["input_ids"][:, i], batch["attention_mask"][:, i]
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        scored = (attention == 1) & (batch["prefix_mask"][:, i] == 0)
        scores.append(logps.masked_fill(~scored[:, :-1], 0.0).sum(1))
    return torch.stack(scores, dim=1)


def check_pairs(work: Workload) -> None:
    """Refuse more than two candidates."""
    if work.case.n != 2:
        raise Refused("n > 2: DPO is measured on pairs")


@dataclass(frozen=True)
class Timed:
    gradient_seconds: float  # forward and backward
    optimizer_seconds: float = 0.0
    loss: float | None = None
    head_seconds: float | None = None  # of the head alone, run after the step

    @property
    def seconds(self) -> float:
        return self.gradient_seconds + self.optimizer_seconds


Around = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class TrainingStep:
    """One timed unit."""

    loss: Callable[[nn.Module], Tensor]  # forward of one batch
    work: Workload
    checkpointed: bool = False  # with gradient checkpointing
    collate: Callable[[], Any] = lambda: None  # makes the batch, as a data loader would
    detail: str = ""  # what is worth a note
    # What the model is made to do meanwhile (distinct rows), outside the timing; and its head.
    around: Around = contextlib.nullcontext
    around_head: Around = contextlib.nullcontext

    def run(self, keep_gradients: bool = False) -> Timed:
        """Forward, backward, AdamW; gradients are dropped afterwards, outside the timing."""
        model = self.work.model
        with self.around(), contextlib.ExitStack() as at_end:
            if self.checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                at_end.callback(model.gradient_checkpointing_disable)  # also where the step fails
            both = backward_step(partial(self.loss, model), ()).run, self.work.optimizer.step
            seconds, (loss, _) = clocked(self.work.device, *both)
        if not keep_gradients:
            self.work.clear()
        return Timed(*seconds, loss.item())


class HeadAlone:
    """A step from the decoder's hidden states to the loss and back, without the decoder.

    The very same code runs, on a model whose decoder only hands out what it once computed. Back
    means the gradients of those hidden states and of the head's weight.
    """

    def __init__(self, step: TrainingStep) -> None:
        """Run the step's forward once and keep what its head reads."""
        self.step, model, kept = step, step.work.model, []
        hook = model.base_model.register_forward_hook(
            lambda _, __, output: kept.append(output.last_hidden_state)
        )
        with torch.no_grad(), step.around():
            step.loss(model)
        hook.remove()
        self.decoder = _Replay(model.base_model, kept)
        self.model = copy.copy(model)  # the parameters are shared
        self.model._modules = {**model._modules, model.base_model_prefix: self.decoder}

    def run(self) -> Timed:
        with self.step.around_head():
            both = backward_step(partial(self.step.loss, self.model), ()).run
            (seconds,), (loss,) = clocked(self.step.work.device, both)
        self.decoder.clear()
        self.step.work.clear()
        return Timed(seconds, loss=loss.item())


class _Replay(nn.Module):
    """Hands out kept hidden states in their order, over and over, and collects their gradients."""

    def __init__(self, decoder: nn.Module, kept: list[Tensor]) -> None:
        super().__init__()
        self.embed_tokens = decoder.get_input_embeddings()  # transformers looks for it
        self.kept, self.calls = [x.detach().clone().requires_grad_() for x in kept], 0

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        hidden = self.kept[self.calls % len(self.kept)]
        self.calls += 1
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def clear(self) -> None:
        self.calls = 0
        for hidden in self.kept:
            hidden.grad = None


@dataclass(frozen=True)
class Floor:
    """The matmuls of the linear layers on the positions that the loss depends on, and no more.

    Forward, gradient of the input, gradient of the weight: three each, with the head's on the
    scored tokens only. Attention, norms, embeddings and the optimizer are left out.
    """

    work: Workload
    detail = ""

    @cached_property
    def shapes(self) -> list[tuple[int, Tensor]]:
        """(rows, weight) of every linear layer."""
        case, model = self.work.case, self.work.model
        head = model.get_output_embeddings()
        return [
            (case.scored if layer is head else case.needed, layer.weight.detach())
            for layer in model.modules()
            if isinstance(layer, nn.Linear)
        ]

    @cached_property
    def operands(self) -> dict[tuple[int, int], Tensor]:
        """Random inputs and output gradients by shape."""
        g = torch.Generator(self.work.device).manual_seed(0)
        sizes = {(rows, width) for rows, w in self.shapes for width in w.shape}
        options = {"device": self.work.device, "dtype": self.work.model.dtype}
        return {size: torch.randn(size, generator=g, **options) for size in sizes}

    def run(self, keep_gradients: bool = False) -> Timed:
        operands = self.operands

        def matmuls() -> None:
            for rows, weight in self.shapes:
                out, into = weight.shape
                x, gradient = operands[rows, into], operands[rows, out]
                torch.mm(x, weight.t())
                torch.mm(gradient, weight)
                torch.mm(gradient.t(), x)

        (seconds,), _ = clocked(self.work.device, matmuls)
        return Timed(seconds)
