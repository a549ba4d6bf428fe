"""The bundled lists and the demo; the two real data sets where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pro_trainer import demo
from pro_trainer.cli import train as run
from pro_trainer.demo_data import BUNDLED_EVAL, BUNDLED_TRAIN, generate


def test_bundled_lists_are_what_the_generator_makes(tmp_path, monkeypatch):
    for name in ("BUNDLED_TRAIN", "BUNDLED_EVAL"):
        monkeypatch.setattr(generate, name, str(tmp_path / name))
    generate.main()
    for name, path in (("BUNDLED_TRAIN", BUNDLED_TRAIN), ("BUNDLED_EVAL", BUNDLED_EVAL)):
        assert (tmp_path / name).read_bytes() == Path(path).read_bytes()


def test_bundled_prompts_are_disjoint_and_lists_have_4_to_6_candidates():
    prompts = []
    for path in (BUNDLED_TRAIN, BUNDLED_EVAL):
        records = [json.loads(line) for line in Path(path).read_text().splitlines()]
        assert all(4 <= len(set(r["completions"])) <= 6 for r in records)
        assert all(len(set(r["rewards"])) == len(r["completions"]) for r in records)
        prompts.append({r["prompt"] for r in records})
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_held_out_accuracy_rises(tmp_path):
    result, _ = demo.run(demo.demo_config(str(tmp_path), steps=50))
    before, after = (result[when]["eval_pairwise_accuracy"] for when in ("before", "after"))
    assert before < 0.5 and after > before + 0.3, (before, after)
    history = demo.losses(result)
    assert len(history) == 50 and history[-1] < 0.5 * history[0]


def test_demo_compares_writes_its_plot_and_fails_where_the_trajectories_part(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo, "REAL_HEAD", (8, 500))
    output, run, results = tmp_path / "demo", demo.run, []

    def kept(config, **options):
        results.append(run(config, **options))
        return results[-1]

    monkeypatch.setattr(demo, "run", kept)
    assert demo.main(str(output), steps=4) == 0
    printed = capsys.readouterr().out
    for part in ("fused loss", "rounding", "pairwise_accuracy, after", "backend torch: usable",
                 "speedup", "same trajectory within rounding: yes"):  # fmt: skip
        assert part in printed
    assert (output / "curves.png").exists() and (output / "model.safetensors").exists()

    for entry in results[0][0]["log_history"]:  # of the fused run
        if "loss" in entry:
            entry["loss"] *= 1.001
    monkeypatch.setattr(demo, "run", lambda *_, **__: results.pop(0))
    assert demo.main(str(output), steps=4) == 1
    assert "same trajectory within rounding: NO" in capsys.readouterr().out


@pytest.mark.shared
@pytest.mark.parametrize("name", ["hh-harmless-base-dev", "alpaca-eval-ranked-dev"])
def test_trains_on_real_lists(name, shared, tmp_path):
    data = [str(shared / "data" / f"{name}.jsonl.gz")]
    config = demo.demo_config(
        str(tmp_path), 3, per_device_train_batch_size=2, max_length=96, save_strategy="no"
    )
    result = run.train(run.TrainArguments(demo=True, data=data, eval_fraction=0.02), config)
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"]
