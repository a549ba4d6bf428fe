"""Stand-ins for packages that tests do not install."""

from __future__ import annotations

import sys
import types

import torch


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

    functional, kernel = types.ModuleType("functional"), types.ModuleType("kernel")
    functional.plain = plain
    functional.FusedLinearForPPO, kernel.LinearCrossEntropy = FusedLinearForPPO, LinearCrossEntropy
    kernel.linear_cross_entropy = lambda *args: ("theirs", *args)
    monkeypatch.setitem(sys.modules, "verl.utils.experimental.torch_functional", functional)
    monkeypatch.setitem(sys.modules, "verl.utils.kernel.linear_cross_entropy", kernel)
    for name in ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return functional, kernel
