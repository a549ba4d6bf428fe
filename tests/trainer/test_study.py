"""The study, tiny: what each method is shown, that it goes on where it stopped, and its page."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.report.tables import block_of
from pro_trainer.evaluate.compare import Difference
from study import report
from study.__main__ import main
from study.run import METHODS, Run, Settings, best_alone, measure, runs, scores_from, study

SETTINGS = Settings(
    seeds=(("sft", 2), ("pro_2", 1)),
    lists=8,
    batch=4,
    held_out_share=0.4,
    candidates=4,
    max_length=64,
    max_prompt_length=32,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def paths(tiny_folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The tiny model on disk, and lists of four."""
    lists = tmp_path_factory.mktemp("study") / "lists.jsonl"
    rng = random.Random(0)
    with lists.open("w") as file:
        for i in range(20):
            words = [" ".join(rng.choices(["red", "blue", "green"], k=k + 2)) for k in range(4)]
            record = {"prompt": f"Secret {i}", "completions": words, "rewards": [3, 1.5, 1, 0]}
            file.write(json.dumps(record) + "\n")
    return tiny_folder, str(lists)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(paths, folder) -> dict[str, Any]:
    """The whole study, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("study.run.ProcessPoolExecutor", lambda n, *_, **__: ThreadPoolExecutor(n))
        return study(*paths, folder, SETTINGS, processes=1)


def test_only_a_run_that_is_missing_is_run_and_to_the_same_numbers(paths, folder, results):
    """In a process of its own."""
    (folder / "pro_2-1.json").unlink()
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = study(*paths, folder, SETTINGS, processes=1)
    for one, other in zip(results["runs"], again["runs"], strict=True):
        assert one["logps"] == other["logps"] and (one == other) == (one["method"] != "pro_2")
    assert study(*paths, folder, SETTINGS, processes=1) == again
    assert times.items() < {file: file.stat().st_mtime_ns for file in folder.iterdir()}.items()


def test_every_method_runs_with_its_seeds_and_learns_something(results):
    done = [(run["method"], run["seed"]) for run in results["runs"]]
    assert done == [(run.method, run.seed) for run in runs(SETTINGS)]
    assert done == [("base", 0), ("pro_2", 1), ("sft", 1), ("sft", 2)]
    base = scores_from(results["runs"][0])
    for run in results["runs"][1:]:
        scores = scores_from(run)
        assert torch.equal(scores.rewards, base.rewards)  # the same held-out lists
        assert not torch.equal(scores.logps, base.logps), run["method"]


def test_every_method_of_the_study_runs(paths, results):
    base = scores_from(results["runs"][0])
    assert set(METHODS) - {method for method, _ in Settings().seeds} == {"pro_4_filter"}
    for method in METHODS.keys() - {"sft", "pro_2"}:
        run = measure(*paths, SETTINGS, Run(method, 1))
        logps = scores_from(run).logps
        assert logps.isfinite().all() and run["log"], method
        assert torch.equal(logps, base.logps) == (method == "base"), method


def test_sft_is_shown_the_best_answer_alone():
    row = {"prompts": [[1]], "completions": [[2], [3], [4]], "rewards": [0.5, 2.0, 1.0]}
    assert best_alone(row) == {"prompts": [[1]], "completions": [[3]], "rewards": [0.0]}


def test_the_committed_page_is_what_the_results_give():
    results = json.loads(report.PAGE.with_suffix(".json").read_text())
    for name, text in report.blocks(results).items():
        assert block_of(report.PAGE, name) == text


def test_the_page_holds_the_numbers_of_the_runs_and_no_text(results, tmp_path: Path):
    report.write({**results, "facts": report.facts(1, "the command")}, tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == {"study.md", "study.json", "study.png"}
    text = (tmp_path / "study.md").read_text()
    for method, values in report.measured(results["runs"]).items():
        line = next(x for x in text.splitlines() if x.startswith(f"| {report.NAMES[method]}"))
        assert f"{values['pairwise_accuracy'][0]:.3f} [" in line, method
    assert "the command" in text
    stored = (tmp_path / "study.json").read_text()
    assert "Secret" not in text + stored and "blue" not in text + stored
    assert report.by_length(results["runs"]) < 0.5  # the longer one is the worse one here


def test_findings_follow_from_the_intervals():
    def of(low: float, high: float) -> dict[str, Difference]:
        return {"pairwise_accuracy": Difference(0.4, 0.4 + (low + high) / 2, low, high)}

    against = {
        "base": {"sft": of(0.1, 0.2), "pro_2": of(-0.1, 0.1)},
        "sft": {"pro_2": of(-0.3, -0.1)},
    }
    found = {"sft": {"pairwise_accuracy": (0.6, 0.5, 0.7)}}
    said = report.findings(against, found, 0.7)
    assert said[:3] == [
        "- Better than the base model in pairwise accuracy: SFT on the best.",
        "- Not told apart from the base model in pairwise accuracy: PRO, n = 2.",
        "- Worse than SFT in pairwise accuracy: PRO, n = 2.",
    ]
    assert "SFT on the best, 0.600" in said[3] and "tells less than length" in said[3]


def test_bad_input_is_named_before_any_work(paths, tmp_path: Path, write_lines, capsys):
    model, data = paths
    out = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert main(["--model", model, "--data", str(tmp_path / "absent.jsonl"), *out]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--model", model, "--data", data, "--processes", "0"])
    few = write_lines(*({"prompt": f"p{i}", "completions": ["a", "b"], "rewards": [1, 0]}
                        for i in range(4)))  # fmt: skip
    assert main(["--model", model, "--data", few, *out]) == 2
    assert "lists to train on, 128 are needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()
