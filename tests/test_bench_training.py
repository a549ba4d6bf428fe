"""The training benchmark, end to end on its tiny preset (the numbers mean nothing)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs the 'train' extra")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed
from bench import memory, tables  # noqa: E402
from bench.cli import main  # noqa: E402
from bench.runner import Settings  # noqa: E402
from bench.training import providers, runner, targets  # noqa: E402
from bench.training.cases import PRESETS, TrainingCase, cases_of  # noqa: E402

CPU = torch.device("cpu")
CASE = TrainingCase("case", 3, 6, 4, model="tiny", repeats=1)
MAIN = "n=4 P=512 R=64"


def rows_of(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "results.json").read_text())["results"]
    return {row["provider"]: row for row in rows if row["case"] == rows[0]["case"]}


def test_tiny_preset_through_the_command(tmp_path):
    readme = tmp_path / "README.md"
    begin, end = tables.marks("training")
    readme.write_text(f"before\n{begin}\nstale text\n{end}\nafter\n")
    out = tmp_path / "out"
    arguments = ["--training", "--preset", "tiny", "--no-memory", "--out", str(out)]
    assert main([*arguments, "--update", str(readme)]) == 0

    data = json.loads((out / "results.json").read_text())
    assert data["complete"] and data["benchmark"] == "training"
    assert data["machine"] and data["versions"]["transformers"] and data["backend"]
    for case in cases_of("tiny"):
        rows = [r for r in data["results"] if r["case"] == case.name]
        assert {r["provider"] for r in rows} == set(case.only)
        for row in rows:
            assert set(row) == set(runner.empty_row(case, "", ""))
            assert row["seconds"] > 0 and row["rounds"] == 2 and not row["wrong"], row
            if row["provider"] != "floor":
                assert row["loss_error"] <= runner.LOSS_TOLERANCE
                assert row["grad_error"] <= runner.GRAD_TOLERANCE
                assert row["optimizer_seconds"] > 0 and 0 < row["collate_share"]
    rows = rows_of(out)
    assert rows["official"]["speedup"] == 1.0 and rows["floor"]["of_floor"] == 1.0
    assert rows["ours-padded"]["vs_padded"] == 1.0
    assert rows["ours-auto"]["note"].startswith("chose ")

    text = (out / "report.md").read_text()
    assert all(f"| {row['label']} |" in text for row in data["results"])
    assert (out / "time.png").read_bytes().startswith(b"\x89PNG") and "(time.png)" in text
    new = readme.read_text()
    assert new.startswith("before\n") and new.endswith("after\n") and "stale text" not in new
    assert data["machine"] in new and "(out/time.png)" in new

    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(["--report", str(out / "results.json"), "--update", str(readme)]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    assert readme.read_text() == new


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch):
    real, count = runner.time_case, []

    def interrupted_on_the_second(*arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(runner, "time_case", interrupted_on_the_second)
    arguments = ["--training", "--preset", "tiny", "--provider", "official", "--no-memory"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    data = json.loads((tmp_path / "results.json").read_text())
    assert not data["complete"]
    assert [r["case"] for r in data["results"]] == [PRESETS["tiny"]()[0].name]
    assert "Partial" in (tmp_path / "report.md").read_text()


def test_a_step_leaves_the_problem_as_it_was():
    work = providers.Workload(CASE, CPU)
    before = {name: p.clone() for name, p in work.model.named_parameters()}
    step = providers.all_providers()["ours-auto"].build(work)
    first = step.run(keep_gradients=True)
    assert all(p.grad.norm() > 0 for p in work.model.parameters())
    assert len(work.optimizer.state) == len(before), "AdamW did its work"
    work.clear()
    assert step.run().loss == first.loss
    assert all(p.grad is None for p in work.model.parameters())
    for name, parameter in work.model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_step_that_computes_something_else_is_flagged(monkeypatch, wrong):
    def build(work):
        step = providers.all_providers()["ours-padded"].build(work)

        def other():
            loss = step.loss()
            if wrong == "loss":
                return loss * 1.001
            return (
                loss + 0.01 * (work.model.lm_head.weight - work.model.lm_head.weight.detach()).sum()
            )

        return providers.TrainingStep(other, work, collate=step.collate)

    table = [providers.all_providers()["official"], providers.Provider("other", "other", build)]
    rows = {r["provider"]: r for r in runner.time_case(CASE, table, Settings(), CPU)}
    assert not rows["official"]["wrong"]
    assert rows["other"]["wrong"] and "WRONG" in rows["other"]["note"]


def test_a_step_that_raises_has_its_reason_in_its_row():
    def build_fails(work):
        raise RuntimeError("cannot\nand more")

    def fails_in_a_round(work):
        step, calls = providers.all_providers()["ours-padded"].build(work), []

        def loss():
            calls.append(1)
            if len(calls) == 2:
                raise ValueError("second call")
            return step.loss()

        return providers.TrainingStep(loss, work, collate=step.collate)

    table = [providers.all_providers()[name] for name in ("official", "ours-shared")]
    table += [
        providers.Provider("a", "a", build_fails), providers.Provider("b", "b", fails_in_a_round)
    ]  # fmt: skip
    settings = Settings(repeats=2)
    rows = {r["provider"]: r for r in runner.time_case(CASE, table, settings, CPU)}
    assert rows["a"]["note"] == "RuntimeError: cannot" and rows["a"]["seconds"] is None
    assert rows["b"]["note"] == "ValueError: second call" and rows["b"]["seconds"] is None
    assert rows["ours-shared"]["rounds"] == 2 and rows["ours-shared"]["speedup"] > 0


def test_floor_multiplies_what_the_loss_needs_and_no_more():
    work = providers.Workload(CASE, CPU)
    head = work.model.lm_head.weight
    body = {id(layer) for layer in work.model.model.modules() if isinstance(layer, torch.nn.Linear)}
    floor = providers.all_providers()["floor"].build(work)
    rows = [rows for rows, _ in floor.shapes]
    # Two lists: a prompt of 6, three completions of 4 whose last tokens predict nothing.
    assert CASE.needed == 2 * (6 + 3 * 3) and CASE.scored == 2 * 3 * 4
    assert rows.count(CASE.needed) == len(body) == 7 * CASE.shape.layers
    assert [r for r, w in floor.shapes if w.shape == head.shape] == [CASE.scored]


def test_features_are_random_repeatable_and_of_the_cases_lengths():
    a, b = providers.make_features(CASE), providers.make_features(CASE)
    assert a == b != providers.make_features(CASE, seed=1)
    for feature in a:
        assert [len(p) for p in feature["prompts"]] == [CASE.P]
        assert [len(c) for c in feature["completions"]] == [CASE.R] * CASE.n
        assert sorted(feature["rewards"], reverse=True) == feature["rewards"]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's clear_refs")
def test_weighing_in_a_child_process(tmp_path):
    answers = []
    wide = TrainingCase("wide", 4, 64, 16, B=8, model="tiny")
    memory.weigh("ours-shared", [CASE, wide], CPU, answers.append, "bench.training.weigh")
    assert [a["case"] for a in answers] == ["case", "wide"]
    assert all("note" not in a for a in answers), answers
    work = providers.Workload(CASE, CPU)
    weights = sum(p.nbytes for p in work.model.parameters())
    assert all(a["gradient_bytes"] == weights for a in answers)
    assert answers[1]["peak_bytes"] > max(weights, answers[0]["peak_bytes"])


def test_targets_say_met_or_not():
    case = TrainingCase(MAIN, 4, 512, 64)
    blank = runner.empty_row(case, "", "")
    rows = [
        {**blank, "provider": "official", "peak_bytes": 1000, "speedup": 1.0},
        {**blank, "provider": "ours-auto", "peak_bytes": 410, "speedup": 3.6,
         "speedup_gradient": 4.0, "collate_share": 0.01},
    ]  # fmt: skip
    said = [o.met for o in targets.outcomes(rows)]
    assert said == [True, None, False, None, None, True]
    rows[1] |= {"speedup": 3.4, "peak_bytes": 390, "collate_share": 0.04}
    assert [o.met for o in targets.outcomes(rows)] == [False, None, True, None, None, False]
    rows[1]["wrong"] = True
    assert targets.outcomes(rows)[0].met is None
    even = {**blank, "case": "n=8 P=128 R=128", "provider": "ours-auto", "vs_padded": 0.97}
    assert targets.outcomes([even])[4].met is False
    assert "| **no** |" in tables.outcome_table(targets.outcomes([even]))


def test_every_target_names_a_case_of_the_full_preset():
    names = {case.name for case in PRESETS["full"]()}
    assert {o.what for o in targets.outcomes([])} and set(targets.SPEED) <= names
    assert targets.NEVER_SLOWER in names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "no such case"], "no training case of preset"),
        (["--provider", "nobody"], "provider must be"),
        (["--repeats", "0"], "--repeats must be at least 1"),
    ],
)
def test_wrong_calls(tmp_path, capsys, arguments, said):
    assert main(["--training", "--preset", "tiny", "--out", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_list_names_the_cases_of_the_full_preset(capsys):
    assert main(["--training", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) == 5 and MAIN in names
