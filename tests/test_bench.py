"""The benchmark harness, end to end on the tiny preset (the numbers mean nothing)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pro_kernels as pk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed
from bench import losses, memory, record, report, runner, tables, targets  # noqa: E402
from bench.cases import PRESETS, Case, cases_of  # noqa: E402
from bench.cli import main  # noqa: E402
from bench.inputs import make_inputs, make_truth  # noqa: E402
from bench.providers import all_providers, ours_name, select  # noqa: E402
from bench.step import Refused, Step, backward_step  # noqa: E402

pytest.importorskip("matplotlib")
BEGIN, END = tables.marks("bench")
CPU = torch.device("cpu")
PEERS = ("trl", "liger", "cce")
CASE = Case("case", 16, 101, 2, 3, 8, 0.5, repeats=2)


@pytest.fixture
def no_peers(monkeypatch):
    """As if no peer were installed."""
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("trl", "liger-kernel", "cut-cross-entropy"):
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.fixture
def no_compile(monkeypatch):
    """torch.compile takes a C++ compiler and many seconds: run the function as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["results"]


def test_tiny_preset_through_the_command_without_peers(tmp_path, no_peers, no_compile, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nstale text\n{END}\nafter\n")
    out = tmp_path / "out"
    arguments = ["--preset", "tiny", "--no-memory", "--out", str(out), "--update", str(readme)]
    assert main(arguments) == 0

    data = json.loads((out / "results.json").read_text())
    assert data["complete"]
    assert data["machine"] and data["versions"]["torch"] and data["threads"] >= 1
    for case in cases_of("tiny"):
        expected = {p.name for p in select(all_providers(CPU), case.only, ())}
        rows = [r for r in data["results"] if r["case"] == case.name]
        assert {r["provider"] for r in rows} == expected
        for row in rows:
            assert set(row) == set(record.empty_row(CASE, "", ""))
            measured = row["seconds"] is not None and row["seconds"] > 0
            assert measured or row["note"] or case.kind == "memory", row
            if measured and not row["provider"].startswith("floor"):
                assert row["loss_error"] < runner.LOSS_TOLERANCE and not row["wrong"]
    head = {r["provider"]: r for r in data["results"] if r["case"] == "tiny head"}
    assert all(head[name]["note"].startswith("not installed: pip install") for name in PEERS)
    assert head["floor"]["of_floor"] == 1.0 and head[ours_name(CPU)]["vs_ours"] == 1.0

    text = (out / "report.md").read_text()
    assert all(f"| {row['label']} |" in text for row in data["results"])
    for image in ("time.png", "growth.png"):
        assert (out / image).read_bytes().startswith(b"\x89PNG")
        assert f"({image})" in text
    new = readme.read_text()
    assert new.startswith("before\n") and new.endswith("after\n") and "stale text" not in new
    assert data["machine"] in new and "(out/time.png)" in new
    assert "wrote" in capsys.readouterr().out


def test_the_same_file_gives_the_same_report(tmp_path):
    arguments = ["--preset", "tiny", "--case", "tiny fp32", "--no-memory", "--out", str(tmp_path)]
    assert main(arguments) == 0
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert main(["--report", str(tmp_path / "results.json")]) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 1), (MemoryError, None)])
def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch, error, code):
    real, count = runner.time_case, []

    def fails_on_the_second(*arguments):
        count.append(1)
        if len(count) == 2:
            raise error
        return real(*arguments)

    monkeypatch.setattr(runner, "time_case", fails_on_the_second)
    arguments = ["--preset", "tiny", "--provider", "ours", "--no-memory", "--out", str(tmp_path)]
    if code is None:
        with pytest.raises(error):
            main(arguments)
        report.write_report(tmp_path / "results.json")
    else:
        assert main(arguments) == code
    data = json.loads((tmp_path / "results.json").read_text())
    assert not data["complete"]
    assert [r["case"] for r in data["results"]] == ["tiny head"]
    assert data["results"][0]["seconds"] > 0
    assert "Partial" in (tmp_path / "report.md").read_text()


def test_a_provider_that_raises_has_its_reason_in_its_row():
    def build_fails(inputs):
        raise RuntimeError("cannot\nand more")

    def fails_in_a_round(inputs):
        calls = []

        def loss():
            calls.append(1)
            if len(calls) == 2:
                raise ValueError("second call")
            return losses.plain_loss(
                inputs.hidden @ inputs.weight.t(), inputs.targets, inputs.rewards
            )

        return backward_step(loss, inputs.leaves)

    def computes_something_else(inputs):
        return backward_step(lambda: (inputs.hidden @ inputs.weight.t()).sum(), inputs.leaves)

    table = all_providers(CPU)
    providers = [table["floor"], table["ours-torch"]] + [
        type(table["floor"])(name, name, build)
        for name, build in [
            ("a", build_fails), ("b", fails_in_a_round), ("c", computes_something_else)
        ]
    ]  # fmt: skip
    rows = {r["provider"]: r for r in runner.time_case(CASE, providers, runner.Settings(), CPU)}
    assert rows["a"]["note"] == "RuntimeError: cannot" and rows["a"]["seconds"] is None
    assert rows["b"]["note"] == "ValueError: second call" and rows["b"]["seconds"] is None
    assert rows["c"]["wrong"] and "WRONG" in rows["c"]["note"]
    assert rows["ours-torch"]["seconds"] > 0 and rows["ours-torch"]["rounds"] == 2


def test_a_slow_peer_takes_part_in_fewer_rounds():
    providers = [all_providers(CPU)[name] for name in ("floor", "official")]
    settings = runner.Settings(repeats=4, peer_seconds=0.0)
    rows = {r["provider"]: r for r in runner.time_case(CASE, providers, settings, CPU)}
    assert (rows["floor"]["rounds"], rows["official"]["rounds"]) == (4, 1)
    assert rows["official"]["note"] == "one call, the first"


def test_a_case_too_large_for_a_provider_is_refused_with_its_size():
    huge = Case("huge", 8, 10**7, 1, 8, 10**5, 0.0)
    table = all_providers(CPU)
    assert "not run: needs about" in table["plain-fp32"].refusal_of_size(huge)
    assert table["ours-torch"].refusal_of_size(huge) is None


@pytest.mark.parametrize("kind", ["linear", "frozen", "score", "logits"])
@pytest.mark.parametrize("name", ["ours-torch", "plain-fp32", "official", "trl"])
def test_every_provider_computes_the_same_loss_and_gradient(kind, name):
    if name == "trl":
        pytest.importorskip("trl")
    case = Case("case", 16, 101, 2, 3, 8, 0.5, "fp32", kind)
    inputs = make_inputs(case)
    step = all_providers(CPU)[name].build(inputs)
    loss, truth = float(step.run()), make_truth(inputs)
    assert truth.loss_error(loss) < 1e-5
    error = truth.grad_error(step.leaves)
    assert (error is None) if kind == "score" else error < 1e-5
    leaves = {"linear": 2, "frozen": 1, "score": 0, "logits": 1}[kind]
    assert len(step.leaves) == leaves and (step.gradient_bytes > 0) == (leaves > 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["official-compiled", "liger", "cce"])
def test_compiled_providers_compute_the_same_loss_and_gradient(name):
    inputs = make_inputs(Case("case", 16, 101, 2, 2, 8, 0.5, "fp32"))
    try:
        step = all_providers(CPU)[name].build(inputs)
    except Refused as refused:
        pytest.skip(str(refused))
    loss, truth = float(step.run()), make_truth(inputs)
    assert truth.loss_error(loss) < 1e-5 and truth.grad_error(step.leaves) < 1e-5


def test_a_missing_rank_term_would_be_flagged():
    inputs = make_inputs(CASE)
    table = all_providers(CPU)

    def sft_only(inputs):
        def loss():
            logps = (inputs.hidden @ inputs.weight.t()).float().log_softmax(-1)
            chosen = logps.gather(-1, inputs.targets.clamp(min=0)[..., None])[..., 0]
            best = torch.where(inputs.targets != -100, chosen, 0.0).sum(-1)[:, 0]
            return -losses.SFT_WEIGHT * (CASE.n - 1) ** 2 * best.mean()

        return backward_step(loss, inputs.leaves)

    step = sft_only(inputs)
    step.run()
    assert make_truth(inputs).grad_error(step.leaves) > runner.GRAD_TOLERANCE
    step.clear()
    step = table["official"].build(inputs)
    step.run()
    assert make_truth(inputs).grad_error(step.leaves) < runner.GRAD_TOLERANCE


@pytest.mark.parametrize("name", ["n2_f64", "n3_f32"])
def test_the_official_formulation_reproduces_the_official_code(name):
    d = dict(np.load(Path(__file__).parent / "data" / f"{name}.npz"))
    d = {k: torch.from_numpy(v) if v.shape else float(v) for k, v in d.items()}
    targets = pk.reference.official_targets(d["input_ids"], d["attention_mask"], d["prefix_mask"])
    logits = d["logits"].requires_grad_()
    loss = losses.official_loss(lambda i: logits[:, i], targets, d["rewards"], d["sft_index"])
    loss.backward()
    tolerance = 1e-9 if logits.dtype == torch.float64 else 1e-5
    assert float(loss.detach()) == pytest.approx(d["loss"], rel=tolerance)
    error = (logits.grad - d["grad_logits"]).norm() / d["grad_logits"].norm()
    assert error < tolerance


@pytest.mark.parametrize("masked", [0.0, 0.5, 0.85])
def test_inputs_are_random_repeatable_and_masked_as_the_case_says(masked):
    case = Case("case", 16, 101, 4, 3, 20, masked)
    a, b = make_inputs(case), make_inputs(case)
    assert torch.equal(a.hidden, b.hidden) and torch.equal(a.targets, b.targets)
    assert int((a.targets != -100).sum()) == case.scored
    assert (a.targets != -100).any(-1).all()
    assert (a.rewards.diff(dim=1) < 0).all(), "best first"
    assert a.hidden.float().std() > 0.5 and a.weight.float().std() > 0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's clear_refs")
def test_peak_memory_is_that_of_the_step_and_freed_memory_is_not_hidden():
    size = 48 << 20

    def run():
        torch.ones(size, dtype=torch.uint8)
        return torch.ones(size // 2, dtype=torch.uint8)

    run()
    for _ in range(2):
        peak, _ = memory.peak_extra_bytes(Step(run), CPU)
        assert 0.95 * size < peak < 1.2 * size  # the kernel's count lags by some pages


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's clear_refs")
def test_weighing_in_a_child_process():
    prompt = next(c for c in PRESETS["tiny"]() if c.kind == "memory")
    answers = []
    memory.weigh("ours-torch", [CASE, prompt], CPU, answers.append)
    assert [a["case"] for a in answers] == [CASE.name, prompt.name]
    assert all("note" not in a and a["peak_bytes"] > 0 for a in answers), answers
    assert answers[0]["gradient_bytes"] == 2 * (CASE.tokens * CASE.H + CASE.V * CASE.H)
    assert answers[1]["seconds"] > 0 and answers[1]["loss_error"] < 1e-3
    outcome = [o for o in targets.outcomes([]) if o.what.startswith("peak extra memory, one")]
    assert outcome[0].met is None


def test_targets_say_met_or_not(tmp_path):
    main_case = {"group": "head", "H": 1024, "V": 32000, "masked": 0.55, "n": 4}
    blank = record.empty_row(CASE, "", "")
    rows = [
        {**blank, **main_case, "provider": "ours-cpu", "vs_ours": 1.0, "seconds": 1.0,
         "of_floor": 0.95},
        {**blank, **main_case, "provider": "official", "vs_ours": 2.0, "seconds": 2.0},
    ]  # fmt: skip
    met = {o.what: o.met for o in targets.outcomes(rows)}
    assert met["(1024, 32000) bf16, 55 % not scored"] is True
    assert met["the same against the official formulation"] is False
    assert met["the same against its torch.compile"] is None
    assert "| **no** |" in tables.targets_table(rows)
    assert targets.linear_misfit([1, 2, 4], [3.0, 5.0, 9.0]) < 1e-9
    assert targets.linear_misfit([1, 2, 4], [1.0, 4.0, 16.0]) > 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "no such case"], "no case of preset"),
        (["--provider", "nobody"], "provider must be"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--update", "nowhere.md"], "no file nowhere.md"),
        (["--report", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_calls(tmp_path, capsys, arguments, said):
    assert main(["--preset", "tiny", "--out", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_files_that_are_not_results_or_lack_the_marks(tmp_path, capsys):
    (tmp_path / "results.json").write_text("[]")
    assert main(["--report", str(tmp_path / "results.json")]) == 2
    assert "not a results file" in capsys.readouterr().err
    readme = tmp_path / "README.md"
    readme.write_text(f"{END} {BEGIN}")
    with pytest.raises(ValueError, match="must hold"):
        tables.update_block(readme, "text")


def test_list_names_the_cases(capsys):
    assert main(["--preset", "full", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) > 30
    assert "H=1024 V=32000 bf16 n=4 masked 55%" in names
