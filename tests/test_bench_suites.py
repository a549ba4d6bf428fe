"""Suites that measure ours alone, and the GPU run on the CPU (the numbers mean nothing)."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch

from bench.cli import main
from bench.engine import record
from bench.engine.isolate import DEVICE_LOST
from bench.engine.timing import Step
from bench.report import round, suites
from bench.report.pages import write_report
from bench.report.tables import marks
from bench.suites import attach, filter
from bench.suites.frameworks import measure as frameworks
from bench.suites.frameworks import prepare
from bench.suites.frameworks.table import FRAMEWORKS, SHARED
from bench.suites.gpu import jobs, kernels, parts
from bench.suites.gpu.jobs import Turn
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
    monkeypatch.setattr(filter, "REAL", ())
    data = filter.run(tmp_path / "results.json", rounds=1)
    assert data["complete"] and json.loads((tmp_path / "results.json").read_text()) == data
    plain, wide, narrow = [row for row in data["results"] if row["batch"] == "zipf"]
    assert plain["tau"] is None and plain["error_hidden"] == plain["mean_dropped_mass"] == 0
    assert 0 < wide["mean_dropped_mass"] <= 0.2
    assert wide["columns_kept"] <= narrow["columns_kept"] <= 1
    for row in (wide, narrow):
        assert row["error_hidden"] <= row["certified_hidden"] + 2**-8
        assert row["error_weight"] <= row["certified_weight"] + 2**-8
    assert write_report(tmp_path / "results.json")[0].read_text().count("\n| zipf") == 3


def test_best_asks_for_both_gradients():
    row = {"batch": "zipf", "dtype": "float32", "tau": 0.1, "of_floor": 0.5}
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
    assert "Not a clean run" in suites.load_line({**busy, "load_before": 1.0})
    before = Clock.now()
    while Clock.now().ours < before.ours + 0.3:
        pass
    assert Clock.now().busy - before.busy >= 0.25  # the kernel counts in hundredths


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_tiny_heads_through_real_ranks(tmp_path, capsys):
    shape = (2, 2, 10, 16, 203)
    path = tmp_path / "results.json"
    data = measure.run(path, 2, shape, shape)
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
    assert "==".join(framework.pin) in pins
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


# ---- a round on a GPU


QUACK = """
import torch
_pick_tile_n1 = lambda V: 32
def scaled_exp_linear_cross_entropy_fwd(x, w, y, rows): return (x @ w.t()).logsumexp(1)
_scaled_exp_lce_loss_only = scaled_exp_linear_cross_entropy_fwd
class scaled_exp_target_epi:
    gemm = staticmethod(lambda x, w, out, **_: torch.mm(x, w.t(), out=out))
"""


def quack_wheel(folder: Path) -> None:
    """What pip reads of a wheel: zipped sources and their description."""
    info, folder = "quack_kernels-0.6.5.dist-info", folder / "quack_kernels-0.6.5-py3-none-any.whl"
    files = {
        "quack/linear_cross_entropy.py": QUACK,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: quack-kernels\nVersion: 0.6.5\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_a_dry_run_goes_through_every_part_and_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """With what is brought along: wheels, and a file of hidden states."""
    states, out = tmp_path / "states.pt", tmp_path / "out"
    torch.save(vars(zipf(1, 2, 16, 16, 101)) | {"name": "SmolLM2"}, states)
    quack_wheel(tmp_path)
    monkeypatch.setattr(jobs, "SITE", tmp_path / "site")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(jobs.WHEELS, str(tmp_path))
    page, call = page_of(tmp_path, "gpu-round"), ["gpu", "--dry", "--out", str(out)]
    units = [unit for part in parts.PARTS for unit in part.units("cpu")]
    assert main([*call, "--update", str(page)]) == 0
    assert "refused" in capsys.readouterr().out
    monkeypatch.setenv(parts.STATES, str(states))
    assert main([*call, "--update", str(page)]) == 0
    said = capsys.readouterr().out
    assert f"{len(units) - 1} of {len(units)} units are measured" in said and "0.6.5" not in said
    data = record.load(out / "results.json")
    assert {p["part"]: p["status"] for p in data["parts"]} == dict.fromkeys(units, "ok")
    assert data["complete"] and data["versions"]["quack-kernels"] == "0.6.5"
    assert {row["part"] for row in data["results"]} == {p.name for p in parts.PARTS}
    named = {(r["part"], r.get("name") or r.get("provider")): r for r in data["results"]}
    assert named["gemm", "QuACK, three"]["seconds"] > 0
    assert named["scoring", "QuACK's epilogue"]["seconds"] > 0
    assert "need a GPU" in named["peers", "quack-mean"]["note"]
    logp, residual = named["rows", "logp"], named["rows", "residual"]
    assert logp["predicted"] > 0 and "predicted" not in named["rows", "copy"]
    assert residual["bytes"] == 2 * logp["bytes"] == 2 * 8 * 211 * 2
    assert "0 failed, 0 did not run" in named["tests", None]["found"]
    found = {o.what for o in round.outcomes(data | {"device": "cuda"}) if o.met is not None}
    assert found >= {
        "comparisons that fail",
        "tests marked gpu that did not run",
        "frozen head",
        "the least memory (T3)",
        "logits in",
        "a sharded head of one rank",
    }
    text = (out / "report.md").read_text()
    assert text == round.report(data) and "its numbers mean nothing" in page.read_text()
    assert main([*call, "--parts", "dtensor", "--seconds", "0.001"]) == 0
    assert record.load(out / "results.json")["results"] == data["results"]


def test_targets_of_a_round_are_met_missed_or_not_measured():
    rows = [
        {"part": "budgets", "case": "a", "provider": "ours-T3", "vs_ours": 1.7},
        {"part": "scoring", "case": "N=6528 H=4096 V=128256, device", "name": "ours",
         "over": {"floor": 1.04}},
        {"part": "logits", "case": "a", "name": "ours", "predicted": 0.95, "seconds": 1.0},
        {"part": "peers", "case": "ce H=4096 V=128256 bf16 n=4 R=4096 masked 0%",
         "provider": "quack-mean", "seconds": 0.017, "vs_ours": 0.99},
        {"part": "peers", "case": "b", "provider": "trl", "vs_ours": 0.5, "wrong": True},
    ]  # fmt: skip
    data = {"device": "cuda", "results": rows}
    found = {o.what: o.met for o in round.outcomes(data) if o.met is not None}
    assert found == {
        "the least memory (T3)": False, "scoring 6528 rows, device": True, "logits in": True,
        "QuACK or Liger for sm_90, 4096 rows, 16.7 ms as published": True,
        "the best peer measured, in any case": False,
    }  # fmt: skip
    dry = round.outcomes({**data, "device": "cpu"})
    assert {(o.measured, o.met) for o in dry} == {("not measured", None)}


def test_a_step_that_raises_leaves_the_others():
    one = kernels.Setting(CPU, lambda step: step.run() or 1e-3, None, Path(), Path(), rounds=2)
    broken, row = one.rows("x", {"b": Step(lambda: 1 / 0), "a": Step(lambda: None)}, inner=2)
    assert "ZeroDivisionError" in broken["note"]
    assert (row["seconds"], row["over"], row["rounds"]) == (0.5e-3, {}, 2)


def test_who_was_running_when_the_process_died_is_left_out(tmp_path):
    one = kernels.Setting(CPU, None, None, Path(), tmp_path, rounds=1)
    lost = record.Record(tmp_path / "tiny-ce.json", record.facts(CPU, preset="round"))
    lost.put(running=["tiny ce", "floor"])
    ((case,),) = next(part.dry for part in parts.PARTS if part.name == "peers")
    rows = {row["provider"]: row for row in parts.providers(one, case)}
    assert "process died" in rows["floor"]["note"] and rows["quack"]["seconds"] is None
    assert any(row["seconds"] for name, row in rows.items() if name.startswith("ours-"))


CHILD = textwrap.dedent(
    f"""
    import json, os, sys, time
    def say(**x): print("@bench " + json.dumps(x), flush=True)
    scratch, *names = sys.argv[3:]
    for name in names:
        say(part=name, row={{"case": name}})
        if name == "dies" or name == "once" and not os.path.exists(scratch + "/once"):
            open(scratch + "/once", "w").close()
            print("last words", flush=True)
            sys.exit(3)
        if name == "hangs":
            time.sleep(60)
        say(part=name, status="failed" if name == "breaks" else "ok", note="")
        if name == "breaks":
            sys.exit({DEVICE_LOST})
    """
)


def turn_by_turn(path: Path, todo: list[Turn], seconds: float = 60.0) -> dict[str, str]:
    child = (sys.executable, "-c", CHILD)
    data = jobs.run(todo, path, seconds, CPU, command=child)
    assert json.loads(path.read_text()) == data
    assert all(row == {"case": row["unit"], "part": row["unit"], "unit": row["unit"]}
               for row in data["results"])  # fmt: skip
    return {p["part"]: p["status"] + p["note"] for p in data["parts"]}


def test_units_that_die_or_hang_cost_only_themselves_and_are_not_tried_again(tmp_path):
    names = ("a", "dies", "breaks", "once", "hangs", "b")
    todo = [Turn(name, 6.0, tries=1 + (name == "once"), key="k") for name in names]
    found = turn_by_turn(tmp_path / "results.json", todo)
    assert found == {"a": "ok", "dies": "failedlast words", "breaks": "failed", "once": "ok",
                     "hangs": "timeoutit took longer than 6 s", "b": "ok"}  # fmt: skip
    start = time.monotonic()
    todo = [*todo[:-1], Turn("b", 6.0, key="other"), Turn("c", 6.0, key="k")]
    assert turn_by_turn(tmp_path / "results.json", todo) == found | {"c": "ok"}
    assert time.monotonic() - start < 5


def test_the_clock_ends_a_round_and_keeps_what_was_measured(tmp_path):
    path, start = tmp_path / "results.json", time.monotonic()
    turn_by_turn(path, [Turn("late", key="old")])
    found = turn_by_turn(path, [Turn("hangs", key="k"), Turn("late", key="new")], seconds=0.5)
    assert time.monotonic() - start < 10
    assert found == {"late": "ok", "hangs": "skippedno time was left"}
    assert not json.loads(path.read_text())["complete"]


def test_a_result_is_of_code_packages_and_machine(tmp_path, monkeypatch, capsys):
    def keys() -> dict[str, str]:
        return {turn.name.split(":")[0]: turn.key for turn in jobs.turns(CPU)}

    before, about = keys(), record.facts(CPU)
    peers = {"peers", "gemm", "scoring", "budgets", "frozen", "step", "growth", "heads"}
    versions = about["versions"]
    for changed, names in (
        ({"versions": versions | {"verl": "0.9.9"}}, peers),
        ({"machine": "another"}, {*before}),
        ({"commit": "another"}, set()),
    ):
        monkeypatch.setattr(jobs, "facts", lambda *_, c=changed: about | c)
        assert {name for name, key in keys().items() if key != before[name]} == names
    wrong = {"--seconds must be > 0": ["--seconds", "0"], "--parts must be of": ["--parts", "x"]}
    if not torch.cuda.is_available():
        wrong["needs a GPU"] = []
    for said, arguments in wrong.items():
        dry = ["--dry"] if arguments else []
        assert main(["gpu", *dry, "--out", str(tmp_path / "out"), *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
