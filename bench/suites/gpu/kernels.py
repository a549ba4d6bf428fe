"""Kernels alone, each a generator of rows; what the parts of a round are measured with.

Data are random and made on the device; ``predicted`` is a kernel's bytes at the rate that a copy
has in the same rounds. Sizes are arguments, so that a dry run goes through every line on a CPU.

Legend: as in ``engine.case``; ``N`` scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import roofline
from bench.engine.timing import Refused, Step, describe, paired, summary, timed
from bench.providers.ours import ranking_call
from pro_kernels import backends
from pro_kernels.backends.protocol import Rows
from pro_kernels.options import LogitOptions


@dataclass
class Setting:
    """Where and how the parts run."""

    device: torch.device  # of all tensors
    timer: Callable[[Step], float]  # seconds of a step on the device
    clock: Callable[[Step], float]  # the same by the clock, with the host's work
    results: Path  # the results file, of this round and those before
    scratch: Path  # a folder that outlives a process that dies
    rounds: int = 11  # how often each step is timed
    inner: int = 20  # calls in one timing where a call takes microseconds
    copy_bytes: int = 2 << 30  # of the copy that kernels are held against
    seconds: float = 60.0  # that a part may take

    def module(self, backend: str, candidates: int | None = None) -> Any:
        """The backend; "auto" is the one that is picked here.

        Raises:
            Refused: it cannot serve this device, with its reason.
        """
        if backend == "auto":
            backend = backends.resolve("auto", self.device, torch.bfloat16)
        reason = backends.refusal(backend, self.device, torch.bfloat16, candidates)
        if reason is not None:
            raise Refused(reason)
        return backends.get(backend)

    def randn(self, *size: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        x = torch.randn(*size, device=self.device, dtype=torch.bfloat16)
        return x.mul_(scale).requires_grad_(grad)

    def tokens(self, V: int, *size: int) -> Tensor:
        return torch.randint(0, V, size, device=self.device)

    def rows(
        self,
        case: str,
        steps: dict[str, Step],
        inner: int = 1,
        timer: Callable[[Step], float] | None = None,
        **moved: int,
    ) -> Iterator[dict]:
        """A row each of interleaved steps, those that fail with a note.

        ``moved`` are the bytes of those that are known.
        """
        timer, ran = timer or self.timer, {}
        for name, step in steps.items():
            try:
                timer(step)
                ran[name] = step
            except Exception as error:  # a kernel that never ran may raise anything
                yield {"case": case, "name": name, "note": describe(error)}
            step.clear()
        times = timed(ran, self.rounds, timer)
        copy = times.get("copy")
        for name, taken in times.items():
            row = {"case": case, "name": name}
            row |= summary([seconds / inner for seconds in taken])
            row["over"] = {o: paired(taken, times[o]) for o in ran if o != name}
            if name in moved:
                row["bytes"], row["bytes_per_second"] = moved[name], moved[name] / row["seconds"]
            if name in moved and copy and name != "copy":
                a_byte = summary(copy)["seconds"] / (2 * self.copy_bytes)
                row["predicted"] = moved[name] * a_byte
            yield row


def rows(s: Setting, backend: str, N: int, V: int) -> Iterator[dict]:
    """The row kernels against a copy; no row is unscored."""
    module, x = s.module(backend), s.randn(N, V)
    given = Rows(x, s.tokens(V, N), LogitOptions())
    lse, weights = (torch.rand(N, device=s.device) + 10 for _ in range(2))
    out = torch.empty_like(x)

    def grad() -> Tensor:
        return module.logits_grad(given, lse, weights, out=out)

    steps = {
        "copy": roofline.copy(s.device, s.copy_bytes),
        "logp": Step(lambda: module.logp(given)),
        "logits_grad": Step(grad),
        # On its own output from the second call on: other numbers, the same bytes.
        "residual": Step(lambda: module.residual_(given)),
    }
    size = N * V * 2
    moved = {"copy": 2 * s.copy_bytes, "logp": size, "logits_grad": 2 * size}
    yield from s.rows(f"{backend}, N={N} V={V}", steps, residual=2 * size, **moved)


def ranking(s: Setting, backend: str, B: int, n: int, tokens: int) -> Iterator[dict]:
    """The ranking kernel, many calls in one graph."""
    rewards = torch.rand(B, n, device=s.device).sort(1, descending=True).values
    logps = -torch.rand(B, n, tokens, device=s.device)
    call = ranking_call(s.module(backend, n), logps, rewards)
    case = f"{backend}, n={n}, {B} prompts, {tokens} tokens a candidate"
    yield from s.rows(case, {"ours": Step(_repeated(s, call))}, s.inner)


def _repeated(s: Setting, call: Callable[[], Any]) -> Callable[[], None]:
    """Many calls; on a GPU as one graph."""

    def run() -> None:
        for _ in range(s.inner):
            call()

    if s.device.type != "cuda":
        return run
    run()  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
