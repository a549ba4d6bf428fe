"""The C++ backend on every instruction set of this machine: exactness, isolation, layout, ABI.

Truth is ``backends/torch.py`` in fp64 on the same (upcast) logits. Bounds follow from the roundings
that are unavoidable: ``U`` of the dtype for what is stored, 2**-24 for what fp32 has to hold.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import cpu_isas, transformed
from pro_kernels import backends
from pro_kernels.backends import cpu
from pro_kernels.options import LogitOptions

if cpu.unusable(torch.device("cpu")) is not None:
    pytest.skip(cpu.unusable(torch.device("cpu")), allow_module_level=True)

reference = backends.get("torch")
EPS = 2.0**-24
U = {torch.float32: EPS, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative rounding
TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}
PLAIN = LogitOptions()
CAPPED = LogitOptions(softcap=30.0, logit_scale=0.7)


ISAS = cpu_isas()
dtypes = pytest.mark.parametrize("dtype", cpu.DTYPES, ids=["fp32", "bf16", "fp16"])


@pytest.fixture(params=ISAS)
def isa(request):
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(None)


def _batch(n: int, v: int, dtype: torch.dtype, scale: float = 4.0, masked: float = 0.2):
    logits = (torch.randn(n, v) * scale).to(dtype)
    targets = torch.randint(0, v, (n,))
    targets[0] = 0
    targets[-1] = v - 1
    return logits, torch.where(torch.rand(n) < masked, -100, targets)


def _exact(logits, targets, shift: float = 0.0):
    """Target logits that differ from the stored ones, as exact dot products do."""
    index = targets.clamp_min(0)[:, None]
    return logits.float().gather(1, index)[:, 0] + shift + 0.01 * torch.rand(len(targets))


def _check_stats(logits, targets, options, exact=None):
    got = cpu.logp(logits, targets, target_logits=exact, options=options, entropy=True)
    exact64 = None if exact is None else exact.double()
    x = logits.double()
    want = reference.logp(x, targets, target_logits=exact64, options=options, entropy=True)
    raw = reference._put_target(x, targets.clamp_min(0)[:, None], targets >= 0, exact64)
    z, _ = transformed(raw, options)
    # z itself is fp32: that costs EPS * |z| once scale and softcap are applied, nothing without.
    size = torch.where(z.isfinite(), z.abs(), 0.0).amax(1)
    z_error = 0 if options is PLAIN else 6 * EPS * size
    for name, a, b in zip(("logp", "lse", "entropy"), got, want, strict=True):
        assert a.dtype == torch.float32
        bound = EPS * b.abs() + 5 * EPS + z_error
        if name == "entropy":  # a difference of two means of the size of log V
            bound = bound * (2 + (size - z.mean(1).clamp_min(-1e3)).clamp(0, 20))
        error = (a.double() - b).abs()
        assert (error <= bound).all(), f"{name}: {error.max():.2e}, bound {bound.min():.2e}"
    assert (got[0] <= 0).all()
    return got


def _check_gradient(got, logits, lse, targets, weights, options, exact=None, first=0):
    x, exact64 = logits.double(), None if exact is None else exact.double()
    w64 = None if weights is None else weights.double()
    want = reference.logits_grad(
        x, lse.double(), targets, w64, target_logits=exact64, first_column=first, options=options
    )
    z, _ = transformed(x, options)
    distance = (z - lse.double()[:, None]).abs().clamp_max(120)
    # exp and its argument, and the error of the sum that lse leaves out (checked above: 5 EPS).
    relative = (11 + distance) * EPS
    if options is not PLAIN:
        relative = relative + (8 + 6 * z.abs()) * EPS
    if logits.dtype != torch.float32:
        relative = relative + U[logits.dtype] + 4e-6
    scale = want.abs() if weights is None else want.abs() + 1e-6 * w64.abs()[:, None] * EPS
    live = torch.where(targets >= 0, 1.0, 0.0)[:, None]
    # At the target 1 - p is as good as log p.
    weight = 1.0 if weights is None else w64.abs()[:, None]
    hit = (torch.arange(x.shape[1])[None] + first == targets[:, None]) * 8 * EPS * weight
    bound = (relative * scale + hit + TINY[logits.dtype] * (1 + live)) * live
    error = (got.double() - want).abs()
    worst = (error - bound).argmax()
    assert (error <= bound).all(), f"{error.flatten()[worst]:.3e} > {bound.flatten()[worst]:.3e}"


@dtypes
@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("v", [1, 2, 7, 16, 33, 1000, 4097, 32003])
def test_rows_against_fp64(isa, dtype, v, options):
    logits, targets = _batch(6, v, dtype)
    exact = None if v % 2 else _exact(logits, targets, shift=1.0)
    logp, lse, _ = _check_stats(logits, targets, options, exact)

    weights = torch.randn(6)
    got = cpu.logits_grad(logits, lse, targets, weights, target_logits=exact, options=options)
    _check_gradient(got, logits, lse, targets, weights, options, exact)

    in_place = logits.clone()
    logp_again, lse_again = cpu.residual_(in_place, targets, target_logits=exact, options=options)
    assert torch.equal(logp, logp_again) and torch.equal(lse, lse_again)
    x = logits.double()
    e64 = None if exact is None else exact.double()
    _, lse64, _ = reference.logp(x, targets, target_logits=e64, options=options)
    _check_gradient(in_place, logits, lse64, targets, None, options, exact)


@dtypes
def test_large_vocabulary_no_worse_than_torch(isa, dtype):
    logits, targets = _batch(4, 151936, dtype, masked=0.0)
    logp, lse, _ = _check_stats(logits, targets, PLAIN)
    want, want_lse, _ = reference.logp(logits.double(), targets, options=PLAIN)
    plain_lse = torch.logsumexp(logits.float(), 1)
    plain = (logits.float().gather(1, targets[:, None])[:, 0] - plain_lse).clamp_max(0)
    assert (lse - want_lse).abs().max() <= (plain_lse - want_lse).abs().max() + 5 * EPS
    assert (logp - want).abs().max() <= (plain - want).abs().max() + 5 * EPS


def test_exp_is_exact_to_two_ulp(isa):
    """logits_grad in fp32 with lse 0 and weight -1 is exp itself."""
    z = torch.cat([torch.linspace(-87, 80, 200_001), torch.linspace(-1, 1, 100_001)])
    z = torch.cat([z, torch.tensor([0.0, -0.0, -87.4, -200.0, -1e30, -torch.inf, torch.nan])])
    args = torch.zeros(1), torch.tensor([10**9]), -torch.ones(1)
    got = cpu.logits_grad(z[None], *args, options=PLAIN)[0]
    want = torch.exp(z.double())
    ulp = torch.exp2(torch.floor(torch.log2(want[:-7])) - 23)
    error = ((got[:-7].double() - want[:-7]).abs() / ulp).max()
    assert error <= 1.5, f"{error:.2f} ulp"
    assert got[-7:-1].tolist() == [1, 1, 0, 0, 0, 0] and got[-1].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_stores_round_to_nearest_even(isa, dtype):
    """exp(0) is exactly 1, so a row of logits equal to lse stores -weight rounded."""
    w = torch.cat([torch.randn(2000), torch.randn(200) * 1e-6])
    halfway = torch.arange(1, 1.25, 2.0**-12)  # ties of both types among them
    odd = torch.tensor([0.0, torch.nan, 65519.0, 65520.0, 3.38e38])
    w = torch.cat([w, halfway, -halfway, odd])
    payload = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    w = torch.cat([w, payload])
    n = len(w)
    zeros = torch.zeros(n)
    got = cpu.logits_grad(
        torch.zeros(n, 70, dtype=dtype), zeros, torch.full((n,), 10**6), w, options=PLAIN
    )
    want = (-w).to(dtype)[:, None].expand(n, 70)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@dtypes
@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_extreme_logits(isa, dtype, scale):
    logits = (torch.rand(8, 3001) * 2 - 1).mul_(scale).to(dtype)
    targets = torch.randint(0, 3001, (8,))
    targets[:4] = logits[:4].float().argmax(1)
    exact = _exact(logits, targets)
    for given in (None, exact):
        _check_stats(logits, targets, PLAIN, given)
        x = logits.clone()
        cpu.residual_(x, targets, target_logits=given, options=PLAIN)
        g64 = None if given is None else given.double()
        _, lse, _ = reference.logp(logits.double(), targets, target_logits=g64, options=PLAIN)
        _check_gradient(x, logits, lse, targets, None, PLAIN, given)


@dtypes
def test_masked_vocabulary(isa, dtype):
    """-inf columns (also whole blocks of them, also first) count as probability 0."""
    logits, targets = _batch(5, 9000, dtype, masked=0.0)
    logits[:, :8200] = -torch.inf
    logits[1, ::2] = -torch.inf
    targets = torch.randint(8200, 8999, (5,)) | 1
    for options in (PLAIN, LogitOptions(logit_scale=0.5)):
        logp, lse, entropy = cpu.logp(logits, targets, options=options, entropy=True)
        want = reference.logp(logits.double(), targets, options=options, entropy=True)
        for a, b in zip((logp, lse, entropy), want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
        x = logits.clone()
        cpu.residual_(x, targets, options=options)
        assert x.isfinite().all() and (x[:, :8200] == 0).all()


@dtypes
def test_rows_of_the_lowest_number(isa, dtype):
    """Masked with finfo.min instead of -inf: no overflow, and uniform where all are."""
    logits = torch.full((2, 300), torch.finfo(dtype).min, dtype=dtype)
    logits[1, 7] = 1.0
    logp, lse, entropy = cpu.logp(logits, torch.tensor([3, 7]), options=PLAIN, entropy=True)
    torch.testing.assert_close(logp, torch.tensor([-(300.0**0 * 5.703782474656201), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([5.703782474656201, 0.0]))
    assert lse[1] == 1.0
    x = logits.clone()
    cpu.residual_(x, torch.tensor([3, 7]), options=PLAIN)
    torch.testing.assert_close(x[0, 4:].float(), torch.full((296,), -1 / 300), rtol=0.005, atol=0)
    assert (x[1] == 0).all()


@dtypes
@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_harms_no_other(isa, dtype, options, bad):
    logits, targets = _batch(6, 5000, dtype, masked=0.0)
    targets = targets.clamp(1, 4000)
    poisoned = logits.clone()
    poisoned[2, 4321] = bad
    poisoned[4] = bad
    clean, dirty = logits.clone(), poisoned.clone()
    outs = [cpu.logp(x, targets, options=options, entropy=True) for x in (logits, poisoned)]
    outs[0] += cpu.residual_(clean, targets, options=options)
    outs[1] += cpu.residual_(dirty, targets, options=options)
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
@pytest.mark.parametrize("masked", [0.0, 0.5, 1.0])
def test_unscored_rows_are_not_read(isa, dtype, masked, poison):
    logits, targets = _batch(40, 77, dtype, masked=masked)
    dead = targets < 0
    logits[dead] = torch.nan
    outs = cpu.logp(logits, targets, options=PLAIN, entropy=True)
    weights = torch.where(dead, torch.nan, 1.0)
    lse = torch.where(dead, torch.nan, outs[1])
    exact = torch.where(
        dead, torch.nan, logits.float().gather(1, targets.clamp_min(0)[:, None])[:, 0]
    )
    grad = cpu.logits_grad(logits, lse, targets, weights, target_logits=exact, options=PLAIN)
    x = logits.clone()
    outs += cpu.residual_(x, targets, target_logits=exact, options=PLAIN)
    for out in (*outs, grad, x):
        assert out.isfinite().all()
        assert (out[dead] == 0).all()
    assert (grad[~dead] != 0).any(1).all()


@dtypes
def test_alignment_strides_and_neighbours_change_no_bit(isa, dtype):
    n, v = 5, 4999
    logits, targets = _batch(n, v, dtype, masked=0.0)
    want = cpu.logp(logits, targets, options=PLAIN, entropy=True)
    want_x = logits.clone()
    cpu.residual_(want_x, targets, options=PLAIN)
    for offset, stride in [(1, v), (3, v + 1), (7, v + 64)]:
        buffer = torch.full((n * stride + offset,), torch.nan, dtype=dtype)
        view = buffer.as_strided((n, v), (stride, 1), offset)
        view.copy_(logits)
        got = cpu.logp(view, targets, options=PLAIN, entropy=True)
        cpu.residual_(view, targets, options=PLAIN)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(view, want_x)
        if stride > v:
            assert buffer.isnan().sum() == len(buffer) - n * v  # nothing else was written
    one = cpu.logp(logits[3:4], targets[3:4], options=PLAIN, entropy=True)
    assert all(torch.equal(a, b[3:4]) for a, b in zip(one, want, strict=True))
    by_column = logits.t().contiguous().t()
    got = cpu.logp(by_column, targets, options=PLAIN)
    assert torch.equal(got[0], want[0])
    with pytest.raises(ValueError, match="unit stride"):
        cpu.residual_(by_column, targets, options=PLAIN)


@dtypes
def test_same_bits_on_any_number_of_threads(isa, dtype):
    logits, targets = _batch(37, 20011, dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            x = logits.clone()
            results.append((*cpu.residual_(x, targets, options=PLAIN), x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@dtypes
@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_column_blocks_and_in_place(isa, dtype, options):
    logits, targets = _batch(9, 5003, dtype)
    exact, weights = _exact(logits, targets), torch.randn(9)
    _, lse, _ = cpu.logp(logits, targets, target_logits=exact, options=options)
    same = {"target_logits": exact, "options": options}
    whole = cpu.logits_grad(logits, lse, targets, weights, **same)
    parts = [
        cpu.logits_grad(logits[:, a:b], lse, targets, weights, first_column=a, **same)
        for a, b in [(0, 1), (1, 2047), (2047, 5003)]
    ]
    assert torch.equal(torch.cat(parts, 1), whole)
    x = logits.clone()
    assert cpu.logits_grad(x, lse, targets, weights, out=x, **same) is x
    assert torch.equal(x, whole)


def test_more_than_2_to_the_31_elements():
    stride = 2**31 + 64
    try:
        buffer = torch.empty(stride + 1000, dtype=torch.bfloat16)  # 4 GiB, two pages of it touched
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")
    logits = buffer.as_strided((2, 1000), (stride, 1))
    logits.copy_(torch.randn(2, 1000))
    small, targets = logits.clone(), torch.tensor([3, 999])
    got = cpu.residual_(logits, targets, options=PLAIN)
    want = cpu.residual_(small, targets, options=PLAIN)
    assert torch.equal(got[0], want[0]) and torch.equal(logits, small)


def test_empty_batch_and_wild_targets(isa):
    empty = torch.empty(0, 50), torch.empty(0, dtype=torch.int64)
    assert [len(t) for t in cpu.logp(*empty, options=PLAIN, entropy=True)] == [0, 0, 0]
    assert cpu.residual_(*empty, options=PLAIN)[0].shape == (0,)
    logits = torch.randn(1, 50)  # a target outside the row: loud, and nothing is read there
    assert cpu.logp(logits, torch.tensor([50]), options=PLAIN)[0].isnan()


def test_unusable_says_why(monkeypatch, tmp_path):
    assert "cuda" in cpu.unusable(torch.device("cuda"))
    monkeypatch.setattr(cpu, "_LIB", tmp_path)
    cpu._load.cache_clear()
    try:
        assert "never built" in cpu.unusable(torch.device("cpu"))
        (tmp_path / "build.json").write_text('{"cpu": {"reason": "no C++ compiler found"}}')
        cpu._load.cache_clear()
        assert "no C++ compiler found" in cpu.unusable(torch.device("cpu"))
        assert "no C++ compiler found" in cpu.details()["reason"]
        with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
            cpu.isa()
        cpu.library_path().write_text("not a library")
        cpu._load.cache_clear()
        assert "does not load" in cpu.unusable(torch.device("cpu"))
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()


def _run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_details_name_the_build(isa):
    details = cpu.details()
    assert details["library"] == str(cpu.library_path())
    assert details["instruction set"].startswith(f"{isa} (built: ")


def test_environment_forces_an_instruction_set():
    code = (
        "import torch; from pro_kernels.backends import cpu;"
        "r = cpu.unusable(torch.device('cpu')); print(r or cpu.isa())"
    )
    assert _run(code, PRO_KERNELS_CPU_ISA="generic") == "generic"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_pool_is_shared_with_torch():
    code = (
        "import torch; from pro_kernels.backends import cpu;"
        "from pro_kernels.options import LogitOptions;"
        "torch.set_num_threads(2); torch.randn(999, 999) @ torch.randn(999, 999);"
        "x, t = torch.randn(64, 9999), torch.zeros(64, dtype=torch.int64);"
        "cpu.logp(x, t, options=LogitOptions());"
        "maps = open('/proc/self/maps').read().split();"
        "print(len({p for p in maps if 'libgomp' in p or 'libomp' in p or 'libiomp' in p}))"
    )
    if cpu.build_info().get("openmp"):
        assert _run(code) == "1"
