"""One framework's DPO, run one way: losses, processor time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from bench.engine.record import Record, facts, load
from bench.suites.frameworks import prepare
from bench.suites.frameworks.table import FRAMEWORKS, Framework

HERE = Path(__file__).resolve().parent
STEPS, THREADS = 4, 1
WAYS = {"plain": [], "run": ["run"], "distinct": ["run", "--rows", "distinct"]}  # of pro-kernels
PACKAGES = ("torch", "transformers", "trl")
_ENV = {
    **{"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
    **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "USE_HF": "1"},
    **{"DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1"},
}


def run(path: Path, folder: Path, source: Path, only: list[str]) -> dict:
    """Run what ``only`` names into the results file ``path``; its other rows stay as they are."""
    os.environ.pop("PYTHONPATH", None)  # the frameworks' environments say what they see
    model = prepare.model(source.expanduser(), folder / "model")
    pairs = prepare.pairs(folder / "data")
    rows = load(path)["results"] if path.exists() else []
    ours = {**facts(torch.device("cpu"), packages=("pro-kernels",)), "threads": THREADS}
    record = Record(path, {"benchmark": "frameworks", **ours})
    chosen = [x for x in FRAMEWORKS if any(text in x.key for text in only)]
    names = [x.key for x in chosen]
    record.add([row for row in rows if row["framework"] not in names])
    for framework in chosen:
        python = prepare.environment(folder.absolute(), framework)
        for way in WAYS:
            record.add([row(framework, way, python, model, pairs)])
            print(framework.key, way, record.data["results"][-1].get("note", "ok"), flush=True)
    record.finish()
    return record.data


def row(framework: Framework, way: str, python: Path, model: Path, data: Path) -> dict:
    """What a run gave, or a note with what it ended with."""
    place = python.parent.parent / "work"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "model").symlink_to(model.resolve())
    (place / "data").symlink_to(data.resolve())
    shutil.copy(HERE / framework.file, place)
    ours = [str(python), "-m", "pro_trainer.cli.main", *WAYS[way], "--"] if WAYS[way] else []
    path = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    env = {**os.environ, **_ENV, "PATH": path, "HF_HOME": str(place / "cache"),
           "MODELSCOPE_CACHE": str(place / "cache")}  # fmt: skip
    code, numbers, log = _watched([*ours, *shlex.split(framework.command)], place, env)
    (python.parent.parent / f"{way}.log").write_text(log)
    row = {"framework": framework.key, "way": way, "versions": _versions(python), **numbers}
    said = re.findall(r"^pro-kernels run: (.*)", log, re.MULTILINE)
    row |= {"said": said[-1] if said else None, "warnings": re.findall(r".*were made for.*", log)}
    try:
        row["losses"] = _losses(place / "out")
    except (OSError, IndexError):
        row["losses"] = []
    if code or len(row["losses"]) != STEPS or row["seconds"] is None:
        row["note"] = f"ended with code {code}: {log.strip().splitlines()[-1]}"
    return row


def _watched(command: list[str], place: Path, env: dict[str, str]) -> tuple[int, dict, str]:
    """Exit code, numbers, and what a command wrote.

    A step is from one line that logs a loss to the next, so the first, which warms up, is not in
    ``seconds``. Memory is that of the largest process.
    """
    process = subprocess.Popen(
        command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines, at = [], []
    for line in process.stdout:
        lines.append(line)
        if "'loss': " in line:
            at.append(_used(process.pid))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    numbers = {
        "seconds": (at[-1] - at[0]) / (STEPS - 1) if len(at) == STEPS else None,
        "whole_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss << 10,
    }
    return process.returncode, numbers, "".join(lines)


def _used(session: int) -> float:
    """Processor seconds so far of the processes of a session."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))  # with those of its own that ended
    return ticks / os.sysconf("SC_CLK_TCK")


def _losses(out: Path) -> list[float]:
    """The losses that a trainer logged: in lines of their own, or in its state."""
    if logs := list(out.rglob("logging.jsonl")):
        history = [json.loads(line) for line in logs[0].read_text().splitlines()]
    else:
        history = json.loads(list(out.rglob("trainer_state.json"))[0].read_text())["log_history"]
    return [float(x["loss"]) for x in history if "loss" in x]


def _versions(python: Path) -> dict[str, str]:
    code = f"import importlib.metadata as m; print(*map(m.version, {PACKAGES}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(PACKAGES, done.stdout.split(), strict=True))
