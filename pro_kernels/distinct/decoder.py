"""``distinct_rows``: a causal LM's decoder on the distinct tokens of a padded batch."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from pro_kernels.distinct import interface, states
from pro_kernels.distinct.row import row_of, run_row
from pro_kernels.distinct.tryout import cannot, carriers, refusal, try_out
from pro_kernels.models import COUNTS
from pro_kernels.models.opened import unwrapped

STATE = "_pro_kernels_distinct"  # the attribute of a decoder that holds its ``Distinct``
# How many decoders have their attention named in a config, by its id: models may share one.
_configs: dict[int, int] = {}


@dataclass
class Distinct:
    """A model that runs distinct rows, until ``close`` or the end of a ``with`` block.

    Attributes:
        padded_tokens: tokens of the padded batches so far, padding among them.
        run_tokens: how many of them were run.
        refused: why calls ran as they were.
    """

    decoder: Any = field(repr=False)
    implementation: str  # of its attention, as it was
    forward: Any  # what the instance had in place of its class's forward
    relative: bool = False  # positions that all lie further on change nothing (RoPE)
    carriers: list[nn.Module] = field(default_factory=list, repr=False)  # of a state along the row
    users: int = 0  # who asked for it and did not close it
    padded_tokens: int = 0
    run_tokens: int = 0
    refused: set[str] = field(default_factory=set)

    def own(self, decoder: Any) -> Callable[..., Any]:
        """The forward of a decoder, this one or a replica, as it was."""
        run = self.forward or functools.partial(type(decoder).forward, decoder)
        return states.to_every_layer(run) if self.carriers else run

    @property
    def saved(self) -> float:
        """The share of the tokens given that was not run."""
        return 1 - self.run_tokens / self.padded_tokens if self.padded_tokens else 0.0

    def close(self) -> None:
        """Leave the model as it was, where nobody else still needs this."""
        self.users -= 1
        if self.users == 0:
            _restore(self)

    def __deepcopy__(self, memo: dict) -> Distinct:
        """Of a copied model, which runs distinct rows until somebody asks for it and closes it."""
        _count(copy.deepcopy(self.decoder.config, memo), 1)
        return Distinct(**{**copy.deepcopy(vars(self), memo), "users": 0})

    def __reduce__(self) -> Any:
        """Refused: what is unpickled would have its own forward, and an attention unknown there."""
        raise TypeError(
            "a model that runs distinct rows cannot be pickled; close that before, or save its "
            "state_dict"
        )

    def __enter__(self) -> Distinct:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def distinct_rows(model: nn.Module) -> Distinct:
    """Have a causal LM of transformers run only the distinct tokens of each padded batch.

    Padding is not run, and what several rows begin with is run once. Hidden states, logits and
    gradients are those of the padded batch but for rounding; on padding, hidden states are 0. It
    begins with the call, and ends with the block or with ``close()``. The backward belongs inside.

        with pk.distinct_rows(model) as rows:
            trainer.train()
        print(f"{rows.saved:.0%} of the tokens were not run")

    A call runs as it would without where there is less than 5 % to leave out, and where it is not
    about such a batch: with a cache (``generate``), or with ``inputs_embeds``. It does so with a
    warning, once, where it has a mask of more than two dimensions, positions other than each row's
    own, or further tensors.

    Dropout between layers is drawn for each token that is run. Dropout in the attention is refused.

    A collator that makes the row itself, as a ``TokenTree``, calls the model with
    ``input_ids=tree.input_ids[None], position_ids=tree.position_ids[None],
    attention_mask=tree.as_mask()``; the tree's ``places`` say where each token stands.

    Args:
        model: a causal LM of transformers, or PEFT's wrapper of one. One that does this already
            goes on until the last of its blocks ends.

    Returns:
        ``Distinct``: ``padded_tokens``, ``run_tokens`` and ``saved``, of the calls so far.

    Raises:
        TypeError: not a module.
        ValueError: the model cannot: it was run both ways, and the two differ by more than its
            rounding.
    """
    lm, decoder = _opened(model)
    state = decoder.__dict__.get(STATE)
    if state is None:
        if reason := refusal(lm, decoder):
            raise cannot(lm, reason)
        implementation = decoder.config._attn_implementation.removeprefix(interface.PREFIX)
        state = Distinct(decoder, implementation, decoder.__dict__.get("forward"))
        setattr(decoder, STATE, state)
        _count(decoder.config, 1)
        try:
            for module in carriers(lm, decoder, state.own(decoder)):
                state.carriers.append(module)
                module.forward = MethodType(states.on_trees(type(module).forward), module)
            state.relative = try_out(lm, decoder, state.own(decoder), implementation)
            decoder.forward = MethodType(_distinct_forward(type(decoder).forward), decoder)
        except BaseException:
            _restore(state)
            raise
    state.users += 1
    return state


def _opened(model: nn.Module) -> tuple[Any, Any]:
    """A model of transformers out of its wrapper, and its decoder."""
    lm = unwrapped(model)
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    if decoder is None or not hasattr(decoder, "config"):
        raise ValueError(
            f"model must be a causal language model of transformers, got {type(lm).__name__}"
        )
    return lm, decoder


def _count(config: Any, by: int) -> int:
    """How many decoders have their attention named in a config, from now on."""
    key = id(config)
    if key not in _configs:
        weakref.finalize(config, _configs.pop, key, None)
    _configs[key] = _configs.get(key, 0) + by
    return _configs[key]


def _restore(state: Distinct) -> None:
    decoder = state.decoder
    del decoder.__dict__[STATE]
    if not _count(decoder.config, -1):
        decoder.config._attn_implementation = state.implementation
    for module in (decoder, *state.carriers):
        module.__dict__.pop("forward", None)
    if state.forward is not None:
        decoder.forward = state.forward


@functools.cache
def _distinct_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in for a decoder's forward; bound to each decoder, so that copies are too."""
    parameters = inspect.signature(original).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    untraced = torch.compiler.disable(row_of)

    # How many tokens differ is not known to a compiler; what runs on them is compiled by itself.
    @torch.compiler.disable(recursive=False)
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        state: Distinct = self.__dict__[STATE]
        run = state.own(self)
        tokens, row = 0, None
        try:
            tokens, row = untraced(self, state.relative, given)
        except ValueError as reason:
            if str(reason) not in state.refused:
                state.refused.add(str(reason))
                warnings.warn(f"a padded batch was run as it is: {reason}", stacklevel=2)
        if tokens:
            state.padded_tokens += given["input_ids"].numel()
            state.run_tokens += tokens
            COUNTS["padded_tokens"] += given["input_ids"].numel()
            COUNTS["run_tokens"] += tokens
        return run(**given) if row is None else run_row(run, row, given)

    return forward
