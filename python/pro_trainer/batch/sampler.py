"""Which lists make a batch, and which batches each rank takes: those one process would take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.utils.data import BatchSampler

# Of a loader, kept.
_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers", "in_order"),
)


class TokenBatches(BatchSampler):
    """Batches of as many lists as have up to so many tokens; a list with more is one by itself.

    Which lists are together is drawn once, so that every epoch has as many batches; their order is
    drawn for each epoch.

    Args:
        lists: tokenised lists.
        limit: tokens of a batch.
        padded: every candidate is a row as long as the longest of the batch; else a prompt counts
            once for all its candidates.
        seed: of both draws.
    """

    def __init__(
        self, lists: Sequence[Mapping[str, Any]], limit: int, *, padded: bool, seed: int
    ) -> None:
        self.seed, self.epoch = seed, 0
        self.sampler = self  # where accelerate sets the epoch
        self.drop_last = False
        self._batches: list[list[int]] = []
        rows = tokens = longest = 0
        sizes = [_size(one) for one in lists]
        for i in torch.randperm(len(sizes), generator=self._generator()).tolist():
            n, most, distinct = sizes[i]
            rows, tokens, longest = rows + n, tokens + distinct, max(longest, most)
            if not self._batches or (rows * longest if padded else tokens) > limit:
                self._batches.append([])
                rows, tokens, longest = n, distinct, most
            self._batches[-1].append(i)
        self.batch_size = max(map(len, self._batches))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of that epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for i in torch.randperm(len(self._batches), generator=self._generator()).tolist():
            yield self._batches[i]


def _size(one: Mapping[str, Any]) -> tuple[int, int, int]:
    """Candidates of a list, tokens of its longest one, and tokens with each prompt once."""
    prompts, own = [len(x) for x in one["prompts"]], [len(x) for x in one["completions"]]
    each = prompts * (len(own) if len(prompts) == 1 else 1)
    return len(own), max(map(sum, zip(each, own, strict=True))), sum(prompts) + sum(own)


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


def dealt(loader: Any, batches: BatchSampler | None = None) -> Any:
    """Accelerate's training loader with ``batches`` (its own), divided by ``RankBatches``.

    Loaders that are divided in another way (one process, ``split_batches``, ``dispatch_batches``,
    a sampler that knows its rank) keep their own batches.
    """
    shard = getattr(loader, "batch_sampler", None)
    divided = (
        isinstance(shard, BatchSamplerShard) and not shard.split_batches and shard.num_processes > 1
    )
    if not divided and batches is None:
        return loader
    if divided:
        own = shard.batch_sampler if batches is None else batches
        batches = RankBatches(own, shard.process_index, shard.num_processes)
    return DataLoaderShard(
        loader.dataset,
        device=loader.device,
        rng_types=loader.rng_types,
        synchronized_generator=loader.synchronized_generator,
        batch_sampler=batches,
        _drop_last=loader._drop_last,
        _non_blocking=loader._non_blocking,
        **{name: getattr(loader, name) for name in _OPTIONS},
    )
