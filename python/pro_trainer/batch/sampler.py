"""Which lists each rank takes: those one process would take, dealt out, none of them twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.utils.data import BatchSampler

# Of a loader, kept.
_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "generator",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


class RankBatches(BatchSampler):
    """One rank's batches; in the last round a short one, or an empty one where nothing is left.

    accelerate's own fills the last round up with lists from the start of the epoch, which then
    count twice.

    Args:
        batches: the batches of all ranks, in order.
        rank: this one.
        ranks: how many there are.
    """

    def __init__(self, batches: BatchSampler, rank: int, ranks: int) -> None:
        self.batch_sampler = batches  # where accelerate looks for the sampler, to set its epoch
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last
        self.process_index, self.num_processes = rank, ranks

    def __len__(self) -> int:
        whole, rest = divmod(len(self.batch_sampler), self.num_processes)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        turn: list[list[int]] = []
        for batch in self.batch_sampler:
            turn.append(batch)
            if len(turn) == self.num_processes:
                yield turn[self.process_index]
                turn = []
        if turn and not self.drop_last:
            turn += [[]] * (self.num_processes - len(turn))
            yield turn[self.process_index]


def dealt(loader: Any) -> Any:
    """Accelerate's training loader with ``RankBatches`` in the place of its own division.

    Loaders that are divided in another way (one process, ``split_batches``, ``dispatch_batches``,
    a sampler that knows its rank) are returned as they are.
    """
    shard = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or shard.split_batches or shard.num_processes == 1:
        return loader
    return DataLoaderShard(
        loader.dataset,
        device=loader.device,
        rng_types=loader.rng_types,
        synchronized_generator=loader.synchronized_generator,
        batch_sampler=RankBatches(shard.batch_sampler, shard.process_index, shard.num_processes),
        _drop_last=loader._drop_last,
        _non_blocking=loader._non_blocking,
        **{name: getattr(loader, name) for name in _OPTIONS},
    )
