"""What is the trainer's own: the loss of a step, scores, metrics, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import log_softmax
from trainer_runs import config, losses, records, trainer_for

import pro_kernels as pk
from pro_trainer.errors import TrainingError
from pro_trainer.train.trainer import PROTrainer


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
                sft = -picked.mean()
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
    assert (trainer.ref_model is not None) == trainer.args.needs_reference()
    entry = trainer.state.log_history[0]
    assert {"rewards/accuracies", "logps/chosen", "scored_share", "peak_memory_mb"} <= set(entry)


@pytest.mark.parametrize("batching", ["lists", "padded"])
@pytest.mark.parametrize("loss_type", ["pro", "dpo"])
def test_reference_and_fused_losses_take_the_same_steps(batching, loss_type, tmp_path):
    runs = []
    for impl in ("auto", "reference"):
        trainer = trainer_for(
            tmp_path, loss_impl=impl, loss_type=loss_type, batching=batching, overwrite=True
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.parametrize("batching", ["lists", "padded"])
def test_batches_of_tokens_weigh_every_list_the_same(batching, tmp_path):
    """All lists in one step, as one batch or accumulated from several: the same steps."""
    options = {"batching": batching, "max_steps": 3, "overwrite": True}
    whole = trainer_for(tmp_path, per_device_train_batch_size=8, **options)
    whole.train()
    options |= {"per_device_train_batch_size": 8, "tokens_per_batch": 150}
    trainer = trainer_for(tmp_path, gradient_accumulation_steps=20, **options)
    batches = [batch["preferences"].num_prompts for batch in trainer.get_train_dataloader()]
    assert sum(batches) == 8 and 1 < len(batches) < 8
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(whole), rel=1e-5)


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
    logps, lengths = (x.gather(1, marked[:, None]) for x in (scores.logps, scores.lengths))
    sft = -0.05 * 4 * (logps / lengths).mean().item()
    assert evaluated["eval_sft_loss"] == pytest.approx(sft, rel=1e-5)


@pytest.mark.parametrize("layout", [{"batching": "auto"}, {"batching": "padded"}], ids=str)
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
    assert "## Held-out lists large" in (tmp_path / "README.md").read_text()
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
    for part in ("library_name: transformers", "2306.17492", "| loss | pro |"):
        assert part in card, part
    assert "| | step 2 | step 4 |" in card
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
    with pytest.raises(ValueError, match="must be a causal LM of transformers, got Linear"):
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
