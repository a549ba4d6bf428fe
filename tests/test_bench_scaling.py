"""The bytes of a step by hand, the page, and a tiny run of what is measured over gloo."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed
from bench import tables
from bench.scaling import measure, page, wire
from bench.scaling.cli import main
from bench.scaling.measure import Clock


def test_bytes_of_a_step_by_hand():
    found = {c.name: (c.kind, c.size, c.calls) for c in wire.tensor_parallel(4, 10, 16, 8, 2, 3)}
    assert found == {
        "agreement": ("all_gather", 4 * 4 * 8, 1),
        "maxima": ("all_reduce", 10 * 4, 3),
        "sums and target logits": ("all_reduce", 10 * 8, 3),
        "dHidden": ("all_reduce", 16 * 8 * 2, 1),
    }
    frozen = wire.tensor_parallel(2, 10, 16, 8, 2, need_hidden=False)
    assert "dHidden" not in [c.name for c in frozen]
    # 67 rows on 4 ranks are 17 each; gathered in bf16, reduced in fp32.
    gather, scatter = wire.sharded_weight(4, 67, 8, 2, grad=4)
    assert (gather.size, scatter.size) == (68 * 8 * 2, 68 * 8 * 4)
    (summed,) = wire.replicated_weight(4, 67, 8, 4)
    assert summed.size == 67 * 8 * 4
    assert [x.size for x in wire.split_tokens(4, 12, steps=2)] == [2 * 4 * 32, 96]
    for make in (wire.replicated_weight, wire.sharded_weight):
        assert make(1, 67, 8, 4) == []
    assert wire.tensor_parallel(1, 10, 16, 8, 2) == wire.split_tokens(1, 12) == []


def between(text: str, block: str) -> str:
    begin, end = tables.marks(block)
    return text.split(begin)[1].split(end)[0].strip("\n")


def test_committed_page_is_what_the_results_give():
    data = measure.read(measure.FOLDER / "results.json")
    assert between(page.PAGE.read_text(), page.BLOCK) == page.measured_block(data)


def test_command_rewrites_the_page(tmp_path, capsys):
    target = tmp_path / "page.md"
    begin, end = tables.marks(page.BLOCK)
    target.write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
    assert main(["--report", "--page", str(target)]) == 0
    text = target.read_text()
    assert "stale" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert "weak scaling, data parallel" in text
    assert main(["--report", "--page", str(target), "--out", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err
    assert main(["--rounds", "1", "--page", str(target), "--out", str(tmp_path)]) == 2
    assert "rounds must be at least 2, got 1" in capsys.readouterr().err


def test_a_page_without_marks_is_refused(tmp_path, capsys):
    target = tmp_path / "page.md"
    target.write_text("nothing\n")
    assert main(["--report", "--page", str(target)]) == 2
    assert "must hold" in capsys.readouterr().err and target.read_text() == "nothing\n"


def test_a_run_beside_others_is_not_clean():
    """Ten seconds, 15 of this run's on two cores: what else was busy is others'."""
    start = Clock(0.0, 100.0, 1.0, 0.0)
    assert measure.judged(start, Clock(10.0, 115.2, 1.1, 15.0)) == {
        "others": pytest.approx(0.02), "stolen": pytest.approx(0.01), "clean": True,
    }  # fmt: skip
    busy = measure.judged(start, Clock(10.0, 116.0, 1.0, 15.0))
    assert busy["others"] == pytest.approx(0.1) and not busy["clean"]
    stolen = measure.judged(start, Clock(10.0, 115.0, 1.3, 15.0))
    assert stolen["stolen"] == pytest.approx(0.03) and not stolen["clean"]
    unknown = measure.judged(start, Clock(10.0, None, None, 15.0))
    assert not unknown["clean"] and "Not a clean run" in page.load_line(unknown)
    assert "Not a clean run" in page.load_line({**busy, "load_before": 1.0})


def test_the_clock_counts_this_process():
    before = Clock.now()
    if before.busy is None:
        pytest.skip("no /proc/stat")
    while Clock.now().ours < before.ours + 0.3:
        pass
    after = Clock.now()
    assert after.busy - before.busy >= 0.25  # the kernel counts in hundredths


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_tiny_heads_through_real_ranks(tmp_path):
    shape = (2, 2, 10, 16, 203)
    path = tmp_path / "results.json"
    data = measure.run(path, 2, lambda _: None, shape, shape)
    assert measure.read(path) == json.loads(json.dumps(data)) and data["complete"]
    split, *weak = data["results"]
    assert split["loss_difference"] <= 1e-6 and len(split["part_bytes"]) == 4
    for name in ("hidden", "weight"):
        assert 0 < split[f"{name}_error"] <= split[f"{name}_allowed"]
    assert [row["name"] for row in weak] == [
        "head matmuls alone", "data parallel", "data parallel, dW summed",
        "tensor parallel, V doubled",
    ]  # fmt: skip
    assert all(row["efficiency"] > 0 and row["by_processor"] > 0 for row in weak)
    assert [row["rounds"] for row in weak] == [2] * 4
    text = page.measured_block(data)
    assert "weak scaling, tensor parallel" in text and "H = 16, V = 203" in text
    path.write_text(json.dumps({**data, "complete": False}))
    with pytest.raises(ValueError, match="did not end"):
        measure.read(path)
    path.write_text(json.dumps({**data, "benchmark": "training"}))
    with pytest.raises(ValueError, match="not a results file of bench.scaling"):
        measure.read(path)
