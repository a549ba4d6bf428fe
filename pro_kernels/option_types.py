"""What an option takes and what it means, as a type: ``beta: Beta = 0.1`` says all of it.

``Annotated[type, Limits(...), "help"]``: losses are declared with these, their values are checked
by them (``validate.check_option``), and the trainer's flags are made of them. Nothing heavy is
imported here, since help has to come at once. A type without a help text is checked alike, and is
no flag.
"""

from __future__ import annotations

from collections.abc import Collection
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

# Of options, and of a prompt's largest reward gap, scaled: fp32 holds them and their products.
SIZES = 1e-30, 1e30
# A row of logits may reach 1e9; beyond that AVX-512 loses its sum.
LARGEST_SCALE = 1e6


class Limits(NamedTuple):
    """Of a number."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    largest: float = SIZES[1]  # in size, whatever its sign


class OptionType(NamedTuple):
    """What ``Annotated`` says, taken apart."""

    kinds: tuple[type, ...]  # the types a value may have beside the choices: float, int, bool
    choices: tuple[str, ...]  # the strings it may be
    optional: bool  # whether it may be None
    limits: Limits  # of numbers
    text: str  # the help, "" for none


def option_type(hint: Any) -> OptionType:
    """What a type hint says of an option; no kinds and no choices, if it is none but a tensor."""
    whole = hint
    hint, *extra = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = [part for part in parts if get_origin(part) is Literal]
    kinds = tuple(part for part in parts if part in (float, int, bool))
    optional = NoneType in parts
    if len(kinds) + len(literals) + optional != len(parts):
        return OptionType((), (), optional, Limits(), "")
    return OptionType(
        kinds,
        tuple(choice for part in literals for choice in get_args(part)),
        optional,
        next((x for x in extra if isinstance(x, Limits)), Limits()),
        help_of(whole),
    )


def help_of(hint: Any) -> str:
    """The help text of a type hint, "" for none."""
    extra = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((x for x in extra if isinstance(x, str)), "")


Beta = Annotated[float, Limits(above=0), "Inverse temperature."]
Pairs = Annotated[Literal["all", "best"], "All pairs of a list, or the best with the rest."]
LabelSmoothing = Annotated[
    float, Limits(at_least=0, at_most=0.5), "Share of labels taken to be wrong."
]
RewardTemperature = Annotated[
    float, Limits(at_least=0), "Temperature of the rewards; 0: they only order."
]
Gain = Annotated[
    Literal["exp2", "linear", "rank"],
    "Gain of a reward r: 2^r - 1, or r; rank: 2^r - 1 of an r that falls evenly from 1 to 0.",
]
SftWeight = Annotated[float, Limits(at_least=0), "Weight of the SFT term."]
SftOn = Annotated[
    Literal["best", "all"], "The SFT term is of the best candidate, or the mean of all of them."
]
SftReduction = Annotated[
    Literal["sum", "mean"],
    "SFT term: log-probabilities of the best candidate's tokens summed, or their mean.",
]
SftReductionOfBatch = Annotated[
    Literal["sum", "mean", "tokens"],
    "SFT term: log-probabilities of a candidate's tokens summed, their mean, or their mean over "
    "all such tokens of a batch (tokens).",
]
ReferenceFree = Annotated[
    bool, "Take the reference model's log-probabilities as 0, and do without that model."
]
# What every loss takes; one that has an option of that name itself takes its own.
SHARED_OPTIONS: dict[str, tuple[Any, Any]] = {
    "sft_weight": (SftWeight, 0.0),
    "sft_on": (SftOn, "best"),
    "sft_reduction": (SftReductionOfBatch, "mean"),
    "reference_free": (ReferenceFree, False),
}


def shared_options(own: Collection[str], compares: bool, **defaults: Any) -> dict[str, Any]:
    """Name -> type and default of what a loss takes beside options of its ``own``.

    ``compares``: with a reference model.
    """
    left_out: tuple[str, ...] = () if compares else ("reference_free",)
    if "sft_weight" in own:
        left_out += ("sft_weight", "sft_on", "sft_reduction")
    return {
        name: (kind, defaults.get(name, default))
        for name, (kind, default) in SHARED_OPTIONS.items()
        if name not in left_out
    }


LengthNormalize = Annotated[bool, "Score is the mean log-probability of a token, or their sum."]
TopK = Annotated[
    int | None, Limits(at_least=1), "Only the first so many rank terms, or None for all."
]
Temperature = Annotated[
    float | Literal["reward"],
    Limits(above=0),
    "reward: reward differences are the inverse temperatures (the paper; 1 for lists without "
    "rewards). A number T: 1 / T for every pair, rewards only order the list.",
]
RewardScale = Annotated[float, Limits(above=0), "Rewards are multiplied by this number (> 0)."]
Ties = Annotated[
    Literal["zero", "skip"],
    "Where rewards make the temperatures, a tied candidate adds exp(0) to the denominator (zero, "
    "the paper) or leaves it.",
]
Eps = Annotated[
    float, Limits(at_least=0), "Constant inside the log of each rank term (official code: 1e-10)."
]
