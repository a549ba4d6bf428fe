"""Rows of logits, on every backend: ``logp``, ``residual_`` and ``logits_grad`` (contract.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import (
    CAPPED,
    EPS,
    OPTIONS,
    PLAIN,
    Rows,
    check,
    check_gradient,
    everything,
    reference,
    rows_of,
    with_exact,
)

from pro_kernels.backends import protocol
from pro_kernels.options import LogitOptions
from subjects import every_subject, every_subject_and_dtype

pytestmark = [
    pytest.mark.usefixtures("poison"),  # what is allocated with ``empty`` starts as NaN
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, inside Triton's interpreter
]
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
plain_and_capped = pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])


def equal(first, second) -> bool:
    """Bit by bit; NaN anywhere in one is to be NaN in the other."""
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(first, second, strict=True)
    )


@every_subject_and_dtype()
@every_option
def test_against_fp64(subject, dtype, options):
    """Widths about vectors of 4 to 32 numbers and blocks of 1024 and more; odd and even ones."""
    few, many = (1, 34, 1024, 2051), (1, 2, 7, 16, 33, 257, 1000, 1024, 4097, 4099, 32003)
    wide = () if options != PLAIN else (9000,) if subject.interpreted else (151_936,)
    for v in (*(few if subject.interpreted else many), *wide):
        rows = replace(rows_of(4, v, dtype), options=options)
        rows = rows if v % 2 else with_exact(rows, shift=1.0)
        found = check(subject, rows)
        if not subject.interpreted or v == 1:
            without = subject.logp(rows.given)
            assert without[2] is None and equal(without[:2], found[:2])


@every_subject_and_dtype(interpreted=(torch.bfloat16,))
def test_fewer_rows_than_processors_and_more(subject, dtype):
    """Some are not scored and a NaN row stays alone; bits do not depend on the number of rows."""
    on_gpu = subject.device == "cuda"
    processors = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 4
    for columns in (1000, 16_384, 50_257, 128_256) if on_gpu else (1000,):
        for share in (0.5, 5.3) if not subject.interpreted else (2.5,):
            rows = rows_of(int(share * processors), columns, dtype, masked=0.3)
            rows.targets[0], rows.targets[1] = -100, 3
            rows.logits[:2] = torch.nan
            found = everything(subject, rows)
            assert found[0][1].isnan() and found[7][1].isnan().any()
            for i in [0, *range(2, len(rows.logits), 64)]:  # fp64 rows a few at a time
                at = slice(i, i + 64 if i else 1)
                check(subject, rows[at], [x[at] for x in found])
            if columns % 16 == 0 or subject.name != "cuda":
                assert equal(everything(subject, rows[2:5]), [x[2:5] for x in found])


@every_subject_and_dtype(interpreted=(torch.float32,))
@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_large_logits_and_masked_columns(subject, dtype, scale):
    v = 1101 if subject.interpreted else 3001
    rows = rows_of(6, v, dtype, masked=0)
    rows.logits = ((torch.rand(6, v) * 2 - 1) * scale).to(dtype)
    rows.targets[:3] = rows.logits[:3].float().argmax(1)
    check(subject, rows)
    rows.logits[:, 5:1000] = -torch.inf  # also where some targets are
    rows.targets[3:] = torch.tensor([4, v - 1, 1000])
    check(subject, with_exact(rows))


@every_subject_and_dtype()
def test_masked_vocabulary(subject, dtype):
    """-inf columns, whole blocks of them and the first ones too, are probability 0."""
    v, first = (1200, 1100) if subject.interpreted else (9000, 8200)
    rows = rows_of(5, v, dtype, masked=0)
    rows.logits[:, :first] = -torch.inf
    rows.logits[1, ::2] = -torch.inf
    rows.logits[4, : v - 1] = -torch.inf  # nothing but the target
    rows.targets = torch.randint(first, v - 1, (5,)) | 1
    rows.targets[3], rows.targets[4] = 20, v - 1  # the first of them is itself masked
    for options in (PLAIN, LogitOptions(logit_scale=0.5)):
        found = check(subject, replace(rows, options=options))
        # The sum of one exponential is 1 up to its rounding.
        assert found[0][3] == -torch.inf and -1e-7 < found[0][4] <= 0 <= found[2][4] < 1e-7
        for gradient in found[5:]:
            assert gradient[:3].isfinite().all() and not gradient[:3, :first].any()


@every_subject_and_dtype(interpreted=(torch.float32,))
def test_rows_of_the_lowest_number(subject, dtype):
    """Masked with finfo.min instead of -inf: no overflow, and uniform where all are."""
    rows = rows_of(2, 300, dtype, masked=0)
    rows.logits[:] = torch.finfo(dtype).min
    rows.logits[1, 7] = 1.0
    rows.targets = torch.tensor([3, 7])
    logp, lse, entropy, *_, raw = everything(subject, rows)
    uniform = torch.tensor(300.0).log()
    torch.testing.assert_close(logp, torch.stack([-uniform, 0 * uniform]))
    torch.testing.assert_close(entropy, torch.stack([uniform, 0 * uniform]))
    assert lse[1] == 1.0 and not raw[1].any()
    torch.testing.assert_close(raw[0, 4:].float(), torch.full((296,), -1 / 300), rtol=5e-3, atol=0)


@every_subject_and_dtype(interpreted=(torch.float32,))
@plain_and_capped
def test_a_bad_row_harms_no_other(subject, dtype, options):
    """NaN, inf or -inf in one place or in all of a row; what is not scored is never read."""
    widths = {"cuda": (5000, 60_000), "triton": (500,)}.get(subject.name, (5000,))
    for v in widths:
        rows = replace(with_exact(rows_of(6, v, dtype, masked=0)), options=options)
        rows.targets = rows.targets.clamp(1, 300).index_fill(0, torch.tensor([0]), -100)
        clean = everything(subject, rows)
        for bad in (torch.nan, torch.inf, -torch.inf):
            dirty = replace(rows, logits=rows.logits.clone(), exact=rows.exact.clone())
            dirty.logits[2, 432] = dirty.logits[4] = dirty.exact[4] = bad
            for x in (dirty.logits, dirty.weights, dirty.by, dirty.exact):
                x[0] = torch.nan
            found = everything(subject, dirty)
            others = torch.tensor([0, 1, 3, 5])
            assert equal([x[others] for x in found], [x[others] for x in clean])
            want = everything(reference, replace(dirty, logits=dirty.logits.float()))
            for i, (got, like) in enumerate(zip(found, want, strict=True)):
                if i == 6:
                    continue  # which number it is there is not specified
                tolerance = {"rtol": 1e-4 if got.dtype == torch.float32 else 0.02, "atol": 1e-4}
                torch.testing.assert_close(got.float(), like, **tolerance, equal_nan=True)


@every_subject_and_dtype(interpreted=(torch.float32,))
@pytest.mark.parametrize("masked", [0.5, 1.0])
def test_unscored_rows_are_not_read(subject, dtype, masked):
    for n, v in ((40, 77), (8, 50_000)) if not subject.interpreted else ((8, 77),):
        rows = with_exact(rows_of(n, v, dtype, masked=masked))
        dead = rows.dead
        for x in (rows.logits, rows.weights, rows.by, rows.exact):
            x[dead] = torch.nan
        for out in everything(subject, rows):
            assert out.isfinite().all() and not out[dead].any()
            assert out.dim() == 1 or (out[~dead] != 0).any(1).all()


@every_subject_and_dtype(interpreted=(torch.float16,))
def test_alignment_strides_and_neighbours(subject, dtype):
    """Results are those of dense rows, and nothing beside the rows is written."""
    n = 5
    for v in (300,) if subject.interpreted else (5, 4999, 4992):
        rows = rows_of(n, v, dtype)
        whole = check(subject, rows)
        for offset, stride in ((1, v), (3, v + 1), (7, v + 64)):
            if subject.interpreted and offset == 3:
                continue
            buffer = torch.full((n * stride + offset,), torch.nan, dtype=dtype)
            view = buffer.as_strided((n, v), (stride, 1), offset)
            view.copy_(rows.logits)
            apart = replace(rows, logits=view)
            found = check(subject, apart)
            # CUDA splits a row's sums by its address.
            assert subject.name == "cuda" or equal(found, whole)
            at = (apart.given, whole[1], rows.weights)
            for shift in (offset, offset + 1):  # aligned like the logits, and not
                memory = torch.full((n * stride + shift,), torch.nan, dtype=dtype)
                out = memory.as_strided((n, v), (stride, 1), shift)
                got = subject.logits_grad(*at, out=out)
                assert got is out and equal([out], [whole[5]])
                assert memory.isnan().sum() == len(memory) - n * v
            subject.residual_(apart.given)
            assert subject.name == "cuda" or equal([view], [whole[7]])
            assert buffer.isnan().sum() == len(buffer) - n * v
        if subject.name != "cuda" or v == 4992:
            for some in (slice(3, 4), torch.tensor([4, 1])):
                assert equal(everything(subject, rows[some]), [x[some] for x in whole])


@every_subject_and_dtype(interpreted=(torch.bfloat16,))
def test_any_strides_are_taken(subject, dtype):
    """What cannot be written in place is refused."""
    rows = rows_of(6, 70, dtype)
    x, want = rows.logits, everything(subject, rows)
    turned, numbers = x.t().contiguous().t(), torch.stack([rows.weights] * 2, 1).flatten()[::2]
    for logits in (turned, torch.stack([x, x], 1).flatten(0, 1)[::2], torch.cat([x, x], 1)[:, :70]):
        given = rows.given._replace(logits=logits)
        got = subject.logp(given._replace(targets=rows.targets.int()), entropy=True)
        for a, b in zip(got, want, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        grad = subject.logits_grad(given, want[1], numbers)
        check_gradient(subject, grad, rows, want[1], rows.weights)
    if subject.name != "torch":  # which takes them
        with pytest.raises(ValueError, match=r"logits .*unit stride.*\(1, 6\)"):
            subject.residual_(rows.given._replace(logits=turned))
        with pytest.raises(ValueError, match="out .*unit stride"):
            subject.logits_grad(rows.given, want[1], None, out=turned)


@every_subject_and_dtype(interpreted=(torch.float32,))
@every_option
def test_blocks_of_columns_and_in_place(subject, dtype, options):
    v = 703 if subject.interpreted else 5003
    rows = replace(with_exact(rows_of(4, v, dtype)), options=options)
    _, lse, entropy = subject.logp(rows.given, entropy=True)
    for extra in ({}, {"entropy": (entropy, rows.by)}):
        at = lse, rows.weights
        whole = subject.logits_grad(rows.given, *at, **extra)
        parts = []
        for a, b in ((0, 1), (1, 350), (350, v)):
            some = rows.given._replace(logits=rows.logits[:, a:b])
            parts.append(subject.logits_grad(some, *at, first_column=a, **extra))
        assert torch.equal(torch.cat(parts, 1), whole)
        own = rows.logits.clone()
        assert subject.logits_grad(rows.given._replace(logits=own), *at, out=own, **extra) is own
        assert torch.equal(own, whole)
    own = rows.logits.clone()  # the target's stored logit is read before it is overwritten
    stored = rows.given._replace(exact=None)
    whole = subject.logits_grad(stored, lse, None)
    assert torch.equal(subject.logits_grad(stored._replace(logits=own), lse, None, out=own), whole)


@every_subject()
def test_same_bits_on_any_number_of_threads_and_in_any_order(subject):
    shapes = {"cpu": [(37, 20_011)], "cuda": [(4, 999), (4, 32_003), (4, 128_256)]}
    for n, v in shapes.get(subject.name, [(5, 1500)]):
        rows = with_exact(rows_of(n, v, torch.bfloat16))
        found = []
        for repeat in subject.repeats:
            with repeat():
                found.append(everything(subject, rows))
        assert all(equal(found[0], other) for other in found[1:])


@every_subject()
def test_more_than_2_to_the_31_elements(subject):
    stride = 2**31 + 64
    torch.use_deterministic_algorithms(False)  # or 4 GiB would be filled
    try:
        buffer = torch.empty(stride + 1000, dtype=torch.bfloat16)  # two pages of it touched
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")
    logits = buffer.as_strided((2, 1000), (stride, 1))
    logits.copy_(torch.randn(2, 1000))
    rows = protocol.Rows(logits.clone(), torch.tensor([3, 999]), PLAIN)
    far, lse = rows._replace(logits=logits), torch.ones(2)
    for function in (subject.residual_, lambda x: [subject.logits_grad(x, lse, lse, out=x.logits)]):
        assert equal([*function(far), logits], [*function(rows), rows.logits])


@every_subject()
def test_no_rows_and_wild_targets(subject):
    for out in everything(subject, rows_of(5, 50, torch.float32)[:0]):
        assert out.shape in ((0,), (0, 50))
    if subject.name == "torch":
        return  # takes the last column
    # Beyond the vocabulary: loud, nothing is read there, and no target in its gradient.
    rows = rows_of(3, 50, torch.float32, masked=0)
    rows.targets[0] = 50
    for function in (subject.logp, subject.residual_):
        logp = function(rows.given._replace(logits=rows.logits.clone()))[0]
        assert logp[0].isnan() and logp[1:].isfinite().all()
    got = subject.logits_grad(rows.given, torch.ones(3), None)
    torch.testing.assert_close(got[0], -torch.exp(rows.logits[0] - 1))


@every_subject()
def test_a_target_near_certain(subject):
    """1 - p from expm1: an absolute error of a rounding of logp, at any p."""
    for gap, shift in ((1e-3, 0), (5.0, 0), (17.0, 0), (40.0, 0), (1e-3, 9.0)):
        rows = rows_of(1, 64, torch.float32, masked=0)
        rows.logits[:] = 0.0
        rows.targets[0] = 3
        rows.logits[0, 3] = gap
        rows.exact = torch.tensor([gap + shift]) if shift else None
        logp, *_, raw = everything(subject, rows)
        truth = reference.logp(rows.double().given)[0]
        assert (logp - truth).abs() <= EPS * (5 + 4 * truth.abs())
        assert (raw[0, 3] + torch.expm1(truth)).abs() <= EPS * 8
        if shift:  # 1 - p itself is small
            assert (raw[0, 3] + torch.expm1(logp.double())).abs() <= 4 * EPS * raw[0, 3]


@every_subject()
def test_a_wide_softcap_changes_little_and_loses_nothing(subject):
    """The cap is 1000 times the logits: a tanh with an absolute error of EPS would show."""
    rows = replace(rows_of(5, 200, torch.float32, scale=1.0), options=LogitOptions(softcap=1e3))
    truth = reference.logp(rows.double().given, entropy=True)
    for got, want in zip(everything(subject, rows), truth, strict=False):
        assert ((got - want).abs() <= EPS * (24 + 4 * want.abs())).all()


@every_subject()
def test_the_exact_logit_stands_in_everywhere(subject):
    """Far from the stored one, and inside the sum too: logp is 0 at most."""
    low, high = torch.full((2, 1, 4000), -60.0, dtype=torch.bfloat16)
    high[0, 17] = 300.7  # bf16 holds 300
    for logits, exact in ((low, 12.0), (high, 300.7)):
        rows = Rows(logits, torch.tensor([17]), *torch.ones(2, 1), torch.tensor([exact]))
        logp, lse, *_, raw = everything(subject, rows)
        assert -1e-7 < logp[0] <= 0 and raw.abs().max() < 1e-7
        torch.testing.assert_close(lse, rows.exact, rtol=2e-7, atol=0)
    rows.logits, rows.exact = torch.full((1, 9), -3.0, dtype=torch.bfloat16), torch.tensor([12.0])
    rows.targets[:] = 4
    check(subject, rows)


@every_subject_and_dtype(interpreted=(torch.bfloat16, torch.float16))
def test_stores_round_to_nearest_even(subject, dtype):
    """exp(0) is exactly 1, so a row of logits equal to lse stores -weight rounded."""
    n = 4 if subject.interpreted else 2000
    halfway = [1 + torch.arange(1, n, 2)[:1000] * 2.0**-k for k in (8, 11)]  # ties in 16 bits
    odd = torch.tensor([0.0, torch.nan, 65519.0, 65520.0, 3.38e38])
    payload = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    payload = payload[:1] if subject.interpreted else payload  # the interpreter overflows on it
    w = torch.cat([torch.randn(n), torch.randn(n) * 1e-6, *halfway, odd, payload])
    w = torch.cat([w, -w])
    zeros, beyond = torch.zeros(len(w), 70, dtype=dtype), torch.full((len(w),), 10**6)
    want = (-w).to(dtype)[:, None].expand(len(w), 70)
    got = subject.logits_grad(protocol.Rows(zeros, beyond, PLAIN), torch.zeros(len(w)), w)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
