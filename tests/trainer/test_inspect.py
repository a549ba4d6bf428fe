"""``pro-kernels inspect`` as a user calls it, and the options an evaluation takes from its run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_text import make
from transformers import LlamaConfig, LlamaForCausalLM

from pro_trainer.cli import commands
from pro_trainer.text.options import ListOptions
from pro_trainer.text.store import load_dataset
from pro_trainer.train.config import PROConfig

RECORDS = [
    {"prompt": f"question {i}", "completions": ["good", "okay", "bad"], "rewards": [0, 2, 1],
     "extra": i}
    for i in range(5)
]  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """The folder of a tiny chat model."""
    tokenizer = make()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=0, bos_token_id=1, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_json_is_what_training_sees(model, write_lines, capsys):
    data = write_lines(*RECORDS)
    argv = ["--data", data, "--model_name_or_path", model, "--num", "2", "--json", "true",
            "--max_length", "90", "--num_candidates", "2"]  # fmt: skip
    assert commands.inspect(argv) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 2 and set(lines[0]) == {"prompt_ids", "completion_ids", "rewards", "cut"}
    tokenizer = make()
    dataset, _ = load_dataset([data], tokenizer, ListOptions(max_length=90, num_candidates=2))
    assert lines[0]["prompt_ids"] == dataset[0]["prompts"][0]
    assert [tokenizer.decode(ids) for ids in lines[0]["completion_ids"]] == [
        "okay<|im_end|>", "good<|im_end|>",
    ]  # fmt: skip
    assert lines[0]["rewards"] == [2.0, 0.0] and lines[0]["cut"] is None
    assert "lists kept: 5 (5 of 2 candidates)" in err
    assert "columns that nothing uses (records that have them): extra (5)" in err
    assert "the tokenizer's EOS is '<|im_end|>' (2), the model's is '<bos>' (0)" in err


def test_text_marks_what_is_scored_and_reports(model, write_lines, capsys):
    data = write_lines({"prompt": "x" * 200, "chosen": "yes", "rejected": "no"})
    assert commands.inspect(["--data", data, "--model", model, "--max_length", "80"]) == 0
    out = capsys.readouterr().out
    assert "=== list 1" in out and "\n[yes<|im_end|>]\n" in out
    assert "--- cut: the prompt lost the first " in out and "of its last turn" in out
    assert "cut to length: 1 prompts, 0 completions" in out


def test_the_demo_and_wrong_calls(write_lines, capsys):
    assert commands.inspect(["--demo", "true", "--num", "1"]) == 0
    assert capsys.readouterr().out.count("=== list") == 1
    for argv, said in (
        (["--num", "1"], "train needs --model and --data"),
        (["--demo", "true", "--num", "0"], "num must be finite and > 0, got 0"),
        (["--data", "no.jsonl", "--model", "no"], "no: no tokenizer"),
        (["--demo", "true", "--chat_template", "on"], "has no chat template"),
    ):
        assert commands.inspect(argv) == 2
        assert said in capsys.readouterr().err


def test_a_run_is_evaluated_with_its_own_options(model, write_lines, tmp_path, capsys):
    data, out = write_lines(*RECORDS), str(tmp_path / "run")
    shape = ["--max_length", "100", "--num_candidates", "2", "--chat_template", "off"]
    train = ["--model", model, "--data", data, *shape, "--sft_weight", "0.5", "--max_steps", "1",
             "--output_dir", out, "--eval_data", data]  # fmt: skip
    assert commands.train(train) == 0
    printed = capsys.readouterr().out
    assert printed.count("=== the first list") == 1 and "[okay<|im_end|>]" in printed
    assert printed.count("the tokenizer's EOS is '<|im_end|>' (2)") == 1
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["after"]

    argv = ["--data", data, "--output_dir", str(tmp_path / "eval")]
    assert commands.evaluate(["--model", out, *argv]) == 0
    printed = capsys.readouterr().out
    assert f"options of the run in {out}: chat_template off, max_length 100" in printed
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert found["metrics"]["loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    assert found["options"]["num_candidates"] == 2 and found["options"]["sft_weight"] == 0.5

    (tmp_path / "eval.yaml").write_text(f"model: {out}\nmax_length: 90\n")
    with_file = ["--config", str(tmp_path / "eval.yaml"), "--num_candidates", "3", *argv]
    assert commands.evaluate(with_file) == 0
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())["options"]
    assert (found["num_candidates"], found["max_length"]) == (3, 90)  # flag, then file, then run
    assert found["chat_template"] == "off"
    (tmp_path / "run" / "pro_run.json").write_text("[]")
    assert commands.evaluate(["--model", out, *argv]) == 2
    assert "must be a JSON object with the options of a run" in capsys.readouterr().err


def trained(model, data, tmp_path, loss_type, beta):
    """What evaluates a run of one step, and the run's folder."""
    out = str(tmp_path / "run")
    argv = ["--model", model, "--data", data, "--loss_type", loss_type, "--beta", beta,
            "--max_steps", "1", "--output_dir", out, "--max_length", "200"]  # fmt: skip
    assert commands.train(argv) == 0
    return ["--model", out, "--data", data, "--output_dir", str(tmp_path / "eval")], out


def test_a_run_is_compared_with_the_model_it_started_from(model, write_lines, tmp_path, capsys):
    argv, out = trained(model, write_lines(*RECORDS), tmp_path, "dpo", "0.2")
    assert commands.evaluate(argv) == 0
    assert f"# Evaluation of {out} against {model}" in capsys.readouterr().out
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert found["base_metrics"]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    found = found["options"]
    assert (found["loss_type"], found["beta"]) == ("dpo", 0.2)
    assert found["max_length"] == 200
    assert commands.evaluate([*argv, "--base", "none"]) == 2
    assert "compares with the model that training started from" in capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine with an accelerator")
def test_bf16_without_an_accelerator_runs_on_the_cpu(tmp_path, capsys):
    assert PROConfig(output_dir=str(tmp_path), bf16=True).device == torch.device("cpu")
    assert capsys.readouterr().out == "bf16 on the CPU: there is no accelerator\n"


def test_quantised_weights_need_adapters_and_bitsandbytes(model, write_lines, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = ["--model", model, "--data", write_lines(*RECORDS), "--load_in_4bit", "true"]
    assert commands.train([*argv, "--use_peft", "true"]) == 2
    assert "load_in_4bit needs bitsandbytes: pip install bitsandbytes" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert commands.train([*argv, "--load_in_8bit", "true", "--use_peft", "true"]) == 2
    assert "load_in_4bit and load_in_8bit were both given" in capsys.readouterr().err
    assert commands.train(argv) == 2
    assert "quantised weights cannot be trained themselves" in capsys.readouterr().err


def test_a_loss_that_is_named_takes_no_options_of_the_runs_own(
    model, write_lines, tmp_path, capsys
):
    argv, _ = trained(model, write_lines(*RECORDS), tmp_path, "simpo", "1.5")
    assert commands.evaluate([*argv, "--loss-type=pro"]) == 0
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())["options"]
    assert (found["loss_type"], found["beta"], found["max_length"]) == ("pro", None, 200)
