"""The thin sides of the head's matmuls and the score, on every backend that has them, in fp64."""

from __future__ import annotations

import pytest
import torch
from contract import EPS, OPTIONS, PLAIN, U, reference
from test_contract_rows import equal

from cases import DTYPES, IDS
from pro_kernels.backends.protocol import Rows
from subjects import every_subject

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, inside Triton's interpreter
]
TINY = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # subnormal results
having = lambda name: every_subject(every_way=False, having=name)  # noqa: E731
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
every_width = pytest.mark.parametrize("width", [1, 33, 40, 2056])


def views(rows: int, width: int, dtype: torch.dtype):
    """One random matrix, at an aligned and at an odd address and stride, NaN around it."""
    values = torch.randn(rows, width).to(dtype)
    yield values
    buffer = torch.full((rows * (width + 1) + 3,), torch.nan, dtype=dtype)
    yield buffer.as_strided((rows, width), (width + 1, 1), 3).copy_(values)


def stored(got, want, size, dtype) -> bool:
    """Rounded once to ``dtype``, after fp32 sums of terms of ``size`` in all."""
    error = (got.double() - want).abs()
    return bool((error <= U[dtype] * want.abs() + 4 * EPS * size + TINY[dtype]).all())


@having("gather_rows")
@every_dtype
@every_width
def test_gather(subject, width, dtype):
    rows, weights = torch.tensor([4, 0, 0, 6]), torch.randn(8)[::2]
    for source in views(7, width, dtype):
        for out in DTYPES if width == 40 else {dtype, torch.float32}:
            for w in (weights, None):
                want = source.double()[rows] * (1.0 if w is None else w.double()[:, None])
                got = subject.gather_rows(source, rows, w, out)
                assert got.dtype == out and stored(got, want, want.abs(), out)
        assert torch.equal(subject.gather_rows(source, rows, None, dtype), source[rows])


@having("scatter_rows")
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "distinct"])
@every_dtype
@every_width
def test_scatter(subject, width, dtype, shared):
    """Each row is the sum of its tokens and, where shared, of what it held, rounded once."""
    rows = torch.tensor([5, 2, 5, 0, 5, 2, 8] if shared else [5, 2, 7, 0, 1, 3, 8])
    weights = torch.randn(7)
    for side in views(7, width, dtype):
        terms = side.double() * weights.double()[:, None]
        for out_dtype in DTYPES if width == 40 else [dtype]:
            memory = torch.full((9, width + 5), 7.0, dtype=out_dtype)
            out = memory[:, 3:-2]
            out.copy_(torch.randn(9, width) if shared else torch.zeros(9, width))
            held = out.double()
            want = held.index_add(0, rows, terms)
            size = held.abs().index_add(0, rows, terms.abs())
            subject.scatter_rows(side, weights, rows, out, shared)
            assert stored(out, want, size, out_dtype)
            assert (memory[:, :3] == 7).all() and (memory[:, -2:] == 7).all()


@having("scatter_rows")
def test_shared_rows_add_up_in_the_order_given_and_over_calls(subject):
    """1e8 + 1 - 1e8 is 0 in this order, 1 in another; NaN stays in its row."""
    side = torch.tensor([1e8, 3.0, 1.0, -1e8, torch.nan, 2.0])[:, None]
    rows, out = torch.tensor([1, 0, 1, 1, 3, 0]), torch.zeros(4, 1)
    subject.scatter_rows(side, torch.ones(6), rows, out, True)
    assert out[:3, 0].tolist() == [5.0, 0.0, 0.0] and out[3].isnan().all()
    subject.scatter_rows(side[:2], torch.ones(2), rows[:2], out, True)
    assert out[:3, 0].tolist() == [8.0, 1e8, 0.0]


@having("scatter_rows")
def test_strides_of_the_sides(subject):
    """What is read may have any; what is written in place may not."""
    source, rows = torch.randn(5, 24).bfloat16(), torch.tensor([4, 0, 4, 2])
    weights = torch.randn(8)[::2]
    want = weights[:, None] * source.float()[rows]
    for x in (source, source.t().contiguous().t(), source.double()):
        if x.dtype != torch.float64 or subject.name == "cuda":
            assert torch.equal(subject.gather_rows(x, rows, weights, torch.float32), want)
    out = torch.zeros(5, 24)
    subject.scatter_rows(want.t().contiguous().t(), weights, rows, out, shared=True)
    torch.testing.assert_close(
        out, torch.zeros_like(out).index_add(0, rows, weights[:, None] * want)
    )
    with pytest.raises(ValueError, match="out .*unit stride"):
        subject.scatter_rows(want, weights, rows, torch.zeros(24, 5).t(), False)


def head(rows: int, hidden: int, vocab: int, dtype: torch.dtype, bias: bool = True):
    """x, weight, bias and targets: both ends of the vocabulary, one row not scored."""
    x, weight = torch.randn(rows, hidden).to(dtype), torch.randn(vocab, hidden).to(dtype)
    targets = torch.randint(0, vocab, (rows,))
    targets[0], targets[-1] = 0, vocab - 1
    if rows > 2:
        targets[1] = -100
    return x, weight, torch.randn(vocab).to(dtype) if bias else None, targets


def logits_of(x, weight, bias):
    raw = x.double() @ weight.double().t()
    return raw if bias is None else raw + bias.double()


@having("target_logits")
@every_dtype
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("width", [1, 33, 4096])
def test_target_logits(subject, width, dtype, with_bias):
    x, weight, bias, targets = head(6, width, 11, dtype, with_bias)
    live, at = targets >= 0, targets.clamp_min(0)[:, None]
    want = logits_of(x, weight, bias).gather(1, at)[:, 0]
    size = (x.double().abs() @ weight.double().abs().t()).gather(1, at)[:, 0]
    for memory in views(11, width, dtype):
        memory.copy_(weight)
        got = subject.target_logits(x, memory, bias, targets)
        assert got.dtype == torch.float32 and (got[~live] == 0).all()
        # Short chains, then a tree: far fewer roundings than H.
        assert ((got - want).abs() <= EPS * ((13 + width / 256) * size + 8))[live].all()
    targets[0] = 11
    got = subject.target_logits(x, weight, bias, targets)
    assert got[0].isnan() and got[1:].isfinite().all()


@having("score")
@every_dtype
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_score(subject, options, dtype):
    shapes = [(1, 5, 1), (5, 40, 37), (9, 32, 16)]
    if options == PLAIN:
        shapes.insert(0, (131, 70, 300) if subject.interpreted else (513, 1024, 32_000))
    for shape in shapes:
        x, weight, bias, targets = head(*shape, dtype)
        want = reference.logp(Rows(logits_of(x, weight, bias), targets, options))
        # A logit's error moves lse by no more than the largest of them: chains of H roundings.
        size = x.double().abs() @ weight.double().abs().t() + 8
        bound = abs(options.logit_scale) * EPS * (shape[1] + 2) * size.amax(1)
        exact = subject.target_logits(x, weight, bias, targets)
        found = subject.score(x, weight, bias, targets, target_logits=exact, options=options)
        for got, truth in zip(found, want[:2], strict=True):
            assert got.dtype == torch.float32 and (got[targets < 0] == 0).all()
            assert ((got - truth).abs() <= 2 * bound + EPS * (24 + 4 * truth.abs())).all()
        assert (found[0] <= 0).all()
    again = subject.score(x, weight, bias, targets, target_logits=None, options=options)
    assert equal(found, again)


@having("score")
@every_dtype
def test_a_score_is_no_worse_than_plain_pytorch(subject, dtype):
    x, weight, _, targets = head(40, 64, 500, dtype, bias=False)
    truth = reference.logp(Rows(logits_of(x, weight, None), targets, PLAIN))[0]
    plain = torch.log_softmax(x @ weight.t(), 1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    got, _ = subject.score(x, weight, None, targets, options=PLAIN)
    errors = [(value - truth)[targets >= 0].abs() for value in (got, plain)]
    assert errors[0].max() <= errors[1].max() + 16 * EPS * truth.abs().max()


@having("score")
def test_a_score_depends_on_no_other_row_and_on_no_strides(subject):
    x, weight, bias, targets = head(70, 24, 90, torch.float32)
    padded = torch.full((90, 31), torch.nan)
    padded[:, 3:27] = weight
    clean, few, strided = (
        subject.score(x[:n], w, bias, targets[:n], options=PLAIN)
        for n, w in ((70, weight), (65, weight), (70, padded[:, 3:27]))
    )
    assert equal([y[:65] for y in clean], few) and equal(clean, strided)
    x[1] = torch.nan  # is not scored
    bad, targets[5:7] = [5, 6], 0
    x[bad] = torch.tensor([[torch.nan], [torch.inf]])
    others = (torch.arange(70) < 5) | (torch.arange(70) > 6)
    found = subject.score(x, weight, bias, targets, options=PLAIN)
    assert equal([y[others] for y in found], [y[others] for y in clean])
    assert not any(y[bad].isfinite().any() for y in found)


@having("score")
def test_a_score_of_masked_columns(subject):
    x, weight, bias, targets = head(6, 16, 200, torch.float32)
    bias[10:190] = -torch.inf  # whole tiles of columns are -inf
    targets[2] = 20
    found = subject.score(x, weight, bias, targets, options=PLAIN)
    want = reference.logp(Rows(logits_of(x, weight, bias), targets, PLAIN))
    assert found[0][2] == -torch.inf
    for got, truth in zip(found, want[:2], strict=True):
        assert ((got == truth) | ((got - truth).abs() <= 64 * EPS * (1 + truth.abs()))).all()
    bias[:] = -torch.inf
    _, lse = subject.score(x, weight, bias, targets, options=PLAIN)
    assert (lse[targets >= 0] == -torch.inf).all()


@having("gather_rows")
def test_nothing_to_do(subject):
    none = torch.zeros(0, dtype=torch.int64)
    source, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert subject.gather_rows(source, none, None, torch.float32).shape == (0, 4)
    assert subject.target_logits(source[:0], weight, None, none).shape == (0,)
    for out in (
        subject.score(source[:0], weight, None, none, options=PLAIN) if subject.score else ()
    ):
        assert out.shape == (0,) and out.dtype == torch.float32
    out = torch.ones(2, 4)
    subject.scatter_rows(source[:0], torch.randn(0), none, out, True)
    assert (out == 1).all()
