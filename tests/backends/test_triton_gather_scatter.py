"""The Triton kernels of the thin sides and the score kernel under the interpreter, against fp64."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
pytest.importorskip("triton")

import pro_kernels as pk  # noqa: E402
from cases import Case  # noqa: E402
from pro_kernels import backends  # noqa: E402
from pro_kernels.options import LogitOptions  # noqa: E402

triton_backend = backends.get("triton")
reference = backends.get("torch")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
U = 2.0**-24
STORE = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # subnormal results

pytestmark = [
    pytest.mark.skipif(
        triton_backend.unusable(DEVICE) is not None, reason=str(triton_backend.unusable(DEVICE))
    ),
    pytest.mark.usefixtures("poison"),
]
every_dtype = pytest.mark.parametrize("dtype", triton_backend.DTYPES, ids=str)
OPTIONS = [LogitOptions(), LogitOptions(logit_scale=-0.5), LogitOptions(2.0, 0.25)]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def make_head(rows: int, hidden: int, vocab: int, dtype: torch.dtype, bias: bool = True):
    """x, weight, bias and targets: both ends of the vocabulary, one row not scored."""
    x, weight = randn(rows, hidden, dtype=dtype), randn(vocab, hidden, dtype=dtype)
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    targets[0], targets[-1] = 0, vocab - 1
    if rows > 2:
        targets[1] = -100
    return x, weight, randn(vocab, dtype=dtype) if bias else None, targets


def logits_of(x, weight, bias):
    raw = x.double() @ weight.double().t()
    return raw if bias is None else raw + bias.double()


def dot_bound(x, weight):
    """Of one fp32 dot product over H, elementwise: a chain of at most H roundings, a bias's."""
    return U * (x.shape[1] + 2) * (x.double().abs() @ weight.double().abs().t() + 8)


@every_dtype
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("hidden", [1, 33, 1500])
def test_gather_against_fp64(hidden, weighted, dtype):
    source = randn(7, hidden + 3, dtype=dtype)[:, 2:-1]  # an odd stride and start
    rows = torch.tensor([6, 0, 0, 3], device=DEVICE)
    weights = randn(4) if weighted else None
    want = source.double()[rows] * (weights.double()[:, None] if weighted else 1.0)
    for out in (dtype, torch.float32):
        got = triton_backend.gather_rows(source, rows, weights, out)
        assert got.dtype == out and got.shape == (4, hidden)
        assert ((got - want).abs() <= (STORE[out] + 4 * U) * want.abs() + TINY[out]).all()
    if not weighted:
        assert torch.equal(triton_backend.gather_rows(source, rows, None, dtype), source[rows])


@every_dtype
@pytest.mark.parametrize("hidden", [1, 33, 1500])
@pytest.mark.parametrize("shared", [True, False])
def test_scatter_against_fp64(shared, hidden, dtype):
    rows = [5, 2, 5, 0, 5, 2, 8] if shared else [5, 2, 7, 0, 1, 3, 8]
    rows = torch.tensor(rows, device=DEVICE)
    side, weights = randn(7, hidden + 1, dtype=dtype)[:, 1:], randn(7)
    out = torch.zeros(9, hidden + 5, dtype=dtype, device=DEVICE)
    triton_backend.scatter_rows(side, weights, rows, out[:, 3:-2], shared)
    terms = side.double() * weights.double()[:, None]
    want = torch.zeros(9, hidden, dtype=torch.float64, device=DEVICE).index_add(0, rows, terms)
    size = torch.zeros_like(want).index_add(0, rows, terms.abs())
    bound = STORE[dtype] * want.abs() + 4 * U * size + TINY[dtype]
    assert ((out[:, 3:-2] - want).abs() <= bound).all()
    assert (out[:, :3] == 0).all() and (out[:, -2:] == 0).all()


def test_shared_rows_add_up_in_the_order_given_and_over_calls():
    """1e8 + 1 - 1e8 is 0 in this order, 1 in another; NaN stays in its row."""
    side = torch.tensor([1e8, 3.0, 1.0, -1e8, torch.nan, 2.0], device=DEVICE)[:, None]
    rows = torch.tensor([1, 0, 1, 1, 3, 0], device=DEVICE)
    out = torch.zeros(4, 1, device=DEVICE)
    triton_backend.scatter_rows(side, torch.ones(6, device=DEVICE), rows, out, True)
    assert out[:3, 0].tolist() == [5.0, 0.0, 0.0] and out[3].isnan().all()
    triton_backend.scatter_rows(side[:2], torch.ones(2, device=DEVICE), rows[:2], out, True)
    assert out[:3, 0].tolist() == [8.0, 1e8, 0.0]


def test_scatter_refuses_an_out_that_it_cannot_write_in_place():
    out = torch.zeros(3, 4, device=DEVICE).t()
    with pytest.raises(ValueError, match=r"out must have unit stride along H .*\(4, 3\)"):
        triton_backend.scatter_rows(
            randn(2, 3), randn(2), torch.tensor([0, 1], device=DEVICE), out, False
        )


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [1, 33, 1500])
def test_target_logits_against_fp64(hidden, bias, dtype):
    x, weight, bias, targets = make_head(6, hidden, 11, dtype, bias)
    weight = torch.cat([weight, weight], 1)[:, :hidden]  # a stride of its own
    got = triton_backend.target_logits(x, weight, bias, targets)
    live = targets >= 0
    at = targets.clamp_min(0)[:, None]
    want = logits_of(x, weight, bias).gather(1, at)[:, 0]
    assert got.dtype == torch.float32 and (got[~live] == 0).all()
    # Chains of H / 1024 terms, then a tree: far fewer roundings than H.
    bound = U * 16 * ((x.double().abs() @ weight.double().abs().t()).gather(1, at)[:, 0] + 8)
    assert ((got - want).abs() <= bound)[live].all()
    targets[0] = 11
    got = triton_backend.target_logits(x, weight, bias, targets)
    assert got[0].isnan() and got[1:].isfinite().all()


@every_dtype
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scale", "softcap"])
@pytest.mark.parametrize("shape", [(1, 5, 1), (5, 40, 37), (131, 70, 300), (9, 32, 16)], ids=str)
def test_score_against_fp64(shape, options, dtype):
    x, weight, bias, targets = make_head(*shape, dtype)
    raw = logits_of(x, weight, bias)
    want = reference.logp(raw, targets, options=options)
    # A logit's error moves lse by no more than the largest of them.
    bound = abs(options.logit_scale) * dot_bound(x, weight).amax(1)
    exact = triton_backend.target_logits(x, weight, bias, targets)
    found = triton_backend.score(x, weight, bias, targets, target_logits=exact, options=options)
    for got, truth in zip(found, want[:2], strict=True):
        assert got.dtype == torch.float32
        assert ((got - truth).abs() <= 2 * bound + U * (24 + 4 * truth.abs())).all()
        assert (got[targets < 0] == 0).all()
    assert (found[0] <= 0).all()
    again = triton_backend.score(x, weight, bias, targets, target_logits=None, options=options)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@every_dtype
def test_score_is_no_worse_than_plain_pytorch(dtype):
    x, weight, _, targets = make_head(40, 64, 500, dtype, bias=False)
    raw = logits_of(x, weight, None)
    truth = reference.logp(raw, targets, options=LogitOptions())
    plain = torch.log_softmax(x @ weight.t(), 1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    got, _ = triton_backend.score(x, weight, None, targets, options=LogitOptions())
    live = targets >= 0
    errors = [(value - truth[0])[live].abs() for value in (got, plain)]
    assert errors[0].max() <= errors[1].max() + 16 * U * truth[0].abs().max()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, inside the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_of_a_score_stays_alone(value):
    x, weight, bias, targets = make_head(70, 24, 90, torch.float32)
    clean = triton_backend.score(x, weight, bias, targets, options=LogitOptions())
    x[5], x[1] = value, torch.nan  # row 1 is not scored
    found = triton_backend.score(x, weight, bias, targets, options=LogitOptions())
    others = torch.arange(70, device=DEVICE) != 5
    for got, want in zip(found, clean, strict=True):
        assert torch.equal(got[others], want[others]) and not got[5].isfinite()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_score_of_masked_columns():
    x, weight, _, targets = make_head(6, 16, 200, torch.float32)
    bias = torch.zeros(200, device=DEVICE)
    bias[10:190] = -torch.inf  # whole tiles of columns are -inf
    targets[2] = 20
    found = triton_backend.score(x, weight, bias, targets, options=LogitOptions())
    want = reference.logp(logits_of(x, weight, bias), targets, options=LogitOptions())
    assert found[0][2] == -torch.inf
    for got, truth in zip(found, want[:2], strict=True):
        assert ((got == truth) | ((got - truth).abs() <= 64 * U * (1 + truth.abs()))).all()
    bias[:] = -torch.inf
    _, lse = triton_backend.score(x, weight, bias, targets, options=LogitOptions())
    assert (lse[targets >= 0] == -torch.inf).all()


def test_a_score_does_not_depend_on_the_other_rows_or_on_strides():
    x, weight, bias, targets = make_head(70, 24, 90, torch.float32)
    padded = torch.full((90, 31), torch.nan, device=DEVICE)
    padded[:, 3:27] = weight
    run = [
        triton_backend.score(x[:n], w, bias, targets[:n], options=LogitOptions())
        for n, w in ((70, weight), (65, weight), (70, padded[:, 3:27]))
    ]
    for whole, few, strided in zip(*run, strict=True):
        assert torch.equal(whole[:65], few) and torch.equal(whole, strided)


def test_nothing_to_do():
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    source, weight = randn(3, 4), randn(5, 4)
    assert triton_backend.gather_rows(source, none, None, torch.float32).shape == (0, 4)
    assert triton_backend.target_logits(source[:0], weight, None, none).shape == (0,)
    for out in triton_backend.score(source[:0], weight, None, none, options=LogitOptions()):
        assert out.shape == (0,) and out.dtype == torch.float32
    out = torch.ones(2, 4, device=DEVICE)
    triton_backend.scatter_rows(source[:0], randn(0), none, out, True)
    assert (out == 1).all()


def test_the_crossover_is_measured_or_forced(monkeypatch):
    from pro_kernels.backends.triton import configs

    shape = (4096, 1024, 32000, torch.bfloat16, DEVICE)
    monkeypatch.delenv("PRO_KERNELS_SCORE", raising=False)
    monkeypatch.setattr(configs, "SCORE_UP_TO_HIDDEN", {})
    assert not triton_backend.scores_fused(*shape)
    family = configs.target_of(DEVICE.type, DEVICE.index).family
    monkeypatch.setattr(configs, "SCORE_UP_TO_HIDDEN", {(family, 2): 1024})
    assert triton_backend.scores_fused(*shape)
    assert not triton_backend.scores_fused(4096, 1025, 32000, torch.bfloat16, DEVICE)
    for choice, fused in (("matmul", False), ("fused", True), ("auto", True)):
        monkeypatch.setenv("PRO_KERNELS_SCORE", choice)
        assert triton_backend.scores_fused(*shape) is fused
    monkeypatch.setenv("PRO_KERNELS_SCORE", "yes")
    with pytest.raises(ValueError, match="PRO_KERNELS_SCORE must be one of fused, .*'yes'"):
        triton_backend.scores_fused(*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("budget", [None, 1])
def test_scoring_through_the_public_function(dtype, budget, monkeypatch):
    """Where asked for, calls without gradients take ``score``; those with gradients never do."""
    case = Case("score", B=2, n=2, T=9, H=32, V=75, bias=True)
    hidden, weight, bias, targets, _ = case.tensors()
    exact = pk.reference.linear_token_logps(
        *(x.to(dtype).double() for x in (hidden, weight)), targets, bias=bias.to(dtype).double()
    )
    inputs = [x.to(dtype) for x in (hidden, weight)]
    calls = []
    own = triton_backend.score
    monkeypatch.setattr(
        triton_backend, "score", lambda *a, **k: calls.append(len(a[0])) or own(*a, **k)
    )
    monkeypatch.setenv("PRO_KERNELS_SCORE", "fused")
    options = {"bias": bias.to(dtype), "backend": "triton", "budget": budget}
    got = pk.linear_token_logps(*inputs, targets, **options)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-5)
    assert sum(calls) == (targets >= 0).sum()
    calls.clear()
    monkeypatch.setenv("PRO_KERNELS_SCORE", "auto")  # nothing is measured yet
    pk.linear_token_logps(*inputs, targets, **options)
    monkeypatch.setenv("PRO_KERNELS_SCORE", "fused")
    inputs[1].requires_grad_()
    pk.linear_token_logps(*inputs, targets, **options)
    assert not calls
