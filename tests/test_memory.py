"""Peak memory of the fused path, and tensors past 2**31 elements."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import pro_kernels as pk
from bench.engine.memory import CHILD_ENV
from cases import usable_backends

MB = 1 << 20

# In a child process: the resident set's high-water mark, reset just before the call.
PEAK = """
import json, sys, torch, pro_kernels as pk
rows, H, V, budget = map(int, sys.argv[1:5])
options, frozen = json.loads(sys.argv[5]), sys.argv[6] == "frozen"
entropy = options.pop("entropy", False)
def memory(field):
    with open("/proc/self/status") as f:
        return next(int(x.split()[1]) * 1024 for x in f if x.startswith(field))
def batch(T, V):
    h = torch.randn(1, 8, T, H).bfloat16().requires_grad_()
    w = (torch.randn(V, H) / H).bfloat16().requires_grad_(not frozen)
    t = torch.randint(0, V // 2, (1, 8, T))
    # A fifth of the vocabulary is next to impossible: what a filter leaves out.
    b = torch.zeros(V).bfloat16()
    b[4 * V // 5 :] = -30
    return h, w, t, torch.randn(1, 8), b
h, w, t, r, b = batch(2, 100)
pk.linear_pro_loss(h, w, t, r, bias=b, **options).loss.backward()
h, w, t, r, b = batch(rows // 8, V)
layout = pk.Layout.from_padded(t)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
dropped = None
if entropy:
    a, e = pk.linear_token_logps(h, w, t, bias=b, budget=budget, return_entropy=True, **options)
    (a.mean() + e.mean()).backward()
else:
    out = pk.linear_pro_loss(h, w, None, r, bias=b, layout=layout, budget=budget, **options)
    out.loss.backward()
    dropped = out.grad_filter and out.grad_filter.dropped_mass.min().item()
print(json.dumps({"peak": memory("VmHWM") - before,
                  "gradients": sum(x.grad.nbytes for x in (h, w) if x.requires_grad),
                  "dropped": dropped}))
"""


def peak(rows: int, hidden: int, vocab: int, budget: int, frozen: bool = False, **options) -> dict:
    """What a call took in a child process, and the size of its gradients."""
    sizes = [str(x) for x in (rows, hidden, vocab, budget)]
    command = [sys.executable, "-c", PEAK, *sizes, json.dumps(options), "frozen" * frozen]
    env = {**os.environ, **CHILD_ENV}  # else what the allocator keeps for itself counts: +-40 MB
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(out.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("budget", [40 * MB, 100 * MB])
def test_one_prompt_larger_than_the_budget(budget):
    """4096 x 16000 logits are 131 MB in bf16; the call stays within gradients + budget + 64 MB."""
    found = peak(4096, 256, 16000, budget)
    assert found["peak"] <= found["gradients"] + budget + 64 * MB, found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("rows", "budget", "frozen"),
    [(512, 140 * MB, False), (1024, 110 * MB, True), (2560, 340 * MB, False)],
    ids=["T1", "T1f", "T3"],
)
def test_a_filter_keeps_to_the_budget(rows, budget, frozen):
    """The copies of four fifths of a 65 MB weight, and of its gradient, count."""
    found = peak(rows, 512, 64000, budget, frozen, grad_filter=0.01)
    assert 0 < found["dropped"] < 0.01
    assert found["peak"] <= found["gradients"] + budget + 64 * MB, found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("rows", [256, 2048], ids=["T1", "T3"])
def test_an_entropy_keeps_to_the_budget(rows):
    """Also where an fp32 copy of dW, 131 MB, would not fit it."""
    found = peak(rows, 512, 64000, 110 * MB, entropy=True)
    assert found["peak"] <= found["gradients"] + (110 + 64) * MB, found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 30.0}, {"entropy": True}], ids=["plain", "softcap", "entropy"]
)
def test_the_plain_backend_keeps_to_the_budget(options):
    """Its fp32 copies are few and small, whatever else they have to hold."""
    found = peak(2048, 64, 151936, 100 * MB, backend="torch", **options)
    assert found["peak"] <= found["gradients"] + (100 + 32) * MB, found


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in usable_backends() if b != "triton"])
def test_more_than_two_to_the_31_elements(backend):
    vocab = 151936
    rows = 2**31 // vocab + 10
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    targets = torch.full((rows,), -100)
    targets[0], targets[-1] = 3, vocab - 1
    logits[-1, -1] = 8.0
    logits.requires_grad_()
    logps = pk.token_logps(logits, targets, backend=backend, inplace_backward=True)
    expected = pk.reference.token_logps(logits[-1:].detach().double(), targets[-1:]).float()
    torch.testing.assert_close(logps[-1:].detach(), expected)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert grad[-1, -1] > 0 and grad[0, 3] > 0 and (grad[1:-1, :8] == 0).all()
