"""Stand-ins for packages that tests do not install."""

from __future__ import annotations

import sys
import types

import torch


def stub(monkeypatch, name: str) -> types.ModuleType:
    """An empty module, and the packages it is in."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        below = ".".join(parts[:n])
        if n == len(parts) or below not in sys.modules:
            monkeypatch.setitem(sys.modules, below, types.ModuleType(below))
    return sys.modules[name]


def stub_verl(monkeypatch):
    """Modules with verl's names and signatures, and plain formulas."""

    def plain(hidden, weight, ids, temperature):
        logps = (hidden @ weight.t() / temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, ids[..., None]).squeeze(-1), entropy

    class FusedLinearForPPO(torch.nn.Module):
        def __init__(self, chunk_size=512, impl_backend="torch"):
            super().__init__()

        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            return functional.plain(hidden_states, vocab_weights, input_ids, temperature)

    class LinearCrossEntropy:
        @staticmethod
        def forward(
            ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
        ):
            raise AssertionError("a kernel")

    functional = stub(monkeypatch, "verl.utils.experimental.torch_functional")
    kernel = stub(monkeypatch, "verl.utils.kernel.linear_cross_entropy")
    functional.plain = plain
    functional.FusedLinearForPPO, kernel.LinearCrossEntropy = FusedLinearForPPO, LinearCrossEntropy
    kernel.linear_cross_entropy = lambda *args: ("theirs", *args)
    return functional, kernel
