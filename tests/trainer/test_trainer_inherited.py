"""What is transformers' must work with the fused loss in it: resuming, autocast, the best model,
reporting, adapters. (What takes the same steps: test_trainer. Several processes: test_ranks.)"""

from __future__ import annotations

import math
import signal

import pytest
from peft import LoraConfig, PeftModel
from ranks import argv, launch
from trainer_runs import losses, records, trained, trainer_for, weights

from pro_trainer.models import tiny_llama
from pro_trainer.train.checkpoints import find, last_whole


def test_a_run_killed_in_a_step_and_resumed_ends_bitwise_where_the_whole_one_does(
    tmp_path, write_lines
):
    model, tokenizer = tiny_llama(0)
    model.config.attention_dropout = 0.1  # draws from the generator that must be restored
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    write_lines(*records(10), name="train.jsonl")

    def run(folder: str, fault: tuple[int, str] | None = None, **more: object) -> list[int]:
        options = {"demo": None, "model": tmp_path / "model", "disable_dropout": False, **more}
        words = argv(tmp_path, tmp_path / folder, 2, 2, **options)
        return launch(1, tmp_path / "log", words, fault=fault).codes

    assert run("whole") == [0]
    assert run("cut", fault=(0, "killed")) == [-signal.SIGKILL]
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    # A checkpoint that was cut off while it was written is passed over.
    torn = tmp_path / "cut" / "checkpoint-3"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert last_whole(tmp_path / "cut").name == "checkpoint-2"
    assert run("cut", resume_from_checkpoint="last") == [0]
    whole, resumed = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert whole == resumed


def test_resuming_another_run_is_refused_with_the_difference(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained(tmp_path, **options)
    assert find(tmp_path, tmp_path / "checkpoint-2").name == "checkpoint-2"
    with pytest.raises(ValueError, match="holds another run .checkpoint-2.*overwrite"):
        trained(tmp_path, **options)
    other = trainer_for(tmp_path, sft_weight=0.5, data=records(5), **options)
    with pytest.raises(ValueError, match="belongs to another run: sft_weight: None then, 0.5 now;"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="train_dataset: '8 lists.*then, '5 lists.*now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        trained(tmp_path / "empty", **options, resume=True)
    trained(tmp_path, overwrite=True, **options)
    again = trained(tmp_path, **(options | {"max_steps": 3}), resume=True)
    assert again.state.global_step == 3


def test_best_model_at_end_is_loaded_by_a_ranking_metric(tmp_path):
    data, evaluating = records(16), {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trained(
        tmp_path,
        None,
        data[:8],
        data[8:],
        max_steps=3,
        learning_rate=0.5,  # wrecks the model at once: the first evaluation stays the best
        load_best_model_at_end=True,
        metric_for_best_model="kendall_tau",
        **evaluating | {"save_strategy": "steps", "save_steps": 1},
    )
    seen = [e["eval_kendall_tau"] for e in trainer.state.log_history if "eval_kendall_tau" in e]
    assert len(seen) == 3
    assert trainer.evaluate()["eval_kendall_tau"] == pytest.approx(max(seen))


def test_reports_to_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trained(tmp_path / "out", report_to="tensorboard", max_steps=2)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {"train/rank_loss_1", "train/rewards/margins"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("target", ["v_proj", "lm_head"])
def test_lora_trains_adapters_only_and_saves_them(target, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", target])
    trainer = trainer_for(
        tmp_path, peft_config=lora, loss_type="dpo", gradient_checkpointing=True, max_steps=3
    )
    before = weights(trainer)
    trainer.train()
    changed = {name for name, w in weights(trainer).items() if not w.equal(before[name])}
    assert all("lora_" in name for name in changed)
    assert all(any(x in name for name in changed) for x in lora.target_modules)
    # The reference is the model without its adapters: the first step has equal log-probs.
    assert trainer.ref_model is None
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-5)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_llama(0)[0], tmp_path)
    again = trainer_for(tmp_path / "again", model=loaded, data=trainer.train_dataset)
    found, expected = (t.score(trainer.train_dataset).logps for t in (again, trainer))
    assert found.allclose(expected, atol=1e-4)
