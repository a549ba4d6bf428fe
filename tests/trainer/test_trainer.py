"""The loop: same trajectory through every implementation, repeatable, saved, refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pro_kernels as pk
from pro_trainer.collate import batches, pad_id
from pro_trainer.config import EvalConfig, TrainConfig
from pro_trainer.data import DataError
from pro_trainer.evaluate import evaluate, evaluate_files, load_lists, ranking_counts
from pro_trainer.model import load, tiny_llama
from pro_trainer.objective import batch_loss
from pro_trainer.trainer import TrainingError, fit, train

CPU = torch.device("cpu")


def usable(name: str) -> str | None:
    if name in ("auto", "reference"):
        return None
    return pk.backends.refusal(name, CPU, torch.float32)


def config_for(path: str, output: Path, **options) -> TrainConfig:
    defaults = {"steps": 6, "batch_size": 3, "eval_fraction": 0.25, "log_every": 2, "lr": 2e-3}
    return TrainConfig(
        demo=True, data=[path], output_dir=str(output), device="cpu", **defaults | options
    )


def weights(output: Path) -> list[torch.Tensor]:
    return list(load(str(output / "checkpoint"))[0].parameters())


@pytest.mark.parametrize("loss_impl", ["auto", "cpu", "triton", "torch"])
def test_fused_trajectory_is_the_reference_one(loss_impl, data_file, tmp_path):
    if (reason := usable(loss_impl)) is not None:
        pytest.skip(reason)
    run, reference = (
        train(config_for(data_file, tmp_path / impl, loss_impl=impl, steps=5))
        for impl in (loss_impl, "reference")
    )
    # A few steps amplify float32 rounding (6e-8) little; 1e-5 is far below any error in the maths.
    losses = torch.tensor([run["train_loss"], reference["train_loss"]])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert losses[0, -1] < 0.95 * losses[0, 0]
    for ours, theirs in zip(run["eval"], reference["eval"], strict=True):
        assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-5)
        assert ours["pairwise_accuracy"] == theirs["pairwise_accuracy"]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "2.0"},
        {"length_normalize": False, "sft_reduction": "mean", "reward_scale": 0.1},
        {"ties": "skip", "eps": 1e-10, "sft_weight": 0.5},
    ],
)
def test_every_option_reaches_both_implementations(options, data_file, tiny):
    model, tokenizer = tiny
    plain = EvalConfig(loss_impl="reference", batch_size=4)
    lists, _ = load_lists([data_file], tokenizer, plain)
    lists[1] = replace(lists[1], rewards=(1.0, 1.0, -1.0))
    batch = next(batches(lists, plain, pad_id(tokenizer)))
    losses = [
        batch_loss(model, batch, replace(plain, loss_impl=impl, **options)).loss.item()
        for impl in ("auto", "reference")
    ]
    assert math.isclose(*losses, rel_tol=1e-5)
    default = batch_loss(model, batch, plain).loss.item()
    assert not math.isclose(losses[0], default, rel_tol=1e-4)


def test_bfloat16_runs_and_keeps_float32_weights(data_file, tmp_path):
    run = train(config_for(data_file, tmp_path / "o", dtype="bfloat16", steps=3))
    exact = train(config_for(data_file, tmp_path / "p", steps=3))
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "o"))
    torch.testing.assert_close(
        torch.tensor(run["train_loss"]), torch.tensor(exact["train_loss"]), rtol=0.02, atol=0
    )


def test_same_seed_is_bitwise_the_same_and_another_is_not(data_file, tmp_path):
    runs = [
        train(config_for(data_file, tmp_path / str(i), seed=seed))
        for i, seed in enumerate((3, 3, 4))
    ]
    assert runs[0]["train_loss"] == runs[1]["train_loss"] != runs[2]["train_loss"]
    assert runs[0]["eval"] == runs[1]["eval"]
    for a, b in zip(weights(tmp_path / "0"), weights(tmp_path / "1"), strict=True):
        assert a.equal(b)


def test_lists_by_order_and_with_rewards_train_together(write_lines, tmp_path):
    by_order = [{"prompt": f"o{i}", "completions": ["a", "b", "c"]} for i in range(3)]
    pairs = [
        {key: f"\n\nHuman: {i}\n\nAssistant: {key}" for key in ("chosen", "rejected")}
        for i in range(3)
    ]
    rewarded = [{"prompt": f"r{i}", "completions": ["a", "b"], "rewards": [0, 3]} for i in range(3)]
    path = write_lines(*by_order, *pairs, *rewarded)
    run = train(config_for(path, tmp_path / "out", steps=None, epochs=2.0, eval_fraction=0.0))
    assert run["steps"] == 6 and run["eval"] == []


def test_checkpoint_evaluates_as_the_run_did(data_file, tmp_path):
    output = tmp_path / "out"
    config = config_for(data_file, output, eval_data=[data_file])
    after = train(config)["eval"][-1]
    metrics = evaluate_files(
        EvalConfig(model=str(output / "checkpoint"), data=[data_file], batch_size=3, device="cpu")
    )
    assert metrics == {name: value for name, value in after.items() if name != "step"}
    assert {"loss", "sft_loss", "rank_loss_1", "rank_loss_2", "top1_accuracy"} <= set(metrics)
    assert math.isclose(
        metrics["loss"],
        metrics["sft_loss"] + metrics["rank_loss_1"] + metrics["rank_loss_2"],
        rel_tol=1e-5,
    )


def test_outputs_are_complete_and_nothing_is_left_over(data_file, tmp_path):
    output = tmp_path / "a" / "out"
    run = train(config_for(data_file, output, eval_every=2))
    assert [point["step"] for point in run["eval"]] == [0, 2, 4, 6]
    assert sorted(p.name for p in output.iterdir()) == ["checkpoint", "curves.png", "metrics.json"]
    saved = json.loads((output / "metrics.json").read_text())
    assert saved["train_loss"] == run["train_loss"] and len(run["train_loss"]) == 6
    assert saved["config"]["seed"] == 0
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_output_folder_with_content_is_refused_before_any_work(data_file, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    config = config_for(data_file, output)
    with pytest.raises(ValueError, match="out is not empty; --overwrite"):
        train(replace(config, data=["does not exist"]))
    train(replace(config, overwrite=True))
    before = weights(output)
    train(replace(config, overwrite=True, seed=1))
    assert not weights(output)[0].equal(before[0])
    assert (output / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="notes.txt is a file"):
        train(replace(config, output_dir=str(output / "notes.txt")))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(data_file, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"step [23]: loss .*nothing was saved"):
        train(config_for(data_file, output, lr=1e30, max_grad_norm=0.0))
    assert list(output.iterdir()) == []


def test_refusals(data_file, tmp_path, tiny):
    config = config_for(data_file, tmp_path / "out")
    with pytest.raises(ValueError, match="train needs --model and --data, or --demo"):
        train(replace(config, demo=False))
    with pytest.raises(ValueError, match="eval needs --model and --data"):
        evaluate_files(EvalConfig())
    with pytest.raises(ValueError, match="device 'nonsense' cannot be used"):
        train(replace(config, device="nonsense"))
    with pytest.raises(DataError, match=r"no usable list \(.*fewer than 2"):
        empty = tmp_path / "e.jsonl"
        empty.write_text('{"prompt": "p", "completions": ["a"]}\n')
        train(replace(config, data=[str(empty)]))
    model, tokenizer = tiny_llama()
    model.config.max_position_embeddings = 4
    lists, _ = load_lists([data_file], tokenizer, config)
    with pytest.raises(ValueError, match="max_position_embeddings=4; set --max_length 4"):
        from pro_trainer.evaluate import check_lengths

        check_lengths(model, lists)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(tiny[0], [], config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_length": 8, "max_prompt_length": 8}, r"max_prompt_length must lie in \[1, max_"),
        ({"num_candidates": 1}, "num_candidates must be at least 2"),
        ({"temperature": "warm"}, "temperature must be 'reward' or a number > 0, got 'warm'"),
        ({"temperature": "0"}, "temperature must be"),
        ({"batch_size": 0}, "batch_size must be finite and > 0"),
        ({"lr": math.nan}, "lr must be finite and > 0"),
        ({"steps": 0}, "steps must be finite and > 0"),
        ({"eval_fraction": 1.0}, r"eval_fraction must lie in \[0, 1\)"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be finite and >= 0"),
    ],
)
def test_options_out_of_range_are_refused(options, wrong):
    with pytest.raises(ValueError, match=wrong):
        TrainConfig(**options)


def test_ranking_counts():
    scores = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -1.0, 0.0], [-1.0, -1.0, -5.0]])
    rewards = torch.tensor([[3.0, 1.0, 2.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    # List 1: 2 of 3 pairs, best on top. List 2: one pair, wrong; the absent one does not count.
    # List 3: equal scores are wrong, the tied pair is left out: 1 of 2.
    assert ranking_counts(scores, rewards, mask) == (3, 6, 2)


def test_tied_heads_and_frozen_parts_train(data_file, tmp_path, tiny):
    from transformers import LlamaForCausalLM

    shared = tiny[0].config.to_dict() | {"tie_word_embeddings": True}
    model = LlamaForCausalLM(type(tiny[0].config)(**shared))
    model.model.layers.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    config = config_for(data_file, tmp_path / "out", steps=2)
    lists, _ = load_lists([data_file], tiny[1], config)
    fit(model, lists, [], config, 0)
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert p.equal(old) == name.startswith("model.layers"), name
