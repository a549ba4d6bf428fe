"""What each gloo rank of ``measure`` runs: ``worker JOB FOLDER ROUNDS B n T H V``.

``split``: a head over all ranks, weighed, and its results against fp64; on one rank it makes the
truth for the others. ``weak``: rounds of one rank alone, then of both, of the same work each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import pro_kernels as pk
from bench.engine.memory import peak_extra_bytes
from bench.engine.timing import Step, backward_step, interleaved, keep_memory

Shape = tuple[int, int, int, int, int]  # B, n, T, H, V of a batch and its head
MASKED = 0.6


def main(job: str, folder: str, rounds: str, *sizes: str) -> None:
    """Run a job and write ``JOB-WORLD-RANK.json``."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    torch.set_num_threads(1)
    B, n, T, H, V = map(int, sizes)
    shape = (B, n, T, H, V)
    found = split(Path(folder), shape) if job == "split" else weak(int(rounds), shape)
    name = f"{job}-{dist.get_world_size()}-{dist.get_rank()}.json"
    Path(folder, name).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort the interpreter as it leaves


def batch(shape: Shape, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (B, n, T, H), weight (V, H), targets and rewards, of random numbers."""
    B, n, T, H, V = shape
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, n, T, H, generator=g).to(dtype)
    weight = torch.randn(V, H, generator=g).mul_(H**-0.5).to(dtype)
    targets = torch.randint(0, V, (B, n, T), generator=g)
    targets[..., : round(MASKED * T)] = -100
    return hidden, weight, targets, torch.rand(B, n, generator=g)


def split(folder: Path, shape: Shape) -> dict:
    """Bytes of the head on this rank, the loss, and errors of loss and gradients."""
    world, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, targets, rewards = batch(shape, 0, torch.float32)
    step = weight.shape[0] // world
    part = slice(rank * step, weight.shape[0] if rank == world - 1 else (rank + 1) * step)
    leaves = hidden, weight[part].clone()
    if world == 1:
        for name, dtype in (("exact", torch.float64), ("plain", torch.float32)):
            _save_gradients(hidden, weight, targets, rewards, dtype, folder / f"{name}.pt")
    del hidden, weight
    for leaf in leaves:
        leaf.requires_grad_()
    group = dist.group.WORLD if world > 1 else None

    def loss() -> Tensor:
        return pk.linear_pro_loss(*leaves, targets, rewards, process_group=group).loss

    made = backward_step(loss, leaves)
    made.run()  # libraries load
    made.clear()
    dist.barrier()
    peak, value = peak_extra_bytes(made, torch.device("cpu"))
    found = {"weight_bytes": leaves[1].nbytes, "peak_bytes": peak, "loss": float(value)}
    exact, plain = (torch.load(folder / f"{x}.pt", mmap=True) for x in ("exact", "plain"))
    for name, leaf, mine in zip(("hidden", "weight"), leaves, (slice(None), part), strict=True):
        truth = exact[name][mine]
        squares = [(x - truth).square().sum() for x in (leaf.grad.double(), plain[name][mine])]
        sums = torch.stack([*squares, truth.square().sum()])
        if name == "weight":
            dist.all_reduce(sums)
        ours, eager, norm = sums.sqrt().tolist()
        found[f"{name}_error"], found[f"{name}_plain_error"] = ours / norm, eager / norm
    return found


def _save_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, rewards: Tensor, dtype: torch.dtype, path: Path
) -> None:
    """Those of the reference, plain PyTorch, computed in ``dtype``."""
    x, w = (t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
    pk.reference.linear_pro_loss(x, w, targets, rewards).loss.backward()
    torch.save({"hidden": x.grad, "weight": w.grad}, path)


def weak(rounds: int, shape: Shape) -> dict:
    """Seconds of each case by round, by the clock and of the processor (all threads).

    Of this rank where it ran alone, and beside the other.
    """
    keep_memory()
    rank = dist.get_rank()
    steps = _weak_steps(rank, shape)
    for alone, both in steps.values():  # libraries load, memory is there
        both.run()
        both.clear()
        alone.run()
        alone.clear()

    turns = dict.fromkeys(steps, 0)

    def take(name: str) -> tuple[tuple[float, float] | None, tuple[float, float]]:
        alone, both = steps[name]
        turn, turns[name] = turns[name], turns[name] + 1
        dist.barrier()
        # The ranks take turns, as one of the cores may be the slower.
        mine = _timed(alone) if rank == turn % 2 else None
        dist.barrier()
        return mine, _timed(both)

    taken = interleaved(steps, rounds, take)
    return {k: {"alone": [a for a, _ in v], "both": [b for _, b in v]} for k, v in taken.items()}


def _timed(step: Step) -> tuple[float, float]:
    start = time.perf_counter(), time.process_time()
    value = step.run()
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    del value
    step.clear()
    return seconds


def _weak_steps(rank: int, shape: Shape) -> dict[str, tuple[Step, Step]]:
    """By case: what a rank runs alone, and the same amount of work as one of two."""
    hidden, weight, targets, rewards = batch(shape, rank, torch.bfloat16)
    x, w = hidden.requires_grad_(), weight.requires_grad_()

    def loss() -> Tensor:
        return pk.linear_pro_loss(x, w, targets, rewards).loss

    alone = backward_step(loss, (x, w))

    def summed() -> Tensor:
        value = alone.run()
        dist.all_reduce(w.grad)
        return value

    # One batch for both ranks, each with V rows of a head of 2 V.
    shared, _, over, ranks = batch(shape, 2, torch.bfloat16)
    over = torch.where(over >= 0, over * 2, over)
    shared.requires_grad_()

    def tensor_parallel() -> Tensor:
        group = dist.group.WORLD
        return pk.linear_pro_loss(shared, w, over, ranks, process_group=group).loss

    rows = x.detach()[targets >= 0]
    dz = torch.mm(rows, w.detach().t())

    def matmuls() -> list[Tensor]:
        plain = w.detach()
        return [torch.mm(rows, plain.t()), torch.mm(dz, plain), torch.mm(dz.t(), rows)]

    floor = Step(matmuls)
    return {
        "head matmuls alone": (floor, floor),
        "data parallel": (alone, alone),
        "data parallel, dW summed": (alone, Step(summed, (x, w))),
        "tensor parallel, V doubled": (alone, backward_step(tensor_parallel, (shared, w))),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
