"""The reference model: scored once and stored, or moved along with the trained one."""

from __future__ import annotations

import copy

import pytest
import torch
from trainer_runs import losses, records, trainer_for

from pro_trainer.models import tiny_llama
from pro_trainer.train.reference import COLUMN

DPO = {"loss_type": "dpo", "learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1}


def lora():
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)


@pytest.mark.parametrize("adapters", [False, True])
def test_scores_computed_once_give_the_same_run(adapters, tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        peft_config = lora() if adapters else None
        data = {"eval_data": records(3), "peft_config": peft_config}
        trainer = trainer_for(tmp_path / folder, **DPO, **data, **options)
        before = trainer.evaluate()
        trainer.train()
        return trainer, before

    (plain, before), (stored, before_stored) = (
        run("plain"),
        run("stored", precompute_ref_log_probs=True),
    )
    assert losses(stored) == pytest.approx(losses(plain), rel=1e-5)
    assert before_stored["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    assert stored.ref_model is None and COLUMN in stored.train_dataset.column_names
    assert len(stored.train_dataset[0][COLUMN]) == 3


def test_a_reference_model_that_is_given_is_scored_and_let_go(tmp_path, tiny):
    torch.manual_seed(0)
    other = copy.deepcopy(tiny[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    plain = trainer_for(tmp_path / "a", **DPO, ref_model=copy.deepcopy(other))
    plain.train()
    stored = trainer_for(tmp_path / "b", **DPO, ref_model=other, precompute_ref_log_probs=True)
    stored.train()
    assert losses(stored) == pytest.approx(losses(plain), rel=1e-5)
    assert abs(losses(stored)[0] - 0.6931) > 1e-3


def test_stored_scores_are_read_again_and_only_for_the_same_lists(tmp_path, monkeypatch):
    options = {**DPO, "precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_for(tmp_path, **{**options, "max_steps": 2})
    trainer.train()
    resumed = trainer_for(tmp_path, **options)
    monkeypatch.setattr(type(resumed), "score", lambda *_: pytest.fail("scored again"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    before = resumed.model.lm_head.weight.clone()
    again = resumed.train(resume_from_checkpoint=True)  # at its end already: nothing is trained
    assert again.global_step == 3 and torch.equal(resumed.model.lm_head.weight, before)
    monkeypatch.undo()
    another = tiny_llama(1)[0]
    other = trainer_for(tmp_path, model=another, **options, overwrite=True)
    other.train()
    assert losses(other)[0] == pytest.approx(0.6931, abs=1e-4)  # not of the stored scores
    with pytest.raises(ValueError, match="no log-probs of the reference model"):
        other.evaluate(records(2))
    other = trainer_for(tmp_path, **options, data=records(5), overwrite=True)
    other.train()
    assert len(other.train_dataset[COLUMN]) == 5


def test_the_reference_moves_and_is_resumed_where_it_was(tmp_path):
    options = {
        **DPO,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    options |= {"ref_model_mixup_alpha": 0.5, "lr_scheduler_type": "constant"}
    whole = trainer_for(tmp_path / "whole", **options)
    first = copy.deepcopy(whole.ref_model)
    whole.train()
    start, moved, trained = (
        model.lm_head.weight for model in (first, whole.ref_model, whole.model)
    )
    assert not torch.equal(start, moved) and not torch.equal(moved, trained)

    cut = trainer_for(tmp_path / "cut", **{**options, "max_steps": 2})
    cut.train()
    torch.testing.assert_close(
        cut.ref_model.lm_head.weight,
        0.5 * cut.model.lm_head.weight + 0.5 * _after_one(tmp_path, options),
    )
    resumed = trainer_for(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.ref_model.lm_head.weight, moved)
    assert torch.equal(resumed.model.lm_head.weight, trained)


def _after_one(tmp_path, options):
    one = trainer_for(tmp_path / "one", **{**options, "max_steps": 1})
    one.train()
    return one.ref_model.lm_head.weight


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (
            {"sync_ref_model": True},
            "sync_ref_model is about a reference model, and loss_type='pro'",
        ),
        ({"ref_model": torch.nn.Linear(1, 1)}, "ref_model is about a reference model, and"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs is about a reference"),
        (
            {"loss_type": "dpo", "sync_ref_model": True, "peft_config": True},
            "model with adapters has none",
        ),
    ],
)
def test_what_has_no_reference_is_refused(options, wrong, tmp_path):
    if options.get("peft_config"):
        options = {**options, "peft_config": lora()}
    with pytest.raises(ValueError, match=wrong):
        trainer_for(tmp_path, **options)


def test_metrics_of_ones_own(tmp_path):
    def mine(prediction):
        logps, lengths = prediction.predictions
        return {"mean_logp": float(logps.sum() / lengths.sum()), "ndcg": -1.0}

    trainer = trainer_for(tmp_path, eval_data=records(3), compute_metrics=mine)
    found = trainer.evaluate()
    scores = trainer.score(trainer.eval_dataset)
    expected = (scores.logps.sum() / scores.lengths.sum()).item()
    assert found["eval_mean_logp"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_ndcg"] == -1.0 and "eval_kendall_tau" in found
