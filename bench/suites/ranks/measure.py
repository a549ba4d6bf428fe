"""Gloo runs on this machine: what a head over ranks weighs, and how two ranks scale.

One and two ranks take turns within each round. What other processes took of the machine meanwhile
is measured: a run that was not alone is kept, and not called clean.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench.engine.isolate import ROOT
from bench.engine.memory import CHILD_ENV
from bench.engine.record import Record, facts
from bench.engine.timing import quartiles
from bench.suites.ranks import worker
from bench.suites.ranks.worker import Shape
from pro_kernels.fused import planner

ROUNDS = 15
SPLIT_RANKS, WEAK_RANKS = 4, 2
SPLIT: Shape = (2, 2, 160, 512, 64128)
WEAK: Shape = (4, 4, 128, 1024, 32000)
# Cores that others, and the host of a virtual machine, may take of a run that is called clean.
_OTHERS, _STOLEN = 0.05, 0.02
_FP32_FLOOR = 4e-6  # of gradients, relative, beside plain PyTorch's error: tests/cases.py


class Clock(NamedTuple):
    """Processor seconds since the machine started, and those of this process and its children."""

    wall: float
    busy: float
    stolen: float
    ours: float

    @classmethod
    def now(cls) -> Clock:
        """Read it, from Linux's /proc/stat."""
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
        user, nice, system, _idle, _wait, irq, soft, stolen = (
            int(x) / os.sysconf("SC_CLK_TCK") for x in fields[:8]
        )
        ours = sum(os.times()[:4])  # those of children once they are waited for
        return cls(time.perf_counter(), user + nice + system + irq + soft, stolen, ours)


def run(
    path: Path,
    rounds: int = ROUNDS,
    split: Shape = SPLIT,
    weak: Shape = WEAK,
) -> dict:
    """Measure into the JSON file ``path``; returns its content, with "clean" true or false.

    Raises:
        ValueError: fewer than two rounds (each rank runs alone in every other one).
        RuntimeError: a rank failed.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    about = facts(torch.device("cpu"), preset="ranks", rounds=rounds, split=split, weak=weak)
    about["threads"] = 1
    record = Record(path, {**about, "benchmark": "ranks"})
    record.put(load_before=os.getloadavg()[0])
    with tempfile.TemporaryDirectory() as folder:
        one = _launch("split", 1, folder, split, rounds, CHILD_ENV)[0]
        many = _launch("split", SPLIT_RANKS, folder, split, rounds, CHILD_ENV)
        record.add([_split_row(one, many, split)])
        print(f"split over {SPLIT_RANKS}: {record.data['results'][-1]}")
        before = Clock.now()
        ranks = _launch("weak", WEAK_RANKS, folder, weak, rounds, {})
        after = Clock.now()
    record.add([_weak_row(name, ranks) for name in ranks[0]])
    for row in record.data["results"][1:]:
        print(f"{row['name']}: {row['alone']:.4f} s, {row['both']:.4f} s, {row['efficiency']:.3f}")
    record.put(**judged(before, after))
    record.finish()
    return record.data


def judged(before: Clock, after: Clock) -> dict:
    """Cores that others and the host took, and whether the run may be called clean."""
    wall, busy, stolen, ours = (b - a for a, b in zip(before, after, strict=True))
    others, stolen = max(0.0, busy - ours) / wall, stolen / wall
    return {"others": others, "stolen": stolen, "clean": others <= _OTHERS and stolen <= _STOLEN}


def _launch(
    job: str, world: int, folder: str, shape: Shape, rounds: int, env: dict[str, str]
) -> list[dict]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
        "-m", "bench.suites.ranks.worker", job, folder, str(rounds), *map(str, shape),
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{job} on {world} ranks failed:\n{done.stderr[-2000:]}")
    names = [f"{job}-{world}-{rank}.json" for rank in range(world)]
    return [json.loads(Path(folder, name).read_text()) for name in names]


def _split_row(one: dict, many: list[dict], shape: Shape) -> dict:
    whole = one["weight_bytes"] + one["peak_bytes"]
    parts = [rank["weight_bytes"] + rank["peak_bytes"] for rank in many]
    row = {
        "name": f"tensor parallel over {len(many)} ranks",
        "whole_bytes": whole,
        "part_bytes": parts,
        "share": max(parts) / whole,
        "predicted_bytes": [_predicted(shape, 1), _predicted(shape, len(many))],
        "loss": one["loss"],
        "loss_difference": max(abs(r["loss"] - one["loss"]) for r in many) / abs(one["loss"]),
    }
    for name in ("hidden", "weight"):
        plain = one[f"{name}_plain_error"]
        row[f"{name}_error"] = max(rank[f"{name}_error"] for rank in many)
        row |= {f"{name}_error_alone": one[f"{name}_error"], f"{name}_plain_error": plain}
        row[f"{name}_allowed"] = plain + _FP32_FLOOR
    return row


def _predicted(shape: Shape, ranks: int) -> int:
    """Bytes by the planner: the weight, its gradient, that of the hidden states, rows of logits."""
    B, n, T, H, V = shape
    V = -(-V // ranks)
    plans = [
        planner.make_plan(
            rows, (V, H, torch.float32), torch.device("cpu"), need_hidden=True, need_weight=True,
            hidden_rows=B * n * T,
        )
        for rows in (B * n * round(T * (1 - worker.MASKED)), 0)
    ]  # fmt: skip
    # Without what is left to matmuls, which in fp32 take nothing.
    return 4 * (2 * V * H + B * n * T * H) + plans[0].taken - plans[1].taken


def _weak_row(name: str, ranks: list[dict]) -> dict:
    """Medians of one rank alone and of the slower of both, and of the ratio within rounds."""
    runs = [rank[name] for rank in ranks]
    turns = zip(*(r["alone"] for r in runs), strict=True)
    alone = [next(x for x in pair if x is not None) for pair in turns]
    both = [tuple(map(max, *pair)) for pair in zip(*(r["both"] for r in runs), strict=True)]
    ratios, by_processor = (
        [a[i] / b[i] for a, b in zip(alone, both, strict=True)] for i in range(2)
    )
    q1, middle, q3 = quartiles(ratios)
    return {
        "name": name, "alone": statistics.median(x for x, _ in alone),
        "both": statistics.median(x for x, _ in both), "efficiency": middle, "q1": q1, "q3": q3,
        "by_processor": statistics.median(by_processor), "rounds": len(both),
    }  # fmt: skip
