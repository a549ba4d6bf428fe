"""Calls that several ranks make together: what each holds, and what they tell one another.

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


@dataclass(frozen=True)
class Shard:
    """This rank's columns of the vocabulary.

    Attributes:
        group: name of the process group, as custom ops can take it.
        first: its first column.
        vocab: columns of all ranks.
        most: those of the rank with most of them, for which all ranks plan.
        budget: the least of their budgets.
    """

    group: str
    first: int
    vocab: int
    most: int
    budget: int

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


def check_group(name: str, group: Any) -> None:
    """Raise TypeError or ValueError unless this process can talk to the ranks of ``group``."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{name} needs torch.distributed.init_process_group() before")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} does not contain this process")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )


def described(x: Any) -> str:
    """What ranks compare of an argument; not the values of a GPU's tensor, which would wait."""
    if not isinstance(x, Tensor):
        return repr(x)
    about = f"{x.dtype} {tuple(x.shape)} on {x.device.type}"
    return f"{x.tolist()}, {about}" if x.device.type == "cpu" else about


def agree(
    name: str,
    group: Any,
    rows: int,
    budget: int,
    facts: dict[str, Any],
    error: Exception | None,
    device: torch.device,
) -> Shard:
    """What this rank holds of a head that is split over ``group``, if all its ranks agree.

    32 bytes a rank are compared at every call, because what one rank remembers of an earlier call
    another may not; on a GPU the host waits for them.

    Args:
        name: of the group, as the caller knows it.
        group: a ``torch.distributed.ProcessGroup``.
        rows: rows of this rank's weight.
        budget: this rank's budget in bytes.
        facts: what must be equal on all ranks, by name.
        error: what is wrong with this rank's arguments.
        device: where the tensors are.

    Raises:
        ValueError: on every rank, if an argument of any is wrong, or ranks disagree.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
    numbers = [rows, budget, int.from_bytes(digest[:7], "little"), int(error is not None)]
    at = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
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
