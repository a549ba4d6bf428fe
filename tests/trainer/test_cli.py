"""The three commands as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pro_trainer.cli import commands as cli

QUICK = ["--report_to", "none", "--use_cpu", "true", "--max_steps", "2", "--logging_steps", "1"]


def pro_kernels(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pro_kernels", *argv], capture_output=True, text=True
    )


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
                 "eval: loss", "saved"):  # fmt: skip
        assert part in printed, part
    saved = json.loads((output / "metrics.json").read_text())
    assert saved["before"]["eval_prompts"] + 6 == 8 and saved["data"]["lists"] == 8
    rate = saved["log_history"][0]["learning_rate"]
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
    done = pro_kernels("eval", *argv, "--output_dir", str(tmp_path / "eval"))
    assert done.returncode == 0, done.stderr
    assert "pairwise" in done.stdout
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())


def test_auto_starts_afresh_where_nothing_whole_is_left(data_file, tmp_path, capsys):
    output = tmp_path / "out"
    (output / "checkpoint-1").mkdir(parents=True)
    argv = ["--demo", "--data", data_file, "--output_dir", str(output), *QUICK]
    assert cli.train([*argv, "--resume_from_checkpoint", "last"]) == 2
    assert "no whole checkpoint in" in capsys.readouterr().err
    assert cli.train([*argv, "--resume_from_checkpoint", "auto"]) == 0
    assert "step 2/2" in capsys.readouterr().out


def test_a_user_error_is_one_line_and_exit_code_2(write_lines, tmp_path):
    path = write_lines({"prompt": "p", "completions": "not a list"})
    done = pro_kernels("train", "--demo", "--data", path, "--output_dir", str(tmp_path / "o"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {path}:1: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "wrong"),
    [
        ([], "train needs --model and --data, or --demo"),
        (["--demo", "--data", "missing.jsonl"], "missing.jsonl"),
        (["--model", "no/such/folder", "--data", "x"], "not a causal LM"),
        (["--demo", "--max_length", "1"], "max_length must be at least 2"),
        (["--demo", "--eval_fraction", "1"], r"eval_fraction must lie in"),
        (["--demo", "--config", "none.yaml"], "--config none.yaml: cannot be read"),
        (["--demo", "--resume_from_checkpoint", "last"], "no whole checkpoint in"),
    ],
)
def test_exit_code_2(argv, wrong, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.train(argv) == 2
    message = capsys.readouterr().err
    assert wrong in message.splitlines()[-1] and message.splitlines()[-1].startswith("error: ")


def test_a_run_that_diverges_has_exit_code_1(data_file, tmp_path, capsys):
    argv = ["--demo", "--data", data_file, "--learning_rate", "1e30", "--max_grad_norm", "0"]
    argv += [*QUICK, "--max_steps", "5", "--output_dir", str(tmp_path / "out")]
    assert cli.train(argv) == 1
    assert "error: steps up to" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("argv", [["--loss_impl", "fast"], ["--unknown"], ["--max_steps", "x"]])
def test_unknown_flags_and_values_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.train(["--demo", *argv])
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("- a\n", "must hold 'option: value' lines"),
        ("a: [\n", "cannot be read"),
        ("!!python/object/apply:os.system ['true']\n", "cannot be read"),
    ],
)
def test_yaml_is_checked_and_loaded_safely(text, wrong, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=wrong):
        cli.config_flags(str(path))


def test_yaml_values_become_flags(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "prefix_sharing: on\neval_strategy: no\nbf16: true\ndata: []\nseed: 3\nmodel:\n"
    )
    assert cli.config_flags(str(path)) == [
        "--prefix_sharing", "on", "--eval_strategy", "no", "--bf16", "true", "--seed", "3",
    ]  # fmt: skip
    path.write_text("")
    assert cli.config_flags(str(path)) == []


def test_an_unknown_key_of_the_file_is_refused(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rte: 1\n")
    with pytest.raises(SystemExit):
        cli.train(["--demo", "--config", str(path)])
    assert "unrecognized arguments: --learning_rte 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            "train",
            ("--sft_weight", "--loss_impl", "--prefix_sharing", "--learning_rate", "--config"),
        ),
        ("evaluate", ("--reward_model", "--data", "--max_length")),
        ("prepare", ("--reward_model", "--ranking_length", "--seed")),
    ],
)
def test_help_shows_the_options(command, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        getattr(cli, command)(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(flag in shown for flag in flags)
