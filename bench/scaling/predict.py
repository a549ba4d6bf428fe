"""Time and memory of the head loss of one step, by model and by layout of the ranks.

Computing is ``bench.model.costs`` on a rank's share, memory is what the planner counts on
(``Plan.taken``) beside the tensors the caller holds, transfers are ``wire``. As the package runs
today nothing overlaps; the second efficiency lets the decoder hide FSDP's transfers of the head,
as a unit of its own could. Outside the model: the decoder itself (its own transfers share the
links), the optimizer, unequal ranks, jitter.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.tables import measured_card
from bench.model import costs
from bench.model.cards import CARDS, Card
from bench.scaling import wire
from bench.scaling.wire import DGX, Cluster, Collective

GPU_RESULTS = Path(__file__).resolve().parent.parent / "results" / "gpu" / "gpu.json"
_BF16 = 2
# Positions that a rank takes at a time, whole prompts, at least one: a micro-batch.
MICRO = 16384
GPUS = tuple(1 << i for i in range(11))
TP = GPUS[:7]


@dataclass(frozen=True)
class Model:
    """A head, and what is needed of the decoder below it: its matmuls' parameters."""

    name: str
    H: int
    V: int
    layers: int = 0
    ffn: int = 0
    queries: int = 0  # width of all heads together
    keys: int = 0

    @property
    def decoder(self) -> int:
        """Parameters of the decoder's matmuls; 0 where nothing is known of it."""
        return self.layers * self.H * (2 * self.queries + 2 * self.keys + 3 * self.ffn)


MODELS = {
    model.name: model
    for model in (
        Model("Llama 3 8B", 4096, 128256, 32, 14336, 4096, 1024),
        Model("Llama 3 70B", 8192, 128256, 80, 28672, 8192, 1024),
        Model("Llama 3 405B", 16384, 128256, 126, 53248, 16384, 1024),
        Model("Gemma 3 27B", 5376, 262208, 62, 21504, 4096, 2048),
    )
}


@dataclass(frozen=True)
class Batch:
    """A global batch: prompts of ``n`` candidates, positions of each and how many are scored."""

    prompts: int = 256
    n: int = 4
    positions: int = 2048
    scored: int = 816


@dataclass(frozen=True)
class Layout:
    """How many ranks share the vocabulary, positions, candidates, prompts; innermost first."""

    tp: int = 1
    cp: int = 1
    candidates: int = 1
    dp: int = 1

    @property
    def data(self) -> int:
        """Ranks with the same part of the weight: FSDP shards it over these."""
        return self.cp * self.candidates * self.dp

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tp * self.data


@dataclass(frozen=True)
class Step:
    """A step of the head loss on one rank; seconds and bytes."""

    layout: Layout
    micros: int
    compute: float
    transfers: tuple[tuple[Collective, float], ...]
    decoder: float  # its forward, all micro-batches; the backward takes twice that
    memory: dict[str, int]

    @property
    def communication(self) -> float:
        """Seconds of all transfers."""
        return sum(seconds for _, seconds in self.transfers)

    @property
    def seconds(self) -> float:
        """As it runs: one after the other."""
        return self.compute + self.communication

    @property
    def hidden(self) -> float:
        """With the head weight's transfers behind the decoder, as far as it is long enough."""
        total = self.compute
        for collective, seconds in self.transfers:
            beside = {"all_gather": 1, "reduce_scatter": 2, "all_reduce": 2}[collective.kind]
            weight = collective.name in ("head weight", "dW, shards", "dW")
            total += max(0.0, seconds - beside * self.decoder) if weight else seconds
        return total


def card(path: Path = GPU_RESULTS) -> tuple[Card, bool]:
    """The card of the predictions, and whether its two rates were measured by this project.

    Raises:
        ValueError: there is a results file, and its floors cannot be read.
    """
    if not path.exists():
        return CARDS["H200"], False
    try:
        found = measured_card(json.loads(path.read_text()))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a results file of bench.gpu: {error!r}") from None
    return (CARDS["H200"], False) if found is None else (found, True)


def step(
    model: Model,
    batch: Batch,
    layout: Layout,
    on: Card,
    cluster: Cluster = DGX,
    *,
    fsdp: bool = True,
) -> Step:
    """Predict one step, forward and backward, head trained, bf16.

    ``fsdp``: the head weight is sharded over the ranks that share it; else replicated (DDP).

    Raises:
        ValueError: the layout does not divide the batch.
    """
    _check(batch, layout)
    tp, n = layout.tp, batch.n // layout.candidates
    V = -(-model.V // tp)  # of the rank with most
    prompts = batch.prompts // layout.dp
    of_prompt = n * batch.positions // layout.cp
    whole, rest = divmod(prompts, max(1, MICRO // of_prompt))
    sizes = [max(1, MICRO // of_prompt)] * whole + [rest] * (rest > 0)
    scored = batch.scored // layout.cp
    parts = [_cost(p * of_prompt, p * n * scored, model.H, V, p, n, tp > 1) for p in sizes]
    compute, chunks = sum(part.seconds(on) for part in parts), 0
    for p, part in zip(sizes, parts, strict=True):
        assert part.plan is not None
        chunks += -(-p * n * scored // part.plan.chunk)
    R, N = prompts * of_prompt, prompts * n * scored
    transfers = wire.tensor_parallel(tp, N, R, model.H, _BF16, chunks, steps=len(sizes))
    ranks = layout.cp * layout.candidates  # of one sequence_group
    transfers += wire.split_tokens(ranks, prompts * batch.n, len(sizes), tp)
    numbers = V * model.H
    if fsdp:
        transfers += wire.sharded_weight(
            layout.data, V, model.H, _BF16, steps=len(sizes), stride=tp
        )
    else:
        transfers += wire.replicated_weight(layout.data, V, model.H, _BF16, stride=tp)
    if len(sizes) > 1 and not (fsdp and layout.data > 1):  # a shard is added to a shard: small
        adding = costs.Piece("dW of micro-batches", 0, 2 * numbers * _BF16, numbers * _BF16)
        compute += (len(sizes) - 1) * adding.seconds(on)
    return Step(
        layout, len(sizes), compute,
        tuple((each, each.seconds(cluster)) for each in transfers),
        2 * model.decoder * R / (tp * on.matmul),
        _memory(model.H, numbers, sizes[0] * of_prompt, parts[0], layout, len(sizes), fsdp),
    )  # fmt: skip


def _check(batch: Batch, layout: Layout) -> None:
    for name, value in (*vars(batch).items(), *vars(layout).items()):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if batch.scored > batch.positions:
        raise ValueError(f"scored must be <= positions = {batch.positions}, got {batch.scored}")
    for name, amount, ranks in (
        ("prompts", batch.prompts, layout.dp),
        ("n", batch.n, layout.candidates),
        ("positions", batch.positions, layout.cp),
        ("scored", batch.scored, layout.cp),
    ):
        if amount % ranks:
            raise ValueError(f"{name} must be a multiple of its {ranks} ranks, got {amount}")


@functools.cache
def _cost(R: int, N: int, H: int, V: int, B: int, n: int, sharded: bool) -> costs.Cost:
    return costs.linear(R, N, H, V, B, n, sharded=sharded)


def _memory(
    H: int, numbers: int, R: int, cost: costs.Cost, layout: Layout, micros: int, fsdp: bool
) -> dict[str, int]:
    """Bytes on a rank at the height of a step: what the caller holds, then the planner's count."""
    assert cost.plan is not None
    whole = numbers * _BF16
    shard = -(-whole // layout.data) if fsdp and layout.data > 1 else 0
    again = shard or (whole if micros > 1 else 0)  # what dW is added to
    return {
        "head weight": whole + shard,
        "dW": whole + again,
        "hidden states and their gradient": 2 * R * H * _BF16,
        "the loss (planner)": cost.plan.taken,
    }


def layouts(gpus: int, batch: Batch, node: int = DGX.node) -> Iterator[Layout]:
    """Every layout in powers of two: tensor and context parallel within a node."""
    sizes = [1 << i for i in range(gpus.bit_length())]
    for tp in sizes:
        for cp in sizes:
            for across in sizes:
                rest, left = divmod(gpus, tp * cp * across)
                fits = not left and rest and tp * cp <= node and not batch.prompts % rest
                if fits and not (batch.n % across or batch.positions % cp or batch.scored % cp):
                    yield Layout(tp, cp, across, rest)


@functools.cache
def best(model: Model, batch: Batch, gpus: int, on: Card, cluster: Cluster = DGX) -> Step:
    """The fastest layout.

    Raises:
        ValueError: none puts the batch on so many GPUs.
    """
    found = [step(model, batch, at, on, cluster) for at in layouts(gpus, batch, cluster.node)]
    if not found:
        raise ValueError(f"gpus: no layout in powers of two puts {batch} on {gpus}")
    return min(found, key=lambda s: s.seconds)


def efficiency(one: Step, many: Step, hidden: bool = False) -> float:
    """Time of one GPU over that of all GPUs together."""
    return one.seconds / (many.layout.gpus * (many.hidden if hidden else many.seconds))


# One micro-batch of two prompts: what the ranks of a tensor parallel group share.
ONE = Batch(prompts=2)


def tensor_parallel(model: Model, on: Card, cluster: Cluster = DGX) -> list[Step]:
    """``ONE`` with the vocabulary over 1, 2, 4 ... GPUs, as in ``TP``."""
    return [step(model, ONE, Layout(tp=tp), on, cluster) for tp in TP]


def rows_to_hide(model: Model, ranks: int, tp: int, on: Card, cluster: Cluster = DGX) -> int:
    """Fewest scored rows a rank and step at which computing takes as long as FSDP's transfers."""
    V, share = -(-model.V // tp), Batch().positions / Batch().scored
    taken = sum(
        c.seconds(cluster) for c in wire.sharded_weight(ranks, V, model.H, _BF16, stride=tp)
    )

    def enough(N: int) -> bool:
        return _cost(round(N * share), N, model.H, V, 1, 1, tp > 1).seconds(on) >= taken

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
