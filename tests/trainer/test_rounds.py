"""Rounds on a tiny model: what each leaves, how the rounds go on after kills, what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from pro_trainer.cli import commands as cli
from pro_trainer.cli import rounds as conductor
from pro_trainer.data.report import DataReport
from pro_trainer.rounds import answers, lists
from pro_trainer.rounds.options import RoundOptions

PROMPTS = [{"prompt": f"q{i}: ", "letter": "aeiou"[i % 5]} for i in range(12)]
REWARD = """
def letters(completions, letter, **_):
    return [float(sum(x in "abcdefgh" for x in c)) + 0.1 * c.count(l)
            for c, l in zip(completions, letter)]

def same(completions, **_):
    return [1.0] * len(completions)
"""
OPTIONS = ["--num_samples", "4", "--max_new_tokens", "6", "--batch_size", "4", "--use_cpu", "true",
           "--report_to", "none", "--max_steps", "3", "--per_device_train_batch_size", "4",
           "--learning_rate", "1e-2", "--save_steps", "1", "--held_out", "0.4",
           "--stop_if_worse", "false", "--disable_tqdm", "true"]  # fmt: skip


@pytest.fixture(scope="module")
def begin(tiny_folder, tmp_path_factory):
    """Runs the command into a folder with these options more; returns its exit code."""
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in PROMPTS))
    (folder / "reward.py").write_text(REWARD)
    given = {
        "--model": tiny_folder,
        "--prompts": str(folder / "prompts.jsonl"),
        "--reward": f"{folder / 'reward.py'}:letters",
        "--rounds": "2",
    }

    def run(output: Path, *more: str, **changed: str) -> int:
        options = given | {f"--{name}": value for name, value in changed.items()}
        flat = [word for pair in options.items() for word in pair if pair[1]]
        return cli.rounds([*flat, "--output_dir", str(output), *OPTIONS, *more])

    return run


@pytest.fixture(scope="module")
def plain(begin, tmp_path_factory):
    """The folder of two rounds that nothing disturbed."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert begin(folder, "--mix_previous", "0.25") == 0
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(folder: Path) -> dict[str, bytes]:
    """All files of a run that are the same whenever it runs, without the settings of the state."""
    names = {"prompts.jsonl", "held-out.jsonl", "sampled.jsonl", "lists.jsonl", "answers.jsonl",
             "model.safetensors"}  # fmt: skip
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name in names or (path.name == "metrics.json" and path.parent.name != "checkpoint")
    }
    state = json.loads((folder / "rounds.json").read_text())
    del state["settings"], state["checkpoint"]
    return found | {"state": json.dumps(state).encode()}


def test_each_round_leaves_lists_metrics_and_a_model(plain):
    training, held_out = read(plain / "prompts.jsonl"), read(plain / "held-out.jsonl")
    assert sorted(map(str, training + held_out)) == sorted(map(str, PROMPTS))
    state = json.loads((plain / "rounds.json").read_text())
    assert len(state["rounds"]) == 2 and state["ended"] == "all 2 rounds are done"
    assert state["base"]["win_rate"] == 0.5
    base = read(plain / "base" / "answers.jsonl")
    for number in (1, 2):
        folder = plain / f"round-{number}"
        sampled, trained = read(folder / "sampled.jsonl"), read(folder / "lists.jsonl")
        own = {record["prompt"] for record in sampled}
        assert own <= {record["prompt"] for record in training}
        mixed = round(len(sampled) / 3) if number > 1 else 0
        assert trained[: len(sampled)] == sampled and len(trained) == len(sampled) + mixed
        before = read(plain / "round-1" / "sampled.jsonl")
        assert all(record in before for record in trained[len(sampled) :])
        found = json.loads((folder / "metrics.json").read_text())
        assert found == state["rounds"][number - 1]
        answered = read(folder / "answers.jsonl")
        assert [x["prompt"] for x in answered] == [x["prompt"] for x in held_out]
        wins = [
            sum((x > y) + (x == y) / 2 for x in a["rewards"] for y in b["rewards"]) / 16
            for a, b in zip(answered, base, strict=True)
        ]
        assert found["win_rate"] == pytest.approx(sum(wins) / len(wins))
        means = [sum(a["rewards"]) / 4 for a in answered]
        assert found["reward"] == pytest.approx(sum(means) / len(means))
        best = [max(a["rewards"]) for a in answered]
        assert found["best_of"] == pytest.approx(sum(best) / len(best))
        assert not list((folder / "checkpoint").glob("checkpoint-*"))
    rates = [0.5, *(x["win_rate"] for x in state["rounds"])]
    assert state["best"] == rates.index(max(rates))
    assert read(plain / "base" / "answers.jsonl") != read(plain / "round-1" / "answers.jsonl")


def test_a_model_that_did_not_change_answers_as_the_base_does(plain, begin, tmp_path):
    """The same prompts with the same seeds."""
    assert begin(tmp_path / "out", "--learning_rate", "0", rounds="1") == 0
    answered = [read(tmp_path / "out" / x / "answers.jsonl") for x in ("base", "round-1")]
    texts = [[x["completions"] for x in lines] for lines in answered]
    assert texts[0] == texts[1] and texts[0] != read(plain / "round-1" / "answers.jsonl")
    found = json.loads((tmp_path / "out" / "round-1" / "metrics.json").read_text())
    assert found["win_rate"] == 0.5


def test_killed_at_random_moments_it_ends_the_same(begin, plain, tmp_path):
    output, draws = tmp_path / "out", random.Random(3)
    context, kills, where = multiprocessing.get_context("fork"), 0, set()
    while True:
        process = context.Process(
            target=lambda: sys.exit(begin(output, "--mix_previous", "0.25"))
        )
        process.start()
        process.join(draws.uniform(0.03, 0.4) if kills < 14 else 120)
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        where.add(tuple(sorted(p.name for p in output.rglob("*") if p.is_dir())))
    assert kills > 2 and len(where) > 2, (kills, where)
    assert kept(output) == kept(plain)
