"""Options of a call, each stated once: a field, whose type says what it takes and means.

``PROOptions`` is the loss as its caller describes it and ``RankingOptions`` what of it the kernels
compute with, ``CrossEntropyOptions`` that of tokens, ``LogitOptions`` what the model does to its
logits, ``CallOptions`` how a call runs. The public functions take them as keyword arguments
(``Options``); kernels get the same fields as a struct (C, CUDA) or a tuple (Triton), and ops get
them encoded (``fused/call.py``). So a new option is a field here, and code where it acts.
"""

from __future__ import annotations

import inspect
import os
import textwrap
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from pro_kernels.option_types import (
    LARGEST_SCALE,
    SIZES,
    Eps,
    LengthNormalize,
    Limits,
    OptionType,
    RewardScale,
    Temperature,
    Ties,
    TopK,
    help_of,
    option_type,
)
from pro_kernels.validate import check_option

IGNORE_INDEX = -100
OFFICIAL_EPS = 1e-10
# Sets of options that a public function remembers, and the types in them: no process groups.
_MOST_KNOWN = 256
_REMEMBERED = {type(None), bool, int, float, str, torch.dtype}


class SettingError(ValueError):
    """A ``PRO_KERNELS_*`` variable of the environment has a value that it cannot have."""


def setting(name: str, choices: Sequence[str], default: str) -> str:
    """The environment variable ``name``, one of ``choices``; unset or empty: ``default``."""
    choice = os.environ.get(name) or default
    if choice not in choices:
        raise SettingError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
    return choice


Function = TypeVar("Function", bound=Callable)


def constant_while_compiling(function: Function) -> Function:
    """Let ``torch.compile`` call this function of constants while tracing, and keep its result.

    What ``torch.compiler.assume_constant_result`` does, without importing the whole compiler (and
    Triton) the moment this package is imported; tests/test_layers.py would show it if that changed.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Checked:
    """Checks its fields by their types; a subclass may then derive others."""

    _types: ClassVar[dict[str, tuple[OptionType, Any]]] = {}  # and the default, checked below

    def __post_init__(self) -> None:
        for name, (kind, default) in self._types.items():
            if (value := getattr(self, name)) is not default:
                check_option(name, value, kind)


@dataclass(frozen=True)
class LogitOptions(Checked):
    """What the model does to raw logits before the softmax.

    ``z = softcap * tanh(logit_scale * raw / softcap)``; without a softcap ``z = logit_scale * raw``
    (Gemma 2 report, arXiv 2408.00118, section 2, for the cap; Cohere and Granite for the scale).
    The cap lies in [1e-30, 1e30], the scale's size in [1e-30, 1e6].
    """

    softcap: Annotated[
        float | None, Limits(above=0), "``c * tanh(z / c)`` on the logits, or None."
    ] = None
    logit_scale: Annotated[
        float,
        Limits(largest=LARGEST_SCALE),
        "Factor on the logits, before the softcap. A number, or a tensor of a number for each row "
        "(of the shape of targets; with a layout, of the rows of hidden): 1 / temperature of "
        "sampling, say. Such a tensor is a constant of the gradient, and there can be no bias. It "
        "is multiplied into the rows of hidden in fp32, which rounds 16-bit ones once more, unless "
        "the head is an fp32 one (docs/logprobs.md).",
    ] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logit_scale == 0:
            raise ValueError("logit_scale must not be 0")

    def transform(
        self, raw: Tensor, out: Tensor | None = None, slope: Tensor | None = None
    ) -> Tensor:
        """The logits after scale and softcap, into ``out``, which may be ``raw``, if given.

        With a softcap their derivative is written to ``slope``; without one it is the scale.
        """
        scale, cap = self.logit_scale, self.softcap
        z = raw if scale == 1.0 else torch.mul(raw, scale, out=out)
        if cap is None:
            return z
        t = torch.tanh(torch.div(z, cap, out=out), out=out)
        if slope is not None:
            torch.mul(t, t, out=slope).neg_().add_(1).mul_(scale)
        return torch.mul(t, cap, out=out)


@dataclass(frozen=True)
class RankingOptions(Checked):
    """Options of the ranking loss on scores (one prompt: n candidates, best first).

    Kernels take these fields: csrc/include/pk_abi.h, and a tuple in Triton.
    """

    length_normalize: LengthNormalize = True
    tau: Annotated[float, Limits(above=0)] = 1.0  # inverse temperature where there are no rewards
    skip_ties: bool = False  # one tied with candidate k leaves term k instead of adding exp(0)
    eps: Eps = 0.0
    sft_weight: Annotated[
        float, "w; the SFT term's factor is ``w (n-1)^2``, or w for a single candidate."
    ] = 0.05
    sft_mean: bool = False  # SFT uses S / m of the best candidate instead of S
    top_k: TopK = None
    single_sft: bool = True  # one candidate is pure SFT (factor 1 instead of (n-1)^2 = 0)


@dataclass(frozen=True)
class PROOptions(RankingOptions):
    """The loss as its caller describes it; what the kernels need beyond that is derived."""

    tau: float = field(init=False, default=1.0)
    skip_ties: bool = field(init=False, default=False)
    sft_mean: bool = field(init=False, default=False)
    single_sft: bool = field(init=False, default=True)
    sft_reduction: Annotated[
        Literal["sum", "mean"] | None,
        '"mean" (per token) or "sum" (the paper) of the SFT log-probs. None: "mean", and "sum" '
        'under ``compat="official"``. As a sum the term is most of the loss of long completions, '
        "and the ranking hardly counts (docs/loss.md).",
    ] = None
    temperature: Temperature = "reward"
    reward_scale: RewardScale = 1.0
    ties: Ties = "zero"
    compat: Annotated[
        Literal["official"] | None,
        '"official" for the meaning of the authors\' code: no sorting, eps = 1e-10, all-equal '
        "rewards kept, one candidate gives 0. Make targets with ``reference.official_targets``.",
    ] = None
    final_dtype: Annotated[
        torch.dtype | None,
        "Cast each rank term and the SFT term to this dtype, as the official code does.",
    ] = None

    def __post_init__(self) -> None:
        if hasattr(self.length_normalize, "__bool__"):  # 1, or NumPy's
            object.__setattr__(self, "length_normalize", bool(self.length_normalize))
        super().__post_init__()
        derived: dict[str, Any] = {"skip_ties": self.ties == "skip"}
        reduction = self.sft_reduction or ("sum" if self.official else "mean")
        derived |= {"sft_reduction": reduction, "sft_mean": reduction == "mean"}
        if not isinstance(self.temperature, str):
            derived["tau"] = max(SIZES[0], 1.0 / self.temperature)
        if self.official:
            derived |= {"eps": OFFICIAL_EPS, "single_sft": False}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        kernel = RankingOptions(**{name: getattr(self, name) for name in _OF_RANKING})
        object.__setattr__(self, "_ranking", kernel)

    @property
    def official(self) -> bool:
        """Whether the meaning is that of the authors' code."""
        return self.compat == "official"

    def ranking(self) -> RankingOptions:
        """The same as the kernels take it."""
        return self._ranking  # type: ignore[attr-defined]


_OF_RANKING = tuple(f.name for f in fields(RankingOptions))


@dataclass(frozen=True)
class CrossEntropyOptions(Checked):
    """The cross-entropy of tokens beside its class weights, a tensor."""

    label_smoothing: Annotated[
        float,
        Limits(at_least=0, at_most=1),
        "Share of the target's probability that goes to all classes alike.",
    ] = 0.0
    z_loss: Annotated[
        float,
        Limits(at_least=0),
        "lambda of ``lambda lse^2``, added for each token whatever its class weight (PaLM, arXiv "
        "2204.02311, section 5; Liger's ``lse_square_scale``); its mean is over tokens.",
    ] = 0.0
    reduction: Annotated[
        Literal["mean", "sum", "none"], "As in PyTorch; a mean is over the scored tokens."
    ] = "mean"


@dataclass(frozen=True)
class CallOptions(Checked):
    """How a call runs; budget and grad_filter are checked where they are used."""

    ignore_index: Annotated[int, "Target value of positions that are not scored."] = IGNORE_INDEX
    shift: Annotated[bool, "Targets are unshifted labels."] = False
    head_dtype: Annotated[
        Literal["float32"] | None,
        '"float32": an fp32 head. Hidden states and weight are multiplied as they are given, '
        "autocast or not, and of any two dtypes; logits are the fp32 sums. Where both have one "
        "16-bit dtype their products are exact in fp32, and no fp32 copy of the weight is made. "
        "None: logits are rounded to the dtype of the matmuls.",
    ] = None
    batch_invariant: Annotated[
        bool,
        "Log-probs of a row are the same to the bit alone and in any batch, at any place: the "
        "matmul of logits runs in tiles of always as many rows (docs/logprobs.md).",
    ] = False
    grad_filter: Annotated[
        float | Literal["auto"] | None,
        "A probability mass tau in (0, 1): vocabulary columns that hold on average at most tau of "
        "a row's probability (under a softcap: probability times the softcap's slope) leave the "
        'gradient matmuls. "auto": as many as change dHidden by no more than the rounding of the '
        "matmuls' dtype does; none in fp32 and fp64. None: all columns stay. What was left out is "
        "told with bounds (``PROOutput.grad_filter``). On a GPU the host then waits once a chunk.",
    ] = None
    inplace_backward: Annotated[
        bool, "Write the gradient over the logits; nothing else may use them afterwards."
    ] = False
    backend: Annotated[str, '"auto" or a backend\'s name; a named one never falls back.'] = "auto"
    budget: Annotated[
        int | None, "Bytes this call may take beyond the inputs' gradients; None for a default."
    ] = None
    process_group: Annotated[
        Any,
        "The ranks that hold the head together (tensor parallel), or that dimension of a "
        'DeviceMesh (``mesh["tp"]``). ``weight`` and ``bias`` are this rank\'s rows, in the order '
        "of the group, in any sizes, or DTensors that are Shard(0) there (and gathered over the "
        "other dimensions of their mesh); hidden, targets and all options are the same on every "
        "rank, which is checked at each call (on a GPU the host waits for that, and of tensors "
        "only shapes and how much is scored are compared; hidden's values never are). So is the "
        "result; dHidden is summed over ranks. Not compiled, not with ``grad_filter`` or an "
        "entropy.",
    ] = None
    sequence_group: Annotated[
        Any,
        "The ranks that hold the tokens together (context parallel, or candidates on other "
        "ranks). Each describes all candidates of all prompts, in targets or layout, and scores "
        "its own tokens of them, with ``ignore_index`` or empty sequences where it has none; shift "
        "labels before they are split. Rewards, weight and all options are the same on every rank, "
        "which is checked at each call (on a GPU the host waits for that, and only the shapes of "
        "its rewards are compared). So is the result: scores, log-probs and lengths of whole "
        "candidates. 8 bytes a candidate are summed over ranks in the forward (16 in fp64; lengths "
        "are exact to 2**24), nothing in the backward: gradients are of this rank's tokens only, "
        "so those of weights must be summed over the group, not averaged. Not compiled; "
        "``PROOutput.grad_filter`` tells of this rank's tokens.",
    ] = None


def declare(options: Any) -> None:
    """Let a dataclass of options know what its fields take, and check its defaults."""
    hints = typing.get_type_hints(options, include_extras=True)
    kinds = {f.name: (option_type(hints[f.name]), f.default) for f in fields(options)}
    options._types = {
        name: (kind, default)
        for name, (kind, default) in kinds.items()
        if (kind.kinds or kind.choices) and name not in ("budget", "grad_filter")
    }
    for name, (kind, default) in options._types.items():
        check_option(name, default, kind)


for _options in (LogitOptions, RankingOptions, PROOptions, CrossEntropyOptions, CallOptions):
    declare(_options)


def row_scale(options: dict[str, Any]) -> Tensor | None:
    """The ``logit_scale`` of each row, where it is no number for all of them."""
    scale = options.get("logit_scale")
    return scale if isinstance(scale, Tensor) else None


class Options:
    """The keyword options of a public function: fields of dataclasses, less some.

    As a decorator it puts them into the function's signature and docstring; ``split`` makes the
    dataclasses of what a call was given.
    """

    def __init__(self, *classes: Any, without: Sequence[str] = ()) -> None:
        self.classes = classes
        self.names = [
            tuple(f.name for f in fields(c) if f.init and f.name not in without) for c in classes
        ]
        self.function = ""
        self._known: dict[tuple, tuple[Any, ...]] = {}

    def __call__(self, function: Function) -> Function:
        """Document the options on a function that takes ``**options``."""
        self.function = function.__name__
        own = inspect.signature(function)
        parameters, lines = list(own.parameters.values())[:-1], []  # all but ``**options``
        for options, names in zip(self.classes, self.names, strict=True):
            hints = typing.get_type_hints(options, include_extras=True)
            bare = typing.get_type_hints(options)
            for f in (f for f in fields(options) if f.name in names):
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(
                    inspect.Parameter(f.name, kind, default=f.default, annotation=bare[f.name])
                )
                text = f"{f.name}: {help_of(hints[f.name])}"
                lines.append(
                    textwrap.indent(textwrap.fill(text, 92, subsequent_indent="    "), " " * 8)
                )
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        doc = function.__doc__ or ""
        function.__doc__ = doc.replace("        **options: of the call.", "\n".join(lines))
        return function

    def split(self, options: dict[str, Any]) -> tuple[Any, ...]:
        """One dataclass each, in the order of the classes; a ``row_scale`` stands as 1.

        Raises:
            TypeError: an option that there is not, or of the wrong type.
            ValueError: a value out of range.
        """
        if row_scale(options) is not None:
            options = {**options, "logit_scale": 1.0}
        types = tuple(map(type, options.values()))
        if torch.compiler.is_compiling() or not _REMEMBERED.issuperset(types):
            return self._made(options)
        # Calls that follow one another mostly have the same options, which were checked then.
        key = (*options.items(), *types)
        found = self._known.get(key)
        if found is None:
            found = self._made(options)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = found
        return found

    def _made(self, options: dict[str, Any]) -> tuple[Any, ...]:
        made, used = [], 0
        for make, names in zip(self.classes, self.names, strict=True):
            given = {name: options[name] for name in names if name in options}
            used += len(given)
            made.append(make(**given))
        if used < len(options):
            known = [name for names in self.names for name in names]
            unknown = sorted(set(options) - set(known))
            raise TypeError(f"{self.function}() got options {unknown}; there are {sorted(known)}")
        return tuple(made)
