"""The kernels of csrc/cuda, compiled for the host (tests/cuda_emulation), against fp64.

The kernel bodies and the launch code are the shipped ones. What emulation cannot show: the memory
model (what another thread sees without a barrier, cache and L2 behaviour), races between warps
inside one stretch between barriers beyond two orders of execution, how clusters are scheduled, the
PTX in csrc/cuda/device.cuh, the accuracy of the hardware's ex2 and reciprocal, register and
occupancy limits, speed. It does abort on misaligned vector accesses, on barriers that not all
threads reach, on writes past a block's shared memory, on reads of the shared memory of a finished
block, and it delivers asynchronous copies only when they are waited for.

Truth is ``backends/torch.py`` in fp64 on the same logits. Bounds count roundings of 2**-24.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import check_infinite_scores, check_sums_stand_for_tokens, transformed
from cuda_emulation import build, calls
from pro_kernels import backends
from pro_kernels.backends import native
from pro_kernels.options import LogitOptions, RankingOptions

try:
    build.library()
except build.NoCompiler as error:
    pytest.skip(str(error), allow_module_level=True)

from test_cpu import CAPPED, EPS, PLAIN, TINY, U, _batch, _exact  # noqa: E402
from test_cpu_ranking import OPTIONS as RANKING_OPTIONS  # noqa: E402
from test_cpu_ranking import _batch as _prompts  # noqa: E402

reference = backends.get("torch")
SCALED = LogitOptions(logit_scale=-0.35)
dtypes = pytest.mark.parametrize("dtype", calls.DTYPES, ids=["fp32", "bf16", "fp16"])
pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=[8, 9], ids=lambda major: f"sm_{major}0")
def major(request):
    """The compute capabilities that differ in how residual takes a row."""
    with calls.device(request.param):
        yield request.param


def _truth(logits, targets, options, exact=None):
    exact = None if exact is None else exact.double()
    return reference.logp(
        logits.double(), targets, target_logits=exact, options=options, entropy=True
    )


def _z_size(logits, targets, options, exact):
    """How large the transformed logits are: what costs EPS of it wherever z is rounded."""
    raw = logits.double()
    exact = None if exact is None else exact.double()
    raw = reference._put_target(raw, targets.clamp_min(0)[:, None], targets >= 0, exact)
    z, _ = transformed(raw, options)
    return torch.where(z.isfinite(), z.abs(), 0.0).amax(1)


def _check_stats(got, logits, targets, options, exact=None):
    want = _truth(logits, targets, options, exact)
    size = _z_size(logits, targets, options, exact)
    rounded_z = 0 if options is PLAIN else 8 * EPS * size
    for name, a, b in zip(("logp", "lse", "entropy"), got, want, strict=False):
        if a is None:
            continue
        assert a.dtype == torch.float32
        bound = EPS * (10 + 3 * b.abs()) + rounded_z
        if name == "entropy":  # a difference of two means of the size of log V
            bound = bound * (2 + 2 * size.clamp_max(20))
        error = (a.double() - b).abs()
        assert (error <= bound).all(), f"{name}: {error.max():.2e}, bound {bound.min():.2e}"
    assert (got[0] <= 0).all()
    return want


def _check_gradient(got, logits, lse, targets, weights, options, exact=None, first=0):
    """``lse``: what the kernel was given, or the true one."""
    exact64 = None if exact is None else exact.double()
    w64 = None if weights is None else weights.double()
    x = logits.double()
    want = reference.logits_grad(
        x, lse.double(), targets, w64, target_logits=exact64, first_column=first, options=options
    )
    z, slope = transformed(x, options)
    distance = (z - lse.double()[:, None]).abs().clamp_max(120)
    # The exponent is rounded twice (the difference, times log2 e); the sum carries a few EPS.
    relative = EPS * (14 + 2.5 * distance)
    if options is not PLAIN:
        relative = relative + EPS * (8 + 8 * z.abs())
    size = 1.0 if weights is None else w64.abs()[:, None]
    scale = abs(options.logit_scale)
    hit = torch.arange(x.shape[1])[None] + first == targets[:, None]
    log_p_error = torch.full((len(x), 1), 12 * EPS, dtype=torch.float64)
    if options is not PLAIN:
        inside = (targets - first).clamp(0, x.shape[1] - 1)
        log_p_error += 4 * EPS * _z_size(logits, inside, options, None)[:, None]
    bound = (relative + U[logits.dtype]) * want.abs() + hit * log_p_error * size * scale
    bound = bound + 2 * TINY[logits.dtype] * torch.as_tensor(size).clamp_min(1)
    error = (got.double() - want).abs()
    assert (error[targets < 0] == 0).all()
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"{error.flatten()[worst]:.3e} > {bound.flatten()[worst]:.3e}"


@dtypes
@pytest.mark.parametrize("options", [PLAIN, SCALED, CAPPED], ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("v", [1, 7, 33, 1000, 4097, 32003])
def test_rows_against_fp64(major, dtype, v, options):
    logits, targets = _batch(5, v, dtype)
    exact = None if v % 2 else _exact(logits, targets, shift=1.0)
    keywords = {"target_logits": exact, "options": options}
    found = calls.logp(logits, targets, entropy=True, **keywords)
    want = _check_stats(found, logits, targets, options, exact)
    without = calls.logp(logits, targets, **keywords)
    assert without[2] is None and all(map(torch.equal, without[:2], found[:2]))

    weights = torch.randn(5)
    got = calls.logits_grad(logits, found[1], targets, weights, **keywords)
    _check_gradient(got, logits, found[1], targets, weights, options, exact)
    in_place = logits.clone()
    got = calls.residual_(in_place, targets, **keywords)
    _check_stats(got, logits, targets, options, exact)
    _check_gradient(in_place, logits, want[1], targets, None, options, exact)


# Rows for clusters of 2, 4 and 8, for one block alone on its SM, and beyond what fits.
@pytest.mark.parametrize(
    ("dtype", "v"),
    [
        (torch.bfloat16, 50_001),
        (torch.bfloat16, 128_256),
        (torch.float16, 262_144),
        (torch.float32, 151_936),
        (torch.float32, 450_001),
    ],
    ids=["2 blocks", "4 blocks", "8 blocks", "8 large blocks", "reread"],
)
@pytest.mark.parametrize("major", [8, 9, 10, 12], indirect=True)
def test_wide_rows(major, dtype, v):
    logits, targets = torch.randn(3, v).mul(4).to(dtype), torch.tensor([v // 2, -1, v - 1])
    shifted = torch.full((3 * (v + 5),), torch.nan, dtype=dtype).as_strided((3, v), (v + 5, 1), 3)
    shifted.copy_(logits)
    for x in (logits.clone(), shifted):
        got = calls.residual_(x, targets, options=PLAIN)
        want = _check_stats(got, logits, targets, PLAIN)
        _check_gradient(x, logits, want[1], targets, None, PLAIN)
    _check_stats(calls.logp(logits, targets, options=PLAIN, entropy=True), logits, targets, PLAIN)


@pytest.mark.parametrize("max_cluster", [1, 2, 4])
def test_rows_are_read_twice_where_a_cluster_finds_no_room(max_cluster):
    logits = torch.randn(3, 128_256, dtype=torch.float32)
    targets = torch.tensor([7, -1, 128_255])
    with calls.device(9, max_cluster=max_cluster):
        got = calls.residual_(x := logits.clone(), targets, options=PLAIN)
    want = _check_stats(got, logits, targets, PLAIN)
    _check_gradient(x, logits, want[1], targets, None, PLAIN)


@dtypes
def test_a_large_vocabulary_is_no_worse_than_pytorch(major, dtype):
    logits, targets = _batch(4, 151_936, dtype, masked=0.0)
    want, want_lse, _ = _truth(logits, targets, PLAIN)
    want_grad = reference.logits_grad(logits.double(), want_lse, targets, None, options=PLAIN)
    plain = logits.clone()
    plain_logp, plain_lse = reference.residual_(plain, targets, options=PLAIN)
    found = logits.clone()
    logp, lse = calls.residual_(found, targets, options=PLAIN)
    assert (lse - want_lse).abs().max() <= (plain_lse - want_lse).abs().max() + 6 * EPS
    assert (logp - want).abs().max() <= (plain_logp - want).abs().max() + 6 * EPS
    ours, theirs = ((x - want_grad).norm() / want_grad.norm() for x in (found, plain))
    assert ours <= theirs + 6 * EPS


@dtypes
@pytest.mark.parametrize("v", [5, 4999])
def test_any_alignment_and_stride(major, dtype, v):
    logits, targets = _batch(5, v, dtype, masked=0.3)
    weights = torch.randn(5)
    lse = _truth(logits, targets, PLAIN)[1].float()
    for offset in (0, 1, 3, 7):
        for stride in (v, v + 1, v + 64):
            buffer = torch.full((5 * stride + offset,), torch.nan, dtype=dtype)
            view = buffer.as_strided((5, v), (stride, 1), offset)
            view.copy_(logits)
            _check_stats(calls.logp(view, targets, options=PLAIN), logits, targets, PLAIN)
            # Gradient into a matrix that is aligned like the logits, and into one that is not.
            for shift in (offset, offset + 1):
                wide = torch.full((5 * stride + shift,), torch.nan, dtype=dtype)
                out = wide.as_strided((5, v), (stride, 1), shift)
                calls.logits_grad(view, lse, targets, weights, options=PLAIN, out=out)
                _check_gradient(out, logits, lse, targets, weights, PLAIN)
                assert wide.isnan().sum() == len(wide) - 5 * v
            calls.residual_(view, targets, options=PLAIN)
            _check_gradient(view, logits, lse, targets, None, PLAIN)
            assert buffer.isnan().sum() == len(buffer) - 5 * v  # nothing else was written


@dtypes
@pytest.mark.parametrize("masked", [0.5, 1.0])
@pytest.mark.parametrize("v", [77, 50_000])
def test_unscored_rows_are_not_read(major, dtype, masked, v):
    logits, targets = _batch(8, v, dtype, masked=masked)
    dead = targets < 0
    logits[dead] = torch.nan
    outs = calls.logp(logits, targets, options=PLAIN, entropy=True)
    per_row = [torch.where(dead, torch.nan, x) for x in (outs[1], torch.ones(8))]
    exact = torch.where(dead, torch.nan, _exact(logits, targets))
    grad = calls.logits_grad(
        logits, per_row[0], targets, per_row[1], target_logits=exact, options=PLAIN
    )
    outs += calls.residual_(logits, targets, target_logits=exact, options=PLAIN)
    for out in (*outs, grad, logits):
        assert out.isfinite().all() and (out[dead] == 0).all()
    assert (grad[~dead] != 0).any(1).all() and (logits[~dead] != 0).any(1).all()


def test_no_rows_and_wild_targets(major):
    empty = torch.empty(0, 50), torch.empty(0, dtype=torch.int64)
    assert [len(t) for t in calls.logp(*empty, options=PLAIN, entropy=True)] == [0, 0, 0]
    assert calls.residual_(*empty, options=PLAIN)[0].shape == (0,)
    assert calls.logits_grad(empty[0], torch.empty(0), empty[1], None, options=PLAIN).numel() == 0
    with pytest.raises(RuntimeError, match="invalid argument"):
        calls._call("logp", None, native.Rows(dtype=3), native.in_c(PLAIN))
    # A target outside the row: the row is not read there, and gets no target in its gradient.
    x, lse = torch.randn(1, 50), torch.ones(1)
    got = calls.logits_grad(x, lse, torch.tensor([50]), None, options=PLAIN)
    torch.testing.assert_close(got, -torch.exp(x - 1))
    assert calls.logp(x, torch.tensor([50]), options=PLAIN)[0].isnan()
    assert calls.residual_(x, torch.tensor([50]), options=PLAIN)[0].isnan()


@dtypes
@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_extreme_logits(major, dtype, scale):
    logits = (torch.rand(6, 3001) * 2 - 1).mul_(scale).to(dtype)
    targets = torch.randint(0, 3001, (6,))
    targets[:3] = logits[:3].float().argmax(1)
    for exact in (None, _exact(logits, targets)):
        got = calls.logp(logits, targets, target_logits=exact, options=PLAIN)
        want = _check_stats(got, logits, targets, PLAIN, exact)
        x = logits.clone()
        calls.residual_(x, targets, target_logits=exact, options=PLAIN)
        _check_gradient(x, logits, want[1], targets, None, PLAIN, exact)


@dtypes
def test_masked_vocabulary(major, dtype):
    """-inf columns, whole blocks of them too, are probability 0; a masked target is -inf."""
    logits, targets = _batch(5, 9000, dtype, masked=0.0)
    logits[:, :8200] = -torch.inf
    logits[1, ::2] = -torch.inf
    targets = torch.randint(8200, 8999, (5,)) | 1
    for options in (PLAIN, LogitOptions(logit_scale=0.5)):
        got = calls.logp(logits, targets, options=options, entropy=True)
        want = _truth(logits, targets, options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
        x = logits.clone()
        calls.residual_(x, targets, options=options)
        assert x.isfinite().all() and (x[:, :8200] == 0).all()
    assert calls.logp(logits, torch.zeros(5, dtype=torch.int64), options=PLAIN)[0].isneginf().all()


@dtypes
@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("v", [5000, 60_000])
def test_a_bad_row_harms_no_other(major, dtype, options, bad, v):
    logits, targets = _batch(6, v, dtype, masked=0.0)
    targets = targets.clamp(1, 4000)
    poisoned = logits.clone()
    poisoned[2, 4321] = bad
    poisoned[4] = bad
    clean, dirty = logits.clone(), poisoned.clone()
    outs = [calls.logp(x, targets, options=options, entropy=True) for x in (logits, poisoned)]
    outs[0] += calls.residual_(clean, targets, options=options)
    outs[1] += calls.residual_(dirty, targets, options=options)
    others = [0, 1, 3, 5]
    for a, b in zip((*outs[0], clean), (*outs[1], dirty), strict=True):
        assert torch.equal(a[others], b[others])
    want = reference.logp(poisoned.float(), targets, options=options, entropy=True)
    for a, b in zip(outs[1], want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    want = poisoned.float()
    reference.residual_(want, targets, options=options)
    torch.testing.assert_close(dirty.float(), want, rtol=0.02, atol=1e-4, equal_nan=True)


@dtypes
@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_column_blocks_and_in_place(dtype, options):
    logits, targets = _batch(9, 5003, dtype)
    exact, weights = _exact(logits, targets), torch.randn(9)
    _, lse, _ = calls.logp(logits, targets, target_logits=exact, options=options)
    same = {"target_logits": exact, "options": options}
    whole = calls.logits_grad(logits, lse, targets, weights, **same)
    parts = [
        calls.logits_grad(logits[:, a:b], lse, targets, weights, first_column=a, **same)
        for a, b in [(0, 1), (1, 2047), (2047, 5003)]
    ]
    assert torch.equal(torch.cat(parts, 1), whole)
    for stored in (None, exact):  # the target's logit is read before it is overwritten
        same["target_logits"] = stored
        whole = calls.logits_grad(logits, lse, targets, None, **same)
        x = logits.clone()
        calls.logits_grad(x, lse, targets, None, out=x, **same)
        assert torch.equal(x, whole)


def test_an_exact_target_logit_keeps_logp_at_most_zero():
    """The exact logit stands in for the rounded one inside the sum too."""
    logits = torch.full((1, 4000), -60.0, dtype=torch.bfloat16)
    exact = torch.tensor([300.7])  # bf16 would hold 300
    logits[0, 17] = exact[0]
    targets = torch.tensor([17])
    for major in (8, 9):
        with calls.device(major):
            got = calls.logp(logits, targets, target_logits=exact, options=PLAIN)
            assert got[0] == 0 and got[1] == exact
            x = logits.clone()
            calls.residual_(x, targets, target_logits=exact, options=PLAIN)
            assert (x == 0).all()


@pytest.mark.parametrize("v", [999, 32_003, 128_256])
@pytest.mark.parametrize("major", [8, 9])
def test_same_bits_in_any_order_of_threads(major, v):
    """Again, and with threads, warps and blocks in the opposite order: no barrier is missing."""
    logits, targets = _batch(4, v, torch.bfloat16)
    prompts = _prompts([5, 70, 2], [3, 50, 0], 1, 2.0, 1.0, True)
    results = []
    for backward in (False, True, False):
        with calls.device(major, backward):
            x = logits.clone()
            lists = calls.ranking(*prompts, options=RankingOptions())
            found = calls.logp(logits, targets, options=PLAIN, entropy=True)
            grad = logits.clone()
            calls.logits_grad(grad, found[1], targets, None, options=PLAIN, out=grad)
            results.append((*found, *calls.residual_(x, targets, options=PLAIN), x, grad, *lists))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_more_than_2_to_the_31_elements():
    stride = 2**31 + 64
    torch.use_deterministic_algorithms(False)  # or 4 GiB would be filled
    try:
        buffer = torch.empty(stride + 1000, dtype=torch.bfloat16)  # two pages of it touched
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")
    logits = buffer.as_strided((2, 1000), (stride, 1))
    logits.copy_(torch.randn(2, 1000))
    small, targets = logits.clone(), torch.tensor([3, 999])
    got = calls.residual_(logits, targets, options=PLAIN)
    want = calls.residual_(small, targets, options=PLAIN)
    assert torch.equal(got[0], want[0]) and torch.equal(logits, small)


def _check_ranking(batch, options, with_rewards):
    logps, offsets, lengths, order, rewards, sft, weights = batch
    rewards = rewards if with_rewards else None
    got = calls.ranking(logps, offsets, lengths, order, rewards, sft, weights, options=options)
    want = reference.ranking(
        *(logps.double(), offsets, lengths, order, rewards, sft, weights.double()), options=options
    )
    # Sums and exponents are double; exponentials and what follows them are float, and a weight is
    # a difference of parts as large as the temperatures.
    tau = options.tau
    if with_rewards and rewards.numel():
        tau = float(rewards.max() - rewards.min())
    parts = order.shape[1] * tau + abs(options.sft_weight) * order.shape[1] ** 2
    floors = (16 * EPS, 0.0, 8 * EPS * parts)
    for name, a, b, floor in zip(("terms", "sums", "weights"), got, want, floors, strict=True):
        assert a.dtype == torch.float32 and a.isfinite().all(), name
        error = (a.double() - b).abs()
        assert (error <= EPS * b.abs() + floor).all(), f"{name}: {error.max():.2e}"
    return got


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 16), min_size=1, max_size=5),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1.0, 30.0]),
    gap=st.sampled_from([0.1, 2.0]),
    ties=st.booleans(),
    with_rewards=st.booleans(),
    options=RANKING_OPTIONS,
)
def test_ragged_prompts(counts, lengths, seed, scale, gap, ties, with_rewards, options):
    batch = _prompts(counts, lengths, seed, scale, gap, ties)
    _check_ranking(batch, options, with_rewards)


@pytest.mark.parametrize("with_rewards", [True, False], ids=["rewards", "order only"])
@pytest.mark.parametrize("n", [64, 65, 1024])
def test_many_candidates(n, with_rewards):
    batch = _prompts([n, n // 2, 1], [3, 50, 0, 17], 1, 2.0, 1.0, True)
    _check_ranking(batch, RankingOptions(), with_rewards)
    _check_ranking(batch, RankingOptions(top_k=3, skip_ties=True, eps=1e-3), with_rewards)


@pytest.mark.parametrize("with_rewards", [True, False], ids=["rewards", "order only"])
@pytest.mark.parametrize("eps", [0.0, 1e-10])
def test_scores_of_any_size(with_rewards, eps):
    """Sums of 1e4 and reward gaps of 1e3, exponents of 1e7: no digits are lost to their size."""
    batch = (
        torch.tensor([-1e4, -3.0, -2e4, 0.0, -7e3, -1e4, 0.0, -5.0]),
        torch.arange(9),
        torch.ones(8, dtype=torch.int64),
        torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4]]),
        torch.tensor([[1e3, 400.0, -200.0, -1e3], [5e2, 5e2, 0.0, -1e3]]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.5]),
    )
    _check_ranking(batch, RankingOptions(eps=eps), with_rewards)


def test_infinite_scores():
    check_infinite_scores(calls.ranking)


def test_sums_stand_for_tokens():
    check_sums_stand_for_tokens(calls.ranking)


def test_long_sequences_and_tokens_of_no_sequence():
    logps = -torch.rand(200_010)
    offsets = torch.tensor([5, 100_005, 100_005, 200_001])
    lengths = offsets.diff()
    args = torch.tensor([[0, 1]]), None, torch.tensor([0]), torch.ones(1)
    _, sums, weights = calls.ranking(logps, offsets, lengths, *args, options=RankingOptions())
    for s, (a, b) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        torch.testing.assert_close(sums.double()[s], logps[a:b].double().sum(), rtol=EPS, atol=0)
    assert weights[5] != 0 and (weights[5:100_005] == weights[5]).all()
    assert (weights[:5] == 0).all() and (weights[100_005:] == 0).all()


def test_more_sequences_than_a_marking_block_takes():
    sequences = 40_000
    batch = list(_prompts([6, 3], [4], 0, 1.0, 1.0, False))
    batch[0] = -torch.rand(sequences)
    batch[1], batch[2] = torch.arange(sequences + 1), torch.ones(sequences, dtype=torch.int64)
    batch[3] = torch.where(batch[3] >= 0, batch[3] * 3600 + 7, -1)
    _check_ranking(tuple(batch), RankingOptions(), True)


def test_ranking_without_prompts_sequences_or_candidates():
    none = torch.empty(0, dtype=torch.int64)
    for n in (0, 4):
        terms, sums, weights = calls.ranking(
            *(torch.ones(3), torch.zeros(1, dtype=torch.int64), none, none.new_empty(0, n)),
            *(None, none, torch.empty(0)),
            options=RankingOptions(),
        )
        assert terms.shape == (0, n) and sums.shape == (0,) and weights.tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="invalid argument"):
        batch = _prompts([1025], [1], 0, 1.0, 1.0, False)
        calls.ranking(*batch, options=RankingOptions())


def _views(rows, width, dtype):
    """One random matrix, at an aligned and at an odd address and stride."""
    values = torch.randn(rows, width).to(dtype)
    yield values
    buffer = torch.full((rows * (width + 1) + 3,), torch.nan, dtype=dtype)
    yield buffer.as_strided((rows, width), (width + 1, 1), 3).copy_(values)


@pytest.mark.parametrize("out_dtype", calls.DTYPES, ids=["fp32", "bf16", "fp16"])
@dtypes
@pytest.mark.parametrize("width", [1, 40, 2056])
def test_gather_and_scatter(dtype, out_dtype, width):
    rows = torch.tensor([4, 0, 6, 2, 5])
    weights = torch.randn(5)
    for source in _views(7, width, dtype):
        for w in (weights, None):
            want = source[rows].float() * (1.0 if w is None else w[:, None])
            got = calls.gather_rows(source, rows, w, out_dtype)
            assert torch.equal(got, want.to(out_dtype))
        for out in _views(7, width, out_dtype):
            before = out.clone()
            calls.scatter_rows(source[:5], weights, rows, out)
            want = (source[:5].float() * weights[:, None]).to(out_dtype)
            assert torch.equal(out[rows], want) and torch.equal(out[[1, 3]], before[[1, 3]])


@dtypes
def test_scatter_of_shared_rows(dtype):
    """Each row is what it holds and its tokens, added in fp32 in their order, rounded once."""
    rows = torch.tensor([3, 1, 3, 3, 0, 1, 6, 3])
    by_row = torch.sort(rows, stable=True).indices
    weights = torch.randn(8)
    for side in _views(8, 1000, dtype):
        out = torch.randn(7, 1000).to(dtype)
        want = out.float()
        calls.scatter_rows(side, weights, rows, out, by_row)
        for i, row in enumerate(rows):
            want[row] += weights[i] * side[i].float()
        assert torch.equal(out, want.to(dtype))


@dtypes
@pytest.mark.parametrize("width", [1, 40, 4096])
@pytest.mark.parametrize("with_bias", [False, True])
def test_target_logits(dtype, width, with_bias):
    targets = torch.tensor([0, 10, 3, 3, 7, -100, 1, 2, 11])
    bias = torch.randn(11).to(dtype) if with_bias else None
    for x in _views(9, width, dtype):
        for weight in _views(11, width, dtype):
            got = calls.target_logits(x, weight, bias, targets)
            inside = targets.clamp(0, 10)
            products = x.double() * weight.double()[inside]
            want = products.sum(1) + (0 if bias is None else bias.double()[inside])
            want = torch.where(targets < 0, 0.0, want)
            chain = 8 + width / 256 + 5  # additions that one product goes through
            near = (got - want).abs() <= EPS * (chain * products.abs().sum(1) + 2)
            assert near[:8].all() and got[5] == 0 and got[8].isnan()


def test_the_library_says_what_it_is():
    library = calls.library()
    assert library.targets() == b"emulated" and library.ready() == 0
    assert library.error(0) == b"no error"
