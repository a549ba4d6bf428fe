"""The scaling model by hand, the page it makes, and a tiny run of what is measured over gloo."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed
from bench import cli as bench_cli
from bench import tables
from bench.model import costs
from bench.model.cards import CARDS
from bench.scaling import measure, page, predict, wire
from bench.scaling.cli import main
from bench.scaling.measure import Clock
from bench.scaling.predict import MODELS, Batch, Layout, Model, best, efficiency, step
from bench.scaling.wire import DGX, Cluster, Collective
from pro_kernels.fused.planner import make_plan

H200 = CARDS["H200"]
SMALL = Model("small", 64, 1000, layers=2, ffn=128, queries=64, keys=32)
BATCH = Batch(prompts=8, n=4, positions=64, scored=16)
LLAMA = MODELS["Llama 3 8B"]


# What is sent.


@pytest.mark.parametrize(
    ("kind", "ranks", "expected"),
    [("all_gather", 4, 750), ("reduce_scatter", 4, 750), ("all_reduce", 4, 1500),
     ("all_reduce", 2, 1000), ("all_gather", 1, 0)],
)  # fmt: skip
def test_bytes_of_a_ring_by_hand(kind, ranks, expected):
    assert Collective("", kind, ranks, 1000).sent == expected


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


def test_seconds_of_a_ring_by_hand():
    """NVLink in a node; beyond it a ring an adapter; small messages by the protocol for them."""
    gigabyte = 10**9
    inside = Collective("", "all_gather", 8, gigabyte).seconds(DGX)
    assert inside == pytest.approx(8.4e-6 + 7 * 3.4e-6 + 7 / 8 * gigabyte / 450e9)
    # 2 nodes of 8: 15 steps, one between nodes; eight adapters together.
    across = Collective("", "all_gather", 16, gigabyte).seconds(DGX)
    assert across == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 9.6e-6 + 15 / 16 * gigabyte / (8 * 50e9))
    # One rank a node, as tensor parallelism over the node leaves it: its own adapter.
    apart = Collective("", "all_gather", 16, gigabyte, stride=8).seconds(DGX)
    assert apart == pytest.approx(8.4e-6 + 15 * 9.6e-6 + 15 / 16 * gigabyte / 50e9)
    small = Collective("", "all_reduce", 4, 1200, calls=3).seconds(DGX)
    assert small == pytest.approx(3 * (3.6e-6 + 6 * 0.47e-6) + 1800 / (450e9 / 4))
    assert Collective("", "all_reduce", 1, 1200).seconds(DGX) == 0


# A step.


def test_a_step_of_one_gpu_is_the_performance_model():
    made = step(SMALL, BATCH, Layout(), H200)
    alone = costs.linear(8 * 4 * 64, 8 * 4 * 16, 64, 1000, 8, 4)
    assert made.seconds == made.compute == alone.seconds(H200) and made.transfers == ()
    assert made.micros == 1
    # Two layers: q and o 64 x 64, k and v 64 x 32, three of 64 x 128.
    assert SMALL.decoder == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert made.decoder == 2 * SMALL.decoder * 2048 / H200.matmul


def test_micro_batches_by_hand(monkeypatch):
    monkeypatch.setattr(predict, "MICRO", 3 * 4 * 64)  # three prompts at a time: 3, 3, 2
    made = step(SMALL, BATCH, Layout(), H200)
    sizes = [costs.linear(p * 256, p * 64, 64, 1000, p, 4).seconds(H200) for p in (3, 3, 2)]
    adding = 2 * 3 * 1000 * 64 * 2 / H200.copy  # dW and what it is added to read, the sum written
    assert made.micros == 3 and made.compute == pytest.approx(sum(sizes) + adding)
    assert made.memory["dW"] == 2 * 1000 * 64 * 2
    fsdp = step(SMALL, dataclasses.replace(BATCH, prompts=16), Layout(dp=2), H200)
    sizes = {c.name: (c.size, c.calls) for c, _ in fsdp.transfers}
    assert sizes == dict.fromkeys(("head weight", "dW, shards"), (3 * 1000 * 64 * 2, 3))
    split = step(SMALL, BATCH, Layout(tp=2), H200)
    sizes = {c.name: (c.size, c.calls) for c, _ in split.transfers}
    assert sizes == {
        "agreement": (3 * 64, 3),
        "maxima": (512 * 4, 3),
        "sums and target logits": (512 * 8, 3),
        "dHidden": (2048 * 64 * 2, 3),
    }


def test_every_dimension_of_a_layout_by_hand():
    at = Layout(tp=2, cp=2, candidates=2, dp=4)
    made = step(SMALL, BATCH, at, H200)
    # A rank: 2 prompts of 2 candidates of 32 positions, 8 of them scored, and 500 columns.
    R, N = 2 * 2 * 32, 2 * 2 * 8
    assert made.compute == costs.linear(R, N, 64, 500, 2, 2, sharded=True).seconds(H200)
    found = {c.name: (c.ranks, c.size, c.stride) for c, _ in made.transfers}
    assert found == {
        "agreement": (2, 64, 1),
        "maxima": (2, 4 * N, 1),
        "sums and target logits": (2, 8 * N, 1),
        "dHidden": (2, R * 64 * 2, 1),
        "agreement on parts": (4, 4 * 32, 2),
        "parts of candidates": (4, 8 * 2 * 4, 2),
        "head weight": (16, 512 * 64 * 2, 2),  # 500 rows on 16 ranks: 32 each
        "dW, shards": (16, 512 * 64 * 2, 2),
    }
    assert at.gpus == 32 and at.data == 16
    ddp = step(SMALL, BATCH, at, H200, fsdp=False)
    assert {c.name: c.size for c, _ in ddp.transfers}["dW"] == 500 * 64 * 2


def test_a_split_head_reads_its_logits_once_more():
    one = costs.linear(128, 64, 64, 500, 2, 4)
    split = costs.linear(128, 64, 64, 500, 2, 4, sharded=True)
    assert split.flops == one.flops
    assert split.moved - one.moved == pytest.approx(64 * 500 * 2, rel=0.05)
    score = costs.linear(128, 64, 64, 500, 2, 4, "score", sharded=True)
    assert score == costs.linear(128, 64, 64, 500, 2, 4, "score")


def test_memory_is_the_planners():
    made = step(SMALL, BATCH, Layout(tp=2, dp=4), H200)
    plan = make_plan(
        128, (500, 64, torch.bfloat16), torch.device("cuda"), need_hidden=True, need_weight=True,
        budget=8 << 30, hidden_rows=512,
    )  # fmt: skip
    weight = 500 * 64 * 2
    assert made.memory == {
        "head weight": weight + weight // 4,
        "dW": weight + weight // 4,
        "hidden states and their gradient": 2 * 512 * 64 * 2,
        "the loss (planner)": plan.taken,
    }
    ddp = step(SMALL, BATCH, Layout(tp=2, dp=4), H200, fsdp=False).memory
    assert ddp["head weight"] == ddp["dW"] == weight


def test_what_the_decoder_hides_by_hand():
    """Gathering beside the forward, reducing beside twice that; scores never."""
    made = step(LLAMA, Batch(), Layout(candidates=4, dp=256), H200)
    times = {c.name: seconds for c, seconds in made.transfers}
    left = max(0, times["head weight"] - made.decoder)
    left += max(0, times["dW, shards"] - 2 * made.decoder)
    scores = times["agreement on parts"] + times["parts of candidates"]
    assert made.hidden == pytest.approx(made.compute + scores + left)
    short = dataclasses.replace(made, decoder=times["head weight"] / 3)
    assert short.hidden == pytest.approx(made.compute + scores + times["head weight"])


def test_more_ranks_compute_less_and_send_no_less():
    steps = predict.tensor_parallel(LLAMA, H200)
    for a, b in zip(steps, steps[1:], strict=False):
        assert b.compute < a.compute and b.communication > a.communication
        assert sum(b.memory.values()) < sum(a.memory.values())
    shares = [efficiency(steps[0], s) for s in steps]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)
    for model in MODELS.values():
        times = [best(model, Batch(), gpus, H200).seconds for gpus in predict.GPUS]
        assert times == sorted(times, reverse=True)
    slow = Cluster("slow", 8, 45e9, 5e9, "")
    for at in (Layout(tp=8), Layout(dp=256), Layout(tp=2, cp=2, candidates=2, dp=8)):
        fast, late = step(LLAMA, Batch(), at, H200), step(LLAMA, Batch(), at, H200, slow)
        assert late.seconds > fast.seconds and late.compute == fast.compute
    wider = step(dataclasses.replace(LLAMA, V=2 * LLAMA.V), Batch(), Layout(dp=8), H200)
    assert wider.seconds > step(LLAMA, Batch(), Layout(dp=8), H200).seconds


def test_the_fastest_layout_is_one_of_all():
    found = list(predict.layouts(16, BATCH))
    assert len(set(found)) == len(found)
    assert all(at.gpus == 16 and at.tp * at.cp <= 8 for at in found)
    assert Layout(tp=2, cp=2, candidates=2, dp=2) in found and Layout(dp=16) not in found
    least = best(SMALL, BATCH, 16, H200)
    assert least.seconds == min(step(SMALL, BATCH, at, H200).seconds for at in found)


def test_rows_that_hide_fsdp_without_latency_have_a_closed_form():
    slow = dataclasses.replace(H200, copy=1e30, matmul=1e12)  # matmuls are all
    near = Cluster("", 8, 1e9, 1e9, "")  # latency is nothing
    found = predict.rows_to_hide(LLAMA, 8, 1, slow, near)
    assert found == pytest.approx(4 * 1e12 / (6 * 1e9) * 7 / 8, rel=1e-2)
    more = predict.rows_to_hide(LLAMA, 1024, 1, H200)
    assert more > predict.rows_to_hide(LLAMA, 64, 1, H200)


@pytest.mark.parametrize(
    ("batch", "layout", "said"),
    [
        (BATCH, Layout(dp=3), "prompts must be a multiple of its 3 ranks, got 8"),
        (BATCH, Layout(candidates=8), "n must be a multiple of its 8 ranks, got 4"),
        (BATCH, Layout(cp=32), "scored must be a multiple of its 32 ranks, got 16"),
        (BATCH, Layout(tp=0), "tp must be at least 1, got 0"),
        (Batch(2, 2, 8, 9), Layout(), "scored must be <= positions = 8, got 9"),
    ],
)
def test_layouts_that_do_not_divide_the_batch_are_refused(batch, layout, said):
    with pytest.raises(ValueError, match=said):
        step(SMALL, batch, layout, H200)


def test_no_layout_at_all_is_said():
    with pytest.raises(ValueError, match="no layout in powers of two puts .* on 1024"):
        best(SMALL, BATCH, 1024, H200)


# Where the numbers come from, and the page.


def test_the_card_is_the_measured_one_where_there_is_one(tmp_path):
    path = tmp_path / "gpu.json"
    assert predict.card(path) == (H200, False)
    rows = [{"part": "floors", "case": "copy", "name": "copy", "bytes_per_second": 4e12}]
    rows += [
        {"part": "floors", "case": "matmul", "name": name, "flops_per_second": rate}
        for name, rate in (("X W^T", 600e12), ("dZ W", 700e12), ("dZ^T X", 800e12))
    ]
    gpu = {"name": "NVIDIA H200", "sms": 132, "memory": 10**11}
    data = {"gpu": gpu, "parts": [{"part": "floors", "rows": rows}]}
    path.write_text(json.dumps(data))
    card, measured = predict.card(path)
    assert measured and (card.name, card.copy, card.matmul) == ("NVIDIA H200", 4e12, 700e12)
    assert "measured by this project" in page._sources(card, measured)
    assert "measured by" not in page._sources(H200, False)
    path.write_text(json.dumps({**data, "parts": []}))
    assert predict.card(path) == (H200, False)
    for text in ("{", "[]", '{"parts": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a results file of bench.gpu"):
            predict.card(path)


def between(text: str, block: str) -> str:
    begin, end = tables.marks(block)
    return text.split(begin)[1].split(end)[0].strip("\n")


def test_committed_page_is_what_the_generator_gives():
    text = page.PAGE.read_text()
    assert between(text, page.BLOCK) == page.block(), "run: python -m bench.scaling"
    data = measure.read(measure.FOLDER / "results.json")
    assert between(text, page.MEASURED) == page.measured_block(data)


def blank(path: Path) -> Path:
    path.write_text("\n".join((*tables.marks(page.BLOCK), *tables.marks(page.MEASURED))) + "\n")
    return path


def test_command_rewrites_page_and_plots(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    target = blank(tmp_path / "page.md")
    out = tmp_path / "out"
    assert main(["--page", str(target), "--out", str(out)]) == 0
    text = target.read_text()
    assert all(f"(out/{name})" in text and (out / name).exists() for name in page.IMAGES)
    assert all(f"**{model}**" in text for model in MODELS)
    assert between(text, page.MEASURED) == ""  # nothing measured in that folder
    assert "Where it stops" in capsys.readouterr().out
    called = []
    monkeypatch.setattr(bench_cli, "scaling", lambda argv: called.append(argv) or 0)
    assert bench_cli.main(["--scaling"]) == 0 and called == [[]]


def test_command_prints_another_head(capsys):
    arguments = ["--hidden", "64", "--vocab", "1000", "--gpus", "2", "--gpus", "8",
                 "--prompts", "8", "--positions", "64", "--scored", "16"]  # fmt: skip
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    made = best(Model("", 64, 1000), BATCH, 8, predict.card()[0])
    assert len(lines) == 4 and lines[3].startswith("| 8 | ")
    assert f"| {made.compute * 1e3:.2f} | {made.communication * 1e3:.2f} |" in lines[3]
    assert "hidden" not in lines[0]  # nothing is known of the decoder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hidden", "64"], "--hidden and --vocab want each other"),
        (["--hidden", "0", "--vocab", "10"], "--hidden must be at least 1, got 0"),
        (["--hidden", "64", "--vocab", "-1"], "--vocab must be at least 1, got -1"),
        (["--gpus", "8"], "--gpus and the batch want --hidden and --vocab"),
        (["--prompts", "8"], "--gpus and the batch want --hidden and --vocab"),
        (["--hidden", "64", "--vocab", "10", "--gpus", "3"], "powers of two, got 3"),
        (["--hidden", "64", "--vocab", "10", "--gpus", "0"], "powers of two, got 0"),
        (["--hidden", "64", "--vocab", "10", "--prompts", "0"], "prompts must be at least 1"),
        (["--hidden", "64", "--vocab", "10", "--scored", "4096"], "scored must be <= positions"),
        (["--hidden", "64", "--vocab", "10", "--prompts", "1", "--n", "1"], "no layout"),
        (["--rounds", "3"], "--rounds wants --measure"),
        (["--measure", "--hidden", "64", "--vocab", "10"], "--measure takes no head"),
        (["--measure", "--n", "8"], "--measure takes no head"),
        (["--measure", "--rounds", "1"], "rounds must be at least 2, got 1"),
        (["--page", "nowhere.md"], "nowhere.md"),
    ],
)
def test_wrong_calls_are_named(arguments, said, capsys, tmp_path):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_a_page_without_marks_is_refused(tmp_path, capsys):
    target = tmp_path / "page.md"
    target.write_text("nothing\n")
    assert main(["--page", str(target), "--out", str(tmp_path)]) == 2
    assert "must hold" in capsys.readouterr().err and target.read_text() == "nothing\n"


# What is measured here.


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
