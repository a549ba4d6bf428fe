"""The benchmark harness, end to end on the tiny preset (the numbers mean nothing)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import pro_kernels as pk
from pro_kernels.fused import planner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed
from bench import (  # noqa: E402
    case_run,
    ceilings,
    cli,
    compare,
    losses,
    memory,
    peers,
    record,
    report,
    runner,
    tables,
    targets,
)
from bench.case_run import CaseRun, Settings  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.cli import main  # noqa: E402
from bench.inputs import make_inputs, make_truth  # noqa: E402
from bench.presets import NAMES, PRESETS, cases_of  # noqa: E402
from bench.providers import all_providers, ours_name, select  # noqa: E402
from bench.step import Refused, backward_step  # noqa: E402

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = tables.marks("bench")
CPU = torch.device("cpu")
PEERS = ("trl", "liger", "liger-ce", "cce", "quack", "quack-mean", "verl")
CASE = Case("case", 16, 101, 2, 3, 8, 0.5, repeats=2)
SETTINGS = {"preset": "tiny", "cases": [], "providers": [], "repeats": None}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """The ceilings of a real run take ten seconds of every command."""
    monkeypatch.setitem(ceilings.SIZES, "cpu", ceilings.Sizes(1 << 20, (64, 64, 512)))


@pytest.fixture
def no_peers(monkeypatch):
    """As if no peer were installed."""
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package in peers.VERSIONS:
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
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nstale text\n{END}\nafter\n")
    out = tmp_path / "out"
    arguments = ["--preset", "tiny", "--no-memory", "--out", str(out), "--update", str(page)]
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
                assert row["loss_error"] < case_run.LOSS_TOLERANCE and not row["wrong"]
                assert row["rate"] > 0 and row["of_ceiling"] > 0
                assert row["warm_seconds"] > 0, "tiny cases fit a cache"
                gradients = {"score": 0, "frozen": 1, "logits": 1, "ranking": 1}
                found = [row[f"{name}_grad_error"] for name in ("input", "weight")]
                assert sum(e is not None for e in found) == (
                    2 if "trained-head" in row["provider"] else gradients.get(case.kind, 2)
                )
    head = {r["provider"]: r for r in data["results"] if r["case"] == "tiny head"}
    assert all(head[name]["note"].startswith("not installed: pip install") for name in PEERS)
    assert head["floor"]["of_floor"] == 1.0 and head[ours_name(CPU)]["vs_ours"] == 1.0

    text = (out / "report.md").read_text()
    assert all(f"| {row['label']} |" in text for row in data["results"])
    assert "Ceilings: copy" in text and "`pro-kernels bench --preset tiny`" in text
    for image in ("time.png", "growth.png", "errors.png"):
        assert (out / image).read_bytes().startswith(b"\x89PNG")
        assert f"({image})" in text
    new = page.read_text()
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
    real, count = CaseRun.rows, []

    def fails_on_the_second(*arguments):
        count.append(1)
        if len(count) == 2:
            raise error
        return real(*arguments)

    monkeypatch.setattr(CaseRun, "rows", fails_on_the_second)
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

    monkeypatch.setattr(CaseRun, "rows", real)
    cases = ["--case", "tiny head", "--case", "tiny fp32"]
    assert main([*arguments, *cases, "--resume"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["complete"] and again["results"][0] == data["results"][0], "kept as it was"
    assert [r["case"] for r in again["results"]] == ["tiny head", "tiny fp32"]


def test_a_run_out_of_time_says_so_and_is_resumed(tmp_path):
    cases = ["--case", "tiny head", "--case", "tiny fp32", "--provider", "ours", "--no-memory"]
    arguments = ["--preset", "tiny", *cases, "--out", str(tmp_path)]
    assert main([*arguments, "--seconds", "1e-9"]) == 0
    assert {r["note"] for r in rows_of(tmp_path / "results.json")} == {"not run: no time was left"}
    assert main([*arguments, "--resume"]) == 0
    assert all(r["seconds"] > 0 for r in rows_of(tmp_path / "results.json"))


def test_a_run_of_another_kind_is_not_resumed(tmp_path, capsys):
    arguments = ["--preset", "tiny", "--case", "tiny fp32", "--no-memory", "--out", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "another"}))
    assert main([*arguments, "--resume"]) == 2
    assert "cannot be resumed" in capsys.readouterr().err


def test_a_provider_in_which_the_process_died_is_left_out(tmp_path):
    facts = record.facts(CPU, preset="tiny")
    path = tmp_path / "results.json"
    record.Record(path, facts).put(running=[CASE.name, "ours-torch"])
    again = record.Record.resume(path, facts)
    assert "running" not in again.data
    providers = [all_providers(CPU)[name] for name in ("floor", "ours-torch")]
    found = {r["provider"]: r for r in CaseRun(CASE, Settings(), CPU, record=again).rows(providers)}
    assert "the process died" in found["ours-torch"]["note"]
    assert found["floor"]["seconds"] > 0 and found["ours-torch"]["seconds"] is None


CRASHES = """
import os, sys
from bench import cli, formulations
def build(inputs, compiled=False):
    os.kill(os.getpid(), 9)
formulations.official = build
sys.exit(cli.main())
"""


def test_a_peer_that_kills_the_process_costs_its_own_row(tmp_path, monkeypatch):
    real = cli._watched

    def crashing(child, *rest):
        return real([sys.executable, "-c", CRASHES, *child[3:]], *rest)

    monkeypatch.setattr(cli, "_watched", crashing)
    arguments = ["--preset", "tiny", "--case", "tiny fp32", "--no-memory", "--out", str(tmp_path)]
    assert cli.command(arguments) == 0
    rows = {r["provider"]: r for r in rows_of(tmp_path / "results.json")}
    assert "the process died" in rows["official"]["note"] and not rows["official"]["seconds"]
    assert rows["floor"]["seconds"] > 0 and rows[ours_name(CPU)]["seconds"] > 0


def test_a_process_that_hangs_on_a_gpu_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "STALLED", 0.0)
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    assert cli._watched(sleep, tmp_path / "results.json", on_gpu=True) == -9


def test_a_lost_device_ends_the_process_with_its_own_code(tmp_path, monkeypatch, capsys):
    def lost(self, providers):
        raise case_run.DeviceLost("cuda: an illegal access")

    monkeypatch.setattr(CaseRun, "rows", lost)
    assert main(["--preset", "tiny", "--case", "tiny fp32", "--out", str(tmp_path)]) == 75
    assert "--resume" in capsys.readouterr().err


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
    rows = {r["provider"]: r for r in CaseRun(CASE, Settings(), CPU).rows(providers)}
    assert rows["a"]["note"] == "RuntimeError: cannot" and rows["a"]["seconds"] is None
    assert rows["b"]["note"] == "ValueError: second call" and rows["b"]["seconds"] is None
    assert rows["c"]["wrong"] and "WRONG" in rows["c"]["note"]
    assert rows["ours-torch"]["seconds"] > 0 and rows["ours-torch"]["rounds"] == 2


def test_a_slow_peer_takes_part_in_fewer_rounds():
    providers = [all_providers(CPU)[name] for name in ("floor", "official")]
    settings = Settings(repeats=4, peer_seconds=0.0)
    rows = {r["provider"]: r for r in CaseRun(CASE, settings, CPU).rows(providers)}
    assert (rows["floor"]["rounds"], rows["official"]["rounds"]) == (4, 1)
    assert rows["official"]["note"] == "one call, the first"


def test_a_case_too_large_for_a_provider_is_refused_with_its_size():
    huge = Case("huge", 8, 10**7, 1, 8, 10**5, 0.0)
    table = all_providers(CPU)
    assert "not run: needs about" in table["plain-fp32"].refusal_of_size(huge)
    assert table["ours-torch"].refusal_of_size(huge) is None


def test_a_case_whose_inputs_do_not_fit_says_how_much_they_need(tmp_path, monkeypatch):
    huge = Case("huge", 10**5, 10**7, 1, 2, 8, 0.0, only=("floor", "ours"))
    monkeypatch.setattr(runner, "cases_of", lambda *_: [huge, CASE])
    settings = Settings(providers=("floor",), memory=False)
    data = runner.run(settings, tmp_path / "results.json", CPU, lambda line: None)
    notes = {r["case"]: r["note"] for r in data["results"]}
    assert notes["huge"].startswith("not run: its inputs need 2000 GB") and not notes["case"]


@pytest.mark.parametrize(
    ("kind", "softcap"),
    [("linear", None), ("linear", 3.0), ("frozen", None), ("score", None), ("logits", None),
     ("ce", None), ("ranking", None)],
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    ["ours-torch", "ours-layout", "plain-fp32", "official", "trl", "torch-lce",
     "torch-lce-chunked", "torch-lce-mean"],
)  # fmt: skip
def test_every_provider_computes_the_same_loss_and_gradient(kind, name, softcap):
    if name == "trl":
        pytest.importorskip("trl")
    case = Case("case", 16, 101, 2, 3, 8, 0.5, "fp32", kind, softcap=softcap)
    if kind in ("logits", "ranking"):
        case = Case("case", 0, 101, 2, 3, 8, 0.5 * (kind == "logits"), "fp32", kind)
    inputs = make_inputs(case)
    try:
        step = all_providers(CPU)[name].build(inputs)
    except Refused as refused:
        assert kind in ("logits", "ranking", "score") or softcap or "mean" in str(refused)
        return
    loss, truth = float(step.run()), make_truth(inputs)
    errors = truth.errors(loss, step)
    assert errors.pop("loss_error") < 1e-5
    assert all(e < 1e-5 for e in errors.values() if e is not None), errors
    leaves = {"linear": 2, "ce": 2, "frozen": 1, "score": 0, "logits": 1, "ranking": 1}[kind]
    assert len(step.leaves) == leaves and (step.gradient_bytes > 0) == (leaves > 0)
    assert (errors["logp_error"] is None) == (kind == "ranking" or "mean" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["official-compiled", "liger", "cce"])
def test_compiled_providers_compute_the_same_loss_and_gradient(name):
    inputs = make_inputs(Case("case", 16, 101, 2, 2, 8, 0.5, "fp32"))
    try:
        step = all_providers(CPU)[name].build(inputs)
    except Refused as refused:
        pytest.skip(str(refused))
    errors = make_truth(inputs).errors(float(step.run()), step)
    assert all(e < 1e-5 for e in errors.values() if e is not None), errors


@pytest.mark.parametrize("tier", ["T2", "T3"])
def test_a_tier_is_reached_by_its_budget(tier, monkeypatch):
    monkeypatch.setattr("pro_kernels.fused.planner.MIN_T2_ROWS", 1)
    plans = []
    real = planner.make_plan
    monkeypatch.setattr(
        "pro_kernels.fused.call.make_plan",
        lambda *a, **k: plans.append(real(*a, **k)) or plans[-1],
    )
    case = Case("case", 16, 4001, 32, 2, 16, 0.0, "fp32")
    step = all_providers(CPU)[f"ours-{tier}"].build(make_inputs(case))
    step.run()
    assert [plan.tier for plan in plans] == [tier]


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
    truth = make_truth(inputs)
    case_run.flag_wrong(
        row := record.empty_row(CASE, "", "") | truth.errors(float(step.run()), step)
    )
    assert row["wrong"] and row["input_grad_error"] > case_run.GRAD_TOLERANCE
    step.clear()
    step = table["official"].build(inputs)
    case_run.flag_wrong(
        row := record.empty_row(CASE, "", "") | truth.errors(float(step.run()), step)
    )
    assert not row["wrong"]


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
    """In a process of its own, as cases are weighed: timers of this one keep freed memory."""
    code = """
        import torch
        from bench import memory
        from bench.step import Step

        size = 48 << 20

        def run():
            torch.ones(size, dtype=torch.uint8)
            return torch.ones(size // 2, dtype=torch.uint8)

        run()
        for _ in range(2):
            print(memory.peak_extra_bytes(Step(run), torch.device("cpu"))[0] / size)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, **memory.CHILD_ENV}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    ratios = [float(x) for x in done.stdout.split()]
    assert len(ratios) == 2
    assert all(0.95 < x < 1.2 for x in ratios), ratios  # the kernel's count lags by some pages


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
    main_case = {"group": "head", "H": 1024, "V": 32000, "masked": 0.6, "n": 4}
    blank = record.empty_row(CASE, "", "")
    rows = [
        {**blank, **main_case, "provider": "ours-cpu", "vs_ours": 1.0, "seconds": 1.0,
         "of_floor": 0.95},
        {**blank, **main_case, "provider": "official", "vs_ours": 2.0, "seconds": 2.0},
    ]  # fmt: skip
    met = {o.what: o.met for o in targets.outcomes(rows)}
    assert met["(1024, 32000) bf16, 60 % not scored"] is True
    assert met["the same against the official formulation"] is False
    assert met["the same against its torch.compile"] is None
    assert "| **no** |" in tables.targets_table({"results": rows, "device": "cpu"})
    assert {o.met for o in targets.outcomes(rows, on_gpu=True)} == {None}
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
        (["--seconds", "0"], "--seconds must be > 0"),
        (["--without", "nobody"], "provider must be"),
        (["--compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_calls(tmp_path, capsys, arguments, said):
    assert main(["--preset", "tiny", "--out", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_files_that_are_not_results_or_lack_the_marks(tmp_path, capsys):
    (tmp_path / "results.json").write_text("[]")
    assert main(["--report", str(tmp_path / "results.json")]) == 2
    assert "not a results file" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text(f"{END} {BEGIN}")
    with pytest.raises(ValueError, match="must hold"):
        tables.update_block(page, "text", tables.BLOCK)


@pytest.mark.parametrize("preset", NAMES)
def test_list_names_the_cases(preset, capsys):
    assert main(["--preset", preset, "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) > 5
    for on_gpu in (False, True):
        for case in cases_of(preset, on_gpu=on_gpu):
            assert select(all_providers(CPU), case.only), case


def test_the_gpu_tables_hold_what_the_targets_ask_for():
    for masked in (0.6, 0.0):
        (case,) = (
            c for c in cases_of("gpu", ("head",), on_gpu=True)
            if (c.H, c.V, c.tokens, c.masked, c.n) == (4096, 128256, 16384, masked, 4)
            and c.group == "head"
        )  # fmt: skip
        assert {"official", *targets.PEERS} <= set(case.only) and case.memory


def results_file(path: Path, **ratios: float) -> Path:
    rows = [{**record.empty_row(CASE, name, name), "of_floor": r} for name, r in ratios.items()]
    path.write_text(json.dumps({"schema": record.SCHEMA, "results": rows}))
    return path


def test_comparing_two_runs(tmp_path, capsys):
    old = results_file(tmp_path / "old.json", **{"ours-cpu": 0.9, "official": 0.5, "floor": 1.0})
    new = results_file(tmp_path / "new.json", **{"ours-cpu": 0.8, "official": 0.4, "floor": 1.0})
    assert main(["--compare", str(old), str(new)]) == 1
    said = capsys.readouterr().out
    assert "2 ratios" in said and "1 of ours worse by more than 10%" in said
    assert "| case | ours-cpu | 0.900 | 0.800 | -11% | **worse** |" in said
    assert main(["--compare", str(new), str(old)]) == 0
    assert main(["--compare", str(old), str(new), "--threshold", "0.2"]) == 0


def test_pytest_benchmark_saves_ratios_that_compare(tmp_path):
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-q", "-k",
               "fp32 and (ours or floor)", f"--benchmark-json={saved}", "-p", "no:cacheprovider",
               "-p", "no:xdist"]  # fmt: skip
    # Under xdist pytest-benchmark would switch itself off.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    ratios = compare.ratios_of(saved)
    assert ratios and all(value > 0 for value in ratios.values())
    text, worse = compare.compare(saved, saved)
    assert worse == 0 and text.startswith(f"{len(ratios)} ratios")


def test_a_page_without_the_marks_is_an_error(tmp_path, capsys):
    results = results_file(tmp_path / "results.json", floor=1.0)
    results.write_text(json.dumps({**json.loads(results.read_text()), **record.facts(CPU),
                                   "complete": True, "settings": dict(SETTINGS)}))  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text("nothing")
    assert main(["--report", str(results), "--update", str(page)]) == 2
    assert "must hold the marks" in capsys.readouterr().err
    page.write_text("".join(tables.marks("measured")))
    assert main(["--report", str(results), "--update", str(page)]) == 0


@pytest.mark.parametrize(
    "name", ["attached/results", "cpu/results", "filter/results", "gpu/gpu", "gpu/results",
             "training-cpu/results", "training-cpu-fp32/results"],
)  # fmt: skip
def test_committed_pages_are_what_the_results_give(name):
    docs = ROOT / "docs"
    pages = [(docs / page).read_text() for page in ("benchmarks.md", "performance.md")]
    found = report.blocks(ROOT / f"bench/results/{name}.json", docs / "benchmarks.md")
    for block, text in found.items():
        begin, end = tables.marks(block)
        assert any(f"{begin}\n{text}\n{end}" in page for page in pages), "run: --report, --update"


def test_the_numbers_of_the_readme_are_measured():
    text = (ROOT / "README.md").read_text()
    numbers = re.findall(r"\d+\.\d+", text.split("## What was measured")[1].split("\n## ")[0])
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert numbers and all(number in page for number in numbers)
