"""The benchmark of ``attach`` and of the swap under TRL, on sizes that mean nothing."""

from __future__ import annotations

import json

import pytest

from bench import attached
from bench.cli import main
from bench.tables import marks

pytest.importorskip("transformers")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(attached, "HEADS", ((64, 301),))
    monkeypatch.setattr(attached, "LENGTH", 10)


def test_both_sides_are_timed_and_agree(tiny, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n".join(marks(attached.BLOCK)) + "\n")
    out = tmp_path / "out"
    assert main(["--attached", "--repeats", "2", "--out", str(out), "--update", str(page)]) == 0
    data = json.loads((out / "results.json").read_text())
    assert data["complete"] and [row["name"].split(",")[0] for row in data["results"]] == [
        "attach", "TRL's head",
    ]  # fmt: skip
    for row in data["results"]:
        if "note" in row:  # TRL is not there
            assert "trl" in row["note"]
            continue
        assert row["ratio"] > 0 and row["seconds"]["ours"][1] > 0
        losses = list(row["losses"].values())
        assert losses[0] == pytest.approx(losses[1], rel=2e-2, abs=1e-2)
    written = page.read_text()
    assert "| attach, H=64 V=301 |" in written
    before = page.read_text()
    again = ["--attached", "--report", str(out / "results.json"), "--update", str(page)]
    assert main(again) == 0 and page.read_text() == before


def test_without_trl_its_row_says_so(tiny, monkeypatch):
    def refuse(name: str) -> None:
        raise attached.Refused(f"not installed: {name}")

    monkeypatch.setattr(attached, "require", refuse)
    row = attached.trl_head(64, 301, 1)
    assert row["note"] == "not installed: trl"
    assert attached._cells(row).count("|") == 7
