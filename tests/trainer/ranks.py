"""``pro-kernels train`` and ``eval`` on several ranks: forked, so that imports cost once."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from trainer_runs import SHORT

from pro_trainer.cli import commands as cli
from pro_trainer.train import callbacks, trainer
from pro_trainer.train.trainer import PROTrainer

TIMEOUT = 6  # seconds of a collective
_FAIL_AT = 3  # steps done before a fault
_PRELOADED = [  # not this file, which the server's path does not reach
    "pro_trainer.cli.commands",
    "pro_trainer.train.trainer",
    "datasets",
    "matplotlib.figure",
    "transformers.models.byt5.tokenization_byt5",
    "transformers.models.llama.modeling_llama",
]


def argv(work: Path, output: Path, batch: int, accumulation: int = 1, **more: object) -> list[str]:
    """The words of a short run on the files of ``work``."""
    held_out = work / "eval.jsonl"
    return words(
        SHORT
        | {
            "demo": True,
            "data": work / "train.jsonl",
            "eval_data": held_out if held_out.exists() else None,
            "eval_fraction": 0,
            "output_dir": output,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 5,
            "save_strategy": "steps",
            "save_steps": 2,
            "ddp_timeout": TIMEOUT,
        }
        | more
    )


def words(options: dict[str, object]) -> list[str]:
    """Options as a command line has them, without those that are None."""
    return [str(x) for k, v in options.items() if v is not None for x in (f"--{k}", v)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class Run:
    """How the ranks of a launch ended, and what each printed."""

    codes: list[int]
    printed: list[str]


def launch(
    world: int,
    folder: Path,
    *argvs: Sequence[str],
    fault: tuple[int, str] | None = None,
    command: str = "train",
) -> Run:
    """Run the command on ``world`` ranks, rank i with argvs[i] (or the one given); ``fault`` is
    (rank, kind)."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    port, processes = free_port(), []
    for rank in range(world):
        argv = list(argvs[rank % len(argvs)])
        log = str(folder / f"rank{rank}.log")
        process = context.Process(target=_run, args=(command, rank, world, port, argv, log, fault))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
    printed = [(folder / f"rank{rank}.log").read_text() for rank in range(world)]
    return Run([p.exitcode for p in processes], printed)


def _run(
    command: str, rank: int, world: int, port: int, argv: list[str], log: str, fault: tuple | None
) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    gc.freeze()  # see tests/conftest.py
    callbacks.draw_curves = lambda *_: None
    if world > 1:
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        os.environ |= {k: str(v) for k, v in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault is not None and fault[0] == rank:
        if fault[1] == "nan":
            trainer.batch_loss = _not_finite(trainer.batch_loss)
        else:
            PROTrainer.compute_loss = _failing(PROTrainer.compute_loss, fault[1])
    sys.exit(getattr(cli, command)(argv))


def _failing(compute_loss, kind: str):
    def failing(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        if self.state.global_step < _FAIL_AT:
            return loss
        if kind.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "out of memory":
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 1.00 GiB")
        if kind == "out of host memory":
            raise MemoryError("no 1.00 GiB left")
        if kind == "interrupted":
            os.kill(os.getpid(), signal.SIGTERM)
        if kind == "stuck":
            time.sleep(3600)
        raise AssertionError(kind)

    return failing


def _not_finite(batch_loss):
    """``batch_loss`` that is NaN from its fourth call on."""
    calls = itertools.count()

    def changed(*args, **kwargs):
        result = batch_loss(*args, **kwargs)
        factor = float("nan") if next(calls) >= _FAIL_AT else 1
        return result._replace(loss=result.loss * factor)

    return changed
