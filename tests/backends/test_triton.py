"""What is the Triton backend's own: when it serves, how programs walk rows, fused scores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import everything, rows_of, with_exact
from test_contract_rows import equal

import pro_kernels as pk
from cases import CPU, Case
from pro_kernels import backends
from subjects import Subject

pytest.importorskip("triton")

triton = backends.get("triton")
interpreted = pytest.mark.parametrize("subject", [Subject("triton")], ids=str, indirect=True)


def test_names_and_limits(monkeypatch):
    from pro_kernels.backends.triton import configs

    assert configs.RANKING[-1].block_n == triton.MAX_CANDIDATES
    assert all(t[-1].max_columns is None for f in configs.ROWS.values() for t in f.values())
    monkeypatch.setattr(triton, "unusable", lambda device: None)
    assert "float64" in backends.refusal("triton", CPU, torch.float64)
    assert "1025" in backends.refusal("triton", CPU, torch.float32, 1025)
    with pytest.raises(AttributeError, match="nothing"):
        _ = triton.nothing


def test_importing_the_backend_does_not_import_triton():
    code = (
        "import sys, pro_kernels.backends; before = 'triton' in sys.modules; "
        "import pro_kernels.backends.triton; assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_unusable_says_why(monkeypatch):
    def said(device: str) -> str | None:
        return triton.unusable(torch.device(device))

    assert "meta" in said("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in said("cpu")
    assert "no CUDA" in said("cuda")
    assert "mps" in said("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "7.5" in said("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert said("cpu") == "triton is not installed"


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, inside the interpreter
@pytest.mark.parametrize("columns", [1, 300, 3000])
def test_programs_that_walk_rows_give_what_a_program_a_row_gives(subject, columns, monkeypatch):
    """Also with a NaN row, a row of -inf and rows not scored on the way of one program."""
    from pro_kernels.backends.triton import launch

    rows = with_exact(rows_of(8, columns, torch.bfloat16))
    rows.logits[2], rows.logits[3] = torch.nan, -torch.inf
    plan = launch.configs.row_plan
    found = []
    for programs in (3, 8):
        monkeypatch.setattr(launch.configs, "row_plan", lambda *a, n=programs: (n, plan(*a)[1]))
        found.append(everything(subject, rows))
    assert equal(*found) and all(x[4:].isfinite().all() for x in found[0])


def test_the_crossover_is_measured_or_forced(monkeypatch):
    from pro_kernels.backends.triton import configs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (4096, 1024, 32000, torch.bfloat16, device)
    monkeypatch.delenv("PRO_KERNELS_SCORE", raising=False)
    monkeypatch.setattr(configs, "SCORE_UP_TO_HIDDEN", {})
    assert not triton.scores_fused(*shape)
    family = configs.target_of(device.type, device.index).family
    monkeypatch.setattr(configs, "SCORE_UP_TO_HIDDEN", {(family, 2): 1024})
    assert triton.scores_fused(*shape)
    assert not triton.scores_fused(4096, 1025, 32000, torch.bfloat16, device)
    for choice, fused in (("matmul", False), ("fused", True), ("auto", True)):
        monkeypatch.setenv("PRO_KERNELS_SCORE", choice)
        assert triton.scores_fused(*shape) is fused
    monkeypatch.setenv("PRO_KERNELS_SCORE", "yes")
    with pytest.raises(ValueError, match="PRO_KERNELS_SCORE must be one of fused, .*'yes'"):
        triton.scores_fused(*shape)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float32, None), (torch.bfloat16, 1)], ids=["fp32", "bf16, chunks"]
)
def test_scoring_through_the_public_function(subject, dtype, budget, monkeypatch):
    """Where asked for, calls without gradients take ``score``; those with gradients never do."""
    case = Case("score", B=2, n=2, T=9, H=32, V=75, bias=True)
    hidden, weight, bias, targets, _ = case.tensors()
    exact = pk.reference.linear_token_logps(
        *(x.to(dtype).double() for x in (hidden, weight)), targets, bias=bias.to(dtype).double()
    )
    inputs = [x.to(dtype) for x in (hidden, weight)]
    calls = []
    own = triton.score
    monkeypatch.setattr(triton, "score", lambda *a, **k: calls.append(len(a[0])) or own(*a, **k))
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
