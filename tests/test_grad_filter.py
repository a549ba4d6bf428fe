"""``grad_filter``: what leaves the gradients is bounded as promised, in every tier and dtype."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import pro_kernels as pk
from cases import fp32_sums, same_compiled, usable_backends
from pro_kernels import backends
from pro_kernels.backends import cpu
from pro_kernels.fused import column_groups, columns, matmul
from pro_kernels.fused.call import Call
from pro_kernels.fused.column_groups import Groups
from pro_kernels.fused.gather_scatter import Inputs
from pro_kernels.fused.planner import Plan, make_plan
from pro_kernels.options import LogitOptions
from subjects import isa, isas

B, N, T, H, V = 4, 3, 8, 16, 301
TAU = 0.03
# Tier -> budget that leads to it for these shapes in fp64.
BUDGETS = {"T1": None, "T2": 137_200, "T3": 1}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Several groups of rows in every chunk, the last of fewer."""
    monkeypatch.setitem(columns._ROWS, "cpu", 7)


def inputs(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, N, T, H, generator=g, dtype=torch.float64)
    weight = 2 * torch.randn(V, H, generator=g, dtype=torch.float64)
    weight[:, 0] -= 3  # what all columns share cancels in the exact gradient
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    targets = torch.randint(0, V, (B, N, T), generator=g)
    targets[torch.rand(B, N, T, generator=g) < 0.4] = -100
    rewards = torch.randn(B, N, generator=g)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return leaves, targets, rewards


def run(dtype=torch.float64, upstream=1.3, frozen="", **options):
    """``frozen``: initials of hidden, weight and bias."""
    (hidden, weight, bias), targets, rewards = inputs(dtype)
    hidden, weight, bias = (
        x.detach() if name in frozen else x
        for name, x in zip("hwb", (hidden, weight, bias), strict=True)
    )
    out = pk.linear_pro_loss(hidden, weight, targets, rewards, bias=bias, **options)
    (upstream * out.loss).backward()
    return out, [x.grad for x in (hidden, weight, bias)], hidden


def compare(dtype=torch.float64, tau=TAU, plain=None, **options):
    """Outputs and gradients without and with a filter, what each gradient lost, and what it may.

    ``plain``: options of the call without.
    """
    out, exact, _ = run(dtype, **options | (plain or {}))
    less, filtered, _ = run(dtype, grad_filter=tau, **options)
    told = less.grad_filter
    bounds = [1.3 * b.item() for b in told.error_bounds()]
    bounds.append((1.3 * told.row_weights.abs() * told.dropped_mass).sum().item())
    return out, less, exact, filtered, lost(filtered, exact), bounds


def lost(filtered, exact):
    return [
        None if a is None else (a.double() - b.double()).norm().item()
        for a, b in zip(filtered, exact, strict=True)
    ]


@pytest.fixture
def small_chunks(monkeypatch):
    """T2 takes prompts one by one instead of calling them too few for it."""
    monkeypatch.setattr("pro_kernels.fused.planner.MIN_T2_ROWS", 1)
    monkeypatch.setattr("pro_kernels.fused.planner.CHUNK_ROWS", 16)
    monkeypatch.setattr("pro_kernels.fused.planner.MIN_ROWS", 4)


FROZEN = {"frozen head": "wb", "weight, bias": "h", "weight": "hb", "bias": "hw"}


@pytest.mark.parametrize("tier", BUDGETS)
@pytest.mark.parametrize(
    "extra",
    [{}, {"softcap": 20.0}, {"logit_scale": -0.9}, *({"frozen": x} for x in FROZEN.values())],
    ids=["plain", "softcap", "negative", *FROZEN],
)
def test_errors_lie_within_the_bounds(small_chunks, monkeypatch, tier, extra):
    """Columns are chosen by dZ0 where the forward alone would do without it, too."""
    plans = []
    monkeypatch.setattr(
        "pro_kernels.fused.call.make_plan",
        lambda *a, **k: plans.append(make_plan(*a, **k)) or plans[-1],
    )
    frozen, plain = extra.get("frozen", ""), {"budget": BUDGETS[tier]}
    budget = plain["budget"]
    if tier == "T2" and not frozen:
        budget += 8 * V * H * 8 // 7  # what the filter takes itself
    out, less, exact, filtered, errors, bounds = compare(plain=plain, budget=budget, **extra)
    if not frozen:
        assert [p.tier for p in plans] == [tier, tier]
        assert torch.equal(out.loss, less.loss) and torch.equal(out.scores, less.scores)
    assert 0 < less.grad_filter.dropped_mass.mean() <= TAU
    for name, error, bound, whole in zip("hwb", errors, bounds, exact, strict=True):
        assert (error is None) == (name in frozen)
        assert error is None or 0 < error <= bound
        if name != "b" and not frozen:
            assert bound < 0.3 * whole.norm()  # a bound that says something


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [
        *({"backend": name} for name in usable_backends() if name != "triton"),
        *({"budget": b, "head_dtype": d} for b in (None, 1) for d in (None, "float32")),
    ],
    ids=str,
)
def test_lower_precision_adds_its_own_rounding_only(dtype, options):
    _, _, exact, _, errors, bounds = compare(dtype, **options)
    for error, bound, whole in zip(errors[:2], bounds, exact, strict=False):
        assert error <= bound + torch.finfo(dtype).eps / 2 * whole.double().norm()


def test_dropped_columns_get_no_gradient_and_targets_always_do():
    _, filtered, _ = run(grad_filter=0.5)
    _, targets, _ = inputs()
    zero = (filtered[1] == 0).all(1)
    assert V // 10 < zero.sum() < V
    assert not zero[targets[targets >= 0].unique()].any()


@pytest.mark.parametrize("tier", BUDGETS)
def test_nothing_negligible_is_the_plain_result(small_chunks, tier):
    _, less, exact, filtered, _, bounds = compare(tau=1e-15, budget=BUDGETS[tier])
    assert less.grad_filter.dropped_mass.max() == 0 and bounds == [0, 0, 0]
    torch.testing.assert_close(filtered, exact, rtol=1e-13, atol=1e-15)


def test_token_logps_tell_what_each_row_lost():
    (hidden, weight, _), targets, _ = inputs()
    upstream = torch.randn(targets.shape, dtype=torch.float64)
    grads = []
    for tau in (None, TAU):
        logps, dropped = pk.linear_token_logps(
            hidden, weight, targets, grad_filter=tau, return_dropped=True
        )
        grads.append(torch.autograd.grad((upstream * logps).sum(), [hidden, weight]))
    mass, of_weight, reach, share = dropped
    assert (share[targets >= 0] <= 1).all() and share[targets >= 0].mean() < 0.9
    assert mass.shape == targets.shape and 0 < mass[targets >= 0].mean() <= TAU
    assert (mass[targets < 0] == 0).all()
    error = (grads[1][0] - grads[0][0]).norm(dim=-1)
    assert (error <= upstream.abs() * reach).all()
    bound = (upstream * of_weight).norm()
    assert 0 < (grads[1][1] - grads[0][1]).norm() <= bound


def test_mass_is_spent_where_it_buys_most_columns():
    """A few rows need all columns; dropping none of theirs leaves the others' at no cost."""
    p = torch.full((21, 64), 1e-9)
    p[:, 0] = 1.0
    p[14:, 1:] = 0.004  # the last group
    found = columns.choose(column_groups, -p, torch.zeros(21).long(), 1e-4, torch.ones(64))
    assert found is not None
    groups, left = found
    assert groups.starts.diff().tolist() == [1, 1, 64]
    assert [rows.tolist() for rows, _ in groups][2] == list(range(14, 21))
    assert (left[:2, 1:] > 0).all() and (left[2] == 0).all() and (left[:, 0] == 0).all()
    # What is far from the centre does more harm: of equal masses it stays.
    p[:] = 1e-4
    far = torch.ones(64).index_fill_(0, torch.arange(32, 64), 9.0)
    groups, _ = columns.choose(column_groups, -p, torch.zeros(21).long(), 32.5e-4, far)
    assert groups.columns.tolist() == 3 * [0, *range(32, 64)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_keeps_every_column(bad):
    (hidden, weight, _), targets, _ = inputs()
    targets[0, 0, 0], targets[0, 0, 1] = 5, 7
    logps = []
    for tau in (None, TAU):
        h = hidden.detach().clone()
        h[0, 0, 0] = bad
        h.requires_grad_()
        logp = pk.linear_token_logps(h, weight, targets, grad_filter=tau)
        logp.sum().backward()
        logps.append((logp.detach(), h.grad[0, 0, 1]))
    torch.testing.assert_close(logps[0][0], logps[1][0], equal_nan=True)
    # It is in a group of its own or with rows that keep all columns with it; others lose a little.
    torch.testing.assert_close(logps[0][1], logps[1][1], rtol=0.1, atol=1e-3)
    assert (weight.grad.isnan().all() or bad != bad) and logps[1][1].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 8, 1), (1, 1, 1, 8, 2), (2, 2, 0, 8, 5)])
def test_tiny_and_empty(shape, poison):
    b, n, t, h, v = shape
    hidden = torch.randn(b, n, t, h, requires_grad=True)
    weight, bias = (torch.randn(size, requires_grad=True) for size in ((v, h), (v,)))
    targets = torch.zeros(b, n, t, dtype=torch.int64)
    rewards = torch.arange(b * n).view(b, n).float()
    out = pk.linear_pro_loss(hidden, weight, targets, rewards, bias=bias, grad_filter=0.1)
    out.loss.backward()
    assert weight.grad.isfinite().all() and bias.grad.isfinite().all()
    assert out.grad_filter.dropped_mass.shape == (b * n * t,)
    assert all(bound.isfinite() for bound in out.grad_filter.error_bounds())


def test_second_backward_and_repeatable(small_chunks):
    for budget in BUDGETS.values():
        (hidden, weight, bias), targets, rewards = inputs(torch.bfloat16)
        out = pk.linear_pro_loss(hidden, weight, targets, rewards, grad_filter=TAU, budget=budget)
        first = torch.autograd.grad(out.loss, [hidden, weight], retain_graph=True)
        second = torch.autograd.grad(out.loss, [hidden, weight])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_there_is_nothing_to_filter():
    (hidden, weight, _), targets, rewards = inputs()
    with torch.no_grad():
        assert pk.linear_pro_loss(hidden, weight, targets, rewards, grad_filter=TAU)[-1] is None
    assert pk.linear_pro_loss(hidden, weight, targets, rewards).grad_filter is None


@pytest.mark.parametrize("bad", [0, 1, -0.1, 1.5, float("nan"), True, "0.1", torch.tensor(0.1)])
def test_what_is_no_probability_between_0_and_1_is_refused(bad):
    (hidden, weight, _), targets, rewards = inputs()
    number = isinstance(bad, (int, float)) and not isinstance(bad, bool)
    said = r"must lie in \(0, 1\), got" if number else 'must be a number in .*, "auto" or None'
    with pytest.raises(ValueError if number else TypeError, match=f"grad_filter {said}"):
        pk.linear_pro_loss(hidden, weight, targets, rewards, grad_filter=bad)
    with pytest.raises(ValueError if number else TypeError, match="grad_filter"):
        pk.linear_token_logps(hidden, weight, targets, grad_filter=bad)


def test_compiles_in_one_graph():
    (hidden, weight, _), targets, rewards = inputs(torch.float32)

    def loss(hidden, weight):
        out = pk.linear_pro_loss(hidden, weight, targets, rewards, grad_filter=TAU)
        return out.loss, out.grad_filter.dropped_mass.max()

    same_compiled(loss, (hidden, weight))


def chosen(dz, weight, targets, tau, x=None):
    """``Kept`` of one chunk with dZ0, the stand-ins, and what left as a mask."""
    n, vocab = dz.shape
    call = Call(
        "torch", LogitOptions(), Plan("T1", n), weight.dtype, dz.dtype, weight.dtype, vocab,
    )  # fmt: skip
    kept = columns.Kept.empty(tau, 1, n, vocab, n, dz)
    kept.centre = columns.Centre.of(call, weight)
    x = torch.ones(n, weight.shape[1], dtype=weight.dtype) if x is None else x
    at = slice(0, n)
    given = Inputs(call, x, weight, None, torch.arange(n), targets)
    stand_ins = kept.choose(0, dz.clone(), x, given, at)
    assert stand_ins is not None
    gone = torch.ones(n, vocab, dtype=torch.bool)
    for rows, some in kept.of(0, at):
        gone[rows[:, None], some.long()] = False
    return kept, stand_ins, gone


def peaked(gap: float, dtype: torch.dtype):
    """(dZ0, targets) of rows whose target is ``gap`` and more above the rest."""
    logits = torch.randn(16, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.arange(16)
    logits[targets, targets] = gap
    dz = -logits.softmax(1)
    dz[targets, targets] = 0
    return dz.to(dtype), targets


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offset", [0, 30, 1000])
def test_what_all_of_the_head_shares_is_within_the_bound(dtype, offset):
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(512, 32, generator=g, dtype=torch.float64)
    weight = (weight + offset * torch.randn(32, generator=g, dtype=torch.float64)).to(dtype)
    dz, targets = peaked(9.0, dtype)
    kept, stand_ins, gone = chosen(dz, weight, targets, 0.1)
    assert gone.double().mean() > 0.5
    parts = column_groups.split(stand_ins, dtype).double().sum(1, keepdim=True)
    exact = torch.where(gone, dz.double(), 0.0) @ weight.double()
    error = (exact - parts * kept.centre.u.double()).norm(dim=1)
    assert (error <= kept.dropped[2]).all()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("gap", [20, 60, 75, 200])
def test_what_rows_lose_does_not_underflow(gap, dtype):
    dz, targets = peaked(gap, dtype)
    g = torch.Generator().manual_seed(4)
    weight, x = torch.randn(512, 8, generator=g), torch.randn(16, 8, generator=g)
    kept, _, gone = chosen(dz, weight.to(dtype), targets, 0.5, x.to(dtype))
    left = torch.where(gone, dz.double().abs(), 0.0)
    assert (kept.dropped[0] >= left.sum(1)).all()
    of_weight = (left.t() @ x.double().norm(dim=1)).norm()
    bound = kept.dropped[1].double().norm()
    assert bound >= of_weight
    if gap <= 60:  # above what fp32 holds, the bound says something
        assert bound <= 1.3 * of_weight + 1e-30


WAYS = {name: (partial(isa, name), cpu.filtered) for name in isas()}
if "triton" in usable_backends():
    own = backends.get("triton").filtered
    WAYS["triton"] = nullcontext, own


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES[1:] for b in DTYPES[1:]], ids=str)
@pytest.mark.parametrize(
    "shape", [(23, 301, 37, 7), (5, 40, 64, 8), (1, 9, 3, 7), (150, 700, 96, 72)]
)
def test_kernels_do_what_plain_pytorch_does(name, dtypes, shape):
    (rows, vocab, hidden, size), (entries, operands) = shape, dtypes
    g = torch.Generator().manual_seed(0)
    dz = torch.rand(rows, vocab + 5, generator=g).pow(8).neg().to(entries)[:, :vocab]
    weight = torch.randn(vocab, hidden, generator=g).to(operands)
    x, weights = torch.randn(rows, hidden, generator=g).to(operands), torch.rand(2, vocab)
    order = torch.randperm(rows, generator=g)
    kept = (
        torch.rand(-(-rows // size), vocab, generator=g)
        < torch.tensor([0.0, 0.3, 1.0])[torch.arange(-(-rows // size)) % 3, None]
    )
    starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    groups = Groups(order, size, starts, kept.nonzero()[:, 1].int())
    stand_ins = torch.randn(rows, generator=g)
    found = []
    context, own = WAYS[name]
    with context():
        for kernels in (column_groups, columns.Functions(own)):
            z = dz.clone()
            centre = kernels.row_sum(weight).div_(vocab).to(operands)
            lost = kernels.compact_(z, groups, weights)
            side = torch.empty(rows, hidden, dtype=torch.float32)
            kernels.hidden_grad(z, groups, weight, centre, stand_ins, side)
            grad = torch.ones(vocab, hidden)
            kernels.weight_grad(z, groups, x, grad, accumulate=True)
            narrow = torch.empty(vocab, hidden, dtype=operands)
            kernels.weight_grad(z[:, : groups.widest], groups, x, narrow, accumulate=False)
            front = [z[r, : c.shape[0]].float() for r, c in groups]
            found.append([
                centre, kernels.squared_distances(weight, centre), kernels.count_large(dz, 0.1),
                kernels.sums(dz, order, size), lost, *front, side, grad, narrow,
            ])  # fmt: skip
    eps = max(torch.finfo(x).eps for x in dtypes)
    torch.testing.assert_close(*reversed(found), rtol=8 * eps, atol=16 * eps * (1 + rows / 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16", "fp16"])
def test_auto_stays_within_the_rounding_of_the_dtype(dtype):
    """In wide dtypes it leaves nothing out."""
    g = torch.Generator().manual_seed(6)
    hidden = torch.randn(60, 32, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(2048, 32, generator=g).to(dtype).requires_grad_()
    targets = (2 * hidden.detach().float() @ weight.detach().float().t()).argmax(1)
    grads = []
    for tau in (None, "auto"):
        logps, dropped = pk.linear_token_logps(
            hidden, weight, targets, logit_scale=2.0, grad_filter=tau, return_dropped=True
        )
        grads.append(torch.autograd.grad(logps.sum(), [hidden, weight]))
    lost_weight, lost_hidden = dropped[1].norm(), dropped[2].norm()
    if dtype.itemsize > 2:
        assert not dropped.any() and all(map(torch.equal, *grads))
        return
    limit = torch.finfo(dtype).eps / 2
    assert 0.3 * limit < lost_hidden / grads[0][0].double().norm() <= limit
    assert 0 < lost_weight <= limit * grads[0][1].double().norm()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp64", "fp32"])
@pytest.mark.parametrize("size", [1.0, 1e-22], ids=["hidden", "tiny hidden"])
@pytest.mark.parametrize("gap", [20, 60, 80, 200])
def test_bounds_do_not_underflow(gap, size, dtype):
    """A bias makes one column certain: what the others lose is e^-gap, its square far less."""
    g = torch.Generator().manual_seed(3)
    hidden = (size * torch.randn(1, 2, 4, H, generator=g, dtype=torch.float64)).to(dtype)
    weight = (0.3 * torch.randn(V, H, generator=g, dtype=torch.float64)).to(dtype)
    bias = torch.zeros(V, dtype=dtype).index_fill_(0, torch.tensor(0), gap)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    targets = torch.zeros(1, 2, 4, dtype=torch.int64)
    grads = []
    for tau in (None, TAU):
        out = pk.linear_pro_loss(
            *leaves, targets, torch.tensor([[1.0, 0.0]]), bias=bias, grad_filter=tau
        )
        grads.append(torch.autograd.grad(out.loss, leaves))
    bounds = out.grad_filter.error_bounds()
    for bound, error, whole in zip(bounds, lost(*grads), grads[0], strict=True):
        held = torch.finfo(torch.float32).tiny  # what fp32 does not hold it does not tell
        assert error <= bound + 4 * torch.finfo(dtype).eps * whole.double().norm() + held
        true = 30 * math.exp(-gap) * V * (1 if whole is grads[0][0] else size)
        if gap <= 60 and true > 1e-30:
            assert 0 < bound <= true


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=["bf16", "fp16"])
@pytest.mark.parametrize("route", ["native", "fp32", "gpu"])
def test_what_the_head_shares_cancels_before_it_is_rounded_to_16_bits(route, dtype, monkeypatch):
    """Kept columns alone sum to dZ0 W of the size of the shared part: its rounding would show."""
    if route == "gpu":
        fp32_sums(monkeypatch)
    else:
        monkeypatch.setattr(matmul, "_upcasts", lambda *_: route == "fp32")
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 3, 8, H, generator=g).to(dtype).requires_grad_()
    weight = torch.full((V, H), 64.0)
    weight[:, 0] += torch.randint(0, 2, (V,), generator=g) / 2  # the rest is the same for all
    bias = -3 * torch.arange(1.0, V + 1).log()
    targets = torch.randint(0, V, (2, 3, 8), generator=g)
    upstream = torch.randn(targets.shape, generator=g)
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ weight.to(dtype).double().t() + bias.to(dtype).double()
    exact = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    (exact,) = torch.autograd.grad((upstream * exact).sum(), wide)
    logps, dropped = pk.linear_token_logps(
        *(hidden, weight.to(dtype), targets),
        **{"bias": bias.to(dtype), "head_dtype": "float32"},
        **{"grad_filter": 0.5, "return_dropped": True},
    )
    assert 0 < dropped[0].mean() <= 0.5 * 1.002
    (filtered,) = torch.autograd.grad((upstream * logps).sum(), hidden)
    error = (filtered.double() - exact).norm(dim=-1)
    rounding = 4 * torch.finfo(dtype).eps * exact.norm(dim=-1)
    assert (error <= upstream.abs() * dropped[2] + rounding).all()
    assert dropped[2].max() < 0.1 * weight.norm(dim=1).max()  # far less than the shared part


@pytest.mark.parametrize("scale", [1 / 16, -0.5, 4.0])
def test_tau_is_a_probability_whatever_the_scale(scale):
    (hidden, weight, _), targets, _ = inputs()
    weight = (weight / scale).detach().requires_grad_()
    logps, dropped = pk.linear_token_logps(
        hidden, weight, targets, logit_scale=scale, grad_filter=TAU, return_dropped=True
    )
    logps.sum().backward()
    mass = dropped[0][targets >= 0]
    assert 0.5 * TAU < mass.mean() <= TAU * 1.002
