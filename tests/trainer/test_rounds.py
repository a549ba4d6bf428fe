"""Rounds on a tiny model: what each leaves, how the rounds go on after kills, what is refused."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from servers import FakeServer

from pro_trainer.cli import commands as cli
from pro_trainer.cli import rounds
from pro_trainer.data.report import DataReport
from pro_trainer.rounds import answers, lists
from pro_trainer.rounds.options import RoundOptions
from study import rounds as study
from study.short_and_named import short_and_named

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

    def run(output: Path, *more: str, drawn: bool = False, **changed: str) -> int:
        options = given | {f"--{name}": value for name, value in changed.items()}
        flat = [word for pair in options.items() for word in pair if pair[1]]
        with pytest.MonkeyPatch.context() as patch:
            if not drawn:  # which takes as long as a round
                patch.setattr(rounds, "draw", lambda *_: None)
            return cli.rounds([*flat, "--output_dir", str(output), *OPTIONS, *more])

    run.reward = given["--reward"]
    return run


@pytest.fixture(scope="module")
def plain(begin, tmp_path_factory):
    """The folder of two rounds that nothing disturbed."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert begin(folder, "--mix_previous", "0.25", drawn=True) == 0
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
    assert (plain / "rounds.png").stat().st_size > 10_000
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
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rounds.json.writing").write_text("{")  # of one that was killed at once
    assert begin(tmp_path / "out", "--learning_rate", "0", rounds="1") == 0
    answered = [read(tmp_path / "out" / x / "answers.jsonl") for x in ("base", "round-1")]
    texts = [[x["completions"] for x in lines] for lines in answered]
    assert texts[0] == texts[1] and texts[0] != read(plain / "round-1" / "answers.jsonl")
    found = json.loads((tmp_path / "out" / "round-1" / "metrics.json").read_text())
    assert found["win_rate"] == 0.5


def test_killed_at_random_moments_it_ends_the_same(begin, plain, tmp_path):
    output, draws = tmp_path / "out", random.Random(3)
    context, kills, where = multiprocessing.get_context("fork"), 0, set()

    def files():
        return sum(len(names) for *_, names in os.walk(output))

    while True:
        process = context.Process(target=lambda: sys.exit(begin(output, "--mix_previous", "0.25")))
        process.start()
        enough = files() + draws.randint(1, 6) if kills < 14 else 10_000
        while process.exitcode is None and files() < enough:
            process.join(draws.uniform(0.002, 0.1))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        where.add(tuple(sorted(p.name for p in output.rglob("*") if p.is_dir())))
    assert kills > 2 and len(where) > 2, (kills, where)
    assert kept(output) == kept(plain)


def test_lists_of_your_own_are_mixed_in_without_held_out_prompts(plain, begin, tmp_path):
    held_out = read(plain / "held-out.jsonl")
    prompts = [*[x["prompt"] for x in held_out], *(f"own {i}: " for i in range(30))]
    own = tmp_path / "own.jsonl"
    records = [{"prompt": x, "completions": ["no", "yes"], "rewards": [0, 3]} for x in prompts]
    own.write_text("".join(f"{json.dumps(x)}\n" for x in records))
    options = ["--mix_reference", str(own), "--mix_reference_share", "0.5"]
    assert begin(tmp_path / "out", *options) == 0
    for folder in ("round-1", "round-2"):
        sampled = read(tmp_path / "out" / folder / "sampled.jsonl")
        extra = read(tmp_path / "out" / folder / "lists.jsonl")[len(sampled) :]
        assert len(extra) == len(sampled) and all(x["prompt"].startswith("own") for x in extra)
        assert all(x["rewards"] == [0, 3] for x in extra)


def test_the_server_is_told_of_each_model_before_it_samples(begin, tmp_path, capfd):
    log, output = tmp_path / "log", tmp_path / "out"
    command = f'echo "$PRO_KERNELS_ROUND $PRO_KERNELS_CHECKPOINT" >> {log}'
    with FakeServer() as server:
        options = ["--server", server.url, "--concurrency", "2"]
        assert begin(output, *options, "--reload_command", command) == 0
        told = [line.split() for line in log.read_text().splitlines()]
        assert [number for number, _ in told] == ["0", "1", "2"]
        assert [Path(model) for _, model in told[1:]] == [
            output / f"round-{n}" / "checkpoint" for n in (1, 2)
        ]
        asked = len(server.asked)
        assert begin(output, *options, "--reload_command", command) == 0
        assert len(server.asked) == asked and len(log.read_text().splitlines()) == 3
        # One that goes on tells the server again; a command that fails ends the run.
        assert begin(output, *options, "--reload_command", "exit 3", rounds="3") == 1
        assert (
            "reload_command: exit 3 ended with exit code 3; the server may not serve"
            in capfd.readouterr().err
        )
        assert begin(output, *options, "--reload_command", command, rounds="3") == 0
        numbers = [line.split()[0] for line in log.read_text().splitlines()]
        assert numbers == ["0", "1", "2", "2", "3"]


def test_a_launcher_trains_the_same_model(begin, plain, tmp_path, capfd):
    launched = tmp_path / "out"
    assert begin(launched, "--mix_previous", "0.25", "--launch", sys.executable, rounds="1") == 0
    model = Path("round-1") / "checkpoint" / "model.safetensors"
    assert (launched / model).read_bytes() == (plain / model).read_bytes()
    assert begin(tmp_path / "no", "--launch", "false", rounds="1") == 1
    assert "ended with exit code 1" in capfd.readouterr().err


def test_adapters_are_merged_into_the_next_rounds_model(begin, tiny_folder, tmp_path):
    assert begin(tmp_path / "out", "--use_peft", "true", "--lora_r", "2") == 0
    model = load_file(Path(tiny_folder) / "model.safetensors")
    for number in (1, 2):
        folder = tmp_path / "out" / f"round-{number}"
        trained = load_file(folder / "adapters" / "adapter_model.safetensors")
        merged = load_file(folder / "checkpoint" / "model.safetensors")
        for name, before in model.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            pair = [trained.get(f"{stem}.lora_{x}.weight") for x in "AB"]
            change = 0 if pair[0] is None else pair[1] @ pair[0] * (32 / 2)
            torch.testing.assert_close(merged[name], before + change)
        assert any((merged[name] != before).any() for name, before in model.items())
        model = merged


def test_it_stops_where_the_win_rate_falls_and_where_nothing_is_ranked(
    begin, tmp_path, monkeypatch, capsys
):
    falling = iter([0.5, 0.7, 0.6, 0.9])
    plainly = answers.metrics

    def metrics(*lines):
        rate = next(falling)
        return plainly(*lines) | {"win_rate": rate, "win_rate_interval": [rate, rate]}

    monkeypatch.setattr(answers, "metrics", metrics)
    output = tmp_path / "out"
    assert begin(output, "--stop_if_worse", "true", rounds="5") == 0
    state = json.loads((output / "rounds.json").read_text())
    assert state["ended"] == "the win rate fell in round 2: 0.700 to 0.600"
    assert state["best"] == 1 and state["checkpoint"] == str(output / "round-1" / "checkpoint")
    said = capsys.readouterr().out
    assert f"best: round 1, its model is {output}/round-1/checkpoint" in said
    assert begin(output, "--stop_if_worse", "false", rounds="3") == 0  # goes on all the same
    assert json.loads((output / "rounds.json").read_text())["best"] == 3

    monkeypatch.undo()
    assert begin(tmp_path / "same", reward=begin.reward.replace(":letters", ":same")) == 0
    state = json.loads((tmp_path / "same" / "rounds.json").read_text())
    assert state["best"] == 0 and state["rounds"] == []
    assert "round 1 has nothing to train on: every list was dropped" in state["ended"]
    assert "no round won against it" in capsys.readouterr().out


# Without bitsandbytes that is what is missing first.
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
QUANTISED = "quantised weights cannot" if HAS_BITSANDBYTES else "load_in_4bit needs bitsandbytes"


def test_bad_input_is_refused_before_any_work(begin, plain, tmp_path, capsys):
    absent, few = str(tmp_path / "absent.jsonl"), tmp_path / "few.jsonl"
    few.write_text('{"prompt": "one", "letter": "a"}\n')
    ordered = tmp_path / "ordered.jsonl"
    ordered.write_text('{"prompt": "own", "completions": ["a", "b"]}\n')
    reward = "none.py:f"
    cases = [
        ({"model": ""}, [], "model: the folder or hub name"),
        ({"prompts": ""}, [], "prompts: no file"),
        ({"prompts": absent}, [], "absent.jsonl"),
        ({"reward": ""}, [], "reward: samples have no reward"),
        ({"reward": reward}, [], "none.py"),
        ({"rounds": "0"}, [], "rounds must be finite and > 0, got 0"),
        ({"prompts": str(few)}, [], "there must be some of both"),
        ({}, ["--held_out", "1.5"], r"held_out must lie in (0, 1), or name a file, got 1.5"),
        ({}, ["--held_out", absent], "absent.jsonl"),
        ({}, ["--mix_previous", "-1"], "mix_previous must lie in [0, 1), got -1"),
        ({}, ["--mix_previous", "1"], "but are 1 together"),
        ({}, ["--mix_reference_share", "0.5"], "give them as mix_reference"),
        ({}, ["--mix_reference", absent], "absent.jsonl"),
        ({}, ["--mix_reference", str(ordered)], "the others only an order"),
        ({}, ["--sft", "chosen"], "sft must be best"),
        ({}, ["--server", "http://localhost:1"], "give a reload_command"),
        ({}, ["--reload_command", "true"], "reload_command is for a server"),
        ({}, ["--eval_strategy", "steps", "--eval_steps", "1"], "eval_strategy 'steps'"),
        ({}, ["--resume_from_checkpoint", "auto"], "resume_from_checkpoint 'auto'"),
        ({}, ["--sampling_temperature", "0"], "temperature must be finite and > 0"),
        ({}, ["--load_in_4bit", "true"], QUANTISED),
        ({}, ["--launch", " "], "launch: a command was expected"),
        ({}, ["--launch", "no-such-launcher -n 2"], "launch: there is no command no-such-launcher"),
    ]
    for changed, more, message in cases:
        assert begin(tmp_path / "out", *more, **changed) == 2, (changed, more)
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) <= 2, (message, said)
        assert not (tmp_path / "out").exists(), message
    # What a run was begun with must stay, but for what has no effect.
    assert begin(plain, "--mix_previous", "0.25", "--num_samples", "5") == 2
    assert "num_samples was 4, is 5" in capsys.readouterr().err
    assert begin(plain, "--mix_previous", "0.25", "--save_steps", "2") == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert begin(tmp_path / "other") == 2
    assert "holds mine.txt and no rounds.json" in capsys.readouterr().err
    assert begin(tmp_path / "other", "--overwrite", "true", rounds="1") == 0
    assert (tmp_path / "other" / "mine.txt").read_text() == "mine"
    assert begin(tmp_path / "other", "--overwrite", "true", "--num_samples", "3", rounds="1") == 0
    assert not (tmp_path / "other" / "round-2").exists()


def test_a_prompt_keeps_its_side(write_lines):
    """Whatever other prompts there are; prompts of a held-out file are not trained on."""

    def sides(count, held_out="0.3"):
        path = write_lines(*({"prompt": f"p{i}"} for i in range(count)))
        found = lists.split(RoundOptions(prompts=[path], held_out=held_out), DataReport())
        return [{record["prompt"] for record in side} for side in found]

    (few, few_held), (many, many_held) = sides(40), sides(400)
    assert few <= many and few_held <= many_held and 0.2 < len(many_held) / 400 < 0.4
    file = write_lines({"prompt": "p3"}, {"prompt": "other"}, name="held.jsonl")
    training, held_out = sides(10, file)
    assert held_out == {"p3", "other"} and training == {f"p{i}" for i in range(10)} - {"p3"}


def test_the_studys_reward_has_a_known_best():
    cases = {
        "The Glacier moves slowly downhill.": 2.0,
        "Ice moves slowly downhill, always.": 1.0,
        "glacier": 1.2,
        "": 0.0,
        "glacier " * 20: 2.0,
        "glacier " * 40: 1.5,
        "ice " * 80: 0.25,
    }
    assert short_and_named(list(cases), ["glacier"] * len(cases)) == pytest.approx(
        [*cases.values()]
    )


def test_the_study_tells_what_a_run_came_to(plain):
    found = study.results(plain)
    assert found["prompts"] + found["base"]["prompts"] == len(PROMPTS) and len(found["rounds"]) == 2
    assert [set(x) for x in found["minutes"]] == [
        {"answering"}, *[{"sampling", "training", "answering"}] * 2
    ]  # fmt: skip
    assert all(0 <= value < 1 for x in found["minutes"] for value in x.values())
    text = study.table(found)
    for name, x in zip(
        ("base", "round 1", "round 2"), [found["base"], *found["rounds"]], strict=True
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
        assert f"{x['reward']:.3f}" in line and f"{x['win_rate']:.3f} [" in line
    assert len(found["example"]["answers"]) == 3
