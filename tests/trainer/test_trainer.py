"""What is the trainer's own: the loss of a step, scores, metrics, refusals."""

from __future__ import annotations

import copy
import functools
import math
import re
import traceback

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_runs import config, losses, records, trained, trainer_for, weights

import pro_kernels as pk
from pro_trainer.errors import TrainingError
from pro_trainer.models import tiny_llama
from pro_trainer.train.objective import list_losses
from pro_trainer.train.trainer import PROTrainer

BY_ORDER = [{key: r[key] for key in ("prompt", "completions")} for r in records()]


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
            scores.append(logps.gather(1, ids[0, 1:, None])[-len(end) :, 0].mean())
        scores, rewards = torch.stack(scores), torch.tensor(row["rewards"])  # the best is first
        rank = sum(pk.reference.rank_terms(scores, rewards))
        per_list.append(rank - 0.05 * (len(scores) - 1) ** 2 * scores[0])
    expected = torch.stack(per_list).mean().item()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)


ONE_BATCH = {"per_device_train_batch_size": 8}  # of all lists
RAGGED = {"data": [*records(8), *records(3, n=5)], **ONE_BATCH}  # every second step has 3 of 11
TOKENS = {"tokens_per_batch": 150, "gradient_accumulation_steps": 20}
HEAD = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head", "q_proj"])}
SAME_STEPS = {  # how they differ: (the options of one run, what the other has besides)
    "adapters on the head, plain loss": (HEAD, {"loss_impl": "reference"}),
    "gradient checkpointing": ({}, {"gradient_checkpointing": True}),
    "grouped by length": (ONE_BATCH, {"train_sampling_strategy": "group_by_length"}),
    "processes of the loader": (ONE_BATCH, {"dataloader_num_workers": 2}),
    "padded": (ONE_BATCH, {"batching": "padded"}),
    "2 x 4": (RAGGED, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "1 x 8": (RAGGED, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
    "an order is temperature 1": ({"data": BY_ORDER}, {"data": records(), "temperature": "1.0"}),
    "with a fixed temperature rewards only order, and the two kinds go together": (
        {"data": [*BY_ORDER, *BY_ORDER[:4]]},
        {"data": [*records(), *BY_ORDER[:4]], "temperature": "1.0"},
    ),
}
for form in ("lists", "padded"):
    for loss in ("pro", "dpo"):
        options = {"loss_type": loss, "batching": form}
        SAME_STEPS[f"plain loss, {loss}, {form}"] = (options, {"loss_impl": "reference"})
    SAME_STEPS[f"batches of tokens, {form}"] = ({**ONE_BATCH, "batching": form}, TOKENS)


@pytest.mark.parametrize("differ", SAME_STEPS)
def test_the_same_steps_by_another_way(differ, tmp_path):
    options, more = SAME_STEPS[differ]
    one, other = trained(tmp_path, **options), trained(tmp_path, **{**options, **more})
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    for name, weight in weights(one).items():
        # Adam moves a weight whose gradient is nearly 0 by a whole step, whichever way it rounds.
        assert (weights(other)[name] - weight).norm() < 1e-3 * weight.norm(), name
    if more is TOKENS:
        batches = [batch["preferences"].num_prompts for batch in other.get_train_dataloader()]
        assert sum(batches) == 8 and 1 < len(batches) < 8
    if options.get("loss_type") == "dpo":  # the reference of the first step is the model itself
        assert losses(one)[0] == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["pro", "simpo"])
def test_mixed_precision_stays_near_plain_training_and_leaves_an_fp32_head_alone(
    loss_type, tmp_path
):
    wide = {"bf16": True, "head_dtype": "float32"}
    fused, plain, rounded, exact = (
        trained(tmp_path, max_steps=2, loss_type=loss_type, **options)
        for options in (wide, wide | {"loss_impl": "reference"}, {"bf16": True}, {})
    )
    first = losses(fused)[0]
    assert first == pytest.approx(losses(plain)[0], rel=1e-6)
    assert first != pytest.approx(losses(rounded)[0], rel=1e-6)
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.02)
    assert losses(rounded) != losses(exact)
    assert all(w.dtype == torch.float32 for w in weights(rounded).values())


# Options under which they learn this in eight steps.
OPTIONS = {"lire": {"length_normalize": True}}
OPTIONS |= dict.fromkeys(("sppo_hard", "apo_down"), {"learning_rate": 1e-3})


@pytest.mark.parametrize("loss_type", sorted(pk.losses.LOSSES))
def test_every_loss_type_learns_to_rank_held_out_lists(loss_type, tmp_path):
    data, options = records(24), {"max_steps": 8, "learning_rate": 5e-3}
    options |= OPTIONS.get(loss_type, {})
    trainer = trainer_for(tmp_path, None, data[:16], data[16:], loss_type=loss_type, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    if loss_type != "apo_down":  # first of all it makes the best less likely
        assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    if loss_type != "slic":  # its scores are sums, and begin far off
        assert after["eval_pairwise_accuracy"] > 0.9 > 0.5 > before["eval_pairwise_accuracy"]
    assert (trainer.ref_model is not None) == trainer.args.needs_reference()
    entry = trainer.state.log_history[1]
    assert {"rewards/accuracies", "logps/chosen", "scored_share", "peak_memory_mb"} <= set(entry)


def test_a_run_of_another_kind_leaves_nothing_of_the_one_it_replaces(tmp_path):
    for lora in (None, LoraConfig(task_type="CAUSAL_LM", r=2), None):
        trained(tmp_path, peft_config=lora, overwrite=True, max_steps=1).save_model()
        names = {p.name for p in tmp_path.iterdir()}
        assert ("model.safetensors" in names) == (lora is None)
        assert ("adapter_model.safetensors" in names) == (lora is not None)


@pytest.mark.parametrize("loss_type", ["pro", "kto"])
def test_lists_count_by_their_weight_and_candidates_by_their_marks(loss_type, tmp_path):
    share = torch.tensor([0.0, 3.0, 0.5, 1.0]).repeat(2).double()
    data = [r | {"prompt_weight": w} for r, w in zip(records(), share.tolist(), strict=True)]
    for record in data[1::2]:
        record["sft_index"] = 2
    for record in data[:2] if loss_type == "kto" else []:
        record["desirable"] = [True, True, False]
    options = {"loss_type": loss_type, "per_device_train_batch_size": 1, "learning_rate": 1e-9}
    trainer = trained(tmp_path, data=data, gradient_accumulation_steps=8, max_steps=1, **options)
    scores = trainer.score(trainer.train_dataset)
    assert scores.weights.equal(share) and scores.sft_index.tolist() == [0, 2] * 4
    metrics, entry = trainer.metrics(scores), trainer.state.log_history[0]
    if loss_type == "kto":
        assert scores.desirable[0, :3].tolist() == [True, True, False]
        assert scores.desirable[2].sum() == 1
        assert metrics["loss"] == pytest.approx(0.5, abs=0.01)
    else:
        logps, m = (x.gather(1, scores.sft_index[:, None]) for x in (scores.logps, scores.lengths))
        sft = -0.05 * 4 * ((logps / m)[:, 0] * share).sum() / share.sum()
        assert metrics["sft_loss"] == pytest.approx(sft.item(), rel=1e-5)
        for name in ("loss", "sft_loss", "rank_loss_1"):
            assert entry[name] == pytest.approx(metrics[name], rel=1e-4), name
    wanted = (list_losses(scores, trainer.args) * share).sum() / share.sum()
    assert losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("batching", ["auto", "padded"])
def test_kto_takes_kl_from_completions_of_other_prompts(batching, tmp_path):
    """As TRL cycles them: each prompt with the best completion of the list before it."""
    (ref_model, _), (model, _) = tiny_llama(0), tiny_llama(1)  # in this order KL is not below 0
    options = {"loss_type": "kto", "batching": batching, "per_device_eval_batch_size": 4}
    trainer = trainer_for(tmp_path, model, ref_model=ref_model, **options)
    models, dataset = (trainer.model, trainer.ref_model), trainer.train_dataset

    def kl(first: int, last: int) -> torch.Tensor:
        ratios = []
        for row in range(first, last):
            other = dataset[last - 1 if row == first else row - 1]["completions"][0]
            start = len(prompt := dataset[row]["prompts"][0])
            ids = torch.tensor([prompt + other])
            scores = [log_softmax(m(ids).logits[0, start - 1 : -1], -1) for m in models]
            ours, its = (x.gather(1, ids[0, start:, None]).sum() for x in scores)
            ratios.append(ours - its)
        return torch.stack(ratios).detach()

    loss, scores = pk.losses.LOSSES["kto"], trainer.score(dataset)
    assert scores.logps.shape == (8, 4) and not scores.mask[:, 3].any()
    inputs = {"rewards": scores.rewards, "ref_logps": scores.ref_logps, "mask": scores.mask}
    over = functools.partial(loss, scores.logps, scores.lengths, **inputs)
    wanted = over(kl=torch.cat([kl(0, 4), kl(4, 8)]).mean())[0].item()
    assert trainer.metrics(scores)["loss"] == pytest.approx(wanted, rel=1e-4)
    batch = trainer.data_collator([dataset[row] for row in range(8)])
    trained_on = trainer.compute_loss(trainer.model, batch).item()
    assert trained_on == pytest.approx(over(kl=kl(0, 8).mean())[0].item(), rel=1e-4)
    assert abs(trained_on - over()[0].item()) > 1e-4  # of the batch itself
    alone = trainer_for(tmp_path, model, reference_free=True, **options)
    assert (alone.score(dataset).kl < 0).all()  # log-probs


@pytest.mark.parametrize("batching", ["auto", "padded"])
def test_the_reference_without_adapters_draws_no_dropout(batching, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.5)
    options = {"loss_type": "dpo", "disable_dropout": False, "batching": batching}
    trainer = trainer_for(tmp_path, peft_config=lora, **options)
    for layer in trainer.model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.5
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    one, two = (trainer._reference_logps(trainer.model, inputs) for _ in range(2))
    assert one.equal(two) and trainer.model.training


def test_held_out_sets_are_evaluated_and_shown_with_samples_in_prints_card_and_curves(
    tmp_path, capsys, curves, monkeypatch
):
    options = {"eval_strategy": "steps", "eval_steps": 2, "sample_steps": 2, "sample_tokens": 5}
    trained(tmp_path, eval_data=records(2), **options).save_model()
    printed, card = capsys.readouterr().out, (tmp_path / "README.md").read_text()
    for part in ("library_name: transformers", "2306.17492", "| loss | pro |"):
        assert part in card, part
    assert "| | step 2 | step 4 |" in card
    monkeypatch.chdir(tmp_path.parent)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert printed.count("sample, step 2: 'q") == printed.count("sample, step 4: 'q") == 2
    assert printed.count("  -> ") == 4
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("pytorch_model*"))

    several = {"small": records(2), "large": records(3, n=5)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "overwrite": True}
    trainer = trained(tmp_path, eval_data=several, **options)
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
    assert scores.lengths.tolist() == [row + [0] * (5 - len(row)) for row in lengths]
    alone = trainer.score(trainer.train_dataset.select([4]))
    torch.testing.assert_close(alone.logps[0], scores.logps[4], rtol=1e-5, atol=1e-5)
    metrics = trainer.metrics(scores)
    evaluated = trainer.evaluate(trainer.train_dataset)
    assert {f"eval_{k}": v for k, v in metrics.items()}.items() <= evaluated.items()
    assert metrics["prompts"] == 7
    terms = [v for k, v in metrics.items() if k.startswith("rank_loss_")] + [metrics["sft_loss"]]
    assert metrics["loss"] == pytest.approx(sum(terms), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    options = {"learning_rate": 1e30, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    with pytest.raises(TrainingError, match=r"steps up to [23]: mean loss .*; stopped"):
        trained(tmp_path, max_steps=10, **options)
    options |= {"logging_steps": 10, "save_strategy": "steps", "save_steps": 3}
    trainer = trainer_for(tmp_path, max_steps=10, **options)
    with pytest.raises(TrainingError, match="step 3: .* weights are not finite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/*"))
    with pytest.raises(TrainingError, match="log-probabilities .* not finite"):
        trainer.evaluate(trainer.train_dataset)
    with pytest.raises(TrainingError, match="nothing saved"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


def test_nothing_of_a_step_is_read_before_the_log(tmp_path, monkeypatch):
    """No value of a tensor is read in a step by our code (reading one waits for a GPU)."""
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
    arguments = config(tmp_path)
    for wrong, given in {
        "args must be a PROConfig, got dict": (model, {}, records()),
        "train_dataset must be one data set, got a dict of .'a'": (model, arguments, {"a": []}),
        "must be a causal LM of transformers, got Linear": (torch.nn.Linear(1, 1), arguments, []),
        "hold no lists": (model, arguments, None),
    }.items():
        with pytest.raises(TypeError if "got dict" in wrong else ValueError, match=wrong):
            PROTrainer(*given, None, tokenizer)
    short, file = copy.deepcopy(model), tmp_path / "file"
    short.config.max_position_embeddings = 4
    file.write_text("")
    evaluated = {"eval_data": records(2), "eval_strategy": "steps", "eval_steps": 1}
    for wrong, options in {
        "peft_config must be a peft config, got dict": {"peft_config": {"r": 1}},
        r"official' needs lists of one length, got \[3, 5\]": {
            "data": [*records(2), *records(2, n=5)], "compat": "official",
        },
        "8 of 12 lists have rewards, the others only an order": {
            "data": [*records(), *BY_ORDER[:4]]
        },
        "unknown backend|cuda": {"loss_impl": "cuda"},
        "max_position_embeddings=4; set max_length to 4": {"model": short},
        "file is a file": {"output": file},
        "no trainable parameter": {"model": copy.deepcopy(model).requires_grad_(False)},
        "metric_for_best_model='tau' is none of .*eval_ndcg": {
            **evaluated, "metric_for_best_model": "tau",
        },
    }.items():  # fmt: skip
        with pytest.raises(TypeError if "got dict" in wrong else ValueError, match=wrong):
            trained(**{"output": tmp_path, **options})
