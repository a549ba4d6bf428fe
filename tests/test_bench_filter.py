"""The benchmark of ``grad_filter``: peaked inputs, rows, report."""

from __future__ import annotations

import json

import pytest
import torch

from bench import filtering
from bench.peaked import trained, zipf
from bench.report import write_report


def test_zipf_is_peaked_and_its_targets_follow_it():
    batch = zipf(2, 2, 32, 64, 500)
    assert 0.4 < batch.top1 < 0.9
    rows = batch.targets.view(-1) >= 0
    p = (batch.hidden.view(-1, 64)[rows].float() @ batch.weight.float().t()).softmax(1)
    hit = (p.argmax(1) == batch.targets.view(-1)[rows]).float().mean()
    assert abs(hit - batch.top1) < 0.2 and 0.3 < rows.float().mean() < 0.6


def test_training_makes_the_model_surer():
    pytest.importorskip("transformers")
    before, after = (trained(1, 2, 32, 64, 101, steps=steps) for steps in (0, 15))
    assert after.top1 > 2 * before.top1


def test_rows_hold_the_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(filtering, "TAUS", (0.2, 1e-3))
    monkeypatch.setattr(filtering, "SIZES", dict.fromkeys(("zipf", "trained"), (1, 2, 32, 32, 400)))
    monkeypatch.setattr(filtering, "_STEPS", 2)
    data = filtering.run(tmp_path / "results.json", rounds=1, log=lambda text: None)
    assert data["complete"] and json.loads((tmp_path / "results.json").read_text()) == data
    plain, wide, narrow = [row for row in data["results"] if row["batch"] == "zipf"]
    assert plain["tau"] is None and plain["error_hidden"] == plain["largest_dropped_mass"] == 0
    assert 0 < wide["largest_dropped_mass"] <= 0.2
    assert wide["columns_with_gradient"] <= narrow["columns_with_gradient"] <= 1
    for row in (wide, narrow):
        assert row["error_hidden"] <= row["certified_hidden"] + 2**-8
        assert row["error_weight"] <= row["certified_weight"] + 2**-8
    written = write_report(tmp_path / "results.json")
    assert written[0].read_text().count("\n| zipf") == 3


def test_committed_numbers_reach_the_target():
    """0.75 of the dense floor at a certified error of 2^-8, where the mean top-1 is above 0.5."""
    data = json.loads((filtering.FOLDER / "results.json").read_text())
    found = filtering.best(data["results"])
    assert [row["batch"] for row in found] == ["zipf", "trained"]
    assert all(row["top1"] >= 0.5 for row in found)
    report = (filtering.FOLDER / "report.md").read_text()
    assert report == filtering.full_report(data, ["filter.png"])


def test_best_asks_for_both_gradients():
    row = {"batch": "zipf", "tau": 0.1, "of_floor": 0.5}
    rows = [
        {**row, "certified_hidden": 0.1, "certified_weight": 0.0},
        {**row, "certified_hidden": 0.001, "certified_weight": 0.002, "of_floor": 0.7},
        {**row, "certified_hidden": 0.0, "certified_weight": 0.0, "of_floor": 0.9},
    ]
    assert filtering.best(rows) == [rows[1]]
    assert torch.tensor(filtering._certified({**rows[0], "certified_weight": 2.0})).isinf()
