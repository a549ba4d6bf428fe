"""The registered ops: schema, fakes, autograd registration, and whole-graph compilation."""

from __future__ import annotations

import pytest
import torch

import pro_kernels as pk
from cases import Case, usable_backends
from pro_kernels import ops, planner

CONFIG = (None, 1.0)
RANKING = (True, 1.0, False, 0.0, 0.05, False, None, True)
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


@pytest.mark.parametrize("backend", usable_backends())
def test_opcheck_logits_ops(backend):
    logits, targets = torch.randn(5, 17), torch.tensor([0, 16, -100, 3, 4])
    for entropy in (False, True):
        args = (logits, targets, *CONFIG, backend, entropy)
        torch.library.opcheck(ops.logps, args, test_utils=FULL)
    _, lse, value = ops.logps(*args)
    for extra in ((None, None), (value, torch.randn(5))):
        args = (logits, lse, targets, torch.randn(5), *extra, *CONFIG, backend)
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
    config = (torch.float32, torch.float32, *CONFIG, backend, 5 if kept < n else n)
    args = (hidden, weight, bias, layout.rows, layout.targets, *config, kept, True, tau)
    # Dense buffers have tails that nobody writes or reads: not to be compared value by value.
    torch.library.opcheck(ops.head_logps, args, test_utils=FULL if rows else FULL[:2])
    logps, *saved = ops.head_logps(*args)
    args = (
        torch.randn_like(logps),
        hidden,
        weight,
        bias,
        layout.rows,
        layout.targets,
        *saved,
        tau,
        *config,
        weight.shape[0],
        torch.float32,
        False,
        True,
        True,
        True,
    )
    torch.library.opcheck(ops.head_backward, args, test_utils=FULL)


@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("tau", [None, 0.3], ids=["exact", "filtered"])
def test_opcheck_ranking_and_linear_pro(backend, tau):
    hidden, weight, bias, layout, rewards = head_inputs()
    order, rank = layout.sequences, torch.zeros(2, dtype=torch.int64)
    ranked = (order, rewards.sort(1, descending=True).values, rank, torch.full((2,), 0.5))
    logps = -torch.rand(layout.num_tokens)
    args = (logps, layout.offsets, layout.lengths, *ranked, *RANKING, backend)
    torch.library.opcheck(ops.ranking, args, test_utils=FULL)
    args = (hidden, weight, bias, layout.rows, layout.targets, layout.offsets, layout.lengths)
    args += (*ranked, list(layout.prompt_tokens), [1, 1], torch.float32, *CONFIG, *RANKING)
    torch.library.opcheck(ops.linear_pro, (*args, backend, False, True, True, tau), test_utils=FULL)


def test_scaled_never_rounds_the_scalar():
    x, by = torch.randn(1000).bfloat16(), torch.tensor(1 / 3)
    torch.library.opcheck(ops.scaled, (x, by), {"budget": 1}, test_utils=FULL)
    assert torch.equal(ops.scaled(x, by, budget=1), (x.float() * by).bfloat16())
    half = torch.tensor(1.0, dtype=torch.float16)
    tiny = torch.full((3,), 1e-12)
    # Nor is x rounded to the scalar's dtype.
    assert torch.equal(ops.scaled(tiny, half, budget=1), tiny)


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
    (grad,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.sum().backward()


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


HEAD_OPS = {"head_logps", "ranking", "head_backward"}


def _step(hidden_kind=torch.Tensor):
    hidden, weight, _, targets, rewards = Case("direct", B=2, n=3, T=4).tensors()
    hidden = hidden.as_subclass(hidden_kind).requires_grad_()
    loss = pk.linear_pro_loss(hidden, weight.requires_grad_(), targets, rewards).loss
    loss.backward()
    return loss.detach(), hidden.grad


def test_bodies_run_directly_only_where_nobody_watches(monkeypatch):
    called = set()
    direct = ops.direct

    def noted(op, *tensors):
        chosen = direct(op, *tensors)
        if chosen is not op:
            called.add(op._schema.name.split("::")[1])
        return chosen

    monkeypatch.setattr(ops, "direct", noted)
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
