"""How the parts measure: sizes, data made on the device, interleaved rounds.

Random data, medians over interleaved rounds: in every round each contender runs once, in random
order, and ratios are of times taken in the same round. Sizes are data, so that the tests run every
part on a CPU. Legend: as in ``bench.cases``; ``R`` positions, ``N`` scored ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import pro_kernels as pk
from bench.step import Refused, Step, backward_step
from bench.timing import Timer, paired, quartiles
from pro_kernels import backends


@dataclass(frozen=True)
class Sizes:
    """Shapes and rounds. ``linear`` and ``small`` are (B, n, T, H, V)."""

    linear: tuple[int, int, int, int, int]
    small: tuple[int, int, int, int, int]
    accuracy: tuple[int, int, int, int, int]
    masked: float
    rows: tuple[int, int]  # N, V of the row kernels alone
    ranking: tuple[tuple[int, int, int], ...]  # B, n, tokens of a candidate
    score: tuple[tuple[int, int, int], ...]  # N, H, V
    copy_bytes: int
    rounds: int
    inner: int  # calls in one timing where a call takes microseconds


CARD = Sizes(
    linear=(32, 4, 128, 4096, 128256),
    small=(2, 4, 64, 1024, 32000),
    accuracy=(4, 4, 32, 1024, 128256),
    masked=0.6,
    rows=(4096, 128256),
    ranking=(
        *((4096, 64, tokens) for tokens in (1, 16, 64)),
        *((4096, 8, 64), (256, 8, 256), (32, 4, 512), (4096, 2, 64)),
    ),
    score=tuple((N, H, V) for V in (32000, 128256) for H in (1024, 4096) for N in (512, 4096)),
    copy_bytes=2 << 30,
    rounds=11,
    inner=20,
)


@dataclass
class Setting:
    """Where and how the parts run; ``timer`` takes a Step and gives seconds."""

    device: torch.device
    backend: str
    sizes: Sizes
    timer: Callable[[Step], float] | None = None
    order: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.timer = self.timer or Timer(self.device)

    def module(self):  # noqa: ANN201
        """The backend.

        Raises:
            Refused: it cannot serve this device, with its reason.
        """
        reason = backends.refusal(self.backend, self.device, torch.bfloat16)
        if reason is not None:
            raise Refused(reason)
        return backends.get(self.backend)

    def wall(self, step: Step) -> float:
        """Seconds until the device is idle again, host work included."""
        start = time.perf_counter()
        step.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


class Batch:
    """A padded bf16 batch of hidden states, made on the device, with its layout."""

    def __init__(self, s: Setting, sizes: tuple[int, int, int, int, int]) -> None:
        """Make (B, n, T, H, V) of random data."""
        B, n, T, self.H, self.V = sizes
        self.backend = s.backend
        self.targets, self.rewards = make_targets(s, B, n, T, self.V), make_rewards(s, B, n)
        self.layout = pk.Layout.from_padded(self.targets.cpu()).to(s.device)
        self.hidden = randn(s, B * n * T, self.H).requires_grad_()
        self.weight = randn(s, self.V, self.H, scale=self.H**-0.5).requires_grad_()
        self.N = self.layout.num_tokens
        self.shape = {"R": B * n * T, "N": self.N, "H": self.H, "V": self.V, "B": B, "n": n}

    def matmuls(self) -> dict[str, Step]:
        """The three head matmuls on the scored rows, each for itself."""
        x, w = self.hidden.detach()[self.layout.rows], self.weight.detach()
        dz = torch.mm(x, w.t())
        return {
            "X W^T": Step(lambda: torch.mm(x, w.t())),
            "dZ W": Step(lambda: torch.mm(dz, w)),
            "dZ^T X": Step(lambda: torch.mm(dz.t(), x)),
        }

    def floor(self, count: int) -> Step:
        """The first ``count`` of them as one step."""
        steps = list(self.matmuls().values())[:count]
        return Step(lambda: [step.run() for step in steps])

    def ours(self, train_head: bool) -> Step:
        """Forward and backward of the loss."""
        weight = self.weight if train_head else self.weight.detach()

        def loss() -> Tensor:
            return pk.linear_pro_loss(
                self.hidden, weight, None, self.rewards, layout=self.layout, backend=self.backend
            ).loss

        return backward_step(loss, (self.hidden, weight) if train_head else (self.hidden,))


def measure(
    s: Setting,
    part: str,
    case: str,
    steps: dict[str, Step],
    clock: Callable[[Step], float] | None = None,
    inner: int = 1,
    **extra,
) -> Iterator[dict]:
    """Interleave the steps; a row each, with its ratio to every other one."""
    clock = clock or s.timer
    for step in steps.values():
        for _ in range(2):
            clock(step)
            step.clear()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(s.sizes.rounds):
        for name in s.order.sample(sorted(steps), len(steps)):
            times[name].append(clock(steps[name]) / inner)
            steps[name].clear()
    moved = extra.pop("bytes", None)
    for name, taken in times.items():
        low, middle, high = quartiles(taken)
        row = {"part": part, "case": case, "backend": s.backend, "name": name, "seconds": middle,
               "q1": low, "q3": high, "rounds": len(taken), **extra}  # fmt: skip
        row["over"] = {other: paired(taken, times[other]) for other in steps if other != name}
        amount = moved.get(name) if isinstance(moved, dict) else moved
        if amount is not None:
            row["bytes"], row["bytes_per_second"] = amount, amount / middle
        if "flops" in extra:
            row["flops_per_second"] = extra["flops"] / middle
        yield row


def copy_step(s: Setting) -> Step:
    source = torch.randn(s.sizes.copy_bytes // 4, device=s.device)
    out = torch.empty_like(source)
    return Step(lambda: out.copy_(source))


def repeat(step: Step, times: int) -> None:
    for _ in range(times):
        step.run()
        step.clear()


def captured(s: Setting, run: Callable[[], None]) -> Callable[[], None]:
    """On a GPU ``run`` as one graph; elsewhere itself."""
    if s.device.type != "cuda":
        return run
    run()  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step.run()
    torch.cuda.synchronize()
    step.clear()
    return torch.cuda.max_memory_allocated() - held


def randn(
    s: Setting, *size: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    return torch.randn(*size, device=s.device, dtype=dtype).mul_(scale)


def make_targets(s: Setting, B: int, n: int, T: int, V: int) -> Tensor:
    """(B, n, T): a prompt, then the scored tokens."""
    targets = torch.randint(0, V, (B, n, T), device=s.device)
    targets[..., : round(s.sizes.masked * T)] = -100
    return targets


def make_rewards(s: Setting, B: int, n: int) -> Tensor:
    return torch.rand(B, n, device=s.device).sort(1, descending=True).values
