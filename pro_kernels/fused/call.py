"""One call, described once: what goes from the public functions to the kernels beside tensors.

``Call`` is made and checked at the door (``api.py``). Its fields travel as they are, or encoded for
``torch.library``, whose ops take plain arguments: as a text of all that is fixed, and as lists of
the floats and of the integers, which may differ from call to call without another compilation.

Legend: ``N`` scored rows, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pro_kernels import backends
from pro_kernels.backends.protocol import Backend, Candidates, Rows
from pro_kernels.fused.matmul import INVARIANT_ROWS
from pro_kernels.fused.planner import Plan, make_plan
from pro_kernels.fused.shards import Shard
from pro_kernels.layout import Layout
from pro_kernels.options import LogitOptions, RankingOptions, constant_while_compiling


@dataclass(frozen=True)
class Call:
    """What a call is made of besides its tensors."""

    backend: str  # name of the one that serves it
    logits: LogitOptions  # what the model does to its logits
    plan: Plan  # tier and chunks; until they are chosen, and of logits, none
    compute_dtype: torch.dtype = torch.float32  # of the matmuls
    logits_dtype: torch.dtype = torch.float32  # of the logits they leave
    weight_dtype: torch.dtype = torch.float32  # of the head's weight, and so of its gradient
    vocab: int = 0  # V, columns of the head on this rank
    ranking: RankingOptions | None = None  # of the loss; None of a call for log-probs
    ranks_with: str = ""  # backend that ranks: another where a prompt has too many candidates
    final_dtype: torch.dtype | None = None  # to which the loss's terms are cast, or None
    prompt_tokens: tuple[int, ...] = ()  # tier T2 only, tokens of each prompt
    batch_invariant: bool = False  # whether a row's log-prob is the same to the bit in any batch
    grad_filter: float | str | None = None  # mass that rows may lose on average, "auto", or None
    targets_checked: bool = False  # whether all are known to lie in the vocabulary
    shared_rows: bool = False  # whether a row of the hidden states is read by several tokens
    outputs: tuple[str, ...] = ("logps",)  # wanted of each row, as ``head_forward`` orders them
    top: int = 1  # k, of the outputs that are of the k most likely tokens
    shard: Shard | None = None  # this rank's part of a head that is split over ranks

    def but(self, **changes: Any) -> Call:
        """The same with other values of some fields: ``replace``, in a fifth of its time."""
        if torch.compiler.is_compiling():
            return replace(self, **changes)
        made = object.__new__(Call)
        vars(made).update(vars(self), **changes)
        return made

    @property
    def kernels(self) -> Backend:
        """The backend's functions."""
        return backends.get(self.backend)

    def rows(self, logits: Tensor, targets: Tensor, exact: Tensor | None = None) -> Rows:
        """Logits as the backends take them."""
        return Rows(logits, targets, self.logits, exact)

    def rank(self, logps: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor, Tensor]:
        """The backend's ``ranking`` of these candidates."""
        assert self.ranking is not None
        backend = backends.get(self.ranks_with or self.backend)
        return backend.ranking(logps, candidates, self.ranking)

    @property
    def sizes(self) -> list[int]:
        """How many numbers of each row each output has."""
        return [self.top if name.startswith("top_") else 1 for name in self.outputs]

    def named(self, values: Tensor) -> dict[str, Tensor]:
        """The outputs of ``values (sum of sizes, N)``: (N,) each, (k, N) of the top ones."""
        parts = zip(self.outputs, values.split(self.sizes), strict=True)
        return {name: x if name.startswith("top_") else x[0] for name, x in parts}

    @property
    def lse(self) -> bool:
        """Whether log-sum-exps have a gradient, so that dZ0 is 0 at targets."""
        return "lse" in self.outputs

    @property
    def entropy(self) -> bool:
        """Whether that of each row is wanted too."""
        return "entropy" in self.outputs

    def needs_head_again(self, tokens: int) -> bool:
        """Whether the backward of this many tokens multiplies by the weight."""
        return self.entropy or (self.plan.need_weight and self.plan.retained < tokens)

    @property
    def acc_dtype(self) -> torch.dtype:
        """Dtype of log-probs and statistics."""
        return acc_dtype(self.compute_dtype)

    @property
    def wide_logits(self) -> bool:
        """Whether logits are fp32 sums of 16-bit operands."""
        return self.logits_dtype != self.compute_dtype

    @property
    def rounds_logits(self) -> bool:
        """Whether logits are held in 16 bits, so that a target's own is kept exactly beside."""
        return self.logits_dtype.itemsize < 4


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of log-probs and statistics: fp32, or fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def planned(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    budget: int | None,
    scalar_loss: bool = False,
) -> Call:
    """The call with its tier and chunks; ``scalar_loss``: its result is one loss over prompts."""
    grads, compute, shard = torch.is_grad_enabled(), call.compute_dtype, call.shard
    may_chunk = scalar_loss and not call.wide_logits and weight.requires_grad and shard is None
    vocab = weight.shape[0] if shard is None else shard.most  # all ranks take the same chunks
    fixed = vocab * weight.shape[1] * compute.itemsize if weight.dtype != compute else 0
    if layout.shared_rows and hidden.requires_grad and hidden.itemsize < 4:
        fixed += 4 * hidden.numel()  # dHidden is summed in fp32
    if call.batch_invariant:  # a chunk of fewer rows is filled up
        fixed += INVARIANT_ROWS * vocab * call.logits_dtype.itemsize
    if call.lse and grads:  # the targets' rows, and an unrounded dHidden of them
        numbers = layout.num_tokens * weight.shape[1]
        fixed += numbers * 2 * (compute.itemsize + call.acc_dtype.itemsize)
    plan = make_plan(
        layout.num_tokens,
        (vocab, weight.shape[1], compute),
        hidden.device,
        need_hidden=grads and hidden.requires_grad,
        need_weight=grads and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        budget=budget if shard is None else shard.budget,
        prompt_tokens=layout.prompt_tokens if may_chunk else None,
        fixed=fixed,
        hidden_rows=layout.num_rows,
        wide_logits=call.wide_logits,
        filtered=call.grad_filter is not None,
        grad_size=weight.itemsize if weight.requires_grad else 0,
        entropy=call.entropy,
    )
    return call.but(
        plan=plan,
        prompt_tokens=layout.prompt_tokens if plan.tier == "T2" else (),
        grad_filter=call.grad_filter if plan.need_hidden or plan.need_weight else None,
        targets_checked=layout.checked_for(weight.shape[0] if shard is None else shard.vocab),
        shared_rows=layout.shared_rows,
    )


# ---- as ops take it

_KINDS = {cls.__name__: cls for cls in (Call, LogitOptions, Plan, RankingOptions, Shard)}
_NAMES = {name: tuple(f.name for f in fields(cls)) for name, cls in _KINDS.items()}
_CLASSES = tuple(_KINDS.values())
_FLOAT, _INT = "<float>", "<int>"
Encoded = tuple[str, Sequence[float], Sequence[int]]


def encode(call: Call) -> Encoded:
    """Text, floats and integers of a call; ``torch.compile`` traces through it."""
    floats: list[float] = []
    integers: list[int] = []
    return _text(_words(call, floats, integers)), floats, integers


def decode(text: str, floats: Sequence[float], integers: Sequence[int]) -> Call:
    """The call that ``encode`` made these of."""
    numbers = {_FLOAT: iter(floats), _INT: iter(integers)}

    def build(word: Any) -> Any:
        if isinstance(word, list):
            parts = [build(part) for part in word[1:]]
            return _KINDS[word[0]](*parts) if word[0] else tuple(parts)
        return next(numbers[word]) if word in numbers else word

    return build(_parsed(text))


def _words(x: Any, floats: list[float], integers: list[int]) -> Any:
    """``x`` as nested tuples of constants, its numbers moved to the lists."""
    if isinstance(x, _CLASSES):  # not type(x) in ...: torch 2.10 cannot trace that
        kind = type(x).__name__
        return (kind, *[_words(getattr(x, part), floats, integers) for part in _NAMES[kind]])
    if isinstance(x, tuple):
        return ("", *[_words(part, floats, integers) for part in x])
    if isinstance(x, float):
        floats.append(x)
        return _FLOAT
    if isinstance(x, int) and not isinstance(x, bool):
        integers.append(x)
        return _INT
    return x


@constant_while_compiling
def _text(words: tuple) -> str:
    return _dumped(words)


@functools.lru_cache
def _dumped(words: tuple) -> str:
    return json.dumps(words, default=lambda dtype: {"dtype": str(dtype).removeprefix("torch.")})


@functools.lru_cache
def _parsed(text: str) -> list:
    return json.loads(text, object_hook=lambda found: getattr(torch, found["dtype"]))
