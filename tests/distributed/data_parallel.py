"""What each rank of ``test_data_parallel`` runs: attached models under DDP and FSDP2."""

from __future__ import annotations

import copy
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from counting import collectives
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pro_kernels as pk


def make(tied: bool):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, hidden_size=16,
        intermediate_size=32, vocab_size=67, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch(rank: int) -> dict:
    """Ranks differ in candidates, length and scored tokens; the last but one scores none."""
    g = torch.Generator().manual_seed(10 + rank)
    n, length = 2 + rank % 2, 7 + rank
    ids = torch.randint(3, 67, (2 * n, length), generator=g)
    labels = ids.clone()
    labels[:, : 2 + rank] = -100
    if rank == dist.get_world_size() - 2:
        labels[:] = -100
    return {"input_ids": ids, "labels": labels, "rewards": torch.randn(2, n, generator=g)}


def gradients(model) -> dict:
    named = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            named[name.removeprefix("module.")] = grad.detach().clone()
    return named


class Head(nn.Module):
    """The loss with the head's weight as the only parameter."""

    def __init__(self, vocab: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, width).to(dtype))

    def forward(self, hidden, targets, rewards):
        return pk.linear_pro_loss(hidden, self.weight, targets, rewards).loss


def bytes_sent(mesh, rank: int) -> list[dict]:
    """What FSDP2 and DDP send for the head, with two micro-batches, and the shapes."""
    found = []
    for kind in ("FSDP2", "DDP"):
        for vocab, width, dtype in ((67, 16, torch.float32), (66, 24, torch.bfloat16)):
            head = Head(vocab, width, dtype)
            if kind == "DDP":
                head = DistributedDataParallel(head)
                # DDP sums in C++; the hook does the same through torch.distributed.
                head.register_comm_hook(None, allreduce_hook)
            else:
                fully_shard(head, mesh=mesh)
            g = torch.Generator().manual_seed(rank)
            hidden = torch.randn(2, 2, 5 + rank, width, generator=g).to(dtype)
            targets = torch.randint(0, vocab, hidden.shape[:-1], generator=g)
            with collectives() as sent:
                for last in (False, True):
                    if kind == "DDP":
                        head.require_backward_grad_sync = last
                    head(hidden, targets, torch.tensor([[2.0, 1.0]] * 2)).backward()
            shape = {"V": vocab, "H": width, "b": dtype.itemsize}
            found.append({"kind": kind, "sent": sent, **shape})
    return found


def main(output: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    found = {"bytes": bytes_sent(mesh, rank)}
    for tied in (False, True):
        for budget in (None, 1 << 13):  # everything retained; most computed again
            options = {"loss": "ranking", "budget": budget, "temperature": 2.0}
            alone = make(tied)
            wanted = copy.deepcopy(alone)
            pk.attach(wanted, **options)
            losses = [wanted(**batch(r)).loss for r in range(world)]
            (sum(losses) / world).backward()
            want = gradients(wanted)
            for kind in ("DDP", "FSDP2", *(() if tied else ("FSDP2, head apart",))):
                model = pk.attach(copy.deepcopy(alone), **options)
                if kind == "DDP":
                    model = DistributedDataParallel(model)
                else:
                    for layer in model.model.layers:
                        fully_shard(layer, mesh=mesh)
                    if kind == "FSDP2, head apart":
                        fully_shard(model.lm_head, mesh=mesh)
                    fully_shard(model, mesh=mesh)
                if kind == "FSDP2, head apart":
                    try:
                        model(**batch(rank))
                    except ValueError as error:
                        found[kind] = str(error)
                    continue
                loss = model(**batch(rank)).loss
                torch.testing.assert_close(loss, losses[rank], rtol=1e-5, atol=1e-6)
                loss.backward()
                got = gradients(model)
                assert got.keys() == want.keys(), (kind, got.keys() ^ want.keys())
                for name, grad in got.items():
                    off = (grad - want[name]).norm() / want[name].norm().clamp_min(1e-9)
                    assert off < 1e-4, (kind, tied, budget, name, float(off))
                found[f"{kind}, tied={tied}, budget={budget}"] = len(got)
    Path(output, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    # All is written. Taking gloo down, or the interpreter with its threads, now and then aborts
    # ("terminate called without an active exception"), whatever came before.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
