"""Short runs of the trainer on lists that can be learnt, shared by its tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from pro_trainer.models import tiny_llama
from pro_trainer.train.config import PROConfig
from pro_trainer.train.trainer import PROTrainer

QUICK = ["--report_to", "none", "--use_cpu", "true", "--max_steps", "2", "--logging_steps", "1"]


def records(count: int = 8, n: int = 3) -> list[dict]:
    """Lists that can be learnt: longer praise is better."""
    return [
        {
            "prompt": f"q{i}: ",
            "completions": [f"{'good ' * k}{i}" for k in range(n, 0, -1)],
            "rewards": [float(k * k) / 4 for k in range(n, 0, -1)],
        }
        for i in range(count)
    ]


SHORT = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}


def config(output: Path, **options) -> PROConfig:
    return PROConfig(
        output_dir=str(output), **SHORT | {"max_steps": 4, "save_strategy": "no"} | options
    )


def trainer_for(output: Path, model=None, data=None, eval_data=None, **options) -> PROTrainer:
    names = ("peft_config", "ref_model", "compute_metrics")
    of_trainer = {name: options.pop(name) for name in names if name in options}
    tiny_model, tokenizer = tiny_llama(0)
    return PROTrainer(
        tiny_model if model is None else model,
        config(output, **options),
        records() if data is None else data,
        eval_data,
        tokenizer,
        **of_trainer,
    )


def trained(output: Path, *args, resume: str | bool | None = None, **options) -> PROTrainer:
    """``trainer_for`` that has trained."""
    trainer = trainer_for(output, *args, **options)
    trainer.train(resume)
    return trainer


def losses(trainer: PROTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: PROTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@contextlib.contextmanager
def held(lock: Path) -> Iterator[subprocess.Popen]:
    """Another process holds ``lock``, until it is killed."""
    code = (
        "import sys; from pathlib import Path; from pro_trainer.files import alone\n"
        "with alone('output', Path('x'), Path(sys.argv[1])): print(flush=True), sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(lock)]
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        yield holder
    finally:
        holder.kill()
        holder.communicate()
