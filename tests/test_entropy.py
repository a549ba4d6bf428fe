"""Entropy as an output with its gradient: every backend's kernel, every tier, both entrances."""

from __future__ import annotations

import shutil

import pytest
import torch

import pro_kernels as pk
from cases import (
    CPU,
    DTYPES,
    IDS,
    Case,
    assert_no_worse,
    cpu_isas,
    fp32_sums,
    transformed,
    usable_backends,
)
from pro_kernels import backends
from pro_kernels.api import linear_token_stats
from pro_kernels.fused import call as call_module
from pro_kernels.fused import matmul, ops
from pro_kernels.fused.planner import Plan, make_plan
from pro_kernels.options import LogitOptions

PLAIN, SCALED, CAPPED = LogitOptions(), LogitOptions(None, 0.3), LogitOptions(5.0, 0.5)
OPTIONS = {"plain": PLAIN, "scaled": SCALED, "capped": CAPPED}
KERNELS = [x for x in usable_backends() if x != "cpu"]
KERNELS += [f"cpu {isa}" for isa in cpu_isas()]
KERNELS += ["cuda emulation"] if shutil.which("g++") else []
reference = backends.get("torch")


@pytest.fixture(params=KERNELS)
def module(request):
    """The functions of a backend, of an instruction set; the CUDA ones run by emulation."""
    name, _, isa = request.param.partition(" ")
    if request.param == "cuda emulation":
        from cuda_emulation import calls as emulated

        yield emulated
        return
    backend = backends.get(name)
    if isa:
        backend.set_isa(isa)
    yield backend
    if isa:
        backend.set_isa(None)


def rows_of_logits(v: int, dtype: torch.dtype, scale: float = 4.0):
    g = torch.Generator().manual_seed(v)
    logits = (torch.randn(6, v, generator=g) * scale).to(dtype)
    targets = torch.randint(0, v, (6,), generator=g)
    targets[0], targets[1], targets[3] = 0, v - 1, -100
    weights, by = torch.randn(2, 6, generator=g)
    return logits, targets, weights, by


def check_gradient(got, logits, targets, weights, by, options, exact=None) -> None:
    """Against fp64, column by column: a few roundings of each probability and of log p."""
    x, w, e = (t.double() for t in (logits, weights, by))
    exact64 = None if exact is None else exact.double()
    same = {"target_logits": exact64, "options": options}
    _, lse, entropy = reference.logp(x, targets, entropy=True, **same)
    want = reference.logits_grad(x, lse, targets, w, entropy=(entropy, e), **same)
    raw = reference._put_target(x, targets.clamp_min(0)[:, None], targets >= 0, exact64)
    z, slope = transformed(raw, options)
    log_p = z - lse[:, None]
    steps = torch.where(z.isfinite(), z.abs() + lse.abs()[:, None], 0.0) + 20
    terms = w.abs()[:, None] + e.abs()[:, None] * (
        1 + log_p.abs().clamp_max(110) + entropy[:, None]
    )
    relative = steps * 2.0**-24 + (0 if logits.dtype == torch.float32 else 4e-6)
    allowed = relative * torch.exp(log_p) * terms * slope
    hit = torch.arange(x.shape[1])[None] == targets[:, None]
    allowed += hit * 8 * 2.0**-24 * w.abs()[:, None]
    info = torch.finfo(logits.dtype)
    allowed += info.eps * want.abs() + 2 * info.smallest_normal * info.eps + 2.0**-126
    error = (got.double() - want).abs()
    i = (error - allowed).argmax()
    assert (error <= allowed).all(), f"{error.flatten()[i]:.3e} > {allowed.flatten()[i]:.3e}"
    assert not got[targets < 0].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("v", [1, 7, 33, 1009, 4099])
def test_kernels_against_fp64(module, v, dtype, options):
    logits, targets, weights, by = rows_of_logits(v, dtype)
    _, lse, entropy = module.logp(logits, targets, options=options, entropy=True)
    got = module.logits_grad(logits, lse, targets, weights, options=options, entropy=(entropy, by))
    check_gradient(got, logits, targets, weights, by, options)


@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_with_the_exact_logit_of_the_target(module, dtype, options):
    logits, targets, weights, by = rows_of_logits(301, dtype)
    exact = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0].float() + 0.01
    same = {"target_logits": exact, "options": options}
    _, lse, entropy = module.logp(logits, targets, entropy=True, **same)
    got = module.logits_grad(logits, lse, targets, weights, entropy=(entropy, by), **same)
    check_gradient(got, logits, targets, weights, by, options, exact)


def test_the_formula_is_what_autograd_derives():
    logits, targets, weights, by = rows_of_logits(33, torch.float64)
    for options in OPTIONS.values():
        x = logits.clone().requires_grad_()
        logp, entropy = pk.reference.token_logps(
            x, targets, softcap=options.softcap, logit_scale=options.logit_scale,
            return_entropy=True,
        )  # fmt: skip
        (logp * weights + entropy * by).sum().backward()
        _, lse, value = reference.logp(logits, targets, options=options, entropy=True)
        torch.testing.assert_close(value, entropy.detach(), rtol=1e-12, atol=1e-12)
        got = reference.logits_grad(
            logits, lse, targets, weights.double(), options=options, entropy=(value, by.double())
        )
        torch.testing.assert_close(got, x.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_large_logits_and_masked_columns(module, scale, dtype):
    logits, targets, weights, by = rows_of_logits(65, dtype, scale)
    logits[:, 5:40] = -torch.inf
    targets = torch.where((targets >= 5) & (targets < 40), 41, targets)
    _, lse, entropy = module.logp(logits, targets, options=PLAIN, entropy=True)
    got = module.logits_grad(logits, lse, targets, weights, options=PLAIN, entropy=(entropy, by))
    assert entropy.isfinite().all() and got.isfinite().all() and not got[:, 5:40].any()
    x = logits.double()
    _, lse64, entropy64 = reference.logp(x, targets, options=PLAIN, entropy=True)
    want = reference.logits_grad(
        x, lse64, targets, weights.double(), options=PLAIN, entropy=(entropy64, by.double())
    )
    finite = logits.float().masked_fill(logits.isinf(), 0).abs().amax(1, keepdim=True)
    allowed = 3e-6 * (1 + finite) * (1 + by.abs())[:, None] + torch.finfo(dtype).eps * want.abs()
    assert ((got - want).abs() <= allowed).all()


@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_blocks_of_columns_in_place_and_odd_strides_change_no_bit(module, options):
    logits, targets, weights, by = rows_of_logits(301, torch.bfloat16)
    exact = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0].float() + 0.01
    _, lse, entropy = module.logp(
        logits, targets, target_logits=exact, options=options, entropy=True
    )
    same = {"options": options, "entropy": (entropy, by), "target_logits": exact}
    whole = module.logits_grad(logits, lse, targets, weights, **same)
    parts = [
        module.logits_grad(
            logits[:, a:b].contiguous(), lse, targets, weights, first_column=a, **same
        )
        for a, b in ((0, 100), (100, 217), (217, 301))
    ]
    assert torch.equal(torch.cat(parts, 1), whole)
    wide = torch.zeros(6, 305, dtype=torch.bfloat16)
    view = wide[:, 3:304]
    view.copy_(logits)
    module.logits_grad(view, lse, targets, weights, out=view, **same)
    assert torch.equal(view, whole) and not wide[:, :3].any()
    wide.zero_()
    module.logits_grad(logits, lse, targets, weights, out=view, **same)  # of another alignment
    assert torch.equal(view, whole) and not wide[:, :3].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_a_bad_row_harms_no_other_and_unscored_ones_are_not_read(module, options, bad):
    logits, targets, weights, by = rows_of_logits(301, torch.float32)
    results = []
    for poisoned in (False, True):
        x, w, e = logits.clone(), weights.clone(), by.clone()
        if poisoned:
            x[2, 100], x[4], x[3] = bad, bad, torch.nan  # row 3 is not scored
            w[3] = e[3] = torch.nan
        _, lse, entropy = module.logp(x, targets, options=options, entropy=True)
        lse, entropy = lse.clone(), entropy.clone()
        if poisoned:
            lse[3] = entropy[3] = torch.nan
        got = module.logits_grad(x, lse, targets, w, options=options, entropy=(entropy, e))
        results.append(got.clone())
    for row in (0, 1, 3, 5):
        assert torch.equal(results[0][row], results[1][row])
    if options is PLAIN and bad != -torch.inf:  # +inf is a finite softcap's largest logit
        assert results[1][2].isnan().any() and results[1][4].isnan().any()


# ---- from hidden states


@pytest.fixture
def force_tier(monkeypatch):
    """T3: in chunks of five rows, the first four kept."""

    def force(tier: str) -> None:
        def forced(rows, *args, **kwargs):
            chosen = make_plan(rows, *args, **kwargs)
            if tier == "T1" or chosen.tier == "T0":
                return chosen
            needs = {"need_hidden": chosen.need_hidden, "need_weight": chosen.need_weight}
            return Plan("T3", 5, retained=min(4, rows), **needs)

        monkeypatch.setattr(call_module, "make_plan", forced)

    return force


def run(function, case: Case, dtype, kind, upstream, freeze=(), **options):
    """Log-probs, entropies and the gradients of a case; inputs of dtype, run in ``kind``."""
    hidden, weight, bias, targets, _ = case.tensors()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {
        k: v.to(dtype).to(kind).requires_grad_(k not in freeze)
        for k, v in leaves.items()
        if v is not None
    }
    logps, entropy = function(
        leaves["hidden"], leaves["weight"], targets, bias=leaves.get("bias"), return_entropy=True,
        **case.options, **options,
    )  # fmt: skip
    outputs = (logps, entropy)
    terms = [(u * x).sum() for u, x in zip(upstream, outputs, strict=True) if u is not None]
    sum(terms).backward()
    return [x.detach() for x in outputs], {k: v.grad for k, v in leaves.items() if k not in freeze}


CASES = [
    Case("plain", T=9),
    Case("nothing masked", masked=0.0),
    Case("all masked", masked=1.0),
    Case("single tokens", T=1, n=4, masked=0.2),
    Case("bias", T=9, bias=True),
    Case("bias, softcap", T=9, bias=True, options={"softcap": 5.0, "logit_scale": 0.5}),
    Case("logits of 50", T=9, scale=25.0),
    Case("one column", V=1),
    Case("odd vocabulary", V=1009, T=4),
]


def compare(case: Case, dtype, upstream, freeze=(), **options) -> None:
    exact = run(pk.reference.linear_token_logps, case, dtype, torch.float64, upstream, freeze)
    plain = run(pk.reference.linear_token_logps, case, dtype, dtype, upstream, freeze)
    ours = run(pk.linear_token_logps, case, dtype, dtype, upstream, freeze, **options)
    for i, name in enumerate(("log-probs", "entropies")):
        values = (r[0][i] for r in (ours, plain, exact))
        assert_no_worse(*values, dtype, name, norm=False)
    known = rounding_of_lse(case, upstream[1])
    for name in exact[1]:
        values = (r[1][name] for r in (ours, plain, exact))
        assert_no_worse(*values, dtype, f"gradient of {name}", norm=True, known=known.get(name, 0))


def rounding_of_lse(case: Case, upstream) -> dict[str, float]:
    """Largest norm of what each entropy's gradient gains when its log-sum-exp is rounded to fp32.

    ``log p = z - lse`` then is up to 2^-24 |lse| off, which plain PyTorch's ``(z - max) - log s``
    is not.
    """
    if case.options:
        return {}
    hidden, weight, bias, targets, _ = case.tensors()
    z = torch.nn.functional.linear(hidden, weight, bias)
    off = upstream.abs() * z.logsumexp(-1).abs() * 2.0**-24
    dz = z.softmax(-1) * torch.where(targets < 0, 0.0, off)[..., None]
    h, dz = hidden.flatten(0, -2), dz.flatten(0, -2)
    return {"hidden": (dz @ weight).norm().item(), "weight": (dz.t() @ h.abs()).norm().item()}


def upstreams(case: Case):
    g = torch.Generator().manual_seed(9)
    return torch.randn(2, case.B, case.n, case.T, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_every_backend(case, backend, dtype, poison):
    compare(case, dtype, upstreams(case), backend=backend)


@pytest.mark.parametrize("freeze", [(), ("weight", "bias"), ("hidden",)], ids=str)
@pytest.mark.parametrize("tier", ["T1", "T3"])
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_every_tier(case, tier, freeze, force_tier, poison):
    force_tier(tier)
    compare(case, torch.bfloat16, upstreams(case), freeze)
    compare(case, torch.float32, (None, upstreams(case)[1]), freeze)


@pytest.mark.parametrize("tier", ["T1", "T3"])
def test_a_gpus_matmuls(tier, force_tier, monkeypatch):
    fp32_sums(monkeypatch)
    force_tier(tier)
    case = Case("sums", T=9, H=48, V=333, bias=True)
    compare(case, torch.bfloat16, upstreams(case))
    compare(case, torch.bfloat16, upstreams(case), logits_dtype=torch.float32)


@pytest.mark.parametrize("tier", ["T1", "T3"])
def test_log_probs_are_those_without_entropy(tier, force_tier):
    force_tier(tier)
    case = Case("same", T=9, bias=True)
    hidden, weight, bias, targets, _ = case.tensors()
    tensors = [x.float().requires_grad_() for x in (hidden, weight, bias)]
    alone = pk.linear_token_logps(tensors[0], tensors[1], targets, bias=tensors[2])
    both, _ = pk.linear_token_logps(
        tensors[0], tensors[1], targets, bias=tensors[2], return_entropy=True
    )
    assert torch.equal(alone, both)
    up = torch.randn_like(alone)
    for a, b in zip(torch.autograd.grad(alone, tensors, up), torch.autograd.grad(both, tensors, up),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tier", ["T1", "T3"])
def test_fp64(tier, force_tier):
    force_tier(tier)
    hidden, weight, bias, targets, _ = Case("fp64", V=17, T=4, bias=True).tensors()
    tensors = [x.requires_grad_() for x in (hidden, weight, bias)]

    def stats(h, w, b):
        return pk.linear_token_logps(h, w, targets, bias=b, softcap=3.0, return_entropy=True)

    assert torch.autograd.gradcheck(stats, tensors, fast_mode=True)


@pytest.mark.parametrize("tier", ["T1", "T3"])
@pytest.mark.parametrize("size", [2.0**-20, 2.0**14])
def test_fp16_keeps_small_and_large_upstream_gradients(tier, size, force_tier):
    """A mean over many tokens must not vanish in an fp16 dZ, nor a scaled loss overflow it."""
    force_tier(tier)
    hidden, weight, _, targets, _ = Case("range", T=9, V=1009).tensors()
    tensors = [x.half().float().requires_grad_() for x in (hidden, weight)]
    up = size * upstreams(Case("range", T=9)).float()
    grads = []
    for function in (pk.linear_token_logps, pk.reference.linear_token_logps):
        with torch.autocast("cpu", torch.float16, enabled=not grads):
            logps, entropy = function(*tensors, targets, return_entropy=True)
        grads.append(torch.autograd.grad((logps * up[0] + entropy * up[1]).sum(), tensors))
    for ours, exact in zip(*grads, strict=True):
        assert (ours - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("tier", ["T1", "T3"])
def test_under_activation_checkpointing(tier, force_tier):
    force_tier(tier)
    hidden, weight, _, targets, _ = Case("checkpoint", T=9).tensors()
    tensors = [x.float().requires_grad_() for x in (hidden, weight)]

    def loss(h, w):
        logps, entropy = pk.linear_token_logps(h, w, targets, return_entropy=True)
        return (logps * entropy).sum()

    again = torch.utils.checkpoint.checkpoint(loss, *tensors, use_reentrant=False)
    values = [torch.autograd.grad(x, tensors) for x in (again, loss(*tensors))]
    assert all(map(torch.equal, *values))


@pytest.mark.parametrize("tier", ["T1", "T3"])
def test_a_second_backward_gives_the_same(tier, force_tier):
    force_tier(tier)
    hidden, weight, _, targets, _ = Case("twice", T=9).tensors()
    tensors = [x.float().requires_grad_() for x in (hidden, weight)]
    logps, entropy = pk.linear_token_logps(*tensors, targets, return_entropy=True)
    loss = (logps * entropy).sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, tensors)))


def test_no_matmul_more(monkeypatch):
    rows = {"logits_into": 0, "hidden_grad": 0, "weight_grad": 0}
    for name in rows:
        function = getattr(matmul, name)

        def counted(first, *args, name=name, function=function, **kwargs):
            rows[name] += first.shape[0]
            return function(first, *args, **kwargs)

        monkeypatch.setattr(matmul, name, counted)
    case = Case("matmuls", T=9)
    run(pk.linear_token_logps, case, torch.bfloat16, torch.bfloat16, upstreams(case))
    scored = int((case.tensors()[3] >= 0).sum())
    assert rows == dict.fromkeys(rows, scored)


def test_a_budget_is_kept_and_decides_how_much_is_computed_again():
    shape = (4096, (32000, 64, torch.bfloat16), CPU)
    needs = {"need_hidden": True, "need_weight": True, "entropy": True}
    large = make_plan(*shape, **needs, budget=1 << 30)
    assert (large.tier, large.retained) == ("T1", 4096)
    small = make_plan(*shape, **needs, budget=200 << 20)
    assert small.tier == "T3" and small.chunk >= 512 and 0 < small.retained < 4096
    assert 2 * 32000 * (small.retained + small.chunk) <= 200 << 20
    assert make_plan(*shape, need_hidden=False, need_weight=False, entropy=True).tier == "T0"


@pytest.mark.parametrize("tier", ["T1", "T3"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=[*IDS, "fp64"])
def test_what_policy_gradient_trainers_log(dtype, tier, force_tier):
    force_tier(tier)
    hidden, weight, bias, targets, _ = Case("extra", T=9, V=61, bias=True).tensors()
    tensors = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    stats = linear_token_stats(
        tensors[0], tensors[1], targets, bias=tensors[2], softcap=4.0, logit_scale=0.5, extra=True
    )
    z = torch.nn.functional.linear(*(x.double() for x in tensors)) * 0.5
    z = 4.0 * torch.tanh(z / 4.0)
    log_p, scored = z.log_softmax(-1), targets >= 0
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    expected = {
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
    }
    for name, value in expected.items():
        got = getattr(stats, name)
        want = torch.where(scored, value, 0.0).to(got.dtype)
        torch.testing.assert_close(got.detach(), want.detach(), **tolerance)
    clear = z.topk(2, -1).values.diff(dim=-1).abs()[..., 0] > 0.1  # no tie after rounding
    want = (z.argmax(-1) == targets) & scored
    assert stats.is_top1.dtype == torch.bool and stats.is_top1[clear].equal(want[clear])


def test_no_grad():
    hidden, weight, _, targets, _ = Case("none", T=9).tensors()
    with torch.no_grad():
        logps, entropy = pk.linear_token_logps(
            hidden.float(), weight.float(), targets, return_entropy=True
        )
    want = pk.reference.linear_token_logps(hidden, weight, targets, return_entropy=True)
    torch.testing.assert_close(logps, want[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, want[1].float(), rtol=1e-5, atol=1e-5)


def test_what_excludes_each_other():
    hidden, weight, _, targets, _ = Case("no").tensors()
    for extra in ({"grad_filter": 0.1}, {"return_dropped": True}):
        with pytest.raises(ValueError, match="return_entropy=True needs grad_filter=None"):
            pk.linear_token_logps(hidden, weight, targets, return_entropy=True, **extra)


# ---- from logits, compiled, as ops


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("upstream", [(1, 1), (1, 0), (0, 1)], ids=["both", "log-probs", "entropy"])
def test_from_logits(upstream, dtype, backend, inplace, poison):
    logits, targets, weights, by = rows_of_logits(301, dtype)
    results = []
    for function, kind, extra in (
        (pk.token_logps, dtype, {"backend": backend, "inplace_backward": inplace}),
        (pk.reference.token_logps, dtype, {}),
        (pk.reference.token_logps, torch.float64, {}),
    ):
        leaf = logits.to(kind, copy=True).requires_grad_()
        logps, entropy = function(leaf * 1, targets, return_entropy=True, **extra)
        terms = [logps * weights, entropy * by]
        sum(x.sum() for x, used in zip(terms, upstream, strict=True) if used).backward()
        results.append((logps.detach(), entropy.detach(), leaf.grad))
    for i, name in enumerate(("log-probs", "entropies", "gradient of logits")):
        assert_no_worse(*(r[i] for r in results), dtype, name, norm=i == 2)


@pytest.mark.parametrize("entrance", ["hidden", "logits"])
@pytest.mark.parametrize(
    "used", [slice(2), slice(1), slice(1, 2)], ids=["both", "logps", "entropy"]
)
def test_compiled_whole(used, entrance):
    hidden, weight, _, targets, _ = Case("compiled", T=9).tensors()

    def loss(h, w):
        if entrance == "hidden":
            both = pk.linear_token_logps(h, w, targets, return_entropy=True)
        else:
            both = pk.token_logps(h @ w.t(), targets, return_entropy=True)
        return sum(x.sin().sum() for x in both[used])

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        tensors = [x.float().requires_grad_() for x in (hidden, weight)]
        grads.append(torch.autograd.grad(function(*tensors), tensors))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", usable_backends())
@pytest.mark.parametrize("retained", [0, 4, 40])
def test_opcheck(backend, retained):
    full = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    hidden, weight, bias, targets, _ = Case("ops", bias=True).tensors()
    layout = pk.Layout.from_padded(targets)
    tensors = (hidden.reshape(-1, 16).float(), weight.float(), bias.float())
    inputs = (*tensors, layout.rows, layout.targets)
    kept = min(retained, layout.num_tokens)
    plan = Plan("T3", 5, kept, need_hidden=True, need_weight=True)
    for extra in (False, True):
        call = call_module.Call(
            backend, LogitOptions(), plan, vocab=weight.shape[0], entropy=True, extra=extra
        )
        encoded = call_module.encode(call)
        torch.library.opcheck(ops.head_forward, (*inputs, *encoded), test_utils=full)
    values, *saved = ops.head_forward(*inputs, *encoded)
    for by in (None, torch.randn_like(values[0])):
        args = (values[0].clone(), by, *inputs, saved, [True, True, True], *encoded)
        torch.library.opcheck(ops.head_backward, args, test_utils=full)
