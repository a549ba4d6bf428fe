"""The two commands as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pro_trainer import cli


def pro_kernels(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pro_kernels", *argv], capture_output=True, text=True
    )


def test_train_then_eval(data_file, tmp_path):
    output = tmp_path / "out"
    done = pro_kernels("train", "--demo", "--data", data_file, "--steps", "2", "--eval_fraction",
                       "0.3", "--output_dir", str(output))  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("loss: fused, backend", "lists kept: 8 (8 of 3 candidates)", "step 2/2",
                 "held out, step 0", "held out, step 2", "saved"):  # fmt: skip
        assert part in done.stdout
    done = pro_kernels("eval", "--model", str(output / "checkpoint"), "--data", data_file)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout[done.stdout.index("{") :])
    assert metrics["prompts"] == 8 and 0 <= metrics["pairwise_accuracy"] <= 1


def test_a_user_error_is_one_line_and_exit_code_2(write_lines, tmp_path):
    path = write_lines({"prompt": "p", "completions": "not a list"})
    done = pro_kernels("train", "--demo", "--data", path, "--output_dir", str(tmp_path / "o"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: {path}:1: 'completions' must be a list of strings, got a string"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "wrong"),
    [
        ([], "train needs --model and --data, or --demo"),
        (["--demo", "--data", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--model", "no/such/folder", "--data", "x"], "not a causal LM"),
        (["--demo", "--lr", "-1"], "lr must be finite and > 0"),
    ],
)
def test_exit_code_2(argv, wrong, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.train(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and wrong in message


def test_a_run_that_diverges_has_exit_code_1(data_file, tmp_path, capsys):
    argv = ["--demo", "--data", data_file, "--lr", "1e30", "--max_grad_norm", "0"]
    assert cli.train([*argv, "--steps", "5", "--output_dir", str(tmp_path / "out")]) == 1
    assert "error: step" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--loss_impl", "fast"], ["--unknown"], ["--steps", "x"]])
def test_unknown_flags_and_values_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.train(argv)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.train(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for name in (
        "--sft_weight",
        "--loss_impl",
        "--max_prompt_length",
        "--overwrite",
        "--all_equal",
    ):
        assert name in shown
