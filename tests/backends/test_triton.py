"""The Triton row kernels under the interpreter, against the torch backend in fp64.

Bounds are worked out from the unit roundoff ``U`` of fp32 and that of the storage dtype, and lie
within a factor of about ten of the errors seen: a wrong operation or a missing term fails.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
pytest.importorskip("triton")

from pro_kernels import backends  # noqa: E402
from pro_kernels.options import LogitOptions  # noqa: E402

triton_backend = backends.get("triton")
reference = backends.get("torch")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
U = 2.0**-24
STORE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 2.0**-125, torch.bfloat16: 2.0**-125, torch.float16: 2.0**-24}
OPTIONS = [LogitOptions(), LogitOptions(logit_scale=-0.5), LogitOptions(2.0, 0.25)]
# Below a tile, over one, over several; odd, a power of two, a multiple of 16.
COLUMNS = [1, 7, 257, 1024, 4999]

pytestmark = [
    pytest.mark.skipif(
        triton_backend.unusable(DEVICE) is not None, reason=str(triton_backend.unusable(DEVICE))
    ),
    pytest.mark.usefixtures("poison"),  # outputs allocated with ``empty`` start as NaN
]


def make_rows(columns: int, dtype: torch.dtype, seed: int = 0, spread: float = 4.0):
    """Logits, targets (both ends of the vocabulary, one row not scored) and exact target logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(5, columns, generator=generator) * spread).to(dtype)
    targets = torch.tensor([0, columns - 1, -100, columns // 2, columns // 3])
    exact = logits.float().gather(1, targets.clamp_min(0)[:, None])[:, 0]
    exact = exact + 0.02 * torch.randn(5, generator=generator)
    weights = torch.randn(5, generator=generator)
    return [x.to(DEVICE) for x in (logits, targets, exact, weights)]


def stats_bound(truth: torch.Tensor, columns: int, options: LogitOptions, size: float = 0.0):
    """Of logp, lse and entropy: exponents up to |truth| + size, the sum's depth, the cap's tanh."""
    cap = 0.0 if options.softcap is None else options.softcap
    return U * (24 + columns / 1024 + 4 * truth.abs() + 2 * size + 8 * cap)


def grad_bound(grad, logits, lse, weights, columns, options, rtol_lse=1.0):
    """Elementwise: the exponent's error times p, the target's absolute one, then the store."""
    scale = abs(options.logit_scale)
    w = 1.0 if weights is None else weights.double().abs()[:, None]
    exponent = (logits.double() * scale - lse[:, None]).abs().nan_to_num(0, 0, 0)
    cap = 0.0 if options.softcap is None else options.softcap
    lse_rounding = 4 * rtol_lse * lse.abs()[:, None]
    relative = U * (24 + columns / 1024 + 4 * exponent + lse_rounding + 8 * cap)
    absolute = w * scale * relative.amax(1, keepdim=True)  # at the target: 1 - p from logp
    store = STORE[logits.dtype]
    at_target = torch.where(grad.abs() == grad.abs().amax(1, keepdim=True), absolute, 0.0)
    return grad.abs() * (relative + store) + at_target + TINY[logits.dtype]


def test_names_and_limits():
    from pro_kernels.backends.triton import configs

    assert triton_backend.NAME == "triton"
    assert configs.RANKING[-1].block_n == triton_backend.MAX_CANDIDATES
    assert all(t[-1].max_columns is None for f in configs.ROWS.values() for t in f.values())
    assert backends.refusal("triton", DEVICE, torch.float64) is not None
    assert "1025" in backends.refusal("triton", DEVICE, torch.float32, 1025)
    with pytest.raises(AttributeError, match="nothing"):
        _ = triton_backend.nothing


def test_importing_the_backend_does_not_import_triton():
    code = (
        "import sys, pro_kernels.backends; before = 'triton' in sys.modules; "
        "import pro_kernels.backends.triton; assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def test_unusable_says_why(monkeypatch):
    assert "meta" in triton_backend.unusable(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in triton_backend.unusable(torch.device("cpu"))
    assert "no CUDA" in triton_backend.unusable(torch.device("cuda"))
    assert "mps" in triton_backend.unusable(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "7.5" in triton_backend.unusable(torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_backend.unusable(torch.device("cpu")) == "triton is not installed"


@pytest.mark.parametrize("with_exact", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scale", "softcap"])
@pytest.mark.parametrize("dtype", triton_backend.DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_against_fp64(columns, dtype, options, with_exact):
    logits, targets, exact, weights = make_rows(columns, dtype)
    exact = exact if with_exact else None
    keywords = {"target_logits": exact, "options": options}
    truth = reference.logp(logits.double(), targets, entropy=True, **keywords)
    found = triton_backend.logp(logits, targets, entropy=True, **keywords)
    for got, want in zip(found, truth, strict=True):
        assert got.dtype == torch.float32
        assert ((got - want).abs() <= stats_bound(want, columns, options)).all()
    assert triton_backend.logp(logits, targets, **keywords)[2] is None

    raw = logits.clone()
    logps, lse = triton_backend.residual_(raw, targets, **keywords)
    assert torch.equal(logps, found[0]) and torch.equal(lse, found[1])
    want = reference.logits_grad(logits.double(), truth[1], targets, None, **keywords)
    bound = grad_bound(want, logits, truth[1], None, columns, options)
    assert ((raw - want).abs() <= bound).all()

    want = reference.logits_grad(logits.double(), truth[1], targets, weights, **keywords)
    bound = grad_bound(want, logits, truth[1], weights, columns, options)
    out = torch.full_like(logits, float("nan"))
    got = triton_backend.logits_grad(logits, lse, targets, weights, out=out, **keywords)
    assert got is out and ((got - want).abs() <= bound).all()
    in_place = logits.clone()
    triton_backend.logits_grad(in_place, lse, targets, weights, out=in_place, **keywords)
    assert torch.equal(in_place, got)
    assert (got[2] == 0).all() and (raw[2] == 0).all()
    assert (found[0] <= 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scale", "softcap"])
def test_blocks_of_columns_make_the_whole_gradient(options):
    logits, targets, exact, weights = make_rows(700, torch.float32)
    keywords = {"target_logits": exact, "options": options}
    _, lse, _ = triton_backend.logp(logits, targets, **keywords)
    whole = triton_backend.logits_grad(logits, lse, targets, weights, **keywords)
    parts = []
    for first, last in ((0, 1), (1, 350), (350, 699), (699, 700)):
        block = logits[:, first:last]  # row stride 700, any alignment
        parts.append(
            triton_backend.logits_grad(block, lse, targets, weights, first_column=first, **keywords)
        )
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("spread", [50.0, 1e4])
def test_large_logits(spread):
    logits, targets, _, _ = make_rows(999, torch.float32, spread=spread)
    truth = reference.logp(logits.double(), targets, entropy=True, options=LogitOptions())
    found = triton_backend.logp(logits, targets, entropy=True, options=LogitOptions())
    sizes = (0.0, spread, 0.0)  # lse carries the rounding of numbers as large as the logits
    for got, want, size in zip(found, truth, sizes, strict=True):
        assert ((got - want).abs() <= stats_bound(want, 999, LogitOptions(), size)).all()
    raw = logits.clone()
    triton_backend.residual_(raw, targets, options=LogitOptions())
    want = reference.logits_grad(logits.double(), truth[1], targets, None, options=LogitOptions())
    # The kernel has the maximum and the sum apart: no rounding of a large lse inside exp.
    bound = grad_bound(want, logits, truth[1], None, 999, LogitOptions(), rtol_lse=0.0)
    assert ((raw - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", triton_backend.DTYPES, ids=str)
def test_minus_inf_columns(dtype):
    logits, targets, _, _ = make_rows(300, dtype)
    logits[:, 10:200] = -torch.inf
    logits[0, 1:] = -torch.inf  # nothing but the target: logp = 0 exactly
    targets[3] = 20  # a target that is itself masked
    truth = reference.logp(logits.double(), targets, entropy=True, options=LogitOptions())
    logps, lse, entropy = triton_backend.logp(logits, targets, entropy=True, options=LogitOptions())
    assert logps[0] == 0 and entropy[0] == 0 and logps[3] == -torch.inf
    for got, want in zip((logps, lse, entropy), truth, strict=True):
        both = got == want
        assert (both | ((got - want).abs() <= stats_bound(want, 300, LogitOptions()))).all()
    raw = logits.clone()
    triton_backend.residual_(raw, targets, options=LogitOptions())
    want = reference.logits_grad(logits.double(), truth[1], targets, None, options=LogitOptions())
    bound = grad_bound(want, logits, truth[1], None, 300, LogitOptions())
    assert ((raw - want).abs() <= bound).all()
    assert (raw[:3, 10:200] == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, inside the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_stays_alone(bad):
    logits, targets, _, weights = make_rows(500, torch.float32)
    clean = triton_backend.logp(logits, targets, entropy=True, options=LogitOptions())
    clean_grad = logits.clone()
    triton_backend.residual_(clean_grad, targets, options=LogitOptions())
    logits[1, 5] = bad
    if bad == -torch.inf:
        logits[1] = bad
    logits[2] = torch.nan  # not scored: never read
    found = triton_backend.logp(logits, targets, entropy=True, options=LogitOptions())
    truth = reference.logp(logits, targets, options=LogitOptions())
    others = torch.tensor([0, 2, 3, 4])
    for got, want in zip(found, clean, strict=True):
        assert torch.equal(got[others], want[others])
    assert torch.equal(found[0][1].nan_to_num(5), truth[0][1].nan_to_num(5))
    assert torch.equal(found[1][1].nan_to_num(5), truth[1][1].nan_to_num(5))
    triton_backend.residual_(logits, targets, options=LogitOptions())
    assert torch.equal(logits[others], clean_grad[others]) and logits[1].isnan().any()


@pytest.mark.parametrize("gap", [1e-3, 5.0, 17.0, 40.0])
def test_target_near_certain(gap):
    """1 - p from expm1: absolute error of a rounding of logp, at any p."""
    logits = torch.zeros(1, 64, device=DEVICE)
    targets = torch.tensor([3], device=DEVICE)
    logits[0, 3] = gap
    truth, _, _ = reference.logp(logits.double(), targets, options=LogitOptions())
    raw = logits.clone()
    logps, _ = triton_backend.residual_(raw, targets, options=LogitOptions())
    assert (logps - truth).abs() <= U * (4 + 4 * truth.abs())
    assert (raw[0, 3] - -torch.expm1(truth)).abs() <= U * 8
    if gap == 1e-3:  # a small |logp| by construction: a plain 1 - exp(logp) would lose digits here
        tiny = torch.tensor([gap + 9.0], device=DEVICE)
        raw = logits.clone()
        logps, _ = triton_backend.residual_(
            raw, targets, target_logits=tiny, options=LogitOptions()
        )
        assert (raw[0, 3] + torch.expm1(logps.double())).abs() <= 4 * U * raw[0, 3]


def test_a_wide_softcap_changes_little_and_loses_nothing():
    """The cap is 1000 times the logits: a tanh with an absolute error of U would show 1000 fold."""
    logits, targets, _, _ = make_rows(200, torch.float32, spread=1.0)
    options = LogitOptions(softcap=1e3)
    truth = reference.logp(logits.double(), targets, entropy=True, options=options)
    found = triton_backend.logp(logits, targets, entropy=True, options=options)
    for got, want in zip(found, truth, strict=True):
        assert ((got - want).abs() <= stats_bound(want, 200, LogitOptions())).all()


def test_exact_target_replaces_the_rounded_one_everywhere():
    logits = torch.full((1, 9), -3.0, device=DEVICE, dtype=torch.bfloat16)
    exact = torch.tensor([12.0], device=DEVICE)  # far from the stored -3, which must not count
    targets = torch.tensor([4], device=DEVICE)
    keywords = {"target_logits": exact, "options": LogitOptions()}
    logps, lse, _ = triton_backend.logp(logits, targets, **keywords)
    want = 12.0 - torch.logsumexp(torch.tensor([12.0] + [-3.0] * 8, dtype=torch.float64), 0)
    assert abs(logps.item() - want) <= 8 * U and logps.item() <= 0
    triton_backend.residual_(logits, targets, **keywords)
    assert abs(logits[0, 4].item() + torch.expm1(want).item()) <= 8 * U


def test_strides():
    base, targets, _, weights = make_rows(80, torch.float32)
    padded = torch.full((5, 97), torch.nan, device=DEVICE)
    padded[:, 3:83] = base
    view, transposed = padded[:, 3:83], base.t().contiguous().t()
    want = triton_backend.logp(base, targets, options=LogitOptions())
    for logits in (view, transposed):
        assert torch.equal(triton_backend.logp(logits, targets, options=LogitOptions())[0], want[0])
    args = (want[1], targets, weights)
    grad = triton_backend.logits_grad(base, *args, options=LogitOptions())
    got = triton_backend.logits_grad(transposed, *args, options=LogitOptions())
    assert torch.equal(got, grad)
    with pytest.raises(ValueError, match=r"logits .* unit stride .*\(5, 80\).*\(1, 5\)"):
        triton_backend.residual_(transposed, targets, options=LogitOptions())
    with pytest.raises(ValueError, match=r"out .* unit stride"):
        triton_backend.logits_grad(base, *args, options=LogitOptions(), out=transposed)
    triton_backend.residual_(view, targets, options=LogitOptions())
    assert padded[:, :3].isnan().all() and padded[:, 83:].isnan().all()
    assert torch.isfinite(view).all()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_scored(rows):
    logits = torch.full((rows, 40), torch.nan, device=DEVICE)
    targets = torch.full((rows,), -100, device=DEVICE)
    outputs = triton_backend.logp(logits, targets, entropy=True, options=LogitOptions())
    for output in outputs:
        assert output.shape == (rows,) and (output == 0).all()
    grad = triton_backend.logits_grad(
        logits, outputs[1], targets, outputs[0], options=LogitOptions()
    )
    assert grad.shape == (rows, 40) and (grad == 0).all()
    triton_backend.residual_(logits, targets, options=LogitOptions())
    assert (logits == 0).all()


def test_target_beyond_the_vocabulary_is_nan_not_a_stray_read():
    logits, targets, _, _ = make_rows(33, torch.float32)
    targets[0] = 33
    logps, _, _ = triton_backend.logp(logits, targets, options=LogitOptions())
    assert logps[0].isnan() and torch.isfinite(logps[1:]).all()


def test_rows_repeat_bitwise_and_do_not_see_their_neighbours():
    logits, targets, exact, weights = make_rows(1500, torch.bfloat16)
    keywords = {"options": LogitOptions()}

    def run(at):
        raw = logits[at].clone()
        logps, lse = triton_backend.residual_(raw, targets[at], target_logits=exact[at], **keywords)
        grad = triton_backend.logits_grad(logits[at], lse, targets[at], weights[at], **keywords)
        return raw, logps, lse, grad

    everything = torch.arange(5, device=DEVICE)
    some = torch.tensor([4, 1], device=DEVICE)
    first, again, few = run(everything), run(everything), run(some)
    for a, b, c in zip(first, again, few, strict=True):
        assert torch.equal(a, b) and torch.equal(a[some], c)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, inside the interpreter
@pytest.mark.parametrize("columns", [1, 300, 3000])
def test_programs_that_walk_rows_give_what_a_program_a_row_gives(columns, monkeypatch):
    """Also with a NaN row, a row of -inf and rows not scored on the way of one program."""
    from pro_kernels.backends.triton import launch

    parts = [make_rows(columns, torch.bfloat16, seed) for seed in (1, 2)]
    logits, targets, exact, weights = (torch.cat(pair) for pair in zip(*parts, strict=True))
    logits[3], logits[4] = torch.nan, -torch.inf
    plan = launch.configs.row_plan
    keywords = {"target_logits": exact, "options": LogitOptions()}

    def run(programs):
        monkeypatch.setattr(launch.configs, "row_plan", lambda *a: (programs, plan(*a)[1]))
        stats = triton_backend.logp(logits, targets, entropy=True, **keywords)
        raw = logits.clone()
        triton_backend.residual_(raw, targets, **keywords)
        grad = triton_backend.logits_grad(logits, stats[1], targets, weights, **keywords)
        return *stats, raw, grad

    for walked, alone in zip(run(3), run(10), strict=True):
        bits = torch.int16 if walked.dtype == torch.bfloat16 else torch.int32
        assert torch.equal(walked.view(bits), alone.view(bits))
        assert alone[5:].isfinite().all()


def _environment() -> dict[str, str]:
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
