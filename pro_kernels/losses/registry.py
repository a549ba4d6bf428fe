"""How a loss is declared: a function of a ``Ranked`` batch, registered under its own name.

    from pro_kernels.losses import Ranked, differences, pair_mean, register
    from pro_kernels.option_types import Beta

    @register()
    def my_loss(ranked: Ranked, *, beta: Beta = 0.1):
        implicit = beta * ranked.scores()
        hinges = (1 - differences(implicit)).relu()
        return ranked.result(pair_mean(hinges, ranked.better()), implicit)

That is all: ``LOSSES["my_loss"](logps, lengths, rewards=...)`` ranks the batch, checks what it is
given, and the trainer takes ``loss_type="my_loss"``.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pro_kernels.option_types import OptionType, option_type, shared_options
from pro_kernels.validate import check_choice, check_option, gap_fault

from .ranked import Result, ranked_batch

Body = Callable[..., Result]

LOSSES: dict[str, Loss] = {}


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss on (S_i, m_i), to be called, and what is known of it."""

    name: str  # in ``LOSSES``
    body: Body  # the function of a ``Ranked`` batch
    needed: Callable[..., Sequence[str]]  # of the options: see ``needs``
    shared: tuple[str, ...]  # those options that every loss has
    defaults: Mapping[str, Any]  # its options and their defaults
    types: Mapping[str, OptionType]  # what an option takes; not in it: tensors
    gaps: Callable[..., bool]
    fault: Callable[..., str | None] | None

    def __call__(
        self,
        logps: Tensor,  # (B, n)
        lengths: Tensor,  # (B, n)
        *,
        rewards: Tensor | None = None,  # (B, n)
        ref_logps: Tensor | None = None,  # (B, n)
        mask: Tensor | None = None,  # (B, n)
        prompt_weights: Tensor | None = None,  # (B,)
        **options: Any,
    ) -> Result:
        """The loss and its metrics; arguments as ``pro_kernels.losses`` says.

        Raises:
            TypeError, ValueError: an input or an option that cannot be.
        """
        self.check(options)
        self.check_needs({"rewards": rewards, "ref_logps": ref_logps}, options)
        shared = {name: options.pop(name, self.defaults[name]) for name in self.shared}
        if shared.pop("reference_free", False):
            ref_logps = None
        ranked = ranked_batch(logps, lengths, rewards, ref_logps, mask, prompt_weights)
        found = self.body(ranked, **options)
        # Not by match: torch 2.10 compiles none.
        pair = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
        loss, metrics = pair
        if not isinstance(loss, Tensor) or loss.ndim or not isinstance(metrics, dict):
            raise ValueError(
                f"loss {self.name} must return a scalar tensor and a dict, got {found!r}"
            )
        if weight := shared.pop("sft_weight", 0.0):
            sft = weight * ranked.mean(ranked.nll(shared["sft_reduction"], shared["sft_on"]))
            loss, metrics = loss + sft, {"sft_loss": sft.detach().float(), **metrics}
        return loss, metrics

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError for a value that an option cannot have, or has no use."""
        for name, value in options.items():
            if name in self.types:
                check_option(name, value, self.types[name])
        if "sft_weight" not in options and not self.defaults.get("sft_weight", 1):
            for name in options.keys() & {"sft_on", "sft_reduction"}:
                raise ValueError(
                    f"{name} is of the SFT term, which {self.name} has with sft_weight > 0 only, "
                    f"got {name}={options[name]!r} without sft_weight"
                )

    def check_needs(self, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Raise ValueError for an input that these options need, and that is not given."""
        for name in self.needs(**options):
            if given.get(name) is None:
                raise ValueError(f"{self.name} needs {name}: expected a (B, n) tensor, got None")

    def needs(self, **options: Any) -> tuple[str, ...]:
        """Which of "rewards" and "ref_logps" it cannot do without, with these options."""
        options = {**self.defaults, **options}
        free = options.get("reference_free", False)
        return tuple(x for x in self.needed(**options) if not (free and x == "ref_logps"))

    def uses_gaps(self, **options: Any) -> bool:
        """Whether, with these options, reward gaps matter and not only their order."""
        return self.gaps(**{**self.defaults, **options})

    def reward_fault(self, rewards: Sequence[float], **options: Any) -> str | None:
        """Why it cannot take these rewards of a prompt with these options, or None."""
        options = {**self.defaults, **options}
        if not self.gaps(**options):
            return None
        if self.fault and (found := self.fault(rewards, **options)):
            return found
        return gap_fault(max(rewards) - min(rewards), options.get("reward_scale", 1.0))


def register(
    *,
    needs: Sequence[str] | Callable[..., Sequence[str]] = (),
    sft_weight: float = 0.0,
    sft_reduction: str = "mean",
    uses_gaps: bool | Callable[..., bool] = False,
    reward_fault: Callable[..., str | None] | None = None,
) -> Callable[[Body], Loss]:
    """Decorator that makes a function of a ``Ranked`` batch a loss, in ``LOSSES`` under its name.

    The function takes a ``Ranked`` and, by keyword, options with defaults; a type of
    ``option_types`` (or ``Annotated[float, Limits(above=0), "help"]``) says what an option may be.
    It returns the scalar loss, differentiable in ``ranked.logps``, and a dict of detached metrics:
    ``ranked.result`` makes both. It must not wait for a device. A function of the same module and
    name, or file and name, is replaced.

    Args:
        needs: "rewards" or "ref_logps", where it cannot do without. May be a function of the
            options, by keyword.
        sft_weight: default of the option of this name, which every loss has: it adds the negative
            log-likelihood of the best candidate, or of all.
        sft_reduction: likewise.
        uses_gaps: whether it takes more than the order from rewards: then lists with rewards and
            lists with an order only do not mix. May be a function of the options, by keyword.
        reward_fault: function of the rewards of one prompt and, by keyword, of the options, that
            says why the loss cannot take them ("too large ..."), or None. Asked where gaps are
            used, beside the limits of any gap.

    Raises:
        TypeError: no function; an argument of it that is not by keyword, or has no type hint
            or no default.
        ValueError: an unknown name in ``needs``; a name that another loss has; a default that its
            own type refuses.
    """
    needed = needs if callable(needs) else lambda **_: needs
    gaps = uses_gaps if callable(uses_gaps) else lambda **_: bool(uses_gaps)

    def decorate(body: Body) -> Loss:
        sft = {"sft_weight": sft_weight, "sft_reduction": sft_reduction}
        loss = _declared(body, sft, needed=needed, gaps=gaps, fault=reward_fault)
        LOSSES[loss.name] = loss
        return loss

    return decorate


def get_loss(name: str) -> Loss:
    """The loss of that name; ValueError listing the names if there is none."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(LOSSES)}")
    return LOSSES[name]


def _declared(body: Body, sft: Mapping[str, Any], **known: Any) -> Loss:
    if not inspect.isfunction(body):
        raise TypeError(f"a loss is registered from a function, got {body!r}")
    name = body.__name__
    other = LOSSES[name].body if name in LOSSES else body
    if other.__module__ != body.__module__ and inspect.getfile(other) != inspect.getfile(body):
        raise ValueError(f"there is a loss {name!r} already, of {other.__module__}")
    first, *rest = inspect.signature(body).parameters.values()
    # Not of the function itself: Python 3.10 hides what is annotated where a default is None.
    bare = types.SimpleNamespace(__annotations__=body.__annotations__)
    hints = typing.get_type_hints(bare, body.__globals__, include_extras=True)
    for p in rest:
        if p.kind is not p.KEYWORD_ONLY or p.default is p.empty or p.name not in hints:
            raise TypeError(
                f"{p.name} of loss {name} must be by keyword and have a type hint and a default"
            )
    own = {p.name: p.default for p in rest}
    needs = known["needed"](**own)
    for need in needs:
        check_choice("needs", need, ("rewards", "ref_logps"))
    shared = shared_options(own, "ref_logps" in needs, **sft)
    rest += [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for option, (kind, default) in shared.items()
    ]
    kinds = {p.name: option_type(hints.get(p.name, p.annotation)) for p in rest}
    checked = {option: kind for option, kind in kinds.items() if kind.kinds or kind.choices}
    defaults = {p.name: p.default for p in rest}
    for option, kind in checked.items():
        check_option(option, defaults[option], kind)
    loss = Loss(name, body, shared=tuple(shared), defaults=defaults, types=checked, **known)
    inputs = [p for p in inspect.signature(loss).parameters.values() if p.kind is not p.VAR_KEYWORD]
    about = {"__signature__": inspect.Signature([*inputs, *rest]), "__doc__": body.__doc__}
    about |= {"__name__": name, "__module__": body.__module__}
    loss.__dict__.update(about)
    return loss
