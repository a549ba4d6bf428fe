"""Suites that measure ours alone, and the GPU run on the CPU (the numbers mean nothing)."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from bench.cli import main
from bench.engine import record
from bench.engine.isolate import DEVICE_LOST
from bench.engine.timing import Step
from bench.report import gpu as gpu_report
from bench.report import ranks as ranks_report
from bench.report.pages import write_report
from bench.report.tables import marks
from bench.suites import attach, filter
from bench.suites.frameworks import measure as frameworks
from bench.suites.frameworks import prepare
from bench.suites.frameworks.table import FRAMEWORKS, SHARED
from bench.suites.gpu import jobs, kernels
from bench.suites.gpu.jobs import Job
from bench.suites.peaked import trained, zipf
from bench.suites.ranks import measure, wire
from bench.suites.ranks.measure import Clock

CPU = torch.device("cpu")
pytest.importorskip("transformers")


def page_of(folder: Path, block: str) -> Path:
    page = folder / "page.md"
    begin, end = marks(block)
    page.write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
    return page


# ---- grad_filter on peaked distributions


def test_zipf_is_peaked_and_its_targets_follow_it_and_training_makes_a_model_surer():
    batch = zipf(2, 2, 32, 64, 500)
    assert 0.4 < batch.top1 < 0.9
    rows = batch.targets.view(-1) >= 0
    p = (batch.hidden.view(-1, 64)[rows].float() @ batch.weight.float().t()).softmax(1)
    hit = (p.argmax(1) == batch.targets.view(-1)[rows]).float().mean()
    assert abs(hit - batch.top1) < 0.2 and 0.3 < rows.float().mean() < 0.6
    before, after = (trained(1, 2, 32, 64, 101, steps=steps) for steps in (0, 15))
    assert after.top1 > 2 * before.top1


def test_rows_of_the_filter_hold_the_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(filter, "TAUS", (0.2, 1e-3))
    monkeypatch.setattr(filter, "SIZES", dict.fromkeys(("zipf", "trained"), (1, 2, 32, 32, 400)))
    monkeypatch.setattr(filter, "_STEPS", 2)
    data = filter.run(tmp_path / "results.json", rounds=1, log=lambda text: None)
    assert data["complete"] and json.loads((tmp_path / "results.json").read_text()) == data
    plain, wide, narrow = [row for row in data["results"] if row["batch"] == "zipf"]
    assert plain["tau"] is None and plain["error_hidden"] == plain["largest_dropped_mass"] == 0
    assert 0 < wide["largest_dropped_mass"] <= 0.2
    assert wide["columns_with_gradient"] <= narrow["columns_with_gradient"] <= 1
    for row in (wide, narrow):
        assert row["error_hidden"] <= row["certified_hidden"] + 2**-8
        assert row["error_weight"] <= row["certified_weight"] + 2**-8
    assert write_report(tmp_path / "results.json")[0].read_text().count("\n| zipf") == 3


def test_best_asks_for_both_gradients():
    row = {"batch": "zipf", "tau": 0.1, "of_floor": 0.5}
    rows = [
        {**row, "certified_hidden": 0.1, "certified_weight": 0.0},
        {**row, "certified_hidden": 0.001, "certified_weight": 0.002, "of_floor": 0.7},
        {**row, "certified_hidden": 0.0, "certified_weight": 0.0, "of_floor": 0.9},
    ]
    assert filter.best(rows) == [rows[1]]
    assert filter.certified({**rows[0], "certified_weight": 2.0}) == float("inf")


# ---- attach, and the swap under TRL


def test_attach_times_both_sides_and_they_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(attach, "HEADS", ((64, 301),))
    monkeypatch.setattr(attach, "LENGTH", 10)
    page, out = page_of(tmp_path, "attach"), tmp_path / "out"
    assert main(["attach", "--repeats", "2", "--out", str(out), "--update", str(page)]) == 0
    data = record.load(out / "results.json")
    assert data["complete"]
    assert [r["name"].split(",")[0] for r in data["results"]] == ["attach", "TRL's head"]
    for row in (row for row in data["results"] if "note" not in row):
        assert row["ratio"] > 0 and row["seconds"]["ours"][1] > 0
        ours, plain = row["losses"].values()
        assert ours == pytest.approx(plain, rel=2e-2, abs=1e-2)
    assert "| attach, H=64 V=301 |" in page.read_text()

    def refuse(name: str) -> None:
        raise attach.Refused(f"not installed: {name}")

    monkeypatch.setattr(attach, "require", refuse)
    assert attach.trl_head(64, 301, 1)["note"] == "not installed: trl"


# ---- ranks


def test_one_rank_sends_nothing():
    for make in (wire.replicated_weight, wire.sharded_weight):
        assert make(1, 67, 8, 4) == []
    assert wire.tensor_parallel(1, 10, 16, 8, 2) == wire.split_tokens(1, 12) == []


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
    assert not unknown["clean"] and "Not a clean run" in ranks_report.load_line(unknown)
    assert "Not a clean run" in ranks_report.load_line({**busy, "load_before": 1.0})
    before = Clock.now()
    if before.busy is not None:
        while Clock.now().ours < before.ours + 0.3:
            pass
        assert Clock.now().busy - before.busy >= 0.25  # the kernel counts in hundredths


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_tiny_heads_through_real_ranks(tmp_path, capsys):
    shape = (2, 2, 10, 16, 203)
    path = tmp_path / "results.json"
    data = measure.run(path, 2, lambda _: None, shape, shape)
    assert record.load(path) == json.loads(json.dumps(data)) and data["complete"]
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
    page = page_of(tmp_path, "scaling-measured")
    assert main(["report", str(path), "--update", str(page)]) == 0
    text = page.read_text()
    assert "weak scaling, tensor parallel" in text and "H = 16, V = 203" in text
    assert main(["ranks", "--repeats", "1", "--out", str(tmp_path)]) == 2
    assert "rounds must be at least 2, got 1" in capsys.readouterr().err


# ---- frameworks


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda x: x.key)
def test_what_is_installed_and_run_is_pinned_and_there(framework):
    pins = " ".join(framework.install)
    assert f"{framework.package}=={framework.version}" in pins
    assert " transformers==" in f" {pins}" and " trl==" in f" {pins}"
    names = {word.split("=")[0] for line in framework.install for word in shlex.split(line)}
    assert "torch" in SHARED and "torch" not in names
    assert framework.file in shlex.split(framework.command)
    text = (frameworks.HERE / framework.file).read_text()
    assert "model" in text and "data/" in text or "dataset_dir: data" in text
    assert "out" in text and "/tmp" not in text


def test_pairs_are_the_same_in_every_form(tmp_path):
    prepare.pairs(tmp_path)
    trl, swift, messages = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("trl", "swift", "messages")
    )
    assert len(trl) == len(swift) == len(messages) == prepare.PAIRS
    for a, b, c in zip(trl, swift, messages, strict=True):
        assert a["prompt"] + a["chosen"] == b["messages"] == [*c["messages"], c["chosen"]]
        assert a["prompt"] + a["rejected"] == b["rejected_messages"]
        assert c["rejected"] == a["rejected"][0] != c["chosen"]


def test_a_run_is_watched_and_its_losses_are_read(tmp_path):
    code = (
        "import json, os, time\n"
        "os.mkdir('out'); log = open('out/logging.jsonl', 'w')\n"
        "for i in range(4):\n"
        "    end = time.process_time() + 0.1\n"
        "    while time.process_time() < end: pass\n"
        "    print({'loss': '0.5'}); log.write(json.dumps({'loss': 0.5 + i}) + chr(10))\n"
    )
    env = {"PYTHONUNBUFFERED": "1"}
    exit_code, numbers, log = frameworks._watched([sys.executable, "-c", code], tmp_path, env)
    assert exit_code == 0 and log.count("loss") == 4
    assert 0.05 < numbers["seconds"] < 1 and numbers["peak_bytes"] > 1 << 20
    assert frameworks._losses(tmp_path / "out") == [0.5, 1.5, 2.5, 3.5]


# ---- the GPU run

TINY = kernels.Sizes(
    rows=(8, 211), ranking=((4, 5, 1), (4, 64, 3)), score=((8, 16, 64),), copy_bytes=1 << 12,
    rounds=2, inner=2,
)  # fmt: skip


def setting(backend: str = "torch") -> kernels.Setting:
    return kernels.Setting(CPU, backend, TINY, lambda step: step.run() is None or 1e-3)


def said_by(one: kernels.Setting, *names: str) -> list[dict]:
    said: list[dict] = []
    kernels.run(one, list(names), said.append)
    return said


def test_every_part_runs_and_is_reported(tmp_path):
    said = said_by(setting(), *kernels.PARTS)
    ends = {x["part"]: x["status"] for x in said if "status" in x}
    assert ends == {"rows": "ok", "ranking": "ok", "score": "ok", "tuning": "refused"}, said
    rows = [{"job": "torch", **x["row"]} for x in said if "row" in x]
    named = {r["name"]: r for r in rows if r["part"] == "rows"}
    assert set(named) == {"copy", "logp", "residual", "logits_grad"}
    assert named["logp"]["predicted"] > 0 and "predicted" not in named["copy"]
    assert named["residual"]["bytes"] == 2 * named["logp"]["bytes"] == 2 * 8 * 211 * 2
    parts = [{"job": "torch", "part": "rows", "status": "ok", "seconds": 1.0, "note": "a|b"}]
    gpu = {"name": "a card", "capability": "9.0", "sms": 132, "memory": 1, "cuda": "13.0"}
    data = {"schema": record.SCHEMA, "benchmark": "gpu", **record.facts(CPU), "complete": True,
            "gpu": gpu, "parts": parts, "results": rows}  # fmt: skip
    path, page = tmp_path / "gpu.json", page_of(tmp_path, "gpu-measured")
    path.write_text(json.dumps(data))
    assert main(["report", str(path), "--update", str(page)]) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert text == gpu_report.report(data) and "| a/b |" in text and "predicted, ms" in text
    assert "| logp, N=8 V=211 |" in page.read_text() and "stale" not in page.read_text()


def test_tuning_tries_every_configuration_and_puts_the_chosen_ones_back(monkeypatch):
    from pro_kernels.backends.triton import configs

    chosen, used = (configs.row_config, configs.ranking_config), []

    def rows(s, part, config):  # noqa: ANN001
        used.append((configs.row_config(1, 2), config))
        if len(used) == 2:
            raise RuntimeError("too many registers")
        yield {"part": part, "case": config}

    monkeypatch.setattr(kernels, "rows", rows)
    monkeypatch.setattr(kernels, "ranking", lambda s, part, config: iter([{"case": config}]))
    monkeypatch.setattr(kernels.Setting, "module", lambda self: None)
    found = list(kernels.tuning(setting("triton")))
    assert (configs.row_config, configs.ranking_config) == chosen
    assert len({row for row, _ in used}) == 12 and "too many registers" in found[1]["note"]
    assert [row["case"] for row in found[12:]] == [*kernels.RANKING_CONFIGS]


def test_a_part_that_raises_leaves_the_others(monkeypatch):
    def broken(_):
        yield {"case": "kept"}
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(kernels.PARTS, "rows", broken)
    said = said_by(setting(), "rows", "score")
    assert said[0] == {"part": "rows", "row": {"case": "kept"}}
    assert said[1]["status"] == "failed" and "no such kernel" in said[1]["note"]
    assert said[-1] == {"part": "score", "status": "ok", "note": ""}
    (row,) = setting().rows("x", "y", {"a": Step(lambda: None)}, inner=2)
    assert (row["seconds"], row["over"], row["rounds"]) == (0.5, {}, 2)


CHILD = textwrap.dedent(
    f"""
    import json, sys, time
    def say(**x): print("@bench " + json.dumps(x), flush=True)
    for name in sys.argv[1:]:
        say(part=name, row={{"case": name}})
        if name == "dies":
            print("last words", flush=True)
            sys.exit(3)
        if name == "hangs":
            time.sleep(60)
        say(part=name, status="failed" if name == "breaks" else "ok", note="")
        if name == "breaks":
            sys.exit({DEVICE_LOST})
    """
)


def run_jobs(path: Path, todo: list[Job], seconds: float = 60.0) -> dict:
    data = jobs.run(todo, path, seconds, CPU, log=lambda line: None)
    assert json.loads(path.read_text()) == data and data["complete"]
    return data


def test_parts_that_die_or_hang_cost_only_themselves(tmp_path):
    names = ("a", "dies", "breaks", "b", "hangs", "c")
    child = (sys.executable, "-c", CHILD)
    todo = [Job("torch", child, names, limit=6.0), Job("ends", (sys.executable, "-c", "1/0"))]
    data = run_jobs(tmp_path / "gpu.json", todo)
    found = data["parts"]
    status = [(p["part"], p["status"]) for p in found]
    assert status == [("a", "ok"), ("dies", "failed"), ("breaks", "failed"), ("b", "ok"),
                      ("hangs", "timeout"), ("c", "ok"), ("ends", "failed")]  # fmt: skip
    assert found[1]["note"] == "last words" and "ZeroDivisionError" in found[-1]["note"]
    assert data["results"] == [{"job": "torch", "case": name} for name in names]


def test_the_clock_ends_the_run(tmp_path):
    child = (sys.executable, "-c", CHILD)
    todo = [Job("torch", child, ("hangs", "a")), Job("late", child)]
    start = time.monotonic()
    found = run_jobs(tmp_path / "gpu.json", todo, seconds=0.5)["parts"]
    assert time.monotonic() - start < 10
    assert [(p["part"], p["status"]) for p in found] == [
        ("hangs", "timeout"), ("a", "skipped"), ("late", "skipped"),
    ]  # fmt: skip


def test_jobs_are_narrowed_by_part_and_backend(tmp_path, capsys):
    names = [job.name for job in jobs.make_jobs(tmp_path, (), ())]
    assert names[:5] == ["build", "check", "loss", "step", "tests"] and names[-1] == "tuning"
    (job,) = jobs.make_jobs(tmp_path, ("rows", "score"), ("torch",))
    assert job.parts == ("rows", "score") and job.command[-1] == "torch"
    out = ["gpu", "--out", str(tmp_path / "out")]
    wrong = {
        "--seconds must be > 0": ["--seconds", "0"],
        "parts must be of": ["--parts", "nothing"],
        "backends must be of": ["--backends", "cpu"],
    }
    if not torch.cuda.is_available():
        wrong["needs a GPU"] = []
    for said, arguments in wrong.items():
        assert main([*out, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
