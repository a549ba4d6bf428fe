"""The trainer: what is ours (the loss of a step, scores, refusals) and what must stay Trainer's."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

import pro_kernels as pk
from pro_trainer.checkpoints import find, last_whole
from pro_trainer.config import PROConfig
from pro_trainer.errors import TrainingError
from pro_trainer.model import tiny_llama
from pro_trainer.objective import NEEDS_REFERENCE
from pro_trainer.trainer import PROTrainer

ROOT = Path(__file__).resolve().parents[2]
HISTORY_ONLY = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


def records(count: int = 8, n: int = 3) -> list[dict]:
    """Lists that can be learnt: longer praise is better."""
    return [
        {
            "prompt": f"q{i}: ",
            "completions": [f"{'good ' * k}{i}" for k in range(n, 0, -1)],
            "rewards": [float(k * k) / 4 for k in range(n, 0, -1)],
        }
        for i in range(count)
    ]


def config(output: Path, **options) -> PROConfig:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    return PROConfig(output_dir=str(output), **(defaults | options))


def trainer_for(output: Path, model=None, data=None, eval_data=None, **options) -> PROTrainer:
    peft_config = options.pop("peft_config", None)
    tiny_model, tokenizer = tiny_llama(0)
    return PROTrainer(
        tiny_model if model is None else model,
        config(output, **options),
        records() if data is None else data,
        eval_data,
        tokenizer,
        peft_config=peft_config,
    )


def losses(trainer: PROTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: PROTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_first_loss_is_the_references_on_whole_logits(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1, per_device_train_batch_size=8)
    model, data = copy.deepcopy(trainer.model), trainer.train_dataset
    trainer.train()
    per_list = []
    for row in data:
        scores = []
        for end in row["completions"]:
            ids = torch.tensor([row["prompts"][0] + end])
            logps = log_softmax(model(ids).logits[0, :-1].double(), -1)
            picked = logps.gather(1, ids[0, 1:, None])[-len(end) :, 0]
            scores.append(picked.mean())
            if len(scores) == 1:  # records come best first
                sft = -picked.sum()
        s, r = torch.stack(scores), torch.tensor(row["rewards"], dtype=torch.float64)
        rank = 0.0
        for k in range(len(s) - 1):
            tau = r[k] - r[k:]
            tau[0] = tau.max()
            rank = rank + torch.logsumexp(s[k:] * tau, 0) - s[k] * tau[0]
        per_list.append(rank + 0.05 * (len(s) - 1) ** 2 * sft)
    expected = torch.stack(per_list).mean().item()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)


def test_training_ranks_held_out_lists(tmp_path):
    data = records(24)
    trainer = trainer_for(
        tmp_path, data=data[:16], eval_data=data[16:], max_steps=30, learning_rate=3e-3
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_pairwise_accuracy"] > 0.9
    assert after["eval_kendall_tau"] > before["eval_kendall_tau"]


@pytest.mark.parametrize("loss_type", sorted(pk.losses.LOSSES))
def test_every_loss_type_trains_and_logs_what_it_minimises(loss_type, tmp_path):
    trainer = trainer_for(tmp_path, loss_type=loss_type, max_steps=12, learning_rate=2e-3)
    before = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert (trainer.ref_model is not None) == (loss_type in NEEDS_REFERENCE)
    entry = trainer.state.log_history[0]
    assert {"rewards/accuracies", "logps/chosen", "scored_share", "peak_memory_mb"} <= set(entry)


@pytest.mark.parametrize("sharing", ["on", "off"])
@pytest.mark.parametrize("loss_type", ["pro", "dpo"])
def test_reference_and_fused_losses_take_the_same_steps(sharing, loss_type, tmp_path):
    runs = []
    for impl in ("auto", "reference"):
        trainer = trainer_for(
            tmp_path, loss_impl=impl, loss_type=loss_type, prefix_sharing=sharing, overwrite=True
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


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
from test_trainer import config, records
from pro_trainer.model import tiny_llama
from pro_trainer.trainer import PROTrainer
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
    with pytest.raises(ValueError, match="belongs to another run: sft_weight: 0.05 then, 0.5 now;"):
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
        {"packing": True, "prefix_sharing": "off"},
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


DISTRIBUTED = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_trainer import config, records, losses
from pro_trainer.model import tiny_llama
from pro_trainer.trainer import PROTrainer
from pathlib import Path
import json

model, tokenizer = tiny_llama(0)
data = records(10) + records(2, n=5)
trainer = PROTrainer(model, config(Path({output!r}), per_device_train_batch_size={batch},
                     per_device_eval_batch_size=2, max_steps=5), data, data[:7], tokenizer)
trainer.evaluate()  # must not keep the model from being wrapped
trainer.train()
total = sum(p.double().sum() for p in model.parameters())
assert trainer.accelerator.gather(total.float()[None]).unique().numel() == 1
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    metrics = {{k: v for k, v in metrics.items() if "second" not in k and "time" not in k}}
    Path({result!r}).write_text(json.dumps({{"losses": losses(trainer), "eval": metrics,
        "entry": trainer.state.log_history[0]}}))
"""


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    found = []
    for processes, batch in ((1, 4), (2, 2)):
        result = tmp_path / f"result{processes}.json"
        script = tmp_path / f"run{processes}.py"
        script.write_text(
            DISTRIBUTED.format(
                tests=str(Path(__file__).parent),
                output=str(tmp_path / f"out{processes}"),
                result=str(result),
                batch=batch,
            )
        )
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [sys.executable, "-m", *launch, str(script)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(result.read_text()))
    one, two = found
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-4)
    for name in ("rank_loss_1", "rewards/margins", "pairwise_accuracy", "scored_share"):
        assert two["entry"][name] == pytest.approx(one["entry"][name], rel=1e-4), name


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
    on_head = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="keep LoRA and quantisation off the head"):
        trainer_for(tmp_path / "head", peft_config=on_head)


@pytest.mark.parametrize("first", ["whole", "adapters"])
def test_a_run_of_another_kind_leaves_nothing_of_the_one_it_replaces(first, tmp_path):
    from peft import LoraConfig

    for kind in (first, "adapters" if first == "whole" else "whole"):
        lora = LoraConfig(task_type="CAUSAL_LM", r=2) if kind == "adapters" else None
        trainer = trainer_for(tmp_path, peft_config=lora, overwrite=True, max_steps=1)
        trainer.train()
        trainer.save_model()
    names = {p.name for p in tmp_path.iterdir()}
    assert ("model.safetensors" in names) == (kind == "whole")
    assert ("adapter_model.safetensors" in names) == (kind == "adapters")


def test_lists_with_and_without_a_marked_candidate_go_together(tmp_path):
    data = [r | ({"sft_index": 2} if i % 2 else {}) for i, r in enumerate(records())]
    trainer = trainer_for(
        tmp_path, data=data, per_device_train_batch_size=1, max_steps=8, logging_steps=8,
        learning_rate=1e-9, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    entry = trainer.state.log_history[0]
    evaluated = trainer.evaluate(trainer.train_dataset)
    for name in ("loss", "sft_loss", "rank_loss_1"):
        assert entry[name] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-4), name
    scores = trainer.score(trainer.train_dataset)
    marked = torch.tensor([2 if i % 2 else 0 for i in range(8)])
    assert scores.sft_index.equal(marked)
    sft = -0.05 * 4 * scores.logps.gather(1, marked[:, None]).mean().item()
    assert evaluated["eval_sft_loss"] == pytest.approx(sft, rel=1e-5)


@pytest.mark.parametrize(
    "layout", [{"prefix_sharing": "on"}, {"prefix_sharing": "off"}, {"packing": True}], ids=str
)
def test_the_reference_of_the_first_step_is_the_model_itself(layout, tmp_path):
    """Every margin is 0, so the loss is ln 2: in any form, with dropout on, with adapters."""
    from peft import LoraConfig

    trainer = trainer_for(tmp_path, loss_type="dpo", max_steps=1, **layout)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-5)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.5)
    options = {"loss_type": "dpo", "disable_dropout": False, "overwrite": True}
    trainer = trainer_for(tmp_path, peft_config=lora, **options, **layout)
    model = trainer.model.get_base_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    one, two = (trainer._reference_logps(trainer.model, inputs) for _ in range(2))
    assert one.equal(two) and trainer.model.training


def test_several_held_out_sets_are_evaluated_and_shown(tmp_path, capsys):
    trainer = trainer_for(
        tmp_path,
        eval_data={"small": records(2), "large": records(3, n=5)},
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
    )
    trainer.train()
    trainer.save_model()
    printed = capsys.readouterr().out
    assert "eval_small: loss" in printed and "eval_large: loss" in printed
    assert "| large kendall_tau |" in (tmp_path / "README.md").read_text()
    rates = [e["scored_tokens_per_second"] for e in trainer.state.log_history if "loss" in e]
    assert len(rates) == 3 and all(rate > 0 for rate in rates)


def test_evaluates_and_scores_records_and_files(tmp_path, data_file):
    trainer = trainer_for(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert trainer.evaluate(data_file)["eval_prompts"] == 8
    assert trainer.evaluate(records(3))["eval_prompts"] == 3
    assert [len(trainer.score(records(k)).logps) for k in (2, 4)] == [2, 4]


def test_score_is_in_the_data_sets_order_and_evaluate_is_made_of_it(tmp_path):
    data = [*records(3), *records(2, n=5), *records(2, n=2)]
    trainer = trainer_for(tmp_path, data=data, per_device_eval_batch_size=2)
    scores = trainer.score(trainer.train_dataset)
    assert scores.logps.shape == (7, 5) and scores.mask.sum(1).tolist() == [3, 3, 3, 5, 5, 2, 2]
    lengths = [[len(end) for end in row["completions"]] for row in trainer.train_dataset]
    for row, expected in zip(scores.lengths.tolist(), lengths, strict=True):
        assert row == expected + [0] * (5 - len(expected))
    alone = trainer.score(trainer.train_dataset.select([4]))
    torch.testing.assert_close(alone.logps[0], scores.logps[4], rtol=1e-5, atol=1e-5)
    metrics = trainer.metrics(scores)
    evaluated = trainer.evaluate(trainer.train_dataset)
    assert {f"eval_{k}": v for k, v in metrics.items()}.items() <= evaluated.items()
    assert metrics["prompts"] == 7
    terms = [v for k, v in metrics.items() if k.startswith("rank_loss_")] + [metrics["sft_loss"]]
    assert metrics["loss"] == pytest.approx(sum(terms), rel=1e-5)


def test_lists_by_order_use_temperature_one_and_kinds_do_not_mix(tmp_path):
    by_order = [{"prompt": r["prompt"], "completions": r["completions"]} for r in records()]
    trainer = trainer_for(tmp_path, data=by_order)
    trainer.train()
    constant = trainer_for(tmp_path / "t", data=records(), temperature="1.0")
    constant.train()
    assert losses(trainer) == pytest.approx(losses(constant), rel=1e-5)
    mixed = [*records(), *by_order[:4]]
    with pytest.raises(ValueError, match="8 of 12 lists have rewards, the others only an order"):
        trainer_for(tmp_path, data=mixed)
    # With a fixed temperature rewards only order, and the two kinds go together.
    together = trainer_for(tmp_path, data=mixed, temperature="1.0", overwrite=True)
    ordered = trainer_for(tmp_path, data=[*by_order, *by_order[:4]], overwrite=True)
    for trainer in (together, ordered):
        trainer.train()
    assert losses(together) == pytest.approx(losses(ordered), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    options = {"learning_rate": 1e30, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = trainer_for(tmp_path, max_steps=10, **options)
    with pytest.raises(TrainingError, match=r"steps up to [23]: mean loss .*; stopped"):
        trainer.train()
    trainer = trainer_for(
        tmp_path, max_steps=10, logging_steps=10, save_strategy="steps", save_steps=3, **options
    )
    with pytest.raises(TrainingError, match="step 3: .* weights are not finite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/*"))
    with pytest.raises(TrainingError, match="log-probabilities .* not finite"):
        trainer.evaluate(trainer.train_dataset)
    with pytest.raises(TrainingError, match="nothing saved"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


def test_saves_card_curves_and_safetensors(tmp_path):
    data = records(10)
    trainer = trainer_for(
        tmp_path, data=data[:8], eval_data=data[8:], eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    for part in ("library_name: transformers", "2306.17492", "| SFT weight | 0.05 |"):
        assert part in card, part
    assert "## Held-out lists, step 4" in card
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("pytorch_model*"))


def test_prints_samples_on_request(tmp_path, capsys):
    trainer = trainer_for(
        tmp_path, eval_data=records(2), sample_steps=2, sample_tokens=5, max_steps=4
    )
    trainer.train()
    printed = capsys.readouterr().out
    assert printed.count("sample, step 2: 'q") == printed.count("sample, step 4: 'q") == 2
    assert printed.count("  -> ") == 4


def test_nothing_of_a_step_is_read_before_the_log(tmp_path, monkeypatch):
    """No value of a tensor is read in a step by our code (reading one waits for a GPU)."""
    import traceback

    from torch.utils._python_dispatch import TorchDispatchMode

    reads = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(function) or "nonzero.default" in str(function):
                frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
                if "pro_trainer" in frames[-1].filename:
                    reads.append(frames[-1])
            return function(*args, **(kwargs or {}))

    trainer = trainer_for(tmp_path, logging_steps=100, max_steps=3)
    step = trainer.training_step

    def watched(*args, **kwargs):
        with Spy():
            return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", watched)
    trainer.train()
    assert reads == []  # (pro_kernels looks at the values of CPU tensors only: docs/design.md)
    assert not trainer.args.logging_nan_inf_filter


def test_refusals_before_any_work(tmp_path, tiny):
    model, tokenizer = tiny
    with pytest.raises(TypeError, match="args must be a PROConfig, got dict"):
        PROTrainer(model, {}, records(), None, tokenizer)
    with pytest.raises(ValueError, match="train_dataset must be one data set, got a dict of .'a'"):
        PROTrainer(model, config(tmp_path), {"a": records()}, None, tokenizer)
    with pytest.raises(ValueError, match="must be a transformers causal LM, got Linear"):
        PROTrainer(torch.nn.Linear(1, 1), config(tmp_path), records(), None, tokenizer)
    with pytest.raises(TypeError, match="peft_config must be a peft config, got dict"):
        trainer_for(tmp_path, peft_config={"r": 1})
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainer_for(tmp_path, model=copy.deepcopy(model).requires_grad_(False)).train()
    with pytest.raises(ValueError, match=r"official' needs lists of one length, got \[3, 5\]"):
        trainer_for(tmp_path, data=[*records(2), *records(2, n=5)], compat="official")
    with pytest.raises(ValueError, match="metric_for_best_model='tau' is none of .*eval_ndcg"):
        trainer_for(
            tmp_path / "best", eval_data=records(2), eval_strategy="steps", eval_steps=1,
            metric_for_best_model="tau",
        ).train()  # fmt: skip
    with pytest.raises(ValueError, match="hold no lists"):
        PROTrainer(model, config(tmp_path), None, None, tokenizer)
    with pytest.raises(ValueError, match="unknown backend|cuda"):
        trainer_for(tmp_path, loss_impl="cuda")
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = 4
    with pytest.raises(ValueError, match="max_position_embeddings=4; set max_length to 4"):
        trainer_for(tmp_path, model=short)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="file is a file"):
        trainer_for(file).train()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_length": 8, "max_prompt_length": 8}, r"max_prompt_length must lie in \[1, max_"),
        ({"num_candidates": 1}, "num_candidates must be at least 2"),
        ({"temperature": "warm"}, "temperature must be 'reward' or a number > 0, got 'warm'"),
        ({"temperature": "0"}, "temperature must be"),
        ({"reward_scale": math.nan}, "reward_scale must be finite and > 0"),
        ({"budget_mb": 0}, "budget_mb must be finite and > 0"),
        ({"loss_type": "best"}, "unknown loss 'best'"),
        ({"loss_type": "dpo", "compat": "official"}, "compat='official' is a meaning of"),
        ({"loss_type": "dpo", "loss_kwargs": {"bta": 1}}, r"may hold \['beta'.*got \['bta'\]"),
        ({"loss_type": "dpo", "loss_kwargs": "{"}, "loss_kwargs must be JSON"),
        ({"loss_kwargs": {"eps": 1}}, "loss_kwargs of loss_type='pro' may hold"),
        ({"compat": "offical"}, "compat must be one of 'none', 'official', got 'offical'"),
        ({"truncation_mode": "end"}, "truncation_mode must be one of 'keep_end', 'keep_start'"),
        ({"prefix_sharing": "maybe"}, "prefix_sharing must be 'auto', 'on' or 'off'"),
        ({"temperature": None}, "temperature must be 'reward' or a number > 0, got None"),
        ({"sample_steps": -1}, "sample_steps must be >= 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must stay False, got True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must stay 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options, wrong, tmp_path):
    with pytest.raises(ValueError, match=wrong):
        config(tmp_path, **options)


@pytest.mark.parametrize("options", [{"max_length": "64"}, {"num_candidates": 2.5}], ids=str)
def test_options_of_the_wrong_type_are_refused(options, tmp_path):
    with pytest.raises(TypeError, match="must be an integer"):
        config(tmp_path, **options)


def test_a_temperature_may_be_given_as_a_number(tmp_path):
    assert config(tmp_path, temperature=2).fixed_temperature() == 2.0
