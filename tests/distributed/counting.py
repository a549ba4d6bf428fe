"""What the collectives of a block send: kind, sum or maximum, bytes of the whole tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

# By older and newer names; the newer ones are what the older call.
_GATHERS = ("all_gather_into_tensor", "all_gather_single")
_SCATTERS = ("reduce_scatter_tensor", "reduce_scatter_single")
_OTHERS = ("broadcast", "reduce", "scatter", "gather", "all_to_all", "all_to_all_single",
           "reduce_scatter", "send", "recv", "isend", "irecv", "all_gather_object",
           "all_gather_coalesced", "all_reduce_coalesced")  # fmt: skip


@contextlib.contextmanager
def collectives() -> Iterator[list[tuple[str, str, int]]]:
    """Count the calls to ``torch.distributed`` within; one that is not known here raises."""
    found: list[tuple[str, str, int]] = []
    kept = {}

    def wrap(name: str, note) -> None:
        if hasattr(dist, name):
            kept[name] = original = getattr(dist, name)

            def counted(*args, **kwargs):
                found.append(note(*args, **kwargs))
                return original(*args, **kwargs)

            setattr(dist, name, counted)

    def reduced(tensor, op=dist.ReduceOp.SUM, *_, **__):
        return "all_reduce", "max" if op == dist.ReduceOp.MAX else "sum", tensor.nbytes

    def gathered(output_tensor, input_tensor, *_, **__):
        return "all_gather", "", output_tensor.nbytes

    def scattered(output, input, *_, **__):
        return "reduce_scatter", "sum", input.nbytes

    def refuse(name: str):
        def note(*_, **__):
            raise AssertionError(f"{name} is not counted")

        return note

    wrap("all_reduce", reduced)
    wrap("all_gather", lambda parts, *_, **__: ("all_gather", "", sum(x.nbytes for x in parts)))
    for name in _GATHERS:
        wrap(name, gathered)
    for name in _SCATTERS:
        wrap(name, scattered)
    for name in _OTHERS:
        wrap(name, refuse(name))
    try:
        yield found
    finally:
        for name, original in kept.items():
            setattr(dist, name, original)
