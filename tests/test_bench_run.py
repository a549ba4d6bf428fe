"""Runs of the suites with providers, end to end on tiny presets (the numbers mean nothing)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import cli, roofline
from bench.cli import main
from bench.engine import isolate, memory, record
from bench.engine.case import Case
from bench.engine.record import NO_TIME
from bench.engine.run import COMMON, DeviceLost, Run, Settings, run
from bench.engine.step import TrainingCase
from bench.engine.timing import Clock, Step, interleaved, timed
from bench.providers import base
from bench.report.tables import marks
from bench.suites import load, loss, step

pytest.importorskip("transformers", reason="the trainer needs the 'train' extra")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CEILINGS = {"copy_bytes": 1 << 20, "matmul": (64, 64, 512)}
CASES = {
    "loss": Case("case", 16, 101, 2, 3, 8, 0.5, repeats=2),
    "step": TrainingCase("case", 3, 6, 4, model="test", repeats=2),
}
PEERS = ("trl", "liger", "liger-ce", "cce", "quack", "quack-mean", "verl")
DPO = ("trl-dpo", "trl-dpo-head", "trl-dpo-distinct", "ours-dpo-padded", "ours-dpo-lists")
# Names of a floor, of the formulation that all are compared with, and of ours.
NAMES = {"loss": ("floor", "official", "ours-cpu"), "step": ("floor", "official", "ours-lists")}
BOTH = pytest.mark.parametrize("suite", ["loss", "step"])


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """The ceilings of a real run take ten seconds of every command."""
    monkeypatch.setitem(roofline.SIZES, "cpu", CEILINGS)


@pytest.fixture
def no_compile(monkeypatch):
    """torch.compile takes a C++ compiler and many seconds: run the function as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def no_peers(monkeypatch, version: str | None = None) -> None:
    """As if no peer were installed, or each in this version."""
    real = importlib.metadata.version

    def reported(package: str) -> str:
        if package not in base.VERSIONS:
            return real(package)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", reported)


def rows_of(path: Path, case: str | None = None) -> dict[str, dict]:
    rows = json.loads((path / "results.json").read_text())["results"]
    return {r["provider"]: r for r in rows if r["case"] == (case or rows[0]["case"])}


def measured(suite: str, case=None, *names, more=(), **settings) -> dict[str, dict]:
    """Rows of one case by provider: those named, and ``more``."""
    chosen = load(suite)
    providers = [chosen.providers(CPU)[name] for name in names or NAMES[suite]]
    rows = chosen.measure(case or CASES[suite], [*providers, *more], Run(Settings(**settings), CPU))
    return {row["provider"]: row for row in rows}


def check_loss(rows: dict[tuple[str, str], dict], text: str) -> None:
    for row in rows.values():
        if row["seconds"] and not row["provider"].startswith("floor"):
            assert row["loss_error"] < 2e-2
            assert row["rate"] > 0 and row["of_ceiling"] > 0 and row["warm_seconds"] > 0
            gradients = {"score": 0, "frozen": 1, "logits": 1, "ranking": 1}
            found = [row[f"{name}_grad_error"] for name in ("input", "weight")]
            trained = row["provider"] == "ours-trained-head"
            expected = 2 if trained else gradients.get(row["kind"], 2)
            assert sum(e is not None for e in found) == expected
    head = {name: row for (case, name), row in rows.items() if case == "tiny head"}
    assert all(head[name]["note"].startswith("not installed: pip install") for name in PEERS)
    assert head["floor"]["of_floor"] == 1.0 and head[base.ours_name(CPU)]["vs_ours"] == 1.0
    assert "Ceilings: copy" in text and "Not run: TRL 1.16 chunked log-probs (not ins" in text


def check_step(rows: dict[tuple[str, str], dict], text: str) -> None:
    for row in rows.values():
        if row["provider"].startswith("trl"):
            assert row["note"].startswith("not installed")
        elif row["provider"] == "floor":
            assert row["tokens_per_second"] is None and row["head_share"] is None
        else:
            most = step.TOLERANCES[row["loss_type"], "fp32"]
            assert row["loss_error"] <= most[0] and row["grad_error"] <= most[1]
            assert row["optimizer_seconds"] > 0 and row["collate_share"] > 0
            assert row["tokens_per_second"] == row["tokens"] / row["seconds"]
            assert row["head_seconds"] > 0 and row["head_share"] > 0, row
            assert row["vs_trl"] is None, "TRL did not run"
            assert ("another loss: DPO" in row["note"]) == (row["speedup"] is None)
            assert (row["speedup"] is None) == (row["provider"] in DPO)
    first = {row["provider"]: row for row in reversed(rows.values())}
    assert first["official"]["speedup"] == 1.0 and first["floor"]["of_floor"] == 1.0
    assert first["ours-padded"]["vs_padded"] == 1.0 and "tokens/s" in text


@BOTH
def test_tiny_preset_through_the_command_without_peers(
    suite, tmp_path, monkeypatch, no_compile, capsys
):
    no_peers(monkeypatch)
    name = f"{suite}-fp32" if record.facts(CPU)["bf16_matmuls"] != "native" else suite
    begin, end = marks(name)
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(f"before\n{begin}\nstale text\n{end}\nafter\n")
    arguments = ["--preset", "tiny", "--no-memory", "--out", str(out), "--update", str(page)]
    assert main([suite, *arguments]) == 0
    data = json.loads((out / "results.json").read_text())
    assert data["complete"] and data["benchmark"] == suite
    assert data["machine"] and data["versions"]["torch"] and data["threads"] >= 1
    assert suite == "loss" or data["backend"] and data["left_out"] == []
    text, providers = (out / "report.md").read_text(), load(suite).providers(CPU)
    rows = {(row["case"], row["provider"]): row for row in data["results"]}
    for case in load(suite).cases("tiny"):
        names = [provider.name for provider in base.select(providers, case.only)]
        assert [name for of, name in rows if of == case.name] == names
        for row in (rows[case.name, name] for name in names):
            assert set(row) == set(load(suite).blank(case, providers["floor"]))
            if row["seconds"]:
                assert row["rounds"] == 2 and not row["wrong"] and f"| {row['label']} |" in text
            else:
                assert row["note"] or row["kind"] == "memory", row
    {"loss": check_loss, "step": check_step}[suite](rows, text)
    assert f"`pro-kernels bench {suite} --preset tiny`" in text
    images = ("time.png", *(("growth.png", "errors.png") if suite == "loss" else ("head.png",)))
    for image in images:
        assert (out / image).read_bytes().startswith(b"\x89PNG") and f"({image})" in text
    new = page.read_text()
    assert new.startswith("before\n") and new.endswith("after\n") and "stale text" not in new
    assert data["machine"] in new and "(out/time.png)" in new
    assert "wrote" in capsys.readouterr().out

    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(["report", str(out / "results.json"), "--update", str(page)]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first, (
        "the same file, the same report"
    )
    assert page.read_text() == new


@BOTH
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_keeps_what_it_measured_and_goes_on(suite, tmp_path, monkeypatch, error):
    chosen, count = load(suite), []

    def fails_on_the_second(*arguments):
        count.append(1)
        if len(count) == 2:
            raise error
        return chosen.measure(*arguments)

    broken = replace(chosen, measure=fails_on_the_second)
    monkeypatch.setattr(cli, "load", lambda name: broken)
    ours = {"loss": "ours", "step": "ours-lists"}[suite]
    arguments = [suite, "--preset", "tiny", "--provider", ours, "--no-memory"]
    arguments += ["--out", str(tmp_path)]
    if error is KeyboardInterrupt:
        assert main(arguments) == 1
        assert "Partial" in (tmp_path / "report.md").read_text()
    else:
        with pytest.raises(error):
            main(arguments)
    data = json.loads((tmp_path / "results.json").read_text())
    assert not data["complete"]
    names = [case.name for case in chosen.cases("tiny")]
    assert [r["case"] for r in data["results"]] == names[:1] and data["results"][0]["seconds"] > 0

    monkeypatch.setattr(cli, "load", load)
    cases = [x for name in names[:2] for x in ("--case", name)]
    assert main([*arguments, *cases, "--resume"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["complete"] and again["results"][0] == data["results"][0], "kept as it was"
    assert {r["case"] for r in again["results"]} == set(names[:2])
    (tmp_path / "results.json").write_text(json.dumps({**again, "machine": "another"}))
    assert main([*arguments, "--resume"]) == 2, "of another machine"


@BOTH
def test_a_run_out_of_time_says_so_and_is_resumed(suite, tmp_path):
    settings = Settings("tiny", providers=("official",), without=(), memory=False, seconds=1e-9)
    quiet = {"path": tmp_path / "results.json", "device": CPU}
    data = run(load(suite), settings, **quiet)
    assert data["complete"] and {r["note"] for r in data["results"]} == {f"not run: {NO_TIME}"}
    case = load(suite).cases("tiny")[0].name
    data = run(load(suite), replace(settings, seconds=None, cases=(case,)), resume=True, **quiet)
    assert all(r["seconds"] > 0 for r in data["results"])


@BOTH
def test_what_goes_wrong_is_in_its_row_and_the_others_go_on(suite):
    def cannot(_):
        raise RuntimeError("cannot\nand more")

    def failing(after: int, factor: float = 1.0):
        """Ours, raising or giving another loss after so many calls."""

        def build(given):
            made, calls = load(suite).providers(CPU)["official"].build(given), []

            def changed(call):
                calls.append(1)
                if len(calls) > after and factor == 1.0:
                    raise ValueError("enough")
                value = call()
                return value * factor if len(calls) > after else value

            if suite == "step":
                return replace(made, loss=lambda model: changed(lambda: made.loss(model)))
            loss_of = base.all_providers(CPU)["plain-fp32"].build(given)
            return replace(loss_of, run=lambda: changed(loss_of.run))

        return build

    floor = load(suite).providers(CPU)["floor"]
    made = {"a": cannot, "b": failing(0), "c": failing(3), "d": failing(0, 1.3)}
    more = [replace(floor, name=name, label=name, build=build) for name, build in made.items()]
    rows = measured(suite, None, *NAMES[suite], more=more, repeats=6)
    assert rows["a"]["note"] == "RuntimeError: cannot"
    assert rows["b"]["note"] == rows["c"]["note"] == "ValueError: enough"
    assert all(rows[x]["seconds"] is None and rows[x]["rounds"] == 0 for x in "abc")
    assert rows["d"]["wrong"] and "WRONG" in rows["d"]["note"]
    assert all(rows[name]["rounds"] == 6 and not rows[name]["wrong"] for name in NAMES[suite])


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's clear_refs")
@BOTH
def test_weighing_in_a_child_process(suite):
    other = next((c for c in loss.SUITE.cases("tiny") if c.kind == "memory"), None)
    if suite == "step":
        other = TrainingCase("wide", 4, 64, 16, B=8, model="test")
    case, provider = CASES[suite], {"loss": "ours-torch", "step": "ours-lists"}[suite]
    answers = [*isolate.weigh(suite, provider, [case, other], CPU)]
    assert [a["case"] for a in answers] == [case.name, other.name]
    assert all(not a.get("note") and a["peak_bytes"] > 0 for a in answers), answers
    if suite == "loss":
        assert answers[0]["gradient_bytes"] == 2 * (case.tokens * case.H + case.V * case.H)
        assert answers[1]["seconds"] > 0 and answers[1]["loss_error"] < 1e-3
    else:
        assert answers[1]["peak_bytes"] > answers[0]["peak_bytes"]
        assert answers[0]["gradient_bytes"] == answers[1]["gradient_bytes"] > 0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's clear_refs")
def test_peak_memory_is_that_of_the_step_and_freed_memory_is_not_hidden():
    """In a process of its own, as cases are weighed: timers of this one keep freed memory."""
    code = """
        import torch
        from bench.engine.memory import peak_extra_bytes
        from bench.engine.timing import Step

        size = 48 << 20

        def run():
            torch.ones(size, dtype=torch.uint8)
            return torch.ones(size // 2, dtype=torch.uint8)

        run()
        for _ in range(2):
            print(peak_extra_bytes(Step(run), torch.device("cpu"))[0] / size)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, **memory.CHILD_ENV}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    ratios = [float(x) for x in done.stdout.split()]
    assert len(ratios) == 2
    assert all(0.95 < x < 1.2 for x in ratios), ratios  # the kernel's count lags by some pages


CRASHES = f"""
import os, sys
from bench import cli, roofline
from bench.providers import official
official.official_logps = lambda *_: os.kill(os.getpid(), 9)
official.loss_of_logits = official.official_logps
roofline.SIZES["cpu"] = {CEILINGS}
sys.exit(cli.main())
"""


def test_a_peer_that_kills_the_process_costs_its_own_row(tmp_path, monkeypatch):
    real = isolate.wait_for

    def crashing(child, *rest):
        return real([sys.executable, "-c", CRASHES, *child[3:]], *rest)

    monkeypatch.setattr(isolate, "wait_for", crashing)
    arguments = ["loss", "--preset", "tiny", "--case", "tiny fp32", "--no-memory"]
    assert cli.command([*arguments, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert "the process died" in rows["official"]["note"] and not rows["official"]["seconds"]
    assert rows["floor"]["seconds"] > 0 and rows[base.ours_name(CPU)]["seconds"] > 0


def test_a_process_that_hangs_on_a_gpu_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(isolate, "STALLED", 0.0)
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    assert isolate.wait_for(sleep, tmp_path / "results.json", on_gpu=True) == -9


def test_a_lost_device_ends_the_process_with_its_own_code(tmp_path, monkeypatch, capsys):
    def lost(*_):
        raise DeviceLost("cuda: an illegal access")

    monkeypatch.setattr(cli, "load", lambda name: replace(load(name), measure=lost))
    assert main(["loss", "--preset", "tiny", "--out", str(tmp_path)]) == isolate.DEVICE_LOST
    assert "--resume" in capsys.readouterr().err


@BOTH
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "no such case"], "no case of preset"),
        (["--preset", "Qwen"], "preset must be one of"),
        (["--provider", "nobody"], "provider must be"),
        (["--without", "nobody"], "provider must be"),
        (["--repeats", "0"], "--repeats must be > 0"),
        (["--seconds", "0"], "--seconds must be > 0"),
        (["--update", "nowhere.md"], "no file nowhere.md"),
    ],
)
def test_wrong_calls(tmp_path, capsys, suite, arguments, said):
    assert main([suite, "--preset", "tiny", "--out", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


@BOTH
def test_every_preset_lists_cases_of_known_providers(suite, capsys):
    chosen = load(suite)
    assert main([suite, "--preset", "cpu", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in chosen.cases("cpu")]
    for preset in chosen.presets:
        for on_gpu in (False, True):
            cases = chosen.cases(preset, on_gpu=on_gpu)
            names = [case.name for case in cases]
            assert len(names) == len(set(names)) > 1
            assert all(base.select(chosen.providers(CPU), case.only) for case in cases)
            assert set(COMMON) <= set(chosen.blank(cases[0], chosen.providers(CPU)["floor"]))


def test_pytest_benchmark_runs_saves_and_compares(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-q", "-k",
               "fp32 and (ours or floor)", f"--benchmark-storage={tmp_path}", "-p",
               "no:cacheprovider", "-p", "no:xdist", "--benchmark-save=first"]  # fmt: skip
    # Under xdist pytest-benchmark would switch itself off.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = tmp_path.rglob("0001_first.json")
    assert main(["compare", str(saved), str(saved)]) == 0


def test_every_round_runs_each_contender_once_in_random_order():
    taken = []
    steps = {name: Step(lambda name=name: taken.append(name)) for name in "abc"}
    times = timed(steps, 8, lambda step: step.run() or 1.0)
    assert sorted(taken[:3]) == list("abc"), "each is warmed up"
    rounds = [tuple(taken[i : i + 3]) for i in range(3, len(taken), 3)]
    assert all(sorted(x) == list("abc") for x in rounds) and len(set(rounds)) > 1
    assert {name: len(x) for name, x in times.items()} == {"a": 8, "b": 8, "c": 8}
    over = interleaved("ab", 5, lambda name: 1, clock=Clock(1e-9), least=2)
    assert over == {"a": [1, 1], "b": [1, 1]}
    few = interleaved("ab", 5, lambda name: 1, skip=lambda name, so_far: name == "a" and so_far)
    assert few == {"a": [1], "b": [1] * 5}
    with pytest.raises(ZeroDivisionError):
        interleaved("a", 1, lambda name: 1 / 0)
