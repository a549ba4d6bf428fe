"""The collectives of a step and their bytes, exactly: what gloo runs count (tests/distributed).

Bytes are those of the tensors that are summed, gathered or scattered, as
``collectives`` in ``tests/distributed/judged.py`` counts them.

Legend: ``N`` scored rows and ``R`` rows of hidden states on a rank, ``H`` hidden, ``V`` rows of
the head weight on a rank (its share under tensor parallelism), ``b`` bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step."""

    name: str  # what is sent
    kind: str  # "all_gather", "reduce_scatter" or "all_reduce"
    size: int  # bytes of all calls: of the tensor that is summed, of the whole that is gathered
    calls: int = 1


def tensor_parallel(
    ranks: int, N: int, R: int, H: int, b: int, chunks: int = 1, need_hidden: bool = True,
    steps: int = 1,
) -> list[Collective]:  # fmt: skip
    """``process_group``: what ranks agree on, the statistics of each chunk, dHidden.

    ``steps``: micro-batches, with N, R and chunks of all together.
    """
    if ranks == 1:
        return []
    found = [
        Collective("agreement", "all_gather", 32 * ranks * steps, steps),
        Collective("maxima", "all_reduce", 4 * N, chunks),
        Collective("sums and target logits", "all_reduce", 8 * N, chunks),
    ]
    if need_hidden:
        found.append(Collective("dHidden", "all_reduce", R * H * b, steps))
    return found


def sharded_weight(
    ranks: int, V: int, H: int, b: int, grad: int | None = None, steps: int = 1
) -> list[Collective]:
    """FSDP2 of the head weight, its rows padded to equal parts; ``grad`` bytes of a number of dW.

    Each micro-batch gathers and reduces.
    """
    if ranks == 1:
        return []
    numbers = steps * -(-V // ranks) * ranks * H
    return [
        Collective("head weight", "all_gather", numbers * b, steps),
        Collective("dW, shards", "reduce_scatter", numbers * (grad or b), steps),
    ]


def replicated_weight(ranks: int, V: int, H: int, grad: int) -> list[Collective]:
    """DDP: dW summed over ranks once a step."""
    return [] if ranks == 1 else [Collective("dW", "all_reduce", V * H * grad)]


def split_tokens(ranks: int, candidates: int, steps: int = 1) -> list[Collective]:
    """``sequence_group``: log-prob and tokens (fp32) of each candidate of the ranks' prompts."""
    if ranks == 1:
        return []
    return [
        Collective("agreement on parts", "all_gather", 32 * ranks * steps, steps),
        Collective("parts of candidates", "all_reduce", 8 * candidates, steps),
    ]
