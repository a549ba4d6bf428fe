"""The reference model: scored once and stored, or moved along with the trained one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from trainer_runs import losses, records, trained, trainer_for

from pro_trainer.models import tiny_llama
from pro_trainer.train.reference import COLUMN

DPO = {"loss_type": "dpo", "learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1}


def lora():
    return LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)


@pytest.mark.parametrize("reference", ["the model itself", "without its adapters", "another"])
def test_scores_computed_once_give_the_same_run_and_the_reference_is_let_go(reference, tmp_path):
    def run(**options):
        torch.manual_seed(0)
        if reference == "without its adapters":
            options["peft_config"] = lora()
        if reference == "another":
            options["ref_model"] = tiny_llama(1)[0]
        trainer = trainer_for(tmp_path, eval_data=records(3), **DPO, **options)
        before = trainer.evaluate()
        trainer.train()
        return trainer, before["eval_loss"]

    (plain, before), (stored, stored_before) = run(), run(precompute_ref_log_probs=True)
    assert losses(stored) == pytest.approx(losses(plain), rel=1e-5)
    assert stored_before == pytest.approx(before, rel=1e-5)
    assert stored.ref_model is None and COLUMN in stored.train_dataset.column_names
    assert len(stored.train_dataset[0][COLUMN]) == 3
    if reference != "the model itself":
        assert abs(losses(stored)[0] - 0.6931) > 1e-3


def test_stored_scores_are_read_again_and_only_for_the_same_lists(tmp_path, monkeypatch):
    options = {**DPO, "precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, **{**options, "max_steps": 2})
    resumed = trainer_for(tmp_path, **options)
    monkeypatch.setattr(type(resumed), "score", lambda *_: pytest.fail("scored again"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    before = resumed.model.lm_head.weight.clone()
    again = resumed.train(resume_from_checkpoint=True)  # at its end already: nothing is trained
    assert again.global_step == 3 and torch.equal(resumed.model.lm_head.weight, before)
    monkeypatch.undo()
    other = trained(tmp_path, tiny_llama(1)[0], **options, overwrite=True)
    assert losses(other)[0] == pytest.approx(0.6931, abs=1e-4)  # not of the stored scores
    with pytest.raises(ValueError, match="no log-probs of the reference model"):
        other.evaluate(records(2))
    other = trained(tmp_path, **options, data=records(5), overwrite=True)
    assert len(other.train_dataset[COLUMN]) == 5


def test_the_reference_moves_and_is_resumed_where_it_was_as_is_the_mean_of_bco(tmp_path):
    options = {
        **DPO,
        "loss_type": "bco",
        "max_steps": 6,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "save_strategy": "steps",
    }
    options |= {"save_steps": 1, "ref_model_mixup_alpha": 0.5, "lr_scheduler_type": "constant"}
    whole = trainer_for(tmp_path / "whole", **options)
    start = whole.ref_model.lm_head.weight.clone()
    whole.train()
    moved, last = whole.ref_model.lm_head.weight, whole.model.lm_head.weight
    assert not torch.equal(start, moved) and not torch.equal(moved, last)

    cut = trained(tmp_path / "cut", **{**options, "max_steps": 1})
    torch.testing.assert_close(
        cut.ref_model.lm_head.weight, 0.5 * cut.model.lm_head.weight + 0.5 * start
    )
    resumed = trained(tmp_path / "cut", **options, resume=True)
    assert resumed._running.equal(whole._running) and whole._running[1] > cut._running[1] > 0
    assert torch.equal(resumed.ref_model.lm_head.weight, moved)
    assert torch.equal(resumed.model.lm_head.weight, last)
    later = trained(tmp_path / "cut", **options, resume=str(tmp_path / "cut" / "checkpoint-5"))
    assert later._running.equal(whole._running)  # after one step the sum is 0


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"sync_ref_model": True}, "sync_ref_model is about a reference model, and loss_type='pro"),
        ({"ref_model": torch.nn.Linear(1, 1)}, "ref_model is about a reference model, and"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs is about a reference"),
        (
            {"loss_type": "dpo", "sync_ref_model": True, "peft_config": lora()},
            "model with adapters has none",
        ),
        ({"loss_type": "kto", "precompute_ref_log_probs": True}, "set kto_kl='batch'"),
        (
            {"loss_type": "dpo", "kto_kl": "batch"},
            "kto_kl is an option of loss_type='kto', got 'dp",
        ),
    ],
)
def test_what_does_not_go_with_a_reference_is_refused(options, wrong, tmp_path):
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
