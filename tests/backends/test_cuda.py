"""The CUDA backend's adapter on CPU tensors, through the emulated library (tests/cuda_emulation).

What the kernels compute, and what emulation cannot show, is in test_cuda_kernels.py.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from cuda_resources import cuda_rows
from test_cpu import CAPPED, PLAIN, _batch

import pro_kernels as pk
from cases import CASE_IDS, CASES, CPU, DTYPES, IDS, Case
from cuda_emulation import build
from pro_kernels import backends
from pro_kernels.backends import cuda, native
from pro_kernels.options import LogitOptions
from test_fused import compare

GPU = torch.device("cuda", 0)
reference = backends.get("torch")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)


@pytest.fixture
def emulated(monkeypatch):
    """The backend with the emulated library, serving CPU tensors."""
    try:
        path = build.library()
    except build.NoCompiler as error:
        pytest.skip(str(error))
    loaded = native.open_library(path, "cuda", cuda._SIGNATURES)
    assert loaded[0] is not None, loaded[1]
    monkeypatch.setattr(cuda, "_load", lambda: loaded)
    monkeypatch.setattr(cuda, "unusable", lambda device: None)
    monkeypatch.setattr(cuda, "_stream_of", lambda x: contextlib.nullcontext(None))


@dtypes
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_the_loss_by_the_rule(case, dtype, emulated, poison):
    compare(case, dtype, backend="cuda")


@dtypes
@pytest.mark.parametrize("budget", [1, 30_000])
def test_the_loss_under_a_budget(dtype, budget, emulated, poison):
    compare(Case("budget", T=9, H=48, V=333, bias=True), dtype, backend="cuda", budget=budget)


def test_prompts_run_once_share_a_row(emulated):
    """The first tokens of all candidates read one row of hidden states: it gets their sum."""
    rows = torch.tensor([0, 1, 0, 2, 0, 3, 4, 5, 4, 6, 4, 7])
    targets = torch.randint(0, 50, (12,))
    cu = torch.arange(0, 13, 2)
    layout = pk.Layout.from_rows(rows, targets, cu, 3, num_rows=8)
    rewards = torch.randn(2, 3)
    grads = []
    for backend in ("cuda", "torch"):
        torch.manual_seed(1)
        hidden, weight = torch.randn(8, 16), torch.randn(50, 16)
        hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
        out = pk.linear_pro_loss(hidden, weight, None, rewards, layout=layout, backend=backend)
        grads.append(torch.autograd.grad(out.loss, [hidden, weight]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-9)


@dtypes
@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_any_strides_are_taken(dtype, options, emulated):
    """Transposed, sliced, and repeated inputs are copied only where the kernels need it."""
    logits, targets = _batch(6, 70, dtype)
    every_other = torch.stack([logits, logits], 1).flatten(0, 1)[::2]
    want = reference.logp(logits.double(), targets, options=options, entropy=True)
    for x in (logits, logits.t().contiguous().t(), every_other, torch.cat([logits] * 2, 1)[:, :70]):
        got = cuda.logp(x, targets.int(), options=options, entropy=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
        grad = cuda.logits_grad(x, got[1], targets, torch.ones(12)[::2], options=options)
        exact = reference.logits_grad(logits.double(), want[1], targets, None, options=options)
        torch.testing.assert_close(grad.double(), exact, rtol=2**-7, atol=1e-5)


def test_the_sides(emulated):
    source, rows = torch.randn(5, 24).bfloat16(), torch.tensor([4, 0, 4, 2])
    weights = torch.randn(8)[::2]
    for x in (source, source.t().contiguous().t(), source.double()):
        got = cuda.gather_rows(x, rows, weights, torch.float32)
        assert torch.equal(got, weights[:, None] * source.float()[rows])
    assert torch.equal(cuda.gather_rows(source, rows, None, torch.bfloat16), source[rows])
    out = torch.zeros(5, 24)
    cuda.scatter_rows(got.t().contiguous().t(), weights, rows, out, shared=True)
    want = torch.zeros(5, 24).index_add_(0, rows, weights[:, None] * got)
    torch.testing.assert_close(out, want)
    weight, bias = torch.randn(7, 24).bfloat16(), torch.randn(7).bfloat16()
    targets = torch.tensor([6, 0, 3, 3, 5])
    exact = (source.double() * weight.double()[targets]).sum(1) + bias.double()[targets]
    got = cuda.target_logits(source, weight, bias, targets)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-5)


def test_nothing_to_do(emulated):
    logits, none = torch.empty(0, 50), torch.empty(0, dtype=torch.int64)
    assert [len(t) for t in cuda.logp(logits, none, options=PLAIN, entropy=True)] == [0, 0, 0]
    assert cuda.residual_(logits, none, options=PLAIN)[0].shape == (0,)
    assert cuda.gather_rows(logits, none, None, torch.float32).shape == (0, 50)


def test_rows_past_two_to_the_31_elements(emulated):
    stride = (1 << 31) + 8
    try:
        buffer = torch.empty(stride + 40, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")
    logits = buffer.as_strided((2, 40), (stride, 1))
    logits.copy_(torch.randn(2, 40))
    small, targets = logits.clone(), torch.tensor([3, 39])
    got = cuda.residual_(logits, targets, options=PLAIN)
    want = cuda.residual_(small, targets, options=PLAIN)
    assert torch.equal(got[0], want[0]) and torch.equal(logits, small)


def test_what_cannot_be_written_or_launched_is_refused(emulated):
    logits, targets = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits of shape \(4, 6\) must have unit stride along V"):
        cuda.residual_(logits.t().contiguous().t(), targets, options=PLAIN)
    with pytest.raises(ValueError, match=r"out must be \(4, 6\) torch.float32 like logits, got"):
        cuda.logits_grad(
            logits, torch.zeros(4), targets, None, options=PLAIN, out=torch.empty(4, 5)
        )
    wide = torch.empty(1).expand(1, cuda._MAX_COLUMNS + 1)
    with pytest.raises(ValueError, match=rf"at most {cuda._MAX_COLUMNS} columns, got"):
        cuda.logp(wide, targets[:1], options=LogitOptions())
    with pytest.raises(RuntimeError, match=r"pk_cuda_logp failed: .* \(1\)"):
        cuda._call("logp", logits, native.Rows(rows=1, columns=1 << 31), native.in_c(PLAIN))


def test_too_many_candidates(emulated):
    refused = backends.refusal("cuda", CPU, torch.float32, 1025)
    assert refused == "1025 candidates a prompt; it takes at most 1024"
    hidden, targets = torch.randn(1, 1025, 1, 4), torch.zeros(1, 1025, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call: 1025 candidates"):
        pk.linear_pro_loss(hidden, torch.randn(5, 4), targets, None, backend="cuda")


def test_refusals_tell_why(monkeypatch, tmp_path):
    assert "not on a CUDA device" in cuda.unusable(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unusable(GPU) == "no CUDA device is available"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_LIB", tmp_path)
    cuda._load.cache_clear()
    try:
        assert "never built" in cuda.unusable(GPU)
        (tmp_path / "build.json").write_text('{"cuda": {"reason": "no CUDA compiler found"}}')
        cuda._load.cache_clear()
        assert "no CUDA compiler found" in cuda.unusable(GPU)
        assert "no CUDA compiler found" in cuda.details()["reason"]
        with pytest.raises(RuntimeError, match="no CUDA compiler found"):
            cuda.logp(torch.randn(1, 3), torch.zeros(1, dtype=torch.int64), options=PLAIN)
        cuda.library_path().write_text("not a library")
        cuda._load.cache_clear()
        assert "does not load" in cuda.unusable(GPU)
    finally:
        cuda._load.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert cuda.unusable(GPU) == "this PyTorch is built for ROCm"


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 0)])
def test_a_device_needs_code_for_its_capability(capability, monkeypatch):
    class Library:
        ready = staticmethod(lambda: 209 if capability == (12, 0) else 0)
        error = staticmethod(lambda code: b"no kernel image is available")
        targets = staticmethod(lambda: b"sm_90a")

    monkeypatch.setattr(cuda, "_load", lambda: (Library(), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    cuda._no_code.cache_clear()
    try:
        said = cuda.unusable(GPU)
    finally:
        cuda._no_code.cache_clear()
    assert (
        said
        == {
            (7, 5): "compute capability is 7.5; it needs 8.0 or newer",
            (9, 0): None,
            (12, 0): "the library has no code for compute capability 12.0 (no kernel image is "
            "available); built for sm_90a",
        }[capability]
    )


def test_a_card_is_known_by_its_architecture(monkeypatch):
    backends.get("torch")  # loaded, its name hides the library's in the package
    assert backends._arch(torch.device("cpu")) is None
    monkeypatch.setattr(backends, "is_available", lambda: False)
    assert backends._arch(GPU) is None
    monkeypatch.setattr(backends, "is_available", lambda: True)
    monkeypatch.setattr(backends, "get_device_capability", lambda device: (8, device.index))
    assert backends._arch(torch.device("cuda", 1)) == "sm_81"
    monkeypatch.setattr(backends, "hip", "7.0")
    assert backends._arch(GPU) is None


def test_auto_passes_over_kernels_that_never_ran_on_a_gpu(monkeypatch):
    monkeypatch.delenv("PRO_KERNELS_UNVERIFIED", raising=False)
    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends.get(name), "unusable", lambda device: None)
        monkeypatch.setattr(backends.get(name), "VERIFIED", {})
    assert backends.resolve("auto", GPU, torch.bfloat16) == "torch"
    assert "never ran on a GPU" in backends.passed_over("cuda", GPU, torch.bfloat16)
    assert backends.resolve("cuda", GPU, torch.bfloat16) == "cuda"
    monkeypatch.setattr(backends.get("triton"), "VERIFIED", {"sm_90": "a card"})
    monkeypatch.setattr(backends, "_arch", lambda device: "sm_90")
    assert backends.resolve("auto", GPU, torch.bfloat16) == "triton"
    monkeypatch.setattr(backends, "_arch", lambda device: "sm_80")
    assert backends.resolve("auto", GPU, torch.bfloat16) == "torch"
    assert "never ran on a GPU of sm_80" in backends.passed_over("triton", GPU, torch.bfloat16)
    monkeypatch.setenv("PRO_KERNELS_UNVERIFIED", "1")
    assert backends.resolve("auto", GPU, torch.bfloat16) == "cuda"
    monkeypatch.setenv("PRO_KERNELS_UNVERIFIED", "yes")
    with pytest.raises(ValueError, match="PRO_KERNELS_UNVERIFIED must be one of 0, 1, got 'yes'"):
        backends.resolve("auto", GPU, torch.bfloat16)


USAGE = """\
arch = sm_80
 Function _Z1a:
  REG:10 STACK:0 SHARED:512 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function _Z1a:
  REG:12 STACK:8 SHARED:1536 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1b:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = """\
arch = sm_90a
.nv.info._Z1b
.nv.info._Z1a
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x200 0x1 0x1 
"""  # noqa: W291


def test_cuda_rows_from_what_cuobjdump_prints():
    names = {"_Z1a": "void pk::a<float, 4>(float*)", "_Z1b": "b(float*)"}
    rows = cuda_rows(USAGE, ELF, lambda found: [names[n] for n in found])
    keys = ("kernel", "config", "arch", "threads", "registers", "shared", "spills")
    assert [tuple(row[k] for k in keys) for row in rows] == [
        ("a", "float, 4", "sm_80", None, 10, 512, 0),
        ("a", "float, 4", "sm_90a", 512, 12, 512, 8),
        ("b", "", "sm_90a", None, 8, 0, 0),
    ]
