"""The trust report: what it says, and that it can say no."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess

import pytest
import torch

from bench.providers import torch as of_torch
from pro_kernels import __main__ as command
from pro_kernels import backends
from pro_kernels.fused import call, matmul
from pro_kernels.selfcheck import env
from pro_kernels.selfcheck.trust import cases, evaluate, measure, report
from pro_kernels.selfcheck.trust.cases import Case

CASES = (
    Case("small", 2, 3, 6, H=16, V=37, ties=True),
    Case("softcap, bias", 2, 2, 6, H=16, V=37, softcap=5.0, bias=True),
    Case("no tokens", 4, 4, 6, H=16, V=37, empty=True),
    Case("one candidate", 2, 1, 6, H=16, V=37),
)


def raises(message: str):
    def function(*_, **__):
        raise RuntimeError(message)

    return function


@pytest.fixture(autouse=True)
def _two_backends(monkeypatch):
    monkeypatch.setattr(backends, "ORDER", ("cpu", "torch"))  # Triton is interpreted here: slow


def run(folder, cases=CASES) -> tuple[int, dict, str]:
    code = report.run(folder, cases)
    return code, json.loads((folder / "trust.json").read_text()), (folder / "trust.md").read_text()


def test_report_holds_and_has_every_row(tmp_path, monkeypatch, capsys):
    seen = []
    real = report.measure
    monkeypatch.setattr(report, "measure", lambda *a: seen.append(real(*a)) or seen[0])
    code, data, text = run(tmp_path / "a" / "b")
    rows, count = data["rows"], len(seen[0].rows)
    assert code == 0 and len(rows) == count and all(r["passed"] for r in rows)
    assert f"**{count} of {count} comparisons hold**" in text.splitlines()[2]
    assert data["verdict"] in capsys.readouterr().out
    assert {r["dtype"] for r in rows} == {"float64", "float32", "bfloat16", "float16"}
    assert {(r["case"], r["kind"]) for r in rows} == {(c.name, k) for c in CASES for k in c.kinds}
    assert {r["backend"] for r in rows if r["dtype"] == "float64"} == {"torch"}
    official = [r for r in rows if "official formulation" in r["others"]]
    assert {r["kind"] for r in official} == set(cases.KINDS)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["trust.json", "trust.md"]
    # A peer fed other inputs or columns would be wrong by far more than its rounding.
    peers = [x for r in rows if r["dtype"] == "float32" for x in r["others"].values()]
    assert len(peers) > 100 and max(peers) < 1e-4


def test_a_wrong_gradient_fails_unless_it_is_allowed(tmp_path, monkeypatch):
    """With plain PyTorch's error alone as the limit a factor of 1.01 on dW breaks the rule."""
    real = matmul.weight_grad
    monkeypatch.setattr(matmul, "weight_grad", lambda *a, **k: real(*a, **k).mul_(1.01))
    code, data, text = run(tmp_path, CASES[:1])
    failed = [r for r in data["rows"] if not r["passed"]]
    assert code == 1 and {r["quantity"] for r in failed} == {"gradient of weight"}
    assert "## Rows that break the rule" in text and "FAILED" in text
    monkeypatch.setattr(measure, "allowance", lambda *_: 1e9)
    _, data, text = run(tmp_path, CASES[:1])
    over = [r for r in data["rows"] if r["error"] > r["plain"] + r["floor"]]
    assert over and all(r["passed"] for r in over if r["dtype"] == "float32")
    assert f"{sum(r['passed'] for r in over)} rows hold by that alone" in text
    assert "ok, by allowance" in text


def test_what_raises_or_is_nan_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(backends.get("torch"), "logp", raises("no kernel"))
    code, data, text = run(tmp_path, CASES[:1])
    failed = [r for r in data["rows"] if not r["passed"]]
    assert code == 1 and {r["note"] for r in failed} == {"RuntimeError: no kernel"}
    assert {r["error"] for r in failed} == {"nan"} and "RuntimeError: no kernel" in text


def test_a_peer_that_is_missing_or_crashes_is_a_line(tmp_path, monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        of_torch.F, "linear_cross_entropy", raises("it crashed\n..."), raising=False
    )
    code, data, text = run(tmp_path, CASES[:1])
    reasons = {(r["who"][:3], r["reason"]) for r in data["refusals"]}
    assert code == 0 and ("TRL", "not installed: pip install 'trl==1.16.*'") in reasons
    assert ("PyT", "RuntimeError: it crashed") in reasons
    assert "- TRL 1.16 chunked log-probs on cpu: not installed" in text


def test_without_bench_peers_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "ROOT", tmp_path)
    code, data, text = run(tmp_path)
    assert code == 0 and "no folder bench/" in text and data["commit"] == "unknown"
    official = "official formulation (reference)"
    assert {who for r in data["rows"] for who in r["others"]} == {official}
    beside = {(r["case"], r["kind"]) for r in data["rows"] if r["others"]}
    kinds = ("train", "frozen", "score", "logits")
    assert beside == {(c, k) for c in ("small", "softcap, bias") for k in kinds}
    errors = [r["others"][official] for r in data["rows"] if r["others"] and "32" in r["dtype"]]
    assert errors and max(errors) < 1e-4  # the other meaning, or other columns: more than rounding
    reasons = {r["case"]: r["reason"] for r in data["refusals"] if r["kind"] == "train"}
    assert set(reasons) == {"no tokens", "one candidate"} and "NaN" in reasons["no tokens"]


def test_commit_is_that_of_a_checkout_alone(tmp_path, monkeypatch):
    """Installed below somebody's repository, whose commit would say nothing of this package."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    below = tmp_path / "site-packages"
    below.mkdir()
    monkeypatch.setattr(env, "ROOT", below)
    assert env.git("rev-parse", "--show-toplevel") == ""
    monkeypatch.setattr(env, "ROOT", tmp_path)
    assert env.git("rev-parse", "--show-toplevel") != ""


def test_eps_that_counts_keeps_the_official_meaning_away():
    case = Case("peaked", 1, 3, 4, H=16, V=37, masked=0.0, peak=400.0)
    problem = cases.make_problem(case, "train", torch.device("cpu"), torch.float32)
    (found,) = evaluate.official_only(problem).values()
    assert isinstance(found, str) and "eps" in found


def test_what_cannot_run_here_is_named(monkeypatch):
    monkeypatch.setattr(backends, "ORDER", ("cuda", "triton", "torch"))
    lines = "\n".join(report._not_run())
    if not torch.cuda.is_available():
        assert "no GPU here" in lines
        assert "cuda on cpu" in lines


def test_interpreted_kernels_run_in_small_batches(monkeypatch):
    if backends.refusal("triton", torch.device("cpu"), torch.float32) is not None:
        pytest.skip("no Triton interpreter here")
    monkeypatch.setattr(backends, "ORDER", ("triton", "torch"))
    batches = [Case(name, 1, 2, T, H=16, V=37) for name, T in (("small", 3), ("large", 65))]
    monkeypatch.setattr(Case, "kinds", ("logits",))
    found = measure.measure(None, batches, (torch.float32,)).rows
    ran = {(r.backend, r.case) for r in found}
    assert ran == {("triton", "small"), ("torch", "small"), ("torch", "large")}
    assert any("interpreted" in line for line in report._not_run())


def test_wrong_calls_exit_with_2_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "measure", None)
    path = tmp_path / "file"
    path.write_text("mine")
    for out in (path, path / "below"):
        assert command.main(["check", "--full", "--out", str(out)]) == 2
    assert "--out must be a folder" in capsys.readouterr().err and path.read_text() == "mine"
    for argv in (["--out", "x"], ["--full", "--json", "x"]):
        with pytest.raises(SystemExit) as error:
            command.main(["check", *argv])
        assert error.value.code == 2


def test_each_entrance_takes_its_tier(monkeypatch):
    """In the report's own batch of some 700 tokens; a budget that led elsewhere would mislabel."""
    plans = []
    real = call.make_plan
    monkeypatch.setattr(call, "make_plan", lambda *a, **k: plans.append(real(*a, **k)) or plans[-1])
    for kind, (_, tiers) in cases.KINDS.items():
        problem = cases.make_problem(cases.CASES[1], kind, torch.device("cpu"), torch.float32)
        plans.clear()
        entrances = evaluate.by_tier(problem)
        for options in entrances.values():
            assert isinstance(evaluate.ours(problem, "torch", options), dict)
        assert len(entrances) == max(1, len(tiers))
        taken = [p.tier for p in plans if kind != "score"] or [p.tier for p in plans[:1]]
        assert taken == [tier[:3].strip() for tier in tiers]


def test_allowance_is_for_gradients_behind_native_16_bit_matmuls(monkeypatch):
    for upcasts, sums, squares in ((0, 0, (3, 3)), (0, 1, (1.5, 1)), (1, 1, (1, 1))):
        monkeypatch.setattr(matmul, "_upcasts", lambda *_, x=upcasts: bool(x))
        monkeypatch.setattr(matmul, "leaves_sums", lambda *_, x=sums: bool(x))
        for name, square in zip(("weight", "hidden"), squares, strict=True):
            assert measure.allowance(name, torch.bfloat16, "cpu") == square**0.5
