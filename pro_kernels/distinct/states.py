"""Layers that carry a state along the row, on a tree: delta nets, Mamba 2, short convolutions.

Each branch starts from the state that its parent ended in. Layers of transformers take such a state
from the cache and leave it there; here each call is given one of its own.

Legend: ``S`` distinct tokens, ``K`` segments.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pro_kernels.distinct.interface import is_tree
from pro_kernels.distinct.tree import paths
from pro_kernels.models.probe import evaluating

# Branches of unlike lengths are run as one batch as long as at most this share of it is padding.
_PADDING = 0.2
_CACHES = ("cache_params", "past_key_values")  # what layers call the argument
_PLAN = "_plan"  # an attribute of segments
_Kept = dict[int, Tensor]


class Everywhere(dict):
    """A mapping in which every key has one value: a mask for each type of layer, the same."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def __missing__(self, key: Any) -> Any:
        return self.value

    def get(self, key: Any, default: Any = None) -> Any:
        """The value."""
        return self.value


def to_every_layer(run: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder's forward that hands a tree to all layers, those without attention too."""

    def forward(attention_mask: Any = None, **given: Any) -> Any:
        mask = Everywhere(attention_mask) if is_tree(attention_mask) else attention_mask
        return run(attention_mask=mask, **given)

    return forward


def find(decoder: Any, input_ids: Tensor, run: Callable[..., Any]) -> list[nn.Module]:
    """The modules of a decoder that leave a state in its cache, from a run with one."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=decoder.config)
    if not any(hasattr(x, "recurrent_states") for x in cache.layers):
        return []
    running: list[nn.Module] = []
    found: dict[nn.Module, None] = {}

    def watched(update: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[running[-1]] = None
            return update(*args, **kwargs)

        return call

    for name in ("update_conv_state", "update_recurrent_state"):
        setattr(cache, name, watched(getattr(cache, name)))
    hooks = []
    for module in decoder.modules():
        if module is not decoder:
            hooks += [
                module.register_forward_pre_hook(lambda module, _: running.append(module)),
                module.register_forward_hook(lambda *_: running.pop() and None),
            ]
    try:
        with torch.no_grad(), evaluating(decoder):
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            given = {"input_ids": input_ids, "position_ids": positions, "past_key_values": cache}
            run(**given, attention_mask=Everywhere(None), use_cache=True, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


@functools.cache
def on_trees(original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in for the forward of such a module.

    A call that has segments among its arguments is run segment by segment. Every tensor that begins
    with (1, S) is cut with them. Any other call is left as it is.
    """
    signature = inspect.signature(original)
    cache = next((name for name in _CACHES if name in signature.parameters), None)
    kinds = signature.parameters.values()
    rest = next((p.name for p in kinds if p.kind is p.VAR_KEYWORD), "")

    @torch.compiler.disable(recursive=False)
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given |= given.pop(rest, {})
        trees = [name for name, x in given.items() if is_tree(x)]
        if not trees:
            return original(self, *args, **kwargs)
        if cache is None:
            raise ValueError(f"{type(self).__name__} takes no state from a cache")
        segments = given[trees[0]]
        for name in trees:
            given[name] = None
        return _over_segments(lambda x: original(**x), given, cache, segments)

    return forward


class States:
    """What layers of transformers ask of a cache, without writing over any state.

    ``conv_states`` and ``recurrent_states`` are by the index of the state in its layer; all of one
    layer, as there is one for each call.
    """

    record_past = True  # says that states may not be written over

    def __init__(self, conv_states: _Kept | None = None, recurrent: _Kept | None = None) -> None:
        self.conv_states: _Kept = conv_states or {}
        self.recurrent_states: _Kept = recurrent or {}
        self._next: tuple[_Kept, _Kept] = {}, {}

    @classmethod
    def of(cls, lines: Sequence[States]) -> States:
        """Of a batch, from those of each line."""
        kinds = zip(*((x.conv_states, x.recurrent_states) for x in lines), strict=True)
        return cls(*({i: torch.cat([x[i] for x in kept]) for i in kept[0]} for kept in kinds))

    def after(self) -> States:
        """What the call left."""
        return States(*self._next)

    @property
    def layers(self) -> Everywhere:
        """Itself, whatever the layer."""
        return Everywhere(self)

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """Whether it does not begin with nothing."""
        return bool(self.conv_states or self.recurrent_states)

    def update_conv_state(
        self, x: Tensor, _: int, state_idx: int = 0, conv_kernel_size: int | None = None, **__: Any
    ) -> Tensor:
        """``x`` (b, C, t) after the columns before it, of which the last are kept."""
        size = conv_kernel_size or x.shape[-1]
        if state_idx in self.conv_states:
            x = torch.cat([self.conv_states[state_idx], x], -1)
        x = nn.functional.pad(x, (max(0, size - x.shape[-1]), 0))
        self._next[0][state_idx] = x[..., -size:]
        return x

    def update_recurrent_state(
        self, x: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Keeps it."""
        self._next[1][state_idx] = x
        return x


class _Call(NamedTuple):
    """Some segments, a line each."""

    tokens: Tensor  # (b, t) int64, which of the S
    kept: Tensor  # which of the b * t outputs are the segments', in the order of their tokens
    starts: list[int]  # of each line, the segment whose state it starts from; all -1: none
    leaves: int | None  # the segment whose state is kept; None where no other starts from it


class _Line(NamedTuple):
    """A segment in a call: its tokens after those that are run again, and where it starts."""

    tokens: list[int]
    again: int
    start: int


def _over_segments(
    run: Callable[[dict[str, Any]], Any], given: dict[str, Any], cache: str, segments: Tensor
) -> Any:
    """A module's output of (1, S, ...), from calls for segments, parents first."""
    size = int(segments[0, 0, -1, 1])
    rows = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.shape[:2] == (1, size)}
    calls, order = _plan(segments, next(iter(rows.values())).device)
    states = {-1: States()}
    parts: list[tuple[Tensor, ...]] = []
    single = True
    for call in calls:
        state = States.of([states[start] for start in call.starts])
        out = run({**given, **{n: x[0][call.tokens] for n, x in rows.items()}, cache: state})
        single = isinstance(out, Tensor)
        parts.append(tuple(x.flatten(0, 1)[call.kept] for x in ((out,) if single else out)))
        if call.leaves is not None:
            states[call.leaves] = state.after()
    whole = tuple(torch.cat(x)[order][None] for x in zip(*parts, strict=True))
    return whole[0] if single else whole


def _plan(segments: Tensor, device: torch.device) -> tuple[list[_Call], Tensor]:
    """The calls, and where in what they give each of the S tokens is; made once for all layers."""
    known = getattr(segments, _PLAN, None)
    if known is None or known[1].device != device:
        calls = [_call(lines, leaves, device) for lines, leaves in _grouped(segments[0, 0])]
        given = torch.cat([call.tokens.flatten()[call.kept] for call in calls])
        known = calls, given.argsort()
        setattr(segments, _PLAN, known)
    return known


def _grouped(segments: Tensor) -> Iterator[tuple[list[_Line], int | None]]:
    """The lines of each call: parents one by one, then branches of about one length at a time."""
    spans, above = segments[:, :2].tolist(), paths(segments.tolist())
    parents = [path[-2] if len(path) > 1 else -1 for path in above]
    branching = set(parents)
    # Layers take one token for the step of generation, which writes over the state: a parent of one
    # token is run again before each of its branches.
    onward: dict[int, tuple[int, list[int]]] = {-1: (-1, [])}
    ends = []
    for k, (first, end) in enumerate(spans):
        start, again = onward[parents[k]]
        line = _Line([*again, *range(first, end)], len(again), start)
        if k in branching and len(line.tokens) > 1:
            onward[k] = k, []
            yield [line], k
        else:
            onward[k] = start, line.tokens
            ends.append(line)
    ends.sort(key=lambda line: (line.start == -1, -len(line.tokens)))
    while ends:
        longest, tokens, n = ends[0], 0, 0
        for line in ends:
            tokens += len(line.tokens)
            padded = (n + 1) * len(longest.tokens)
            if tokens < (1 - _PADDING) * padded or (line.start == -1) != (longest.start == -1):
                break
            n += 1
        yield ends[:n], None
        del ends[:n]


def _call(lines: list[_Line], leaves: int | None, device: torch.device) -> _Call:
    width = max(2, *(len(line.tokens) for line in lines))
    tokens = torch.tensor([x.tokens + x.tokens[-1:] * (width - len(x.tokens)) for x in lines])
    kept = [
        torch.arange(i * width + line.again, i * width + len(line.tokens))
        for i, line in enumerate(lines)
    ]
    starts = [line.start for line in lines]
    return _Call(tokens.to(device), torch.cat(kept).to(device), starts, leaves)
