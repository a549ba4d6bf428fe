"""The registered ops: schema, fakes, autograd registration, and whole-graph compilation."""

from __future__ import annotations

import pytest
import torch

import pro_kernels as pk
from cases import Case, same_compiled
from pro_kernels.fused import ops, planner, registry
from pro_kernels.fused.call import Call, decode, encode
from pro_kernels.fused.planner import Plan
from pro_kernels.fused.shards import Shard
from pro_kernels.options import LogitOptions, RankingOptions
from subjects import every_subject, subjects

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


def check(op, args, tests=FULL):
    torch.library.opcheck(op, args, test_utils=tests)


def encoded(backend: str, plan: Plan | None = None, **facts):
    return encode(Call(backend, LogitOptions(), plan or Plan("T0", 1), **facts))


def test_a_call_survives_encoding():
    call = Call(
        "cpu", LogitOptions(30.0, 0.1), Plan("T2", 5, 3, True, False, (1, 2), 7, 9), torch.bfloat16,
        vocab=11, ranking=RankingOptions(top_k=2), final_dtype=torch.float16, prompt_tokens=(4, 5),
        grad_filter=0.25, shard=Shard("0", 1, 2, 3, 4),
    )  # fmt: skip
    assert decode(*encode(call)) == call


@every_subject(every_way=False)
def test_opcheck_logits_ops(subject):
    logits, targets = torch.randn(5, 17), torch.tensor([0, 16, -100, 3, 4])
    scale = torch.rand(5)
    of_both = ("logps", "entropy")
    for outputs, by in ((("logps",), None), (of_both, scale), (of_both, None)):
        call = encoded(subject.name, outputs=outputs)
        check(ops.logps, (logits, targets, by, *call))
    _, lse, value = ops.logps(logits, targets, None, *call)
    for extra in ((None, None, None), (value, torch.randn(5), scale)):
        args = (logits, lse, targets, torch.randn(5), *extra, *call)
        check(ops.logits_grad, args)
        check(ops.logits_grad_, args)


OUTPUTS = "logps", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "top_logps", "top_ids"
# Compact or dense rows; how many are kept; what else the call asks for.
HEADS = {
    "compact, all kept": (True, 99, {}),
    "dense, some kept": (False, 4, {}),
    "dense, all kept, filtered": (False, 99, {"grad_filter": 0.3}),
    "compact, some kept, filtered": (True, 4, {"grad_filter": 0.3}),
    "entropy, none kept": (True, 0, {"outputs": ("logps", "entropy")}),
    "all, some kept": (True, 4, {"outputs": OUTPUTS}),
    "all, all kept": (True, 99, {"outputs": OUTPUTS}),
    "log-sum-exp, all kept": (False, 99, {"outputs": ("logps", "lse")}),
}
# The kernels differ by backend, not the ops: all heads on one of them, a few on the others.
OF_EACH = ["dense, some kept", "compact, some kept, filtered", "all, some kept"]


@pytest.mark.parametrize(
    ("subject", "head"),
    [
        pytest.param(x.values[0], head, id=f"{head}-{x.id}", marks=x.marks)
        for x in subjects(every_way=False)
        for head in (HEADS if x.values[0].name == "torch" else OF_EACH)
    ],
    indirect=["subject"],
)
def test_opcheck_head_ops(subject, head):
    rows, retained, facts = HEADS[head]
    hidden, weight, bias, layout, _ = head_inputs(rows=rows)
    n = layout.num_tokens
    kept = min(retained, n)
    plan = Plan("T3", 5 if kept < n else n, kept, need_hidden=True, need_weight=True)
    call = encoded(subject.name, plan, vocab=weight.shape[0], **facts)
    scale = None if layout.rows is None else torch.rand(len(hidden))
    inputs = (hidden, weight, bias, layout.rows, layout.targets, scale)
    # Dense buffers have tails that nobody writes or reads: not to be compared value by value.
    check(ops.head_forward, (*inputs, *call), FULL if rows else FULL[:2])
    values, *saved = ops.head_forward(*inputs, *call)
    up, wanted = torch.randn_like(values), facts.get("outputs", ())
    given = [up[i] if name in wanted else None for i, name in ((1, "entropy"), (-1, "lse"))]
    for more in {(None, None), tuple(given)}:
        args = (up[0], *more, *inputs, saved, [True, True, True], *call)
        check(ops.head_backward, args)


@every_subject(every_way=False)
def test_opcheck_ranking_and_linear_pro(subject):
    hidden, weight, bias, layout, rewards = head_inputs()
    order, rank = layout.sequences, torch.zeros(2, dtype=torch.int64)
    ranked = (order, rewards.sort(1, descending=True).values, rank, torch.full((2,), 0.5))
    candidates = (layout.offsets, layout.lengths, *ranked)
    call = encoded(subject.name, ranking=RankingOptions())
    check(ops.ranking, (-torch.rand(layout.num_tokens), *candidates, *call))
    plan = Plan("T2", 99, need_hidden=True, need_weight=True, prompt_chunks=(1, 1))
    facts = {"vocab": weight.shape[0], "prompt_tokens": layout.prompt_tokens}
    for tau, scale in ((None, None), (0.3, torch.rand(len(hidden)))):
        call = encoded(subject.name, plan, ranking=RankingOptions(), grad_filter=tau, **facts)
        rows = (layout.rows, layout.targets, scale)
        args = (hidden, weight, bias, *rows, candidates, True, *call)
        check(ops.linear_pro, args)


def test_scaled_never_rounds_the_scalar():
    x, by = torch.randn(1000).bfloat16(), torch.tensor(1 / 3)
    call = encoded("torch")
    check(ops.scaled, (x, by, *call))
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


def loss_in_chunks(h, w, t, r):
    return pk.linear_pro_loss(h, w, t, r, budget=13200, final_dtype=torch.bfloat16).loss


def loss_logits(h, w, t, r):
    return pk.pro_loss(h @ w.t(), t, r).loss


def loss_tokens(h, w, t, r):
    steps = torch.arange(t.shape[-1], device=t.device)
    return (pk.linear_token_logps(h, w, t) * steps).sum()


def compile_inputs():
    h, w, _, t, r = Case("compile", masked=0.3).tensors()
    return (h.float().requires_grad_(), w.float().requires_grad_()), t, r


@pytest.mark.parametrize(
    "function", [loss_padded, loss_layout, loss_small_budget, loss_logits, loss_tokens]
)
def test_compiles_in_one_graph_on_first_call(function):
    leaves, t, r = compile_inputs()
    same_compiled(function, leaves, pk.Layout.from_padded(t) if function is loss_layout else t, r)


def test_the_chunked_tier_compiles_too(monkeypatch):
    monkeypatch.setattr(planner, "MIN_T2_ROWS", 1)
    monkeypatch.setattr(planner, "MIN_ROWS", 1)
    graph = []

    def spy(gm, inputs):
        parts = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
        graph.append("".join(str(part.graph) for part in parts))
        return gm.forward

    torch._dynamo.reset()
    leaves, t, r = compile_inputs()
    torch.compile(loss_in_chunks, fullgraph=True, backend=spy)(*leaves, t, r)
    assert "linear_pro" in graph[0]
    same_compiled(loss_in_chunks, leaves, t, r)


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
    same_compiled(loss_padded, *compile_inputs(), backend="inductor")


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
