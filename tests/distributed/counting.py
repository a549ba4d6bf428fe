"""What the collectives of a block send: kind, sum or maximum, bytes of the whole tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

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

    def reduced(tensor, op=dist.ReduceOp.SUM, *_, **__):
        return "all_reduce", "max" if op == dist.ReduceOp.MAX else "sum", tensor.nbytes

    def gathered(output_tensor, input_tensor, *_, **__):
        parts = output_tensor if isinstance(output_tensor, list) else [output_tensor]
        return "all_gather", "", sum(x.nbytes for x in parts)

    def scattered(output, input, *_, **__):
        return "reduce_scatter", "sum", input.nbytes

    def counted(name: str, note, original):
        def call(*args, **kwargs):
            assert note is not None, f"{name} is not counted"
            found.append(note(*args, **kwargs))
            return original(*args, **kwargs)

        return call

    notes = {"all_reduce": reduced, "all_gather": gathered} | dict.fromkeys(_OTHERS)
    notes |= dict.fromkeys(_GATHERS, gathered) | dict.fromkeys(_SCATTERS, scattered)
    with contextlib.ExitStack() as patched:
        for name, note in notes.items():
            if original := getattr(dist, name, None):
                new = counted(name, note, original)
                patched.enter_context(mock.patch.object(dist, name, new))
        yield found
