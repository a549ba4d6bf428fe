"""What is transformers' must work with the fused loss in it: resuming, accumulation, autocast,
gradient checkpointing, reporting, adapters. (Several processes: test_ranks.)"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_runs import losses, records, trainer_for, weights

from pro_trainer.models import tiny_llama
from pro_trainer.train.checkpoints import find, last_whole
from pro_trainer.train.trainer import PROTrainer

ROOT = Path(__file__).resolve().parents[2]


def test_accumulation_does_not_move_the_trajectory(tmp_path):
    """8 x 1 = 2 x 4, also where the last step of an epoch has fewer lists."""
    ragged = [*records(8), *records(3, n=5)]  # 11 lists: the second step of an epoch has 3
    runs = []
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = trainer_for(
            tmp_path,
            data=ragged,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
            overwrite=True,
        )
        trainer.train()
        runs.append((losses(trainer), weights(trainer)))
    for other, changed in runs[1:]:
        assert other == pytest.approx(runs[0][0], rel=1e-4)
        for name, weight in runs[0][1].items():
            torch.testing.assert_close(changed[name], weight, rtol=0, atol=2e-4, msg=name)


RUN = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from trainer_runs import config, records
from pro_trainer.models import tiny_llama
from pro_trainer.train.trainer import PROTrainer
from transformers import TrainerCallback
import os, signal
from pathlib import Path

class Kill(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)

model, tokenizer = tiny_llama(0)
arguments = config(Path({output!r}), max_steps=7, save_strategy="steps", save_steps=2,
                   disable_dropout=False, gradient_accumulation_steps=2,
                   per_device_train_batch_size=2)
for layer in model.model.layers:
    layer.self_attn.attention_dropout = 0.1  # draws from the generator that must be restored
trainer = PROTrainer(model, arguments, records(10), None, tokenizer, callbacks=[Kill()])
trainer.train(resume_from_checkpoint={resume!r})
trainer.save_model()
"""


def run_script(output: Path, kill_at: int = -1, resume: bool = False) -> int:
    code = RUN.format(
        tests=str(Path(__file__).parent), output=str(output), kill_at=kill_at, resume=resume
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode


def test_a_run_killed_in_a_step_and_resumed_ends_bitwise_where_the_whole_one_does(tmp_path):
    assert run_script(tmp_path / "whole") == 0
    assert run_script(tmp_path / "cut", kill_at=5) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    # A checkpoint that was cut off while it was written is passed over.
    torn = tmp_path / "cut" / "checkpoint-5"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert last_whole(tmp_path / "cut").name == "checkpoint-4"
    assert run_script(tmp_path / "cut", resume=True) == 0
    whole, resumed = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert whole == resumed


def test_resuming_another_run_is_refused_with_the_difference(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_for(tmp_path, **options).train()
    assert find(tmp_path, tmp_path / "checkpoint-2").name == "checkpoint-2"
    with pytest.raises(ValueError, match="holds another run .checkpoint-2.*overwrite"):
        trainer_for(tmp_path, **options).train()
    other = trainer_for(tmp_path, sft_weight=0.5, data=records(5), **options)
    with pytest.raises(ValueError, match="belongs to another run: sft_weight: None then, 0.5 now;"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="train_dataset: '8 lists.*then, '5 lists.*now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        trainer_for(tmp_path / "empty", **options).train(resume_from_checkpoint=True)
    trainer_for(tmp_path, overwrite=True, **options).train()
    assert trainer_for(tmp_path, **(options | {"max_steps": 3})).train(True).global_step == 3


def test_bf16_autocast_and_gradient_checkpointing_stay_near_plain_training(tmp_path):
    def run(**options) -> PROTrainer:
        trainer = trainer_for(tmp_path, overwrite=True, **options)
        trainer.train()
        return trainer

    plain = run()
    checkpointed = run(gradient_checkpointing=True)
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)
    mixed = run(bf16=True)
    assert losses(mixed) == pytest.approx(losses(plain), rel=0.02)
    assert losses(mixed) != losses(plain)
    assert all(w.dtype == torch.float32 for w in weights(mixed).values())


@pytest.mark.parametrize(
    "options",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 2},
        {"batching": "padded"},
    ],
    ids=str,
)
def test_other_ways_to_feed_the_same_lists(options, tmp_path):
    """All lists in one batch: however they are ordered, fetched and laid out, one loss."""
    plain = trainer_for(tmp_path, per_device_train_batch_size=8, max_steps=2)
    plain.train()
    other = trainer_for(tmp_path, per_device_train_batch_size=8, max_steps=2, **options)
    other.train()
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)


def test_best_model_at_end_is_loaded_by_a_ranking_metric(tmp_path):
    data = records(16)
    trainer = trainer_for(
        tmp_path,
        data=data[:8],
        eval_data=data[8:],
        max_steps=6,
        learning_rate=0.5,  # wrecks the model at once: the first evaluation stays the best
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="kendall_tau",
    )
    trainer.train()
    seen = [e["eval_kendall_tau"] for e in trainer.state.log_history if "eval_kendall_tau" in e]
    assert len(seen) == 3
    assert trainer.evaluate()["eval_kendall_tau"] == pytest.approx(max(seen))


def test_reports_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "tb")
    try:
        trainer_for(tmp_path / "out", report_to="tensorboard").train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {"train/rank_loss_1", "train/rewards/margins"} <= set(events.Tags()["scalars"])


def test_lora_trains_adapters_only_and_saves_them(tmp_path):
    from peft import LoraConfig, PeftModel

    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    trainer = trainer_for(
        tmp_path, peft_config=lora, loss_type="dpo", gradient_checkpointing=True, max_steps=3
    )
    before = weights(trainer)
    trainer.train()
    changed = {name for name, w in weights(trainer).items() if not w.equal(before[name])}
    assert changed and all("lora_" in name for name in changed)
    # The reference is the model without its adapters: the first step has equal log-probs.
    assert trainer.ref_model is None
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-5)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_llama(0)[0], tmp_path)
    again = trainer_for(tmp_path / "again", model=loaded, data=trainer.train_dataset)
    assert again.score(trainer.train_dataset).logps.allclose(
        trainer.score(trainer.train_dataset).logps, atol=1e-4
    )


def test_lora_on_the_head_is_trained_and_scored_as_the_whole_model_does(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head", "q_proj"])
    trainer = trainer_for(tmp_path / "fused", peft_config=lora, max_steps=3)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, w in weights(trainer).items() if not w.equal(before[name])}
    assert changed and all("lora_" in n for n in changed) and any("lm_head" in n for n in changed)
    plain = trainer_for(tmp_path / "plain", peft_config=lora, max_steps=3, loss_impl="reference")
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-4)
