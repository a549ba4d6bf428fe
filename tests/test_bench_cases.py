"""What is measured: inputs and truth of the loss, model, lists and steps of a training step."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pro_kernels as pk
from bench.engine import lists, losses
from bench.engine.case import Case, real_case
from bench.engine.run import Run, Settings
from bench.engine.step import MODELS, HeadAlone, TrainingCase, TrainingStep, Workload, make_features
from bench.engine.timing import Refused, backward_step
from bench.engine.truth import make_inputs, make_truth
from bench.providers import base, trl
from bench.suites import loss, step
from pro_kernels.fused import planner
from test_bench_run import CASES, CPU, DPO, measured, no_peers

CASE, STEP = CASES["loss"], CASES["step"]
PAIRS = TrainingCase("pairs", 2, 6, 4, model="test", repeats=2)
TRLS = tuple(name for name in DPO if name.startswith("trl"))
STEPS = step.SUITE.providers(CPU)


def real_models(test):  # noqa: ANN001, ANN201
    """Of models and data that are built, or lie beside a checkout."""
    there = "PRO_KERNELS_MODELS" in os.environ
    skip = pytest.mark.skipif(not there, reason="needs the real models: make test-models")
    return pytest.mark.models(pytest.mark.shared(skip(test)))


@pytest.fixture(scope="module", autouse=True)
def _trl() -> None:
    pytest.importorskip("trl", reason="needs TRL 1.16")


EAGER = ("ours-torch", "ours-layout", "plain-fp32", "official", "trl", "torch-lce",
         "torch-lce-chunked", "torch-lce-mean")  # fmt: skip
LEAVES = {"linear": 2, "ce": 2, "frozen": 1, "score": 0, "logits": 1, "ranking": 1}


@pytest.mark.parametrize(
    ("name", "kind", "softcap"),
    [
        *itertools.product(EAGER, LEAVES, [None]),
        *itertools.product(EAGER, ["linear"], [3.0]),
        *(pytest.param(name, "linear", None, marks=pytest.mark.slow)
          for name in ("official-compiled", "liger", "cce")),
    ],
)  # fmt: skip
def test_every_provider_computes_the_same_loss_and_gradient(name, kind, softcap):
    n, masked = 3 if name in EAGER else 2, 0.0 if kind == "ranking" else 0.5
    H = 0 if kind in ("logits", "ranking") else 16
    inputs = make_inputs(Case("case", H, 101, 2, n, 8, masked, "fp32", kind, softcap=softcap))
    try:
        made = base.all_providers(CPU)[name].build(inputs)
    except Refused as refused:
        expected = kind in ("logits", "ranking", "score") or softcap or name not in EAGER
        assert expected or "mean" in str(refused)
        return
    errors = make_truth(inputs).errors(float(made.run()), made)
    assert errors.pop("loss_error") < 1e-5
    assert all(e < 1e-5 for e in errors.values() if e is not None), errors
    assert len(made.leaves) == LEAVES[kind]
    assert (made.gradient_bytes > 0) == (LEAVES[kind] > 0)
    if name in EAGER:
        assert (errors["logp_error"] is None) == (kind == "ranking" or "mean" in name)


def test_a_wrong_gradient_is_flagged_though_the_loss_is_near():
    inputs = make_inputs(CASE)

    def sft_only() -> torch.Tensor:
        chosen = losses.plain_logps(inputs.hidden @ inputs.weight.t(), inputs.targets)
        best = torch.where(inputs.targets != -100, chosen, 0.0).sum(-1)[:, 0]
        return -losses.SFT_WEIGHT * (CASE.n - 1) ** 2 * best.mean()

    truth, official = make_truth(inputs), base.all_providers(CPU)["official"]
    for made, wrong in (
        (backward_step(sft_only, inputs.leaves), True),
        (official.build(inputs), False),
    ):
        row = loss.SUITE.blank(CASE, official)
        loss.check(row, truth, float(made.run()), made)
        assert row["wrong"] is wrong and (row["input_grad_error"] > 0.2) is wrong
        made.clear()


@pytest.mark.parametrize(
    "case",
    [
        *(Case("case", 16, 101, 4, 3, 20, masked) for masked in (0.0, 0.5, 0.85)),
        *(real_case(name, 2, 16, 101) for name in lists.load()),
    ],
    ids=lambda case: case.data or f"masked {case.masked:.0%}",
)
def test_inputs_are_random_repeatable_and_masked_as_the_case_says(case):
    a, b = make_inputs(case), make_inputs(case)
    assert torch.equal(a.hidden, b.hidden) and torch.equal(a.targets, b.targets)
    scored = (a.targets != -100).sum(-1)
    assert int(scored.sum()) == case.scored and (scored > 0).all()
    assert (a.rewards.diff(dim=1) <= 0).all() and 0 <= a.rewards.min() <= a.rewards.max() <= 1
    assert a.hidden.float().std() > 0.5 and a.weight.float().std() > 0
    if case.data:
        assert scored.tolist() == lists.load()[case.data].completions[:2]
        assert case.tokens == 2 * case.n * case.T and 0 < case.masked < 1


@real_models
@pytest.mark.parametrize("model", lists.MODELS)
def test_hidden_states_of_real_models(model, shared, monkeypatch):
    """Every formulation gives the truth; their next tokens are far likelier than chance."""
    monkeypatch.setenv("PRO_KERNELS_DATA", str(shared / "data"))
    (case,) = (c for c in loss.SUITE.cases("cpu", ("real",)) if c.model == model)
    case = real_case(case.data, 1, case.H, case.V, case.model, dtype=case.dtype)
    inputs = make_inputs(case)
    truth = make_truth(inputs)
    assert truth.logps.mean() > -0.5 * torch.tensor(float(case.V)).log()
    made = base.all_providers(CPU)[base.ours_name(CPU)].build(inputs)
    row = loss.SUITE.blank(case, base.all_providers(CPU)["floor"])
    loss.check(row, truth, float(made.run()), made)
    assert not row["wrong"] and row["loss_error"] < 1e-3


def test_a_model_that_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PRO_KERNELS_MODELS", str(tmp_path))
    case = next(c for c in loss.SUITE.cases("cpu", ("real",)))
    with pytest.raises(Refused, match="no model smollm2-135m-instruct in"):
        make_inputs(case)
    rows = loss.measure(case, [base.all_providers(CPU)["floor"]], Run(Settings(), CPU))
    assert rows[0]["note"].startswith("not run: no model")


def test_a_slow_peer_takes_part_in_fewer_rounds():
    rows = measured("loss", None, "floor", "official", repeats=4, peer_seconds=0.0)
    assert (rows["floor"]["rounds"], rows["official"]["rounds"]) == (4, 1)
    assert rows["official"]["note"] == "one call, the first"


def test_cases_too_large_are_refused_with_their_size():
    huge = Case("huge", 8, 10**7, 1, 8, 10**5, 0.0)
    table = base.all_providers(CPU)
    assert "not run: needs about" in table["plain-fp32"].refusal_of_size(huge)
    assert table["ours-torch"].refusal_of_size(huge) is None
    huge = Case("huge", 10**5, 10**7, 1, 2, 8, 0.0)
    note = measured("loss", huge, "floor")["floor"]["note"]
    assert note.startswith("not run: its inputs need 2000 GB")


@pytest.mark.parametrize("tier", ["T2", "T3"])
def test_a_tier_is_reached_by_its_budget(tier, monkeypatch):
    monkeypatch.setattr("pro_kernels.fused.planner.MIN_T2_ROWS", 1)
    plans, real = [], planner.make_plan
    monkeypatch.setattr(
        "pro_kernels.fused.call.make_plan",
        lambda *a, **k: plans.append(real(*a, **k)) or plans[-1],
    )
    case = Case("case", 16, 4001, 32, 2, 16, 0.0, "fp32")
    base.all_providers(CPU)[f"ours-{tier}"].build(make_inputs(case)).run()
    assert [plan.tier for plan in plans] == [tier]


@pytest.mark.parametrize("name", ["official", "ours-padded", "ours-lists", *DPO])
def test_a_step_leaves_the_problem_as_it_was_and_its_head_alone_is_its_head(name):
    work, calls = Workload(PAIRS, CPU), []
    before = {key: p.clone() for key, p in work.model.named_parameters()}
    made, weight = STEPS[name].build(work), work.model.lm_head.weight
    value = made.run(keep_gradients=True).loss
    assert all(p.grad.norm() > 0 for p in work.model.parameters())
    assert len(work.optimizer.state) == len(before), "AdamW did its work"
    expected = weight.grad.clone()
    work.clear()
    assert made.run().loss == pytest.approx(value, rel=1e-6)
    assert all(p.grad is None for p in work.model.parameters())
    assert all(torch.equal(p, before[key]) for key, p in work.model.named_parameters())

    head, gradients = HeadAlone(made), []
    clear, work.clear = work.clear, lambda: gradients.append(weight.grad.clone())
    work.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert head.run().loss == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(gradients[0], expected)  # the test model is not tied
    assert not calls, "the decoder does not run"
    assert all(hidden.grad is None for hidden in head.decoder.kept)
    clear()


def test_a_step_with_another_gradient_or_a_loss_that_changes_is_flagged():
    def other(work):
        made, head = STEPS["ours-padded"].build(work), work.model.lm_head.weight
        return replace(made, loss=lambda x: made.loss(x) + 0.01 * (head - head.detach()).sum())

    def changing(work):
        made, calls = STEPS["ours-padded"].build(work), itertools.count(1)
        return replace(made, loss=lambda x: made.loss(x) * (2 if next(calls) == 4 else 1))

    wrong = {"other": other, "changing": changing}
    more = [replace(STEPS["official"], name=name, build=build) for name, build in wrong.items()]
    rows = measured("step", None, "official", more=more)
    assert {name for name, row in rows.items() if row["wrong"]} == {*wrong}
    assert rows["other"]["loss_error"] < 1e-5 and "round to round" in rows["changing"]["note"]


def test_a_step_that_fails_leaves_no_checkpointing_behind():
    work = Workload(STEP, CPU)
    with pytest.raises(ZeroDivisionError):
        TrainingStep(lambda _: 1 / 0, work, checkpointed=True).run()
    assert not work.model.is_gradient_checkpointing


def test_errors_are_against_the_plain_procedure_and_a_truth_that_fails_is_said(monkeypatch):
    row = measured("step", None, "ours-lists")["ours-lists"]
    assert 0 < row["grad_error"] <= step.TOLERANCES["pro", "fp32"][1] and row["speedup"] is None

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(step, "_official", fails)
    row = measured("step", None, "official")["official"]
    assert row["note"] == "not compared: RuntimeError: out of memory"
    assert row["loss_error"] is None and row["rounds"] == 2
    monkeypatch.undo()
    monkeypatch.setattr(HeadAlone, "run", fails)
    row = measured("step", None, "official")["official"]
    assert row["rounds"] == 2 and row["head_share"] is None and row["head_seconds"] is None
    assert row["note"] == "head not measured: RuntimeError: out of memory" and not row["wrong"]


def test_trl_and_ours_agree_on_dpo_and_leave_the_model_alone(monkeypatch):
    work = Workload(PAIRS, CPU)
    forward, settings = work.model.forward, work.model.config.to_dict()
    values, gradients = {}, {}
    for name in DPO:
        made = STEPS[name].build(work)
        values[name] = made.run(keep_gradients=True).loss
        gradients[name] = [p.grad.clone() for p in work.model.parameters()]
        work.clear()
    assert abs(values["trl-dpo"] - 0.6931) > 1e-3, "policy and reference differ"
    for name in DPO[1:]:
        assert values[name] == pytest.approx(values["trl-dpo"], rel=1e-5)
        torch.testing.assert_close(gradients[name], gradients["trl-dpo"], rtol=1e-4, atol=1e-6)
    assert work.model.forward == forward and work.model.config.to_dict() == settings

    real = trl._trainer

    def other(work):
        trainer = real(work)
        trainer.beta = 0.2
        return trainer

    monkeypatch.setattr(trl, "_trainer", other)
    rows = measured("step", PAIRS, "trl-dpo", "ours-dpo-lists")
    assert rows["trl-dpo"]["wrong"] and not rows["ours-dpo-lists"]["wrong"]


def test_another_trl_is_refused_and_dpo_takes_pairs_only(monkeypatch):
    assert measured("step", STEP, "ours-dpo-padded")["ours-dpo-padded"]["note"].startswith("n > 2")
    no_peers(monkeypatch, "1.15.0")
    rows = measured("step", PAIRS, "official", *DPO)
    for name, row in rows.items():
        if name in TRLS:
            assert row["note"].startswith("version 1.15.0 is installed") and row["seconds"] is None
        else:
            assert row["rounds"] == 2 and not row["wrong"] and row["vs_trl"] is None


def test_bf16_is_held_against_fp32_of_the_same_weights(monkeypatch):
    monkeypatch.setitem(MODELS, "test bf16", replace(MODELS["test"], dtype="bf16", kv_heads=2))
    case = replace(PAIRS, model="test bf16")
    names = ("floor", "official", "ours-padded", "ours-lists", *DPO)
    rows = measured("step", case, *names)
    for name in names[1:]:
        assert 1e-4 < rows[name]["grad_error"] < 0.1 and not rows[name]["wrong"], rows[name]
    work = Workload(case, CPU)
    assert work.model.dtype == torch.bfloat16 != work.exact_model().dtype
    assert work.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert rows["floor"]["seconds"] > 0


def test_cases_that_need_a_gpu_are_left_out_elsewhere():
    names = step.SUITE.about(Settings("cpu"), [], CPU)["left_out"]
    everywhere, with_gpu = (step.SUITE.cases("cpu", on_gpu=on) for on in (False, True))
    assert [c.name for c in with_gpu if c not in everywhere] == names and len(names) == 2
    assert step.SUITE.about(Settings("cpu"), [], torch.device("cuda"))["left_out"] == []
    shape = MODELS["0.5B"]
    kv = shape.H * shape.kv_heads // shape.heads
    layer = 2 * shape.H * (shape.H + kv) + 3 * shape.H * shape.feed_forward
    assert 4.9e8 < shape.V * shape.H + shape.layers * layer < 1e9


def test_floor_multiplies_what_the_loss_needs_and_no_more():
    work = Workload(STEP, CPU)
    head = work.model.lm_head.weight
    body = {id(layer) for layer in work.model.model.modules() if isinstance(layer, torch.nn.Linear)}
    floor = STEPS["floor"].build(work)
    rows = [rows for rows, _ in floor.shapes]
    # Two lists: a prompt of 6, three completions of 4 whose last tokens predict nothing.
    assert STEP.needed == 2 * (6 + 3 * 3) and STEP.scored == 2 * 3 * 4
    assert rows.count(STEP.needed) == len(body) == 7 * STEP.shape.layers
    assert [r for r, w in floor.shapes if w.shape == head.shape] == [STEP.scored]


def test_features_have_the_lengths_of_the_case():
    a, b = make_features(STEP), make_features(STEP)
    assert a == b != make_features(STEP, seed=1)
    real = [case for case in step.SUITE.cases("cpu") if case.data]
    assert {case.data for case in real} == {"HH", "ranked", "ranked pairs"}
    for case in (STEP, *real):
        features = make_features(case)
        got = [(len(f["prompts"][0]), [len(c) for c in f["completions"]]) for f in features]
        assert got == [(prompt, list(own)) for prompt, own in case.lists]
        assert all(sorted(f["rewards"], reverse=True) == f["rewards"] for f in features)
        if not case.data:
            continue
        assert case.needed < case.tokens and case.B == len(case.lists)
        assert len({tuple(f["prompts"][0][: case.start]) for f in features}) == 1
        rows = [f["prompts"][0] + c for f in features for c in f["completions"]]
        # The floor leaves last tokens out, which predict nothing.
        distinct = case.needed + sum(len(own) for _, own in case.lists)
        assert pk.TokenTree.from_sequences(rows).num_tokens == pytest.approx(distinct, rel=0.02)


@real_models
def test_committed_lists_are_those_of_the_data(shared):
    from pro_trainer.models import load_tokenizer

    models = Path(os.environ["PRO_KERNELS_MODELS"])
    for name, entry in lists.load().items():
        tokenizer = load_tokenizer(str(models / entry.model))
        found = lists.tokens(shared / "data" / f"{entry.source}.jsonl.gz", tokenizer,
                             len(entry.completions[0]))  # fmt: skip
        for own, rewards, (rows, given) in zip(
            entry.completions, entry.rewards, found, strict=False
        ):
            shared_tokens = lists._shared(rows)
            assert [len(x) - shared_tokens for x in rows] == own, name
            assert given == pytest.approx(rewards, abs=1e-3)
