from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import torch

from study import known, real, report, task
from study.__main__ import main
from study.run import study
from study.training import best_of, mean_and_error

KNOWN = known.KnownSettings(
    seeds=(1,),
    choice_seeds=(9,),
    candidates=(2, 3),
    learning_rates=(1e-3, 3e-3),
    hidden=16,
    layers=1,
    behaviour_prompts=64,
    train_prompts=32,
    held_out_prompts=16,
    clone_steps=4,
    clone_batch=8,
    steps=3,
    batch=8,
)
REAL = real.RealSettings(
    candidates=(2, 3),
    choice_candidates=2,
    learning_rates=(1e-3,),
    vocabulary=300,
    hidden=16,
    layers=1,
    max_length=64,
    max_prompt_length=32,
    pretrain_epochs=0.5,
    epochs=1,
    points=2,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> report.Results:
    """Both parts, tiny, run through the worker processes."""
    path = tmp_path_factory.mktemp("real") / "lists.jsonl"
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(20):
            words = [" ".join(rng.choices(["red", "blue", "green"], k=k + 2)) for k in range(4)]
            record = {"prompt": f"Secret {i}", "completions": words, "rewards": [3, 1.5, 1, 0]}
            file.write(json.dumps(record) + "\n")
    return study(str(path), 1, KNOWN, REAL)


def test_the_reward_is_graded_and_bounded():
    prompt = "cabhl" + task.MARK
    assert task.reward(prompt, "fdekc") == task.MAX_REWARD == 5
    assert task.reward(prompt, "cabhl") == 0  # the lazy answer
    assert task.reward(prompt, "edekc") == pytest.approx(5 - 1 / 3)
    assert task.reward(prompt, "ddekc") == pytest.approx(5 - 2 / 3)
    assert task.reward(prompt, "gdekc") == pytest.approx(5 - 1 / 3)
    for wrong in ("", "fdek", "fdekcc"):
        assert task.reward(prompt, wrong) == 0
    assert task.reward(prompt, "?dekc") == 4


def test_more_samples_of_the_behaviour_policy_hold_better_ones():
    rng = random.Random(0)
    drawn = [task.draw_example(prompt, 5, rng) for prompt in task.draw_prompts(300, 0)]
    best = [sum(max(x.rewards[:n]) for x in drawn) / len(drawn) for n in (1, 2, 3, 5)]
    assert all(b > a + 0.2 for a, b in zip(best, best[1:], strict=False))
    assert all(len(set(x.rewards)) == 5 for x in drawn)
    for x in drawn:
        assert list(x.rewards) == [task.reward(x.prompt, answer) for answer in x.answers]


def test_the_list_of_two_is_part_of_the_list_of_three_and_both_methods_see_the_same_best():
    example = known.Data.of_seed(KNOWN, 1).training[0]
    two, three = example.record(2), example.record(3)
    assert set(two["completions"]) < set(three["completions"])
    assert three["rewards"] == sorted(three["rewards"], reverse=True)
    lists = known._tokenized([three])
    alone = best_of(lists)[0]
    assert alone["completions"] == [lists[0]["completions"][0]]
    assert alone["completions"][0][:-1] == known._ids(three["completions"][0])


def test_no_prompt_is_trained_on_and_measured():
    data = known.Data.of_seed(KNOWN, 1)
    sets = [
        {prompt for prompt, _ in data.behaviour},
        {x.prompt for x in data.training},
        {x.prompt for x in data.held_out},
    ]
    assert [len(x) for x in sets] == [64, 32, 16]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_the_best_rate_is_that_of_the_highest_mean():
    rewards = {0.1: (1.0, 4.0), 0.2: (3.0, 3.0), 0.3: (5.0, 0.0)}
    runs = [
        {"method": "pro", "candidates": 2, "learning_rate": rate, "greedy_reward": reward}
        for rate, both in rewards.items()
        for reward in both
    ]
    assert known.best_rates(runs) == {("pro", 2): 0.2}


def test_a_run_is_repeatable_and_learns(tmp_path: Path):
    settings = known.KnownSettings(
        **(vars(KNOWN) | {"clone_steps": 60, "behaviour_prompts": 500, "hidden": 32})
    )
    fresh = known.clone(known.KnownSettings(**(vars(settings) | {"clone_steps": 1})), 1, tmp_path)
    cloned = known.clone(settings, 1, tmp_path)
    assert cloned["sampled_reward"] > fresh["sampled_reward"]
    run = known.Fit(1, "pro", 3, 3e-3)
    first, second = (known.fit(settings, run, tmp_path) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["lists"] == settings.train_prompts


def test_what_the_methods_differ_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known.clone(KNOWN, 1, tmp_path)
    seen = {}
    make = known.study_trainer

    def spy(model, tokenizer, lists, **config):
        seen[method] = (
            len(lists[0]["completions"]),
            config["sft_weight"],
            config.get("temperature"),
        )
        return make(model, tokenizer, lists, **config)

    monkeypatch.setattr(known, "study_trainer", spy)
    for method in known.methods(3):
        known.fit(KNOWN, known.Fit(1, method, 3, 1e-3), tmp_path)
    assert seen == {
        "sft": (1, 1.0, None),
        "pro": (3, 0.05, "reward"),
        "pro_constant": (3, 0.05 / 4, "reward"),
        "pro_order": (3, 0.05 / 4, "1"),
    }
    assert "pro_constant" not in known.methods(2)  # it is "pro" there


def test_the_study_runs_every_part(results: report.Results):
    assert len(results["known"]["fits"]) == 3 + 4  # methods on 2, on 3
    assert len(results["known"]["choices"]) == 2 * 7  # rates
    assert [x["candidates"] for x in results["real"]["runs"]] == [2, 3]
    assert results["real"]["pretrain"]["held_out_lists"] == 4
    assert [len(x["curve"]) for x in results["real"]["runs"]] == [2, 2]
    rates = known.best_rates(results["known"]["choices"])
    for run in results["known"]["fits"]:
        assert run["learning_rate"] == rates[run["method"], run["candidates"]]


def test_the_artefacts_hold_the_numbers_of_the_runs(results: report.Results, tmp_path: Path):
    results["facts"]["command"] = "the command"
    report.write(results, tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == {
        "study.md", "study.json", "study.png", "study-real.png",
    }  # fmt: skip
    text = (tmp_path / "study.md").read_text()
    stored = json.loads((tmp_path / "study.json").read_text())
    for run in results["known"]["fits"]:
        row = next(
            line
            for line in text.splitlines()
            if line.startswith(f"| {report.METHODS[run['method']]}")
            and f"| {run['candidates']} |" in line.replace("  ", "")
        )
        assert f"{run['greedy_reward']:.3f}" in row and f"{run['pairwise_accuracy']:.3f}" in row
    accuracy = results["real"]["runs"][0]["after"]["all"]
    assert f"{sum(accuracy['right']) / sum(accuracy['pairs']):.3f}" in text
    assert stored["known"]["fits"] == results["known"]["fits"]
    assert "the command" in text and str(results["known"]["settings"]["seeds"][0]) in text
    assert "Secret" not in text + json.dumps(stored)  # no text of the data
    assert "blue" not in text + json.dumps(stored)


def test_the_page_without_real_data_says_how_to_add_them(results: report.Results, tmp_path: Path):
    report.write({**results, "real": None}, tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "Not part of this run" in text and "--real-data" in text
    assert not (tmp_path / "study-real.png").exists()


def test_findings_follow_from_the_numbers(results: report.Results):
    changed = copy.deepcopy(results["known"])
    changed["advantages"] = [
        {"method": method, "candidates": n, "greedy_reward": greedy, "sampled_reward": (0.1, 0.1)}
        for method, n, greedy in (
            ("pro", 2, (0.5, 0.1)),
            ("pro", 3, (-0.5, 0.1)),
            ("pro_constant", 3, (0.5, 0.1)),
        )
    ]
    said = report.findings(changed).splitlines()
    assert said[0].endswith("PRO is ahead of SFT at n = 2; behind SFT at n = 3.")
    assert said[1].endswith("PRO is within two standard errors of SFT at n = 2, 3.")


def test_mean_and_error():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and error == pytest.approx((5 / 3) ** 0.5 / 2)
    assert mean_and_error([1.0])[1] != mean_and_error([1.0])[1]  # NaN


def test_errors_over_lists_agree_with_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(5, 30, (200,), generator=generator).double()
    shares = torch.rand(200, generator=generator)
    lists = {
        "pairs": pairs.tolist(),
        "right": (pairs * shares).round().tolist(),
        "top1": (shares > 0.5).double().tolist(),
        "kendall_tau": (2 * shares - 1).tolist(),
    }
    found = real.compare(lists, lists)
    resampled = torch.randint(0, 200, (4000, 200), generator=generator)
    right = torch.tensor(lists["right"])[resampled].sum(1)
    error = (right / pairs[resampled].sum(1)).std().item()
    assert found["before"]["pairwise_accuracy"][1] == pytest.approx(error, rel=0.1)
    assert found["change"]["pairwise_accuracy"] == (0, 0)


def test_highest_tau_counts_ties():
    assert real.highest_tau([{"rewards": [2.0, 1.0, 0.0]}]) == 1
    assert real.highest_tau([{"rewards": [2.0, 1.0, 1.0]}]) == pytest.approx((2 / 3) ** 0.5)


def test_bad_input_is_named_before_any_work(tmp_path: Path, write_lines, capsys):
    missing = str(tmp_path / "absent.jsonl")
    assert main(["--out", str(tmp_path / "out"), "--real-data", missing]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
    ordered = write_lines({"prompt": "p", "completions": ["a", "b"]})
    assert main(["--out", str(tmp_path / "out"), "--real-data", ordered]) == 2
    assert "rewards" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--processes", "0"])
    assert not (tmp_path / "out").exists()
