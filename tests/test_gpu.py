"""The fused path on a card: no synchronisation, CUDA graphs, side streams, memory.

``Step`` and its tiers also run on the CPU, so that what is tested here is known to be right
apart from the card. Accuracy there: tests/backends and test_fused.py.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import pro_kernels as pk
from cases import DTYPES, IDS, Case
from pro_kernels import backends
from pro_kernels.fused import planner

TIERS = ["T0", "T1", "T1f", "T2", "T3"]
CASE = Case("gpu", B=4, n=4, T=32, H=128, V=1009, bias=True)

gpu = pytest.mark.gpu
every_tier = pytest.mark.parametrize("tier", TIERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)


@pytest.fixture(params=["torch", *(b for b in backends.ORDER if b not in ("torch", "cpu"))])
def backend(request) -> str:
    reason = backends.refusal(request.param, torch.device("cuda", 0), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def force(force_tier):
    """Chunks of some rows on a card."""
    return lambda tier: force_tier(tier, chunk=50, retained=100)


class Step:
    """One training step with everything on the device: fixed inputs, layout and gradients."""

    def __init__(self, device: str, dtype: torch.dtype, tier: str, backend: str, shared: bool):
        hidden, weight, bias, targets, rewards = CASE.tensors()
        layout = pk.Layout.from_padded(targets)
        if shared:  # every two tokens read one row
            layout = pk.Layout.from_rows(
                *(layout.rows // 2, layout.targets, layout.offsets, CASE.n),
                num_rows=layout.num_rows,
            )
        self.layout = layout.to(device)
        self.rewards = rewards.to(device)
        needs = {"T0": (False,) * 3, "T1f": (True, False, False)}.get(tier, (True,) * 3)
        self.leaves = [
            x.to(device, dtype).requires_grad_(need)
            for x, need in zip((hidden.flatten(0, 2), weight, bias), needs, strict=True)
        ]
        self.options = {"layout": self.layout, "backend": backend}

    def __call__(self) -> list[torch.Tensor]:
        h, w, b = self.leaves
        out = pk.linear_pro_loss(h, w, None, self.rewards, bias=b, **self.options)
        grads = ()
        if out.loss.requires_grad:
            grads = torch.autograd.grad(out.loss, [x for x in self.leaves if x.requires_grad])
        return [*out[:-1], *grads]


@contextlib.contextmanager
def no_sync():
    """PyTorch raises where the host would wait for the card."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_tier
@pytest.mark.parametrize("shared", [False, True], ids=["distinct", "shared"])
def test_the_steps_tested_on_a_card_are_right_on_the_cpu(tier, shared, force):
    force(tier)
    step = Step("cpu", torch.float32, tier, "torch", shared)
    h, w, b = (x.detach().double() for x in step.leaves)
    layout = step.layout
    logps = pk.reference.linear_token_logps(h[layout.rows], w, layout.targets, bias=b)
    found, sums = step(), torch.segment_reduce(logps, "sum", offsets=layout.offsets)
    torch.testing.assert_close(found[4].double().flatten(), sums, rtol=1e-5, atol=1e-5)
    assert len(found) == 6 + {"T0": 0, "T1f": 1}.get(tier, 3)


@gpu
@every_tier
@every_dtype
@pytest.mark.parametrize("shared", [False, True], ids=["distinct", "shared"])
def test_nothing_waits(tier, dtype, shared, backend, force):
    force(tier)
    step = Step("cuda", dtype, tier, backend, shared)
    step()  # libraries load and kernels compile, which may wait
    with no_sync():
        step()


@gpu
def test_nothing_waits_with_logits_given(backend):
    logits = torch.empty(2, 3, 5, 301, device="cuda").normal_().requires_grad_()
    targets = torch.zeros(2, 3, 5, dtype=torch.int64, device="cuda")
    rewards = torch.arange(6.0).view(2, 3).pin_memory()
    for check in (contextlib.nullcontext, no_sync):  # what loads and compiles first may wait
        with check():
            pk.pro_loss(logits, targets, rewards, backend=backend).loss.backward()


@gpu
def test_rewards_on_the_host_do_not_wait(backend, force):
    force("T1")
    step = Step("cuda", torch.bfloat16, "T1", backend, False)
    step.rewards = step.rewards.cpu().pin_memory()
    step()
    with no_sync():
        step()


@gpu
@every_tier
@every_dtype
def test_a_captured_graph_replays_to_the_same_bits(tier, dtype, backend, force):
    force(tier)
    step = Step("cuda", dtype, tier, backend, shared=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():  # other values, same layout
        step.leaves[0].mul_(0.5)
    graph.replay()
    for got, eager in zip(captured, step(), strict=True):
        assert torch.equal(got, eager)


@gpu
@every_tier
def test_side_streams(tier, backend, force):
    """Work queued on another stream reads nothing early and gives the same bits."""
    force(tier)
    step = Step("cuda", torch.bfloat16, tier, backend, shared=True)
    expected = step()
    for _ in range(5):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # a stream that was ignored would be ahead by this
            step.leaves[0].data.mul_(1.0)
            found = step()
        torch.cuda.current_stream().wait_stream(stream)
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)


@gpu
def test_default_budget_is_within_the_cards_memory():
    planner._default_budget.cache_clear()
    free, total = torch.cuda.mem_get_info()
    assert 0 < planner.default_budget(torch.device("cuda", 0)) <= max(total // 8, 256 << 20)
    assert free > 0


@gpu
def test_out_of_memory_names_the_budget():
    hidden = torch.randn(4, 8, device="cuda")
    weight = torch.randn(1, 8, device="cuda").expand(1 << 40, 8)
    targets = torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match="PRO_KERNELS_BUDGET"):
        pk.linear_token_logps(hidden, weight, targets, budget=1 << 60, backend="torch")
