"""The GPU run, exercised on the CPU: every part at tiny sizes, the jobs with stand-ins."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed
from bench.cli import main  # noqa: E402
from bench.gpu import jobs, measure, parts, tables, worker  # noqa: E402
from bench.gpu.jobs import Job  # noqa: E402
from bench.record import SCHEMA  # noqa: E402
from bench.step import Step  # noqa: E402

CPU = torch.device("cpu")
TINY = measure.Sizes(
    linear=(2, 2, 8, 32, 211),
    small=(2, 2, 4, 16, 64),
    accuracy=(2, 2, 8, 32, 101),
    masked=0.5,
    rows=(8, 211),
    ranking=((4, 5, 1), (4, 64, 3)),
    score=((8, 16, 64),),
    copy_bytes=1 << 12,
    rounds=2,
    inner=2,
)


def said_by(setting: measure.Setting, *names: str) -> list[dict]:
    said: list[dict] = []
    worker.run(setting, list(names), said.append)
    return said


@pytest.fixture(scope="module")
def measured() -> dict:
    """Every part of the torch backend, as gpu.json has it."""
    setting = measure.Setting(CPU, "torch", TINY)
    found = []
    for name in parts.PARTS:
        said = said_by(setting, name)
        end = said.pop()
        rows = [x["row"] for x in said]
        note = end["note"]
        found.append({"job": "torch", "part": name, "status": end["status"], "seconds": 1.0,
                      "note": note, "rows": rows})  # fmt: skip
    gpu = {"name": "a card", "capability": "9.0", "sms": 132, "memory": 1, "cuda": "13.0"}
    about = {"machine": "", "device": "cuda", "threads": 1, "bf16_matmuls": "native",
             "versions": {}, "python": "", "commit": None, "modified": False, "date": "",
             "complete": True}  # fmt: skip
    return {**about, "gpu": gpu, "parts": found}


def test_every_part_runs(measured):
    status = {part["part"]: part["status"] for part in measured["parts"]}
    assert status.pop("tuning") == "refused"
    assert set(status.values()) == {"ok"}, measured["parts"]
    for part in measured["parts"]:
        assert part["rows"] or part["part"] == "tuning"
        json.dumps(part)


def test_rows_hold_what_the_targets_need(measured):
    rows = {p["part"]: {r["name"]: r for r in p["rows"]} for p in measured["parts"]}
    assert rows["linear"]["ours"]["over"]["floor"] > 0
    assert set(rows["frozen"]["ours"]["over"]) == {"full", "floor"}
    # 2 prompts of 2 candidates, 8 positions, half scored, bf16: (2 * 16 + 32) * V * 2 bytes.
    assert rows["logits"]["ours"]["bytes"] == (2 * 16 + 32) * 211 * 2
    assert rows["small"]["ours"]["over"]["plain"] > 0
    assert set(rows["rows"]) == {"copy", "logp", "residual", "logits_grad"}


def test_report_sets_targets_and_predictions_beside_the_times(measured):
    text = tables.full_report(measured)
    for wanted in (
        "head trained, times the three matmuls",
        "share of the copy bandwidth",
        "ranking, us",
        "two prompts, times plain PyTorch",
        "Error against fp64",
    ):
        assert wanted in text
    card = tables.measured_card(measured)
    (copy,) = [r for p in measured["parts"] for r in p["rows"] if r["case"] == "copy"]
    assert card.copy == copy["bytes_per_second"] == 2 * TINY.copy_bytes / copy["seconds"]
    rows = [r for p in measured["parts"] for r in p["rows"] if r.get("shape")]
    assert {r["part"] for r in rows if tables.predicted(r, card)} == {
        "linear", "logits", "ranking", "score", "rows",
    }  # fmt: skip


def test_pages_are_made_again_from_a_results_file(measured, tmp_path, capsys):
    page, path = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text("before\n<!-- gpu-measured:begin -->\nold\n<!-- gpu-measured:end -->\nafter\n")
    data = {**measured, "benchmark": "gpu", "schema": SCHEMA}
    path.write_text(json.dumps(data))
    assert main(["--report", str(path), "--update", str(page)]) == 0
    assert (tmp_path / "gpu.md").read_text() == tables.full_report(data)
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    ours = [r for p in measured["parts"] for r in p["rows"] if r.get("name") == "ours"]
    kinds = {r["case"] for r in ours if r["part"] in ("linear", "logits", "ranking", "small")}
    assert all(f"| {case} |" in text for case in kinds)


def test_ranking_rows_of_the_tuning_have_a_prediction_too():
    card = tables.H200
    row = {"part": "tuning", "name": "ours", "shape": {"B": 4, "n": 5, "tokens": 3}}
    assert tables.predicted(row, card) == tables.predicted({**row, "part": "ranking"}, card) > 0


def test_report_of_a_run_without_floors_makes_no_predictions(measured):
    partial = {**measured, "parts": [p for p in measured["parts"] if p["part"] != "floors"]}
    assert tables.measured_card(partial) is None
    assert "head trained" in tables.full_report(partial)


def test_a_fused_score_and_tuning_run_where_the_backend_has_them(monkeypatch):
    from pro_kernels.backends import torch as backend

    def score(x, weight, bias, targets, *, target_logits, options):  # noqa: ANN001, ANN202
        return backend.logp(x @ weight.t(), targets, target_logits=target_logits, options=options)

    monkeypatch.setattr(backend, "score", score, raising=False)
    setting = measure.Setting(CPU, "torch", TINY)
    rows = list(parts.score(setting))
    assert {row["name"] for row in rows} == {"floor", "ours", "fused"}


def test_tuning_puts_the_chosen_configurations_back(monkeypatch):
    configs = pytest.importorskip("pro_kernels.backends.triton.configs")
    chosen, used = (configs.row_config, configs.ranking_config), []

    def kernels(s, extra):  # noqa: ANN001, ANN202
        used.append(configs.row_config("logp", None, 5))
        if len(used) == 2:
            raise RuntimeError("too many registers")
        yield {"part": "tuning", "case": extra["config"]}

    def lists(s, sizes, extra):  # noqa: ANN001, ANN202
        config = configs.ranking_config(sizes[1])
        assert config.block_n == chosen[1](sizes[1]).block_n
        yield {"part": "tuning", "case": extra["config"], "ranking": True}

    monkeypatch.setattr(parts, "_row_kernels", kernels)
    monkeypatch.setattr(parts, "_ranking_kernel", lists)
    monkeypatch.setattr(measure.Setting, "module", lambda self: None)
    rows = list(parts.tuning(measure.Setting(CPU, "triton", TINY)))
    assert (configs.row_config, configs.ranking_config) == chosen
    assert len(set(used)) == 12 and rows[1]["note"] == "too many registers"
    assert [r.get("ranking", False) for r in rows] == 12 * [False] + len(parts.RANKING_CONFIGS) * [
        True
    ]


def test_medians_are_of_interleaved_rounds():
    taken = []

    def timer(step: Step) -> float:
        taken.append(step.run())
        return {"a": 2.0, "b": 4.0}[taken[-1]]

    setting = measure.Setting(CPU, "torch", TINY, timer)
    steps = {"a": Step(lambda: "a"), "b": Step(lambda: "b")}
    a, b = measure.measure(setting, "linear", "case", steps, inner=2, bytes=8)
    assert (a["seconds"], b["seconds"], b["over"]) == (1.0, 2.0, {"a": 2.0})
    assert b["bytes_per_second"] == 4.0
    warm, rounds = taken[:4], taken[4:]
    assert sorted(warm) == sorted(rounds[:2] + rounds[2:]) == ["a", "a", "b", "b"]
    assert set(rounds[:2]) == set(rounds[2:]) == {"a", "b"}


def test_a_part_that_raises_leaves_the_others(monkeypatch):
    def broken(setting):  # noqa: ANN001, ANN202
        yield {"case": "kept"}
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(parts.PARTS, "linear", broken)
    said = said_by(measure.Setting(CPU, "torch", TINY), "linear", "small")
    assert said[0] == {"part": "linear", "row": {"case": "kept"}}
    assert said[1]["status"] == "failed" and "no such kernel" in said[1]["note"]
    assert said[-1] == {"part": "small", "status": "ok", "note": ""}


CHILD = textwrap.dedent(
    """
    import json, sys, time
    def say(**x): print("@gpu " + json.dumps(x), flush=True)
    for name in sys.argv[1:]:
        say(part=name, row={"case": name})
        if name == "dies":
            print("last words", flush=True)
            sys.exit(3)
        if name == "hangs":
            time.sleep(60)
        say(part=name, status="failed" if name == "breaks" else "ok", note="")
        if name == "breaks":
            sys.exit(75)
    """
)


def run_jobs(path: Path, todo: list[Job], seconds: float = 30.0) -> list[dict]:
    data = jobs.run(todo, path, seconds, CPU, log=lambda line: None)
    assert json.loads(path.read_text()) == data and data["complete"]
    return data["parts"]


def test_parts_that_die_or_hang_cost_only_themselves(tmp_path):
    names = ("a", "dies", "breaks", "b", "hangs", "c")
    child = (sys.executable, "-c", CHILD)
    todo = [Job("torch", child, names, limit=4.0), Job("ends", (sys.executable, "-c", "1/0"))]
    found = run_jobs(tmp_path / "gpu.json", todo)
    status = [(p["part"], p["status"]) for p in found]
    assert status == [("a", "ok"), ("dies", "failed"), ("breaks", "failed"), ("b", "ok"),
                      ("hangs", "timeout"), ("c", "ok"), ("ends", "failed")]  # fmt: skip
    assert found[1]["note"] == "last words" and "ZeroDivisionError" in found[-1]["note"]
    assert all(p["rows"] == [{"case": p["part"]}] for p in found[:-1])


def test_the_clock_ends_the_run(tmp_path):
    child = (sys.executable, "-c", CHILD)
    todo = [Job("torch", child, ("hangs", "a")), Job("late", child)]
    start = time.monotonic()
    found = run_jobs(tmp_path / "gpu.json", todo, seconds=0.5)
    assert time.monotonic() - start < 10
    assert [(p["part"], p["status"]) for p in found] == [
        ("hangs", "timeout"), ("a", "skipped"), ("late", "skipped"),
    ]  # fmt: skip


def test_jobs_are_narrowed_by_part_and_backend(tmp_path):
    names = [job.name for job in jobs.make_jobs(tmp_path, (), ())]
    assert names[:6] == ["build", "floors", "check", "cases", "training", "tests"]
    assert names[-1] == "tuning"
    (job,) = jobs.make_jobs(tmp_path, ("linear", "small"), ("torch",))
    assert job.parts == ("linear", "small")
    assert job.command[-1] == "torch"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs --out"),
        (["--out", "x", "--seconds", "0"], "--seconds must be > 0"),
        (["--out", "x", "--parts", "nothing"], "--parts must be of"),
        (["--out", "x", "--backends", "cpu"], "--backends must be of"),
    ],
)
def test_wrong_calls(arguments, said, capsys):
    assert main(["--gpu", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert main(["--gpu", "--out", str(tmp_path / "out")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
