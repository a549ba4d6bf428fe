"""Calls that several ranks make together: what each holds, and what they tell one another.

A DTensor head is gathered for the call, over all dimensions of its mesh but the one that splits the
vocabulary.

``process_group``: the head's vocabulary is split. Each rank holds consecutive rows of the weight,
in the order of the group, and the same hidden states and targets. A chunk costs one maximum and one
sum over ranks of what a row's log-sum-exp and target logit are made of, 12 bytes a row, and the
call one sum of dHidden.

``sequence_group``: the tokens are split. Each rank holds some of the tokens of some candidates; one
sum over ranks of their log-probs and numbers, 8 bytes a candidate, makes every rank's scores whole.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Shard:
    """This rank's columns of the vocabulary."""

    group: str  # name of the process group, as custom ops can take it
    first: int  # its first column
    vocab: int  # columns of all ranks
    most: int  # those of the rank with most of them, for which all ranks plan
    budget: int  # the least of their budgets

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return sum_(x, _group(self.group))

    def max_(self, x: Tensor) -> Tensor:
        """Maximum over ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=_group(self.group))
        return x


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def sum_(x: Tensor, group: Any) -> Tensor:
    """Sum over the ranks of ``group``, in place; the same bits on each of them."""
    dist.all_reduce(x, dist.ReduceOp.SUM, group=group)
    return x


def group_of(name: str, group: Any) -> Any:
    """The ``ProcessGroup`` of ``group``, one itself or a DeviceMesh of one dimension; None of None.

    Raises:
        TypeError: it is neither.
        ValueError: this process cannot talk to its ranks, the mesh has several dimensions, or the
            call is compiled.
    """
    if group is None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError(f"{name} cannot be compiled; call it outside of torch.compile")
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{name} needs torch.distributed.init_process_group() before")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} does not contain this process")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{name} must be one dimension of a DeviceMesh, got a mesh of {group.ndim} with "
                f'names {group.mesh_dim_names}: mesh["tp"], say'
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, "
            f"got {type(group).__name__}"
        )
    return group


def is_dtensor(x: object) -> bool:
    """Whether it is one; without importing them, a second of work, for those who have none."""
    if torch.compiler.is_compiling() and dist.is_available():  # it does not see attributes of one
        from torch.distributed.tensor import DTensor

        return isinstance(x, DTensor)
    return hasattr(x, "full_tensor")


def part_here(name: str, x: Any, group: Any) -> Any:
    """What this rank needs of the head's weight or bias, as a plain tensor.

    Of a DTensor that is all of it or, where a dimension of its mesh is ``group``, this rank's rows.
    It is gathered over the other dimensions, and in the backward its gradient is averaged over
    them, as DDP and FSDP do with every other: ranks there have other data, or the same.

    Raises:
        ValueError: a DTensor placed in another way, or not split over ``group``; a parameter that
            DeepSpeed ZeRO-3 has partitioned.
    """
    if hasattr(x, "ds_id") and not x.numel():
        raise ValueError(
            f"{name} is partitioned by DeepSpeed ZeRO-3: hold it for forward and backward "
            "(deepspeed.zero.GatheredParameters), or read it from its module, and compute the "
            "loss, within the forward of a module of the engine, where DeepSpeed gathers it"
        )
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, placements = x.device_mesh, x.placements
    if any(isinstance(placement, Partial) for placement in placements):
        raise ValueError(f"{name} must be sharded or replicated, got a DTensor placed {placements}")
    kept: list[Any] = [Replicate()] * mesh.ndim
    grads: list[Any] = [Partial("avg")] * mesh.ndim
    if group is not None:
        ranks = dist.get_process_group_ranks(group)
        here = [i for i in range(mesh.ndim) if _ranks_of(mesh, i) == ranks]
        split = [i for i in here if placements[i] == Shard(0)]
        if not split:
            raise ValueError(
                f"{name} must be split over process_group, Shard(0) on that dimension of its mesh, "
                f"got a DTensor placed {placements} on {mesh} and ranks {ranks}; without "
                "process_group it is gathered"
            )
        kept[split[-1]] = grads[split[-1]] = Shard(0)
    return x.redistribute(placements=kept).to_local(grad_placements=grads)


def head_here(
    weight: Tensor, bias: Tensor | None, group: Any
) -> tuple[Tensor, Tensor | None, dist.ProcessGroup | None]:
    """What this rank needs of the head, as plain tensors, and the process group of ``group``.

    Before anything else is checked, so that no rank raises while others wait to gather.
    """
    group = group_of("process_group", group)
    weight = part_here("weight", weight, group)
    return weight, part_here("bias", bias, group), group


def _ranks_of(mesh: DeviceMesh, dim: int) -> list[int]:
    """The ranks that differ from this one in that dimension only, in the mesh's order."""
    at: list[Any] = list(mesh.get_coordinate() or ())
    at[dim] = slice(None)
    return mesh.mesh[tuple(at)].tolist()


def described(x: Any) -> str:
    """What ranks compare of an argument; not the values of a GPU's tensor, which would wait."""
    if not isinstance(x, Tensor):
        return repr(x)
    about = f"{x.dtype} {tuple(x.shape)} on {x.device.type}"
    return f"{x.tolist()}, {about}" if x.device.type == "cpu" else about


def agree(
    name: str,  # of the group, as the caller knows it
    group: dist.ProcessGroup,
    rows: int,  # of this rank's weight
    budget: int,  # this rank's, in bytes
    facts: dict[str, Any],  # what must be equal on all ranks, by name
    error: Exception | None,  # what is wrong with this rank's arguments
    device: torch.device,  # where the tensors are
) -> Shard:
    """What this rank holds of a head that is split over ``group``, if all its ranks agree.

    32 bytes a rank are compared at every call, because what one rank remembers of an earlier call
    another may not; on a GPU the host waits for them.

    Raises:
        ValueError: on every rank, if an argument of any is wrong, or ranks disagree.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
    numbers = [rows, budget, int.from_bytes(digest[:7], "little"), int(error is not None)]
    if dist.get_backend(group) != "nccl":
        at = torch.device("cpu")
    else:  # it knows no other device, wherever this rank's tensors are
        at = device if device.type == "cuda" else torch.device("cuda")
    mine = torch.tensor(numbers, dtype=torch.int64, device=at)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    table = torch.stack(found).tolist()
    if any(row[3] for row in table) or any(row[2] != table[0][2] for row in table):
        _raise(name, group, facts, error)
    parts, rank = [row[0] for row in table], dist.get_rank(group)
    least = min(row[1] for row in table)
    return Shard(group.group_name, sum(parts[:rank]), sum(parts), max(parts), least)


def _raise(name: str, group: Any, facts: dict[str, Any], error: Exception | None) -> None:
    found: list[Any] = [None] * dist.get_world_size(group)
    told = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(found, (facts, told), group=group)
    if wrong := [f"rank {i}: {x[1]}" for i, x in enumerate(found) if x[1] is not None]:
        raise ValueError(f"in {name}, {'; '.join(wrong)}") from error
    for key in sorted(set().union(*(x[0] for x in found))):
        values = [x[0].get(key) for x in found]
        if any(value != values[0] for value in values):
            raise ValueError(f"the ranks of {name} disagree on {key}: {values}, by rank")
