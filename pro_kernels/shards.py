"""A head whose vocabulary is split over ranks: what each holds, and what they tell one another.

Each rank holds consecutive rows of the weight, in the order of the group, and the same hidden
states and targets. A chunk costs one maximum and one sum over ranks of what a row's log-sum-exp and
target logit are made of, 12 bytes a row, and the call one sum of dHidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        dist.all_reduce(x, dist.ReduceOp.SUM, group=_group(self.group))
        return x

    def max_(self, x: Tensor) -> Tensor:
        """Maximum over ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=_group(self.group))
        return x


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


_agreed: dict[tuple, Shard] = {}


def shard_of(
    group: Any, rows: int, budget: int, facts: dict[str, Any], sizes: dict[str, Any]
) -> Shard | None:
    """What this rank holds of a head that is split over ``group``; None: it is not split.

    The first time that a rank meets its facts, all ranks compare facts and sizes, and all of them
    raise. Later calls compare nothing, so that nothing waits.

    Args:
        group: a ``torch.distributed.ProcessGroup``, or None.
        rows: rows of this rank's weight.
        budget: this rank's budget in bytes.
        facts: what must be equal on all ranks, by name; hashable.
        sizes: the same, of one batch.

    Raises:
        TypeError: no process group.
        ValueError: the group is not initialised or this process not in it, a rank holds no row of
            the weight, or ranks disagree.
    """
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("process_group needs torch.distributed.init_process_group() before")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    key = (group.group_name, rows, budget, *facts.items())
    if key not in _agreed:
        _agreed[key] = _agree(group, rows, budget, {**facts, **sizes})
    return _agreed[key]


def _agree(group: Any, rows: int, budget: int, facts: dict[str, Any]) -> Shard:
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("process_group does not contain this process")
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (rows, budget, facts), group=group)
    for key in sorted(set().union(*(x[2] for x in found))):
        values = [x[2].get(key) for x in found]
        if any(value != values[0] for value in values):
            raise ValueError(f"the ranks of process_group disagree on {key}: {values}, by rank")
    parts = [x[0] for x in found]
    if min(parts) < 1:
        raise ValueError(f"every rank of process_group must hold rows of the weight, got {parts}")
    least = min(x[1] for x in found)
    return Shard(group.group_name, sum(parts[:rank]), sum(parts), max(parts), least)
