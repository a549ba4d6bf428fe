"""Run every check of this folder on ranks forked from one process: worlds.py FOLDER WORLDS."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import timedelta

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has counted GPUs cannot fork well
import judged
import torch
import torch.distributed as dist
import torch.multiprocessing

CHECKS = ["tensor_parallel", "dtensors", "sequence_parallel", "data_parallel"]
modules = [__import__(name) for name in CHECKS]
# What the ranks would each import by themselves.
LATER = [
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
]
for name in [*LATER, "peft", "triton"]:
    with contextlib.suppress(ImportError):
        __import__(name)


def on_rank(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                            timeout=timedelta(seconds=120))  # fmt: skip
    torch.set_num_threads(1)
    judged.watch_plans()
    for module in modules:
        module.check(dist.group.WORLD)
    dist.barrier()
    # Taking gloo down, or the interpreter with its threads, now and then aborts ("terminate called
    # without an active exception"), whatever came before.
    os._exit(0)


if __name__ == "__main__":
    # What is imported is imported once; a fork is safe on Linux only.
    method = "fork" if sys.platform == "linux" else "spawn"
    for world in map(int, sys.argv[2:]):
        args = world, f"{sys.argv[1]}/store{world}"
        torch.multiprocessing.start_processes(on_rank, args, world, start_method=method)
