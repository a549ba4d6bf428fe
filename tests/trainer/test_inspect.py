"""``pro-kernels inspect`` as a user calls it, and the options an evaluation takes from its run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from texts import chat_tokenizer, pair, save

import tiny_models
from pro_trainer.cli import commands
from pro_trainer.text.options import ListOptions
from pro_trainer.text.store import load_dataset
from pro_trainer.train.config import PROConfig

RECORDS = [
    {"prompt": f"question {i}", "completions": ["good", "okay", "bad"], "rewards": [0, 2, 1],
     "extra": i}
    for i in range(5)
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny chat model."""
    tokenizer = chat_tokenizer()
    made = tiny_models.make(vocab_size=len(tokenizer), eos_token_id=0)
    return save(tmp_path_factory.mktemp("model"), made, tokenizer)


@pytest.fixture
def data(write_lines):
    return write_lines(*RECORDS)


def test_json_is_what_training_sees(model, data, capsys):
    argv = ["--data", data, "--model_name_or_path", model, "--num", "2", "--json", "true",
            "--max_length", "90", "--num_candidates", "2"]  # fmt: skip
    assert commands.inspect(argv) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    names = {"prompt_ids", "completion_ids", "rewards", "desirable", "weight", "cut"}
    assert len(lines) == 2 and set(lines[0]) == names
    tokenizer = chat_tokenizer()
    dataset, _ = load_dataset([data], tokenizer, ListOptions(max_length=90, num_candidates=2))
    assert lines[0]["prompt_ids"] == dataset[0]["prompts"][0]
    ends = [tokenizer.decode(ids) for ids in lines[0]["completion_ids"]]
    assert ends == ["okay<|im_end|>", "good<|im_end|>"]
    assert lines[0]["rewards"] == [2.0, 0.0] and lines[0]["cut"] is None
    assert "lists kept: 5 (5 of 2 candidates)" in err
    assert "columns that nothing uses (records that have them): extra (5)" in err
    assert "the tokenizer's EOS is '<|im_end|>' (2), the model's is '<bos>' (0)" in err


def test_text_marks_what_is_scored_and_reports(model, write_lines, capsys):
    data = write_lines(pair("x" * 200))
    assert commands.inspect(["--data", data, "--model", model, "--max_length", "80"]) == 0
    out = capsys.readouterr().out
    assert "=== list 1" in out and "\n[yes<|im_end|>]\n" in out
    assert "--- cut: the prompt lost the first " in out and "of its last turn" in out
    assert "cut to length: 1 prompts, 0 completions" in out
    assert commands.inspect(["--demo", "true", "--num", "1"]) == 0
    assert capsys.readouterr().out.count("=== list") == 1


QUANTISED = "--load_in_4bit true"


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        ("inspect", "--num 1", "train needs --model and --data"),
        ("inspect", "--demo true --num 0", "num must be finite and > 0, got 0"),
        ("inspect", "--data no.jsonl --model no", "no: no tokenizer"),
        ("inspect", "--demo true --chat_template on", "has no chat template"),
        ("train", f"{QUANTISED} --use_peft true", "load_in_4bit needs bitsandbytes: pip install"),
        ("train installed", f"{QUANTISED} --load_in_8bit true --use_peft true", "were both given"),
        ("train installed", QUANTISED, "quantised weights cannot be trained themselves"),
    ],
)
def test_wrong_calls(model, data, capsys, monkeypatch, command, flags, said):
    command, *installed = command.split()
    argv = flags.split()
    if command == "train":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
        argv += ["--model", model, "--data", data]
    assert getattr(commands, command)(argv) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def trained(model, data, tmp_path, capsys):
    """Trains a run of one step; the run's folder and what was printed."""

    def train(*flags):
        out = str(tmp_path / "run")
        argv = ["--model", model, "--data", data, "--max_steps", "1", "--output_dir", out]
        assert commands.train([*argv, *flags]) == 0
        return out, capsys.readouterr().out

    return train


@pytest.fixture
def evaluated(data, tmp_path, capsys):
    """What an evaluation writes and prints; None and the error where it is refused."""

    def evaluate(*flags):
        argv = ["--data", data, "--output_dir", str(tmp_path / "eval"), *flags]
        code, (out, err) = commands.evaluate(argv), capsys.readouterr()
        if code:
            assert code == 2
            return None, err
        return json.loads((tmp_path / "eval" / "eval.json").read_text()), out

    return evaluate


def test_a_run_is_evaluated_with_its_own_options(trained, evaluated, data, tmp_path):
    shape = ["--max_length", "100", "--num_candidates", "2", "--chat_template", "off"]
    out, printed = trained(*shape, "--sft_weight", "0.5", "--eval_data", data)
    assert printed.count("=== the first list") == 1 and "[okay<|im_end|>]" in printed
    assert printed.count("the tokenizer's EOS is '<|im_end|>' (2)") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["after"]

    found, printed = evaluated("--model", out)
    assert f"options of the run in {out}: chat_template off, max_length 100" in printed
    assert found["metrics"]["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert found["options"]["num_candidates"] == 2 and found["options"]["sft_weight"] == 0.5

    (tmp_path / "eval.yaml").write_text(f"model: {out}\nmax_length: 90\n")
    found, _ = evaluated("--config", str(tmp_path / "eval.yaml"), "--num_candidates", "3")
    options = found["options"]  # flag, then file, then run
    assert (options["num_candidates"], options["max_length"]) == (3, 90)
    assert options["chat_template"] == "off"
    (tmp_path / "run" / "pro_run.json").write_text("[]")
    said = "must be a JSON object with the options of a run"
    assert said in evaluated("--model", out)[1]


def test_a_run_is_compared_with_the_model_it_started_from(model, trained, evaluated):
    out, _ = trained("--loss_type", "dpo", "--beta", "0.2", "--max_length", "200")
    found, printed = evaluated("--model", out)
    assert f"# Evaluation of {out} against {model}" in printed
    assert found["base_metrics"]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    names = ("loss_type", "beta", "max_length")
    assert [found["options"][name] for name in names] == ["dpo", 0.2, 200]
    _, said = evaluated("--model", out, "--base", "none")
    assert "compares with the model that training started from" in said
    # A loss that is named takes no options of the run's own.
    found, _ = evaluated("--model", out, "--loss-type=pro")
    assert [found["options"][name] for name in names] == ["pro", None, 200]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine with an accelerator")
def test_bf16_without_an_accelerator_runs_on_the_cpu(tmp_path, capsys):
    assert PROConfig(output_dir=str(tmp_path), bf16=True).device == torch.device("cpu")
    assert capsys.readouterr().out == "bf16 on the CPU: there is no accelerator\n"
