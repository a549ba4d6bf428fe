"""The training benchmark, end to end on its tiny preset (the numbers mean nothing)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs the 'train' extra")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed
import pro_kernels as pk  # noqa: E402
from bench import memory, tables  # noqa: E402
from bench.case_run import Clock, Settings  # noqa: E402
from bench.cli import main  # noqa: E402
from bench.training import (  # noqa: E402
    pairs,
    providers,
    runner,
    shapes,
    steps,
    targets,
    truth,
    workload,
)  # fmt: skip
from bench.training import tables as training_tables  # noqa: E402
from bench.training.cases import MODELS, PRESETS, TrainingCase, cases_of, left_out  # noqa: E402

CPU = torch.device("cpu")
CASE = TrainingCase("case", 3, 6, 4, model="test", repeats=1)
PAIRS = TrainingCase("pairs", 2, 6, 4, model="test", repeats=2)
DPO = ("trl-dpo", "trl-dpo-head", "trl-dpo-distinct", "ours-dpo-padded", "ours-dpo-lists")
TRLS = tuple(name for name in DPO if name.startswith("trl"))
MAIN = "n=4 P=512 R=64"


def trl_installed() -> bool:
    try:
        return importlib.metadata.version("trl").startswith("1.16.")
    except importlib.metadata.PackageNotFoundError:
        return False


needs_trl = pytest.mark.skipif(not trl_installed(), reason="needs TRL 1.16")


def rows_at(case: TrainingCase, names: tuple[str, ...], **settings) -> dict[str, dict]:
    table = [providers.all_providers()[name] for name in names]
    return {r["provider"]: r for r in runner.time_case(case, table, Settings(**settings), CPU)}


def rows_of(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "results.json").read_text())["results"]
    return {row["provider"]: row for row in rows if row["case"] == rows[0]["case"]}


def test_tiny_preset_through_the_command(tmp_path):
    page = tmp_path / "page.md"
    begin, end = tables.marks("training")
    page.write_text(f"before\n{begin}\nstale text\n{end}\nafter\n")
    out = tmp_path / "out"
    arguments = ["--training", "--preset", "tiny", "--no-memory", "--out", str(out)]
    assert main([*arguments, "--update", str(page)]) == 0

    data = json.loads((out / "results.json").read_text())
    assert data["complete"] and data["benchmark"] == "training"
    assert data["machine"] and data["versions"]["transformers"] and data["backend"]
    for case in cases_of("tiny"):
        rows = [r for r in data["results"] if r["case"] == case.name]
        assert {r["provider"] for r in rows} == set(case.only)
        for row in rows:
            assert set(row) == set(runner.empty_row(case, "", ""))
            if row["provider"] in TRLS and not trl_installed():
                assert row["seconds"] is None and row["note"]
                continue
            assert row["seconds"] > 0 and row["rounds"] == 2 and not row["wrong"], row
            if row["provider"] == "floor":
                assert row["tokens_per_second"] is None and row["head_share"] is None
                continue
            most = truth.TOLERANCES[row["loss_type"], "fp32"]
            assert row["loss_error"] <= most[0] and row["grad_error"] <= most[1]
            assert row["optimizer_seconds"] > 0 and 0 < row["collate_share"]
            assert row["tokens_per_second"] == case.tokens / row["seconds"]
            assert row["head_seconds"] > 0 and row["head_share"] > 0, row
            if row["provider"] in DPO:
                assert row["note"] == pairs.NOTE and row["speedup"] is None
    rows = rows_of(out)
    assert rows["official"]["speedup"] == 1.0 and rows["floor"]["of_floor"] == 1.0
    assert rows["ours-padded"]["vs_padded"] == 1.0

    text = (out / "report.md").read_text()
    assert all(f"| {row['label']} |" in text for row in data["results"])
    assert (out / "time.png").read_bytes().startswith(b"\x89PNG") and "(time.png)" in text
    assert (out / "head.png").is_file() and "(head.png)" in text and "tokens/s" in text
    new = page.read_text()
    assert new.startswith("before\n") and new.endswith("after\n") and "stale text" not in new
    assert data["machine"] in new and "(out/time.png)" in new
    assert "ours DPO, lists, tokens/s (head)" in new

    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(["--report", str(out / "results.json"), "--update", str(page)]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    assert page.read_text() == new


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
    work = workload.Workload(CASE, CPU)
    before = {name: p.clone() for name, p in work.model.named_parameters()}
    step = providers.all_providers()["ours-lists"].build(work)
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

        def other(model):
            loss = step.loss(model)
            if wrong == "loss":
                return loss * 1.001
            return loss + 0.01 * (model.lm_head.weight - model.lm_head.weight.detach()).sum()

        return steps.TrainingStep(other, work, collate=step.collate)

    table = [providers.all_providers()["official"], providers.Provider("other", "other", build)]
    rows = {r["provider"]: r for r in runner.time_case(CASE, table, Settings(), CPU)}
    assert not rows["official"]["wrong"]
    assert rows["other"]["wrong"] and "WRONG" in rows["other"]["note"]


def test_a_step_that_raises_has_its_reason_in_its_row():
    def build_fails(work):
        raise RuntimeError("cannot\nand more")

    table = [providers.all_providers()[name] for name in ("official", "ours-lists")]
    table += [
        providers.Provider("a", "a", build_fails),
        providers.Provider("b", "b", lambda work: failing(work, 2, checkpointed=True)),
    ]
    settings = Settings(repeats=2)
    rows = {r["provider"]: r for r in runner.time_case(CASE, table, settings, CPU)}
    assert rows["a"]["note"] == "RuntimeError: cannot" and rows["a"]["seconds"] is None
    assert rows["b"]["note"] == "ValueError: enough" and rows["b"]["seconds"] is None
    assert rows["ours-lists"]["rounds"] == 2 and rows["ours-lists"]["speedup"] > 0


def failing(work, calls: int, checkpointed: bool = False) -> steps.TrainingStep:
    """Ours, raising after so many calls; one is the first check."""
    step, done = providers.all_providers()["ours-padded"].build(work), []

    def loss(model):
        done.append(1)
        if len(done) > calls:
            raise ValueError("enough")
        return step.loss(model)

    return steps.TrainingStep(loss, work, checkpointed, step.collate)


def test_a_step_that_crashes_in_the_middle_leaves_the_others_alone():
    names = ("official", "ours-lists", "ours-dpo-padded")
    table = [providers.all_providers()[name] for name in names]
    # One call is the check, one is recorded for the head, one is the first round.
    table.append(providers.Provider("b", "b", lambda work: failing(work, 3, checkpointed=True)))
    rows = {r["provider"]: r for r in runner.time_case(PAIRS, table, Settings(repeats=4), CPU)}
    assert rows["b"]["note"] == "ValueError: enough"
    assert rows["b"]["rounds"] == 0 and rows["b"]["head_share"] is None
    assert all(rows[name]["rounds"] == 4 and not rows[name]["wrong"] for name in names)
    assert all(rows[name]["head_share"] > 0 for name in names)


def test_a_failed_step_leaves_no_gradient_checkpointing_behind():
    work = workload.Workload(CASE, CPU)
    with pytest.raises(ValueError, match="enough"):
        failing(work, 0, checkpointed=True).run()
    assert not work.model.is_gradient_checkpointing


def test_a_loss_that_changes_from_round_to_round_is_flagged():
    def build(work):
        step, calls = providers.all_providers()["ours-padded"].build(work), []

        def loss(model):
            calls.append(1)
            return step.loss(model) * (2 if len(calls) == 4 else 1)

        return steps.TrainingStep(loss, work, collate=step.collate)

    table = [providers.all_providers()["official"], providers.Provider("b", "b", build)]
    rows = {r["provider"]: r for r in runner.time_case(CASE, table, Settings(repeats=2), CPU)}
    assert rows["b"]["wrong"] and "round to round" in rows["b"]["note"]
    assert not rows["official"]["wrong"]


def test_errors_are_against_the_plain_procedure_though_it_is_no_row():
    row = rows_at(CASE, ("ours-lists",))["ours-lists"]
    assert 0 < row["grad_error"] <= truth.TOLERANCES["pro", "fp32"][1] and row["speedup"] is None


def test_a_truth_that_fails_is_said_and_the_steps_are_timed(monkeypatch):
    def fails(model, work):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(truth, "_official", fails)
    row = rows_at(CASE, ("official",))["official"]
    assert row["note"] == "not compared: RuntimeError: out of memory"
    assert row["loss_error"] is None and row["rounds"] == 1


@pytest.mark.parametrize("name", ["official", "ours-padded", "ours-lists", *DPO])
def test_the_head_alone_is_the_steps_head(name):
    """Same loss; the head's gradient is the step's, as the test model is not tied."""
    if name in TRLS and not trl_installed():
        pytest.skip("needs TRL 1.16")
    work = workload.Workload(PAIRS, CPU)
    step = providers.all_providers()[name].build(work)
    loss = step.run(keep_gradients=True).loss
    weight = work.model.lm_head.weight
    expected = weight.grad.clone()
    work.clear()
    head, gradients = steps.HeadAlone(step), []
    clear, work.clear = work.clear, lambda: gradients.append(weight.grad.clone())
    calls = []
    work.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert head.run().loss == pytest.approx(loss, rel=1e-6)
    clear()
    torch.testing.assert_close(gradients[0], expected)
    assert not calls, "the decoder does not run"
    assert all(hidden.grad is None for hidden in head.decoder.kept)


def test_a_head_that_cannot_be_measured_says_nothing(monkeypatch):
    def fails(self):
        raise RuntimeError("no head")

    monkeypatch.setattr(steps.HeadAlone, "run", fails)
    row = rows_at(CASE, ("official",))["official"]
    assert row["rounds"] == 1 and row["head_share"] is None and row["head_seconds"] is None
    assert row["note"] == "head not measured: RuntimeError: no head" and not row["wrong"]


@needs_trl
def test_trl_and_ours_agree_on_dpo_and_leave_the_model_alone():
    work = workload.Workload(PAIRS, CPU)
    forward, settings = work.model.forward, work.model.config.to_dict()
    table = providers.all_providers()
    losses, gradients = {}, {}
    for name in DPO:
        step = table[name].build(work)
        losses[name] = step.run(keep_gradients=True).loss
        gradients[name] = [p.grad.clone() for p in work.model.parameters()]
        work.clear()
        assert step.run().loss == pytest.approx(losses[name], rel=1e-6)
    assert abs(losses["trl-dpo"] - 0.6931) > 1e-3, "policy and reference differ"
    for name in DPO[1:]:
        assert losses[name] == pytest.approx(losses["trl-dpo"], rel=1e-5)
        torch.testing.assert_close(gradients[name], gradients["trl-dpo"], rtol=1e-4, atol=1e-6)
    assert work.model.forward == forward and work.model.config.to_dict() == settings


@needs_trl
def test_trl_with_another_loss_is_flagged(monkeypatch):
    build = pairs._trainer

    def other(work):
        trainer = build(work)
        trainer.beta = 0.2
        return trainer

    monkeypatch.setattr(pairs, "_trainer", other)
    rows = rows_at(PAIRS, DPO)
    assert rows["trl-dpo"]["wrong"] and not rows["ours-dpo-lists"]["wrong"]
    assert "trl-dpo" not in training_tables.summary_rows(list(rows.values()))


@pytest.mark.parametrize(
    ("version", "said"),
    [(None, "not installed: pip install 'trl==1.16.*'"), ("1.15.0", "version 1.15.0 is installed")],
)
def test_without_the_right_trl_its_row_says_so_and_the_rest_goes_on(monkeypatch, version, said):
    real = importlib.metadata.version

    def reported(package):
        if package != "trl":
            return real(package)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", reported)
    rows = rows_at(PAIRS, ("official", *DPO))
    for name in TRLS:
        assert rows[name]["note"].startswith(said) and rows[name]["seconds"] is None
        assert set(rows[name]) == set(runner.empty_row(PAIRS, "", ""))
    for name in ("official", *(name for name in DPO if name not in TRLS)):
        assert rows[name]["rounds"] == 2 and not rows[name]["wrong"]
        assert rows[name]["vs_trl"] is None and rows[name]["loss_error"] is not None


def test_dpo_takes_pairs_only():
    row = rows_at(CASE, ("ours-dpo-padded",))["ours-dpo-padded"]
    assert row["seconds"] is None and row["note"] and "not compared" not in row["note"]


def test_bf16_is_held_against_fp32_of_the_same_weights(monkeypatch):
    monkeypatch.setitem(MODELS, "test bf16", replace(MODELS["test"], dtype="bf16", kv_heads=2))
    case = replace(PAIRS, model="test bf16")
    names = (
        "floor",
        "official",
        "ours-padded",
        "ours-lists",
        *DPO[0 if trl_installed() else len(TRLS) :],
    )
    rows = rows_at(case, names)
    for name in names[1:]:
        assert 1e-4 < rows[name]["grad_error"] < 0.1 and not rows[name]["wrong"], rows[name]
    work = workload.Workload(case, CPU)
    assert work.model.dtype == torch.bfloat16 != work.exact_model().dtype
    assert work.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert rows["floor"]["seconds"] > 0


def test_time_that_is_over_starts_nothing_more(tmp_path):
    settings = Settings("tiny", providers=("official", "ours-lists"), without=("ours-lists",))
    over = replace(settings, seconds=1e-9)
    data = runner.run(over, tmp_path / "results.json", CPU, log=lambda _: None)
    assert data["complete"] and {row["provider"] for row in data["results"]} == {"official"}
    assert all(row["note"].startswith("not run: ") for row in data["results"])
    assert list(runner._clocked(3, Clock(1e-9))) == [0]
    assert list(runner._clocked(3, Clock(None))) == [0, 1, 2]


def test_cases_that_need_a_gpu_are_left_out_elsewhere(capsys):
    everywhere, with_gpu = cases_of("cpu"), cases_of("cpu", (), True)
    names = left_out("cpu", (), False)
    assert [c.name for c in with_gpu if c not in everywhere] == names and len(names) == 2
    assert left_out("cpu", (), True) == [] == left_out("cpu", ("n=8",), False)
    with pytest.raises(ValueError, match="needs a GPU: n=2 P=512 R=64, 0.5B"):
        cases_of("cpu", ("n=2 P=512 R=64, 0.5B",))
    assert "needs a GPU: a; b" in training_tables.not_measured({"left_out": ["a", "b"]})[0]
    shape = MODELS["0.5B"]
    kv = shape.H * shape.kv_heads // shape.heads
    layer = 2 * shape.H * (shape.H + kv) + 3 * shape.H * shape.feed_forward
    assert 4.9e8 < shape.V * shape.H + shape.layers * layer < 1e9


def test_floor_multiplies_what_the_loss_needs_and_no_more():
    work = workload.Workload(CASE, CPU)
    head = work.model.lm_head.weight
    body = {id(layer) for layer in work.model.model.modules() if isinstance(layer, torch.nn.Linear)}
    floor = providers.all_providers()["floor"].build(work)
    rows = [rows for rows, _ in floor.shapes]
    # Two lists: a prompt of 6, three completions of 4 whose last tokens predict nothing.
    assert CASE.needed == 2 * (6 + 3 * 3) and CASE.scored == 2 * 3 * 4
    assert rows.count(CASE.needed) == len(body) == 7 * CASE.shape.layers
    assert [r for r, w in floor.shapes if w.shape == head.shape] == [CASE.scored]


def test_features_are_random_repeatable_and_of_the_cases_lengths():
    a, b = workload.make_features(CASE), workload.make_features(CASE)
    assert a == b != workload.make_features(CASE, seed=1)
    for feature in a:
        assert [len(p) for p in feature["prompts"]] == [CASE.P]
        assert [len(c) for c in feature["completions"]] == [CASE.R] * CASE.n
        assert sorted(feature["rewards"], reverse=True) == feature["rewards"]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's clear_refs")
def test_weighing_in_a_child_process(tmp_path):
    answers = []
    wide = TrainingCase("wide", 4, 64, 16, B=8, model="test")
    memory.weigh("ours-lists", [CASE, wide], CPU, answers.append, "bench.training.weigh")
    assert [a["case"] for a in answers] == ["case", "wide"]
    assert all("note" not in a for a in answers), answers
    work = workload.Workload(CASE, CPU)
    weights = sum(p.nbytes for p in work.model.parameters())
    assert all(a["gradient_bytes"] == weights for a in answers)
    assert answers[1]["peak_bytes"] > max(weights, answers[0]["peak_bytes"])


def test_targets_say_met_or_not():
    case = TrainingCase(MAIN, 4, 512, 64)
    blank = runner.empty_row(case, "", "")

    def met(rows):
        return {o.what: o.met for o in targets.outcomes(rows) if o.met is not None}

    rows = [
        {**blank, "provider": "official", "peak_bytes": 1000, "speedup": 1.0},
        {**blank, "provider": "ours-lists", "peak_bytes": 410, "speedup": 3.6,
         "speedup_gradient": 4.0, "collate_share": 0.01},
    ]  # fmt: skip
    assert list(met(rows).values()) == [True, False, True]
    rows[1] |= {"speedup": 3.4, "peak_bytes": 390, "collate_share": 0.04}
    assert list(met(rows).values()) == [False, True, False]
    rows[1]["wrong"] = True
    assert list(met(rows)) == ["collation, the worst case"]
    for name, least in targets.AGAINST_PADDED.items():
        row = {**blank, "case": name, "provider": "ours-lists", "vs_padded": least - 0.01}
        assert met([row]) == {f"{name}: lists against padded rows": False}
        assert met([row | {"vs_padded": least}]) == {f"{name}: lists against padded rows": True}
    blank["case"] = targets.TRL
    trl = [
        {**blank, "provider": f"trl-dpo{kind}", "vs_trl": times, "peak_bytes": peak}
        for kind, times, peak in (("", 1.0, 10), ("-head", 1.1, 8), ("-distinct", 3.4, 5))
    ]
    assert list(met(trl).values()) == [False, True, True]
    assert "| **no** |" in tables.outcome_table(targets.outcomes(trl))


def test_real_cases_have_the_lengths_of_real_lists():
    found = [case for case in cases_of("cpu") if case.data]
    assert [case.data for case in found] == list(shapes.load())
    for case in found:
        assert case.needed < case.tokens and case.B == len(case.lists)
        features = workload.make_features(case)
        got = [(len(f["prompts"][0]), [len(c) for c in f["completions"]]) for f in features]
        assert got == [(prompt, own) for prompt, own in case.lists]
        assert len({tuple(f["prompts"][0][: case.start]) for f in features}) == 1
        rows = [f["prompts"][0] + c for f in features for c in f["completions"]]
        # The floor leaves last tokens out, which predict nothing.
        distinct = case.needed + sum(len(own) for _, own in case.lists)
        assert pk.TokenTree.from_sequences(rows).num_tokens == pytest.approx(distinct, rel=0.02)


@pytest.mark.parametrize("last", [40.0, 80.0])
def test_growth_is_held_against_a_line(last):
    rows = [
        {**runner.empty_row(case, "ours-lists", ""), "seconds": 3 + case.needed, "peak_bytes": b}
        for case, b in zip(cases_of("cpu", ("growth",)), (5.0, 10.0, 20.0, last), strict=True)
    ]
    met = {o.what: o.met for o in targets.outcomes(rows)}
    assert met["time linear in tokens that differ, 2,032 to 16,256"]
    assert met["memory linear in tokens that differ, 2,032 to 16,256"] is (last == 40.0)


def test_every_target_names_a_case_of_the_largest_preset():
    names = {case.name.split(" in ")[0] for case in PRESETS["cpu"]()}
    named = {*targets.SPEED, *targets.AGAINST_PADDED, *targets.OF_FLOOR, targets.TRL}
    assert {o.what for o in targets.outcomes([])} and named <= names


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


def test_list_names_the_cases(capsys):
    assert main(["--training", "--list", "--preset", "tiny"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in cases_of("tiny")]
    for preset in PRESETS:
        names = [case.name for case in cases_of(preset, (), True)]
        assert len(names) == len(set(names))
    assert len(cases_of("cpu")) == 16 and MAIN in {case.name for case in cases_of("cpu")}
    with pytest.raises(ValueError, match="preset of --training must be one of"):
        cases_of("Qwen")
