"""The commands as a user runs them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_runs import QUICK

from pro_trainer.cli import commands as cli
from pro_trainer.cli import flags
from pro_trainer.cli import help as texts
from pro_trainer.cli.main import main
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.train.config import PROConfig

NO_OPTION = "--learning_rte is no option of train; did you mean learning_rate?"


def test_train_resume_and_eval(data_file, tmp_path, capsys):
    output = tmp_path / "out"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"demo: true\ndata: [{data_file}]\neval_fraction: 0.3\nsave_strategy: steps\n"
        "save_steps: 1\nlearning_rate: 0.5\nbf16: false\nsft_weight: 0.1\n"
        "lr_scheduler_kwargs: {}\ntemperature: 2.0\nlength_normalize: false\n"
    )
    argv = ["--config", str(config), "--output_dir", str(output), "--learning_rate", "1e-3", *QUICK]
    assert cli.train(argv) == 0
    printed = capsys.readouterr().out
    for part in ("loss: fused, backend", "lists kept: 8 (8 of 3 candidates)", "step 2/2  loss",
                 "eval: loss", "| held-out lists", "saved"):  # fmt: skip
        assert part in printed, part
    saved = json.loads((output / "metrics.json").read_text())
    assert saved["before"]["eval_prompts"] + 6 == 8 and saved["data"]["lists"] == 8
    steps = [entry["step"] for entry in saved["log_history"] if "eval_loss" in entry]
    assert steps == [0, 2]  # no weights are evaluated twice
    rate = saved["log_history"][1]["learning_rate"]
    assert rate == pytest.approx(1e-3)  # the flag wins over the file
    identity = json.loads((output / "checkpoint-2" / "pro_run.json").read_text())
    assert identity["sft_weight"] == 0.1 and identity["temperature"] == "2.0"
    assert identity["length_normalize"] is False

    assert cli.train(argv) == 2  # the folder holds a run
    assert "holds another run" in capsys.readouterr().err
    resumed = [*argv[:-4], "--max_steps", "3", "--resume_from_checkpoint", "last"]
    assert cli.train(resumed) == 0
    assert "step 3/3" in capsys.readouterr().out

    (output / "checkpoint-4").mkdir()  # cut off: passed over
    assert cli.train([*resumed[:-1], "auto", "--max_steps", "4"]) == 0
    assert "step 4/4" in capsys.readouterr().out

    argv = ["--model", str(output), "--data", data_file, "--use_cpu", "true"]
    assert cli.evaluate([*argv, "--output_dir", str(tmp_path / "eval")]) == 0
    assert "pairwise" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())


def test_auto_starts_afresh_where_nothing_whole_is_left(train, tmp_path, capsys):
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    assert train("--resume_from_checkpoint", "last") == 2
    assert "no whole checkpoint in" in capsys.readouterr().err
    assert train("--resume_from_checkpoint", "auto") == 0
    assert "step 2/2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "wrong"),
    [
        ("", "train needs --model and --data, or --demo"),
        ("--demo --data missing.jsonl", "missing.jsonl"),
        ("--demo --data data.jsonl", "error: data.jsonl:1: "),
        ("--model no/such/folder --data x", "not a causal LM"),
        ("--demo --max_length 1", "max_length must be at least 2"),
        ("--demo --eval_fraction 1", "eval_fraction must lie in"),
        ("--demo --config none.yaml", "--config none.yaml: cannot be read"),
        ("--demo --resume_from_checkpoint last", "no whole checkpoint in"),
        ("--demo --loss_impl fast", "--loss_impl: invalid choice: 'fast'"),
        ("--demo --max_steps x", "--max_steps: invalid int value: 'x'"),
        ("--demo --learning_rte 1", NO_OPTION),
        ("--demo --nothing_like_it", "--nothing_like_it is no option of train"),
        ("--demo --padding_free", "TRL that has none here: leave it out: no padding is run"),
        ("--dataset_test_split test --data data.jsonl", "give the held-out lists as --eval_data"),
        ("--demo --loss_type sigmoid_loss", "unknown loss 'sigmoid_loss'"),
        ("lists.jsonl --demo", "unexpected argument 'lists.jsonl'"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    argv, wrong, write_lines, capsys, tmp_path, monkeypatch
):
    write_lines({"prompt": "p", "completions": "not a list"})
    monkeypatch.chdir(tmp_path)
    assert cli.train(argv.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and wrong in line


def test_a_run_that_diverges_has_exit_code_1(train, tmp_path, capsys):
    argv = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "5"]
    assert train(*argv) == 1
    assert "error: steps up to" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_yaml_values_become_flags(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("batching: lists\neval_strategy: no\nbf16: true\ndata: []\nseed: 3\nmodel:\n")
    found, where = flags.config_flags(str(path))
    assert flags.words(found) == [
        "--batching=lists", "--eval_strategy=no", "--bf16=true", "--data", "--seed=3",
    ]  # fmt: skip
    assert where["seed"] == f"{path}:5"
    path.write_text("")
    assert flags.config_flags(str(path)) == ([], {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("demo: true\nlearning_rte: 1", f"c.yaml:2: {NO_OPTION}"),
        ("demo: true\nlearning_rate: fast", "c.yaml:2: --learning_rate: invalid float value: 'f"),
        ("demo: true\nmax_length: 1", "c.yaml:2: max_length must be at least 2, got 1"),
        ("demo: true\nfoo:", "c.yaml:2: --foo is no option of train"),
        ("demo: true\ndata: missing.jsonl", "missing.jsonl: cannot be read"),
        ("- a", "--config c.yaml: must hold 'option: value' lines"),
        ("a: [", "--config c.yaml: cannot be read"),
        ("!!python/object/apply:os.system ['true']", "--config c.yaml: cannot be read"),
    ],
)
def test_a_fault_in_the_file_is_named_with_its_line(text, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(f"{text}\n")
    assert cli.train(["--config", "c.yaml"]) == 2
    assert f"error: {said}" in capsys.readouterr().err
    if "max_length" in text:  # what the command line gives is not the file's fault
        assert cli.train(["--config", "c.yaml", "--max_length", "0"]) == 2
        assert "error: max_length must be at least 2, got 0" in capsys.readouterr().err


def test_a_command_line_of_trl_works_with_other_data(data_file, tiny_folder, tmp_path, capsys):
    argv = ["dpo", "--model_name_or_path", tiny_folder, "--dataset_name", data_file,
            "--dataset_train_split", "train", "--loss_type", "sigmoid", "--beta", "0.2",
            "--label_smoothing", "0.1", "--no_remove_unused_columns", "--torch_dtype", "float32",
            "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj",
            "--precompute_ref_log_probs", "--max_length", "64", "--learning_rate", "1e-3",
            "--output_dir", str(tmp_path / "out"), *QUICK]  # fmt: skip
    assert main(argv) == 0
    identity = json.loads((tmp_path / "out" / "pro_run.json").read_text())
    assert (identity["loss_type"], identity["beta"], identity["max_length"]) == ("dpo", 0.2, 64)
    assert "loss 0.6931" in capsys.readouterr().out  # of a model to itself


@pytest.fixture
def configs(monkeypatch):
    """What training is called with; nothing is trained."""
    seen = []

    def train(arguments, config):
        seen.append(config)

    monkeypatch.setitem(cli.ACTIONS, "train", (train, *cli.ACTIONS["train"][1:]))
    return seen


def test_values_with_a_dash_empty_lists_and_bare_switches(configs, monkeypatch, tmp_path):
    argv = ["--demo", "--output_dir", str(tmp_path), "--run_name=-x", "--length_normalize"]
    assert cli.train([*argv, "--reward_scale", "1e-3"]) == 0
    (config,) = configs
    assert (config.run_name, config.length_normalize, config.reward_scale) == ("-x", True, 1e-3)
    monkeypatch.setitem(cli.ACTIONS, "prepare", (configs.append, PrepareArguments))
    (tmp_path / "p.yaml").write_text("data: [a]\nstop: []\n")
    assert cli.prepare(["--config", str(tmp_path / "p.yaml")]) == 0 and configs[1].stop == []


def test_the_file_of_options_says_which_loss_dpo_is(configs, tmp_path):
    (tmp_path / "c.yaml").write_text("loss_type: ipo\n")
    argv = ["dpo", "--demo", "--output_dir", str(tmp_path)]
    assert main(argv) == main([*argv, "--config", str(tmp_path / "c.yaml")]) == 0
    assert [config.loss_type for config in configs] == ["dpo", "ipo"]


def test_the_output_folder_has_a_name_of_model_data_and_loss(
    data_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    argv = ["--demo", "--data", data_file, "--loss_type", "simpo", "--eval_fraction", "0", *QUICK]
    assert cli.train(argv) == 0
    assert capsys.readouterr().out.startswith("output_dir: demo-data-simpo\n")
    assert Path("demo-data-simpo/README.md").exists()


@pytest.mark.parametrize("command", texts.COMMANDS)
def test_help_fits_two_screens_and_names_every_option(command):
    lines = texts.page(command).splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 100
    for kind in texts.COMMANDS[command].kinds:
        for field in dataclasses.fields(kind):
            if texts._group(kind, field.name) in texts.COMMANDS[command].groups:
                assert f"--{field.name}" in texts.page(command, "all"), field.name


def test_help_on_a_group_an_option_and_all():
    assert "--beta FLOAT" in texts.page("train", "loss")
    assert texts.page("train", "sft_weight").startswith("  --sft_weight FLOAT")
    assert "--torch_compile_backend" in texts.page("train", "all")
    assert "--learning_rate" not in texts.page("eval") + texts.page("prepare", "all")
    with pytest.raises(ValueError, match="no such group or option of train; groups are data, text"):
        texts.page("train", "lossy")


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom pro_trainer.cli.main import main\nmain(['train', '--help'])\n"
        "main(['eval', '--help', 'loss'])\ntry: main(['run', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(x in done.stdout for x in ("--model", "--beta", "--rows", "-- COMMAND"))


def test_what_help_says_of_options_of_transformers_is_so():
    of_fields = {f.name: f.default for f in dataclasses.fields(PROConfig)}
    for options in texts._OF_TRANSFORMERS.values():
        for option in options:
            if option.name != "config":
                assert option.name in of_fields
            if option.default is not None and option.name != "warmup_steps":
                default = of_fields[option.name]
                assert str(option.default) == str(getattr(default, "value", default)), option


def test_a_term_that_holds_most_of_the_loss_and_much_memory_are_said_once(
    train, capsys, monkeypatch
):
    monkeypatch.setattr("pro_trainer.train.usage.memory_size", lambda device: 1 << 20)
    assert train("--sft_weight", "5", "--sft_reduction", "sum") == 0
    printed = capsys.readouterr().out
    said = [x for x in printed.splitlines() if "the SFT term is" in x]
    assert len(said) == 1 and "a lower --sft_weight or --sft_reduction mean" in said[0]
    assert printed.count("--gradient_checkpointing true would save about") == 1
    assert train("--overwrite", "true", "--gradient_checkpointing", "true") == 0
    printed = capsys.readouterr().out
    assert "the SFT term is" not in printed and "would save" not in printed
