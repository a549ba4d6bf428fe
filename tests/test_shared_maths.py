"""The maths of csrc/include that the CPU and CUDA kernels share, one number at a time, in fp64.

It is compiled into the emulated CUDA library (tests/cuda_emulation/exports.cpp).
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from cuda_emulation import build, emulation
from pro_kernels.backends import native
from pro_kernels.options import LogitOptions, RankingOptions
from pro_kernels.ranking import temperatures

try:
    build.library()
except build.NoCompiler as error:
    pytest.skip(str(error), allow_module_level=True)

EPS = 2.0**-24
EPS64 = 2.0**-53
INF = math.inf


KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}


def _call(name: str, kinds: str, *arguments):
    """A function of exports.cpp; options and tensors are pointers."""
    raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    raw = [ctypes.addressof(a) if isinstance(a, ctypes.Structure) else a for a in raw]
    function = getattr(emulation.library(), f"pk_test_{name}")
    return function(*(KINDS[kind](a) for kind, a in zip(kinds, raw, strict=True)))


def _exp_sum(z: Tensor, part: int) -> list[float]:
    out = torch.empty(4, dtype=torch.float64)
    _call("exp_sum", "piip", z, len(z), part, out)
    return out.tolist()


def _row_sum(z: Tensor, part: int, target_z: float) -> list[float]:
    out = torch.empty(3)
    _call("row_sum", "piifp", z, len(z), part, target_z, out)
    return out.tolist()


@pytest.mark.parametrize("part", [1, 7, 1000])
@pytest.mark.parametrize("size", [1.0, 50.0, 1e4])
def test_merged_sums_of_exponentials(part, size):
    z = (torch.rand(1000, dtype=torch.float64) * 2 - 1) * size
    z[::3] = -INF
    top, total, dot, log = _exp_sum(z, part)
    e = torch.exp(z - z.max())
    assert top == z.max()
    assert math.isclose(total, e.sum(), rel_tol=1e-12)
    below = torch.where(z.isfinite(), z - z.max(), 0.0)
    assert math.isclose(dot, (e * below).sum(), rel_tol=1e-11)
    assert math.isclose(log, torch.logsumexp(z, 0), rel_tol=1e-13, abs_tol=1e-13)

    z32 = z.float()
    want = torch.logsumexp(z32.double(), 0)
    p = torch.exp(z32.double() - want)
    entropy = want - torch.where(p > 0, p * z32, 0.0).sum()
    logp, lse, got = _row_sum(z32, part, float(z32[1]))
    assert math.isclose(lse, want, rel_tol=EPS, abs_tol=6 * EPS)
    assert math.isclose(logp, z32[1].double() - want, rel_tol=2 * EPS, abs_tol=6 * EPS)
    assert math.isclose(got, entropy, abs_tol=64 * EPS)


@pytest.mark.parametrize("part", [1, 3, 8])
def test_sums_of_what_is_not_finite(part):
    nothing = torch.full((8,), -INF, dtype=torch.float64)
    assert _exp_sum(nothing, part)[3] == -INF
    assert _row_sum(nothing.float(), part, -INF)[1:] == [-INF, -INF]
    one = nothing.clone()
    one[5] = 3.0
    assert _exp_sum(one, part) == [3.0, 1.0, 0.0, 3.0]
    assert _row_sum(one.float(), part, 3.0) == [0.0, 3.0, 0.0]
    one[2] = INF
    assert _row_sum(one.float(), part, 3.0) == [-INF, INF, INF]
    one[2] = math.nan
    assert all(math.isnan(x) for x in _row_sum(one.float(), part, 3.0))
    lowest = torch.full((8,), torch.finfo(torch.float32).min)
    logp, _, entropy = _row_sum(lowest, part, float(lowest[0]))
    assert math.isclose(entropy, math.log(8), rel_tol=EPS) and logp == -entropy
    highest = _row_sum(-lowest, part, -float(lowest[0]))
    assert math.isclose(highest[0], -math.log(8), rel_tol=EPS)


def test_log_probabilities_are_at_most_zero():
    z = torch.full((5,), -1e4)
    for top in (0.1, 17.3, 3e5):
        z[3] = top
        assert _row_sum(z, 2, top)[0] == 0.0


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (-0.25, 0.0), (1.0, 30.0), (0.7, 2.0)])
def test_transform_and_slope(scale, cap):
    size = torch.logspace(-12, 4, 4001, dtype=torch.float64)
    raw = torch.cat([size, -size, torch.zeros(1, dtype=torch.float64)]).float().double()
    z, slope = torch.empty_like(raw), torch.empty_like(raw)
    fast_z, fast_slope = torch.empty(len(raw)), torch.empty(len(raw))
    _call("transform", "piffpppp", raw, len(raw), scale, cap, z, slope, fast_z, fast_slope)
    scale = float(torch.tensor(scale))  # as C has it
    want = LogitOptions(cap or None, scale).transform(raw)
    torch.testing.assert_close(z, want, rtol=8 * EPS64, atol=0)
    torch.testing.assert_close(fast_z.double(), want, rtol=10 * EPS, atol=0)
    if cap:
        x = (raw * scale / cap).abs()
        want_slope = scale / torch.cosh(x.clamp_max(300)) ** 2
        torch.testing.assert_close(slope, want_slope, rtol=1e-13, atol=1e-200)
        error = (fast_slope.double() - want_slope).abs()
        assert (error <= EPS * (8 + 4 * x) * want_slope.abs() + 2.0**-124).all()
    else:
        assert (slope == scale).all() and (fast_slope.double() == scale).all()


def test_one_minus_p_where_p_is_close_to_one():
    log_p = -torch.logspace(-300, 3, 2001, dtype=torch.float64)
    log_p = torch.cat([log_p, torch.tensor([0.0, 1e-9, math.nan, -INF], dtype=torch.float64)])
    out, single = torch.empty_like(log_p), torch.empty(len(log_p))
    _call("one_minus_p", "pipp", log_p, len(log_p), out, single)
    want = -torch.expm1(log_p[:-4])
    torch.testing.assert_close(out[:-4], want, rtol=4 * EPS64, atol=0)
    want32 = -torch.expm1(log_p[:-4].float().double())
    torch.testing.assert_close(single[:-4].double(), want32, rtol=4 * EPS, atol=2.0**-149)
    for values in (out, single):
        assert values[-4] == 0 and values[-3] == 0 and values[-2].isnan() and values[-1] == 1


@pytest.mark.parametrize("with_rewards", [True, False])
@pytest.mark.parametrize(
    ("n", "options"),
    [
        (1, RankingOptions()),
        (2, RankingOptions(tau=0.3)),
        (7, RankingOptions(eps=1e-3)),
        (16, RankingOptions(top_k=3, skip_ties=True)),
        (64, RankingOptions()),
    ],
    ids=["1", "2", "eps", "top, skip", "64"],
)
def test_ranking_of_one_prompt(n, options, with_rewards):
    """Terms, and the gradient as autograd has it of the definition."""
    scores = (torch.randn(n, dtype=torch.float64) * 3).requires_grad_()
    rewards = torch.randn(n).mul(4).round().div(2).sort(descending=True).values
    rewards = rewards if with_rewards else None
    tau = torch.full((1, n, n), options.tau, dtype=torch.float64)
    keep = torch.ones(1, n, n, dtype=torch.bool)
    if rewards is not None:
        tau, tied = temperatures(rewards[None], keep[:, 0], torch.float64)
        keep = ~tied | torch.eye(n, dtype=torch.bool) if options.skip_ties else keep
    want = []
    for k in range(n - 1):
        entries = [scores[i] * tau[0, k, i] for i in range(k, n) if keep[0, k, i]]
        if options.eps:
            entries.append(scores.new_tensor(math.log(options.eps)))
        live = options.top_k is None or k < options.top_k
        term = torch.logsumexp(torch.stack(entries), 0) - scores[k] * tau[0, k, k]
        want.append(term if live else torch.zeros((), dtype=torch.float64))
    grad = torch.zeros(n, dtype=torch.float64)
    if want:
        (grad,) = torch.autograd.grad(torch.stack(want).sum() + 0 * scores.sum(), scores)

    terms, gradients = torch.empty(n), torch.empty(n, dtype=torch.float64)
    given = native.in_c(options)
    _call("rank", "ippppp", n, scores.detach(), rewards, given, terms, gradients)
    for got, term in zip(terms, want, strict=False):
        assert math.isclose(got, term.detach(), rel_tol=2 * EPS, abs_tol=1e-12)
    torch.testing.assert_close(gradients, grad, rtol=1e-11, atol=1e-11)


def test_sft_factor():
    emulation.library().pk_test_sft_factor.restype = ctypes.c_double
    for count, single, want in [(1, True, 0.05), (1, False, 0.0), (2, True, 0.05), (5, True, 0.8)]:
        options = native.in_c(RankingOptions(sft_weight=0.05, single_sft=single))
        got = _call("sft_factor", "ip", count, options)
        assert math.isclose(got, want)


def test_a_term_from_its_parts():
    """The largest exponent apart from the sum: a size of 1e7 costs no digits."""
    out = torch.empty(2)
    _call("term", "dffdp", 1e7, 0.5, 1.0, 1e7, out)
    assert math.isclose(out[0], math.log(1.5), rel_tol=2 * EPS)
    assert math.isclose(out[1], 1 / 3, rel_tol=2 * EPS)
    _call("term", "dffdp", 0.0, 1e-20, 1.0, 0.0, out)
    assert math.isclose(out[1], 1e-20, rel_tol=2 * EPS)  # 1 - p, not 1 - (1 - 1e-20)
    _call("term", "dffdp", -INF, 0.0, 0.0, -INF, out)
    assert out.isnan().all()
