"""The case table: shapes of models and of lists, and the presets that group them.

Legend: ``B`` prompts, ``n`` candidates, ``P`` prompt tokens, ``R`` tokens of each completion, ``H``
hidden, ``V`` vocabulary. The lists of a synthetic case have the same lengths, so nothing is
padding: the official procedure, which pads to the longest candidate, has no smaller batch. Those of
a real case have the lengths and common prefixes of real lists (``shapes``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.training import shapes
from pro_kernels.fused.matmul import upcasts

_FEW = ("floor", "official", "ours-padded", "ours-lists")
_MOST = (*_FEW, "official-published")
_ALL = (*_MOST, "official-checkpointed", "ours-lists-checkpointed")
_OURS = ("floor", "ours-padded", "ours-lists")
_DPO = ("trl-dpo", "trl-dpo-head", "trl-dpo-distinct", "ours-dpo-padded", "ours-dpo-lists")
_PAIRS = (*_FEW, *_DPO)
GROWTH = "growth "  # how the name of a case begins that differs from others in its lists alone


@dataclass(frozen=True)
class ModelShape:
    """A Llama-shaped model with random weights.

    Attributes:
        tied: the head is the embedding.
        kv_heads: of keys and values; None: as many as ``heads``.
        dtype: of the weights, "fp32" or "bf16".
        needs_gpu: too large to be measured on a CPU.
    """

    layers: int
    H: int
    feed_forward: int
    heads: int
    V: int
    tied: bool = False
    kv_heads: int | None = None
    dtype: str = "fp32"
    needs_gpu: bool = False


def _native() -> str:
    """What this machine multiplies fast; where bf16 is emulated, steps are measured in fp32."""
    emulated = not torch.cuda.is_available() and upcasts(torch.bfloat16, "cpu")
    return "fp32" if emulated else "bf16"


MODELS = {
    "tiny": ModelShape(2, 256, 704, 4, 32000),  # the head is most of it
    "small": ModelShape(8, 512, 1408, 8, 32000),
    "large vocabulary": ModelShape(4, 512, 1408, 8, 151936, tied=True),
    # The shape of Qwen2.5-0.5B without its biases: 494 million parameters.
    "0.5B": ModelShape(
        24, 896, 4864, 14, 151936, tied=True, kv_heads=2, dtype="bf16", needs_gpu=True
    ),
    # The shape of SmolLM2-135M.
    "SmolLM2": ModelShape(30, 576, 1536, 9, 49152, tied=True, kv_heads=3, dtype=_native()),
    "test": ModelShape(2, 32, 48, 4, 211),
}
# How the name of a case ends; V where nothing is said.
_SUFFIXES = {"small": "", "tiny": ", tiny", "0.5B": ", 0.5B in bf16"}


@dataclass(frozen=True)
class TrainingCase:
    """Lists of one shape and a model.

    Attributes:
        name: unique within a preset.
        n: candidates.
        P: tokens of a prompt.
        R: tokens of a completion.
        B: prompts a batch.
        model: key of ``MODELS``.
        only: names of the providers.
        repeats: rounds.
        data: entry of ``shapes`` that the lists have their lengths from; "": all P and R.
    """

    name: str
    n: int
    P: int
    R: int
    B: int = 2
    model: str = "small"
    only: tuple[str, ...] = _FEW
    repeats: int = 5
    data: str = ""

    def __post_init__(self) -> None:
        if self.model not in MODELS or self.n < 2 or min(self.P, self.R, self.B) < 1:
            raise ValueError(f"not a case: {self}")

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return MODELS[self.model]

    @property
    def is_large(self) -> bool:
        """Whether the plain procedure takes too much memory."""
        return bool(self.data) or self.name.startswith(GROWTH)

    @property
    def lists(self) -> list[tuple[int, list[int]]]:
        """Of each list, tokens of the prompt and of each completion."""
        if self.data:
            return shapes.load()[self.data]["lists"]
        return [(self.P, [self.R] * self.n)] * self.B

    @property
    def start(self) -> int:
        """Tokens that all prompts begin with."""
        return shapes.load()[self.data]["start"] if self.data else 0

    @property
    def tokens(self) -> int:
        """Positions of all sequences."""
        return sum(prompt + own for prompt, completions in self.lists for own in completions)

    @property
    def scored(self) -> int:
        """Tokens of all completions."""
        return sum(own for _, completions in self.lists for own in completions)

    @property
    def needed(self) -> int:
        """Positions that the loss depends on: each prefix once, no completion's last token."""
        prompts = self.start + sum(prompt - self.start for prompt, _ in self.lists)
        return prompts + self.scored - sum(len(completions) for _, completions in self.lists)


def _case(n: int, P: int, R: int, model: str = "small", **more) -> TrainingCase:
    suffix = _SUFFIXES.get(model, f", V={MODELS[model].V}")
    return TrainingCase(f"n={n} P={P} R={R}{suffix}", n, P, R, model=model, **more)


def _real(data: str, only: tuple[str, ...], **more) -> TrainingCase:
    lists = shapes.load()[data]["lists"]
    longest = max(own for _, completions in lists for own in completions)
    return TrainingCase(
        f"{data} n={len(lists[0][1])}, SmolLM2 in {MODELS['SmolLM2'].dtype}", len(lists[0][1]),
        max(prompt for prompt, _ in lists), longest, len(lists), "SmolLM2", only, data=data, **more,
    )  # fmt: skip


def _growth(B: int) -> TrainingCase:
    """``B`` lists of 508 tokens that differ."""
    return TrainingCase(
        f"{GROWTH}{B} lists", 4, 128, 96, B, "SmolLM2", ("floor", "ours-lists"), repeats=3
    )


def _tiny() -> list[TrainingCase]:
    """Seconds; for tests of the harness, the numbers mean nothing."""
    return [
        _case(3, 12, 4, model="test", repeats=2, only=_ALL),
        _case(2, 4, 4, model="test", repeats=2, only=_PAIRS),
    ]


def _small() -> list[TrainingCase]:
    """A few minutes: one prompt a batch, fewer rounds; pairs on tiny and, on a GPU, on 0.5B."""
    return [
        _case(4, 512, 64, B=1, repeats=3, only=_MOST),
        _case(2, 512, 64, model="tiny", repeats=3, only=_PAIRS),
        _case(2, 512, 64, B=4, model="0.5B", repeats=3, only=_PAIRS),
    ]


def _full() -> list[TrainingCase]:
    """About forty minutes on two quiet slow cores, most of it the official procedure and TRL."""
    return [
        _case(4, 512, 64, only=_ALL),
        _case(8, 512, 64),
        _case(8, 128, 128),
        _case(2, 64, 64, repeats=9, only=_PAIRS),
        _case(2, 512, 64, only=_PAIRS),
        _case(4, 512, 64, model="large vocabulary", repeats=3),
        _case(4, 512, 64, model="tiny"),
        _case(2, 512, 64, model="tiny", only=_PAIRS),
        _case(16, 2048, 64, B=1, repeats=3, only=_OURS),
        _real("HH", ("floor", *_DPO), repeats=3),
        _real("ranked", _OURS, repeats=3),
        _real("ranked pairs", _OURS, repeats=3),
        *map(_growth, (4, 8, 16, 32)),
        _case(4, 512, 64, model="0.5B"),
        _case(2, 512, 64, B=4, model="0.5B", only=_PAIRS),
    ]


# The names of the loss's presets (``bench.presets``).
PRESETS = {"tiny": _tiny, "cpu-small": _small, "cpu": _full, "gpu-quick": _small, "gpu": _full}


def cases_of(
    preset: str, patterns: tuple[str, ...] = (), on_gpu: bool = False
) -> list[TrainingCase]:
    """The cases of a preset whose name contains one of ``patterns`` (none: all).

    Those that need a GPU are left out elsewhere.

    Raises:
        ValueError: an unknown preset, or nothing left.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset of --training must be one of {list(PRESETS)}, got {preset!r}")
    named = [
        case for case in PRESETS[preset]() if not patterns or any(p in case.name for p in patterns)
    ]
    if not named:
        raise ValueError(f"no training case of preset {preset!r} matches {list(patterns)}")
    found = [case for case in named if on_gpu or not case.shape.needs_gpu]
    if not found:
        raise ValueError(f"needs a GPU: {', '.join(case.name for case in named)}")
    return found


def left_out(preset: str, patterns: tuple[str, ...], on_gpu: bool) -> list[str]:
    """Names of the cases that ``cases_of`` leaves out for want of a GPU."""
    every = [] if on_gpu else cases_of(preset, patterns, on_gpu=True)
    return [case.name for case in every if case.shape.needs_gpu]
