"""The registered ops: schema, fakes, autograd registration, and whole-graph compilation."""

from __future__ import annotations

import pytest
import torch

import pro_kernels as pk
from cases import Case, usable_backends
from pro_kernels.fused import ops, planner, registry
from pro_kernels.fused.call import Call, decode, encode
from pro_kernels.fused.planner import Plan
from pro_kernels.fused.shards import Shard
from pro_kernels.options import LogitOptions, RankingOptions

FULL = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def head_inputs(dtype=torch.float32, rows=True):
    hidden, weight, bias, targets, rewards = Case("ops", bias=True).tensors()
    layout = pk.Layout.from_padded(targets) if rows else pk.Layout.dense(targets)
    return (
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        weight.to(dtype),
        bias.to(dtype),
        layout,
        rewards,
    )


def encoded(backend: str, plan: Plan | None = None, **facts):
    return encode(Call(backend, LogitOptions(), plan or Plan("T0", 1), **facts))


def test_a_call_survives_encoding():
    call = Call(
        "cpu", LogitOptions(30.0, 0.1), Plan("T2", 5, 3, True, False, (1, 2), 7, 9), torch.bfloat16,
        vocab=11, ranking=RankingOptions(top_k=2), final_dtype=torch.float16, prompt_tokens=(4, 5),
        grad_filter=0.25, shard=Shard("0", 1, 2, 3, 4),
    )  # fmt: skip
    assert decode(*encode(call)) == call


@pytest.mark.parametrize("backend", usable_backends())
def test_opcheck_logits_ops(backend):
    logits, targets = torch.randn(5, 17), torch.tensor([0, 16, -100, 3, 4])
    for entropy in (False, True):
        call = encoded(backend, entropy=entropy)
        torch.library.opcheck(ops.logps, (logits, targets, *call), test_utils=FULL)
    _, lse, value = ops.logps(logits, targets, *call)
    for extra in ((None, None), (value, torch.randn(5))):
        args = (logits, lse, targets, torch.randn(5), *extra, *call)
        torch.library.opcheck(ops.logits_grad, args, test_utils=FULL)
        torch.library.opcheck(ops.logits_grad_, args, test_utils=FULL)


@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("rows", [True, False], ids=["compact", "dense"])
@pytest.mark.parametrize("retained", ["all", "some"])
@pytest.mark.parametrize("tau", [None, 0.3], ids=["exact", "filtered"])
def test_opcheck_head_ops(backend, rows, retained, tau):
    hidden, weight, bias, layout, _ = head_inputs(rows=rows)
    n = layout.num_tokens
    kept = n if retained == "all" else 4
    plan = Plan("T3", 5 if kept < n else n, kept, need_hidden=True, need_weight=True)
    call = encoded(backend, plan, vocab=weight.shape[0], grad_filter=tau)
    inputs = (hidden, weight, bias, layout.rows, layout.targets)
    # Dense buffers have tails that nobody writes or reads: not to be compared value by value.
    args, tests = (*inputs, *call), FULL if rows else FULL[:2]
    torch.library.opcheck(ops.head_forward, args, test_utils=tests)
    values, *saved = ops.head_forward(*args)
    args = (torch.randn_like(values[0]), None, *inputs, saved, [True, True, True], *call)
    torch.library.opcheck(ops.head_backward, args, test_utils=FULL)


@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("tau", [None, 0.3], ids=["exact", "filtered"])
def test_opcheck_ranking_and_linear_pro(backend, tau):
    hidden, weight, bias, layout, rewards = head_inputs()
    order, rank = layout.sequences, torch.zeros(2, dtype=torch.int64)
    ranked = (order, rewards.sort(1, descending=True).values, rank, torch.full((2,), 0.5))
    candidates = (layout.offsets, layout.lengths, *ranked)
    call = encoded(backend, ranking=RankingOptions())
    args = (-torch.rand(layout.num_tokens), *candidates, *call)
    torch.library.opcheck(ops.ranking, args, test_utils=FULL)
    call = encoded(
        backend,
        Plan("T2", 99, need_hidden=True, need_weight=True, prompt_chunks=(1, 1)),
        vocab=weight.shape[0],
        ranking=RankingOptions(),
        prompt_tokens=layout.prompt_tokens,
        grad_filter=tau,
    )
    args = (hidden, weight, bias, layout.rows, layout.targets, candidates, True, *call)
    torch.library.opcheck(ops.linear_pro, args, test_utils=FULL)


def test_scaled_never_rounds_the_scalar():
    x, by = torch.randn(1000).bfloat16(), torch.tensor(1 / 3)
    call = encoded("torch")
    torch.library.opcheck(ops.scaled, (x, by, *call), test_utils=FULL)
    assert torch.equal(ops.scaled(x, by, *call), (x.float() * by).bfloat16())
    half = torch.tensor(1.0, dtype=torch.float16)
    tiny = torch.full((3,), 1e-12)
    # Nor is x rounded to the scalar's dtype.
    assert torch.equal(ops.scaled(tiny, half, *call), tiny)


def loss_padded(h, w, t, r):
    return pk.linear_pro_loss(h, w, t, r).loss


def loss_layout(h, w, t, r):
    return pk.linear_pro_loss(h, w, None, r, layout=t).loss


def loss_small_budget(h, w, t, r):
    return pk.linear_pro_loss(h, w, t, r, budget=1).loss


def loss_logits(h, w, t, r):
    return pk.pro_loss(h @ w.t(), t, r).loss


def loss_tokens(h, w, t, r):
    steps = torch.arange(t.shape[-1], device=t.device)
    return (pk.linear_token_logps(h, w, t) * steps).sum()


def test_the_chunked_tier_compiles_too(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(planner, "MIN_T2_ROWS", 1)
    monkeypatch.setattr(planner, "MIN_ROWS", 1)
    h, w, _, t, r = Case("compile", masked=0.3).tensors()
    h, w = h.float().requires_grad_(), w.float().requires_grad_()

    def loss(h, w, t, r):
        return pk.linear_pro_loss(h, w, t, r, budget=13200, final_dtype=torch.bfloat16).loss

    graph = []

    def spy(gm, inputs):
        parts = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
        graph.append("".join(str(part.graph) for part in parts))
        return gm.forward

    torch.compile(loss, fullgraph=True, backend=spy)(h, w, t, r)
    assert "linear_pro" in graph[0]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(h, w, t, r)
    exact = pk.linear_pro_loss(h, w, t, r).loss
    for a, b in zip(
        torch.autograd.grad(compiled, (h, w)), torch.autograd.grad(exact, (h, w)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function", [loss_padded, loss_layout, loss_small_budget, loss_logits, loss_tokens]
)
def test_compiles_in_one_graph_on_first_call(function):
    torch._dynamo.reset()
    h, w, _, t, r = Case("compile", masked=0.3).tensors()
    h, w = h.float().requires_grad_(), w.float().requires_grad_()
    if function is loss_layout:
        t = pk.Layout.from_padded(t)
    eager = function(h, w, t, r)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(h, w, t, r)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(compiled, (h, w)), torch.autograd.grad(eager, (h, w)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [None, True])
def test_options_and_sizes_may_change_between_compiled_calls(dynamic):
    torch._dynamo.reset()
    h, w, _, t, r = Case("compile", masked=0.3).tensors()

    def losses(h, t, r, scale, softcap):
        first = pk.linear_pro_loss(h, w, t, r, reward_scale=scale, softcap=softcap)
        lengths = (t >= 0).sum(-1)
        return (
            first.loss
            + pk.losses.get_loss("pro")(
                first.logps, lengths, rewards=r, mask=lengths > 0, reward_scale=scale
            )[0]
        )

    compiled = torch.compile(losses, fullgraph=True, backend="eager", dynamic=dynamic)
    for scale, softcap in ((1.0, 30.0), (0.5, 20.0), (0.3, 5.0)):
        torch.testing.assert_close(
            compiled(h, t, r, scale, softcap), losses(h, t, r, scale, softcap), rtol=1e-6, atol=0
        )
        h, t = h[:, :, 1:], t[:, :, 1:]


def test_compiles_with_inductor():
    torch._dynamo.reset()
    h, w, _, t, r = Case("inductor").tensors()
    h, w = h.float().requires_grad_(), w.float().requires_grad_()
    eager = loss_padded(h, w, t, r)
    compiled = torch.compile(loss_padded, fullgraph=True)(h, w, t, r)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    a, b = (torch.autograd.grad(x, h)[0] for x in (compiled, eager))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_import_is_light():
    """Neither Triton nor transformers nor a kernel library loads with the package."""
    import subprocess
    import sys

    heavy = "('triton', 'transformers', 'torch._dynamo')"
    code = f"import pro_kernels, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout


def test_a_second_derivative_is_refused():
    h = torch.randn(1, 2, 3, 4, requires_grad=True)
    w = torch.randn(5, 4)
    loss = pk.linear_pro_loss(h, w, torch.zeros(1, 2, 3, dtype=torch.long), None).loss
    for upstream in (None, torch.ones((), requires_grad=True)):
        with pytest.raises(RuntimeError, match="first order only"):
            torch.autograd.grad(loss, h, upstream, create_graph=True)


class _Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the ops of this package that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pro_kernels":
            self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


class _OwnTensor(torch.Tensor):
    pass


HEAD_OPS = {"head_forward", "ranking", "head_backward"}


def _step(hidden_kind=torch.Tensor):
    hidden, weight, _, targets, rewards = Case("direct", B=2, n=3, T=4).tensors()
    hidden = hidden.as_subclass(hidden_kind).requires_grad_()
    loss = pk.linear_pro_loss(hidden, weight.requires_grad_(), targets, rewards).loss
    loss.backward()
    return loss.detach(), hidden.grad


def test_bodies_run_directly_only_where_nobody_watches(monkeypatch):
    called = set()

    def noted(name, body):
        return lambda *args: called.add(name) or body(*args)

    for op, body in registry.BODIES.items():
        name = op._schema.name.split("::")[1]
        monkeypatch.setitem(registry.BODIES, op, noted(name, body))
    expected = _step()
    assert called == HEAD_OPS
    called.clear()
    with _Seen() as seen:
        found = _step()
    assert seen.names == HEAD_OPS
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.profiler.profile() as profile:
        _step()
    assert {f"pro_kernels::{name}" for name in HEAD_OPS} <= {e.name for e in profile.events()}
    _step(_OwnTensor)
    assert not called
    with torch.device("cpu"):  # a function mode; PyTorch calls ``backward`` outside of it
        _step()
    assert called <= {"head_backward"}
