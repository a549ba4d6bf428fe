"""Run checks on ranks forked from one process: worlds.py FOLDER 2,4 MODULES."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from datetime import timedelta

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has counted GPUs cannot fork well
import judged
import torch
import torch.distributed as dist
import torch.multiprocessing

# What the ranks would each import by themselves.
for name in ("transformers.models.llama.modeling_llama", "torch._dynamo", "peft", "triton"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
FOLDER, WORLDS, *CHECKS = sys.argv[1:]
modules = [importlib.import_module(name) for name in CHECKS]


def on_rank(rank: int, world: int, store: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}  # DeepSpeed asks for it
    os.environ |= {name: str(value) for name, value in place.items()}
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
    for world in map(int, WORLDS.split(",")):
        args = world, f"{FOLDER}/store{world}"
        torch.multiprocessing.start_processes(on_rank, args, world, start_method=method)
