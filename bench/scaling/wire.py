"""The collectives of a step: their bytes, exactly, and the time they take by stated ceilings.

Bytes are those of the tensors that are summed, gathered or scattered, as
``tests/distributed/counting.py`` counts them in gloo runs. Times are NCCL's rings: its own tuning
model with bandwidths from data sheets. **None of these times or rates was measured.**

Legend: ``N`` scored rows and ``R`` rows of hidden states on a rank, ``H`` hidden, ``V`` rows of
the head weight on a rank (its share under tensor parallelism), ``b`` bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs, every number a ceiling stated by its maker.

    Attributes:
        name: as in the tables.
        node: GPUs of a node.
        nvlink: bytes a second that a GPU sends to others of its node.
        network: the same to other nodes, through its own adapter.
        source: of the two rates.
    """

    name: str
    node: int
    nvlink: float
    network: float
    source: str


DGX = Cluster(
    "DGX H200", 8, 450e9, 50e9,
    "data sheets of NVIDIA: NVLink 900 GB/s a GPU, both directions together; one 400 Gb/s "
    "InfiniBand adapter a GPU",
)  # fmt: skip

LATENCY_SOURCE = "NCCL's tuning model, src/graph/tuning.cc at 01afd20: rings, LL and Simple"
# Of a ring: seconds of a call, of a step within a node, of one between nodes, share of bandwidth.
_PROTOCOLS = ((3.6e-6, 0.47e-6, 2.7e-6, 0.25), (8.4e-6, 3.4e-6, 9.6e-6, 1.0))
_LL_BETWEEN_NODES = 1.8  # times as long a step of LL takes within nodes, where there are several
_PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step.

    Attributes:
        name: what is sent.
        kind: "all_gather", "reduce_scatter" or "all_reduce".
        ranks: of the group.
        size: bytes, of all calls together: of the tensor that is summed, of the whole that is
            gathered or scattered.
        calls: how many.
        when: where it stands in a step, and what runs beside it.
        stride: GPUs from one rank of the group to the next, counted along the nodes.
    """

    name: str
    kind: str
    ranks: int
    size: int
    calls: int = 1
    when: str = ""
    stride: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a rank of a ring sends."""
        return _PASSES[self.kind] * (self.ranks - 1) / self.ranks * self.size

    def seconds(self, cluster: Cluster) -> float:
        """Predicted, all calls, one after the other."""
        if self.ranks == 1 or not self.calls:
            return 0.0
        here = min(self.ranks, max(1, cluster.node // self.stride))  # ranks in a node
        nodes = -(-self.ranks // here)
        # A node's ranks send around one ring each, through an adapter of their own.
        rate = cluster.nvlink if nodes == 1 else min(cluster.nvlink, here * cluster.network)
        steps, between = (_PASSES[self.kind] * (x - 1) for x in (self.ranks, nodes))
        times = []
        for base, inner, outer, share in _PROTOCOLS:
            slower = _LL_BETWEEN_NODES if share < 1 and nodes > 1 else 1.0
            latency = base + (steps - between) * inner * slower + between * outer
            times.append(self.calls * latency + self.sent / (share * rate))
        return min(times)


def tensor_parallel(
    ranks: int,
    N: int,
    R: int,
    H: int,
    b: int,
    chunks: int = 1,
    need_hidden: bool = True,
    steps: int = 1,
) -> list[Collective]:
    """``process_group``: what ranks agree on, the statistics of each chunk, dHidden.

    ``steps``: micro-batches, with N, R and chunks of all together.
    """
    if ranks == 1:
        return []
    stats = "after a chunk's logits; its residual waits"
    first = "first of all; the host waits"
    found = [
        Collective("agreement", "all_gather", ranks, 32 * ranks * steps, steps, first),
        Collective("maxima", "all_reduce", ranks, 4 * N, chunks, stats),
        Collective("sums and target logits", "all_reduce", ranks, 8 * N, chunks, stats),
    ]
    if need_hidden:
        when = "in the backward, before dW; nothing runs beside it"
        found.append(Collective("dHidden", "all_reduce", ranks, R * H * b, steps, when))
    return found


def sharded_weight(
    ranks: int, V: int, H: int, b: int, grad: int | None = None, steps: int = 1, stride: int = 1
) -> list[Collective]:
    """FSDP2 of the head weight, its rows padded to equal parts; ``grad`` bytes of a number of dW.

    Each micro-batch gathers and reduces.
    """
    if ranks == 1:
        return []
    numbers = -(-V // ranks) * ranks * H
    return [
        Collective(
            "head weight", "all_gather", ranks, steps * numbers * b, steps,
            "before the first layer (the root unit of FSDP2); nothing runs beside it", stride,
        ),
        Collective(
            "dW, shards", "reduce_scatter", ranks, steps * numbers * (grad or b), steps,
            "after the last layer's backward; nothing runs beside it", stride,
        ),
    ]  # fmt: skip


def replicated_weight(ranks: int, V: int, H: int, grad: int, stride: int = 1) -> list[Collective]:
    """DDP: dW summed over ranks once a step."""
    if ranks == 1:
        return []
    when = "beside the decoder's backward"
    return [Collective("dW", "all_reduce", ranks, V * H * grad, 1, when, stride)]


def split_tokens(ranks: int, candidates: int, steps: int = 1, stride: int = 1) -> list[Collective]:
    """``sequence_group``: log-prob and tokens (fp32) of each candidate of the ranks' prompts."""
    if ranks == 1:
        return []
    first, last = "first of all; the host waits", "before the ranking, which waits"
    return [
        Collective("agreement on parts", "all_gather", ranks, 32 * ranks * steps, steps, first,
                   stride),
        Collective("parts of candidates", "all_reduce", ranks, 8 * candidates, steps, last, stride),
    ]  # fmt: skip
