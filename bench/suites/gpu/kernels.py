"""Kernels alone: ``python -m bench.suites.gpu.kernels BACKEND PART ...``, one backend's process.

A part is a generator of rows and its name in ``PARTS``. Data are random and made on the device;
``predicted`` is a kernel's bytes at the rate that a copy has in the same rounds. Sizes are data, so
that the tests run every part on a CPU.

Legend: as in ``engine.case``; ``N`` scored positions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.engine.isolate import DEVICE_LOST, MARK
from bench.engine.rounds import timed
from bench.engine.timing import Refused, Step, Timer, describe, paired, summary, wait
from pro_kernels import backends
from pro_kernels.options import LogitOptions, RankingOptions

# Of Triton's ranking kernel: (block_n, block_k, warps, block_t).
RANKING_CONFIGS = (
    *((16, 16, 1, 16), (16, 16, 2, 16), (16, 16, 2, 32), (16, 16, 4, 32), (16, 16, 4, 64)),
    *((16, 8, 1, 16), (16, 8, 1, 32), (16, 8, 2, 64), (16, 4, 1, 16)),
    *((64, 4, 4, 8), (64, 8, 2, 8), (64, 8, 4, 8), (64, 8, 4, 16), (64, 16, 4, 8)),
    *((64, 16, 4, 32), (64, 16, 8, 16), (64, 16, 8, 32), (64, 32, 8, 16)),
)


@dataclass(frozen=True)
class Sizes:
    """Shapes and rounds."""

    rows: tuple[int, int] = (4096, 128256)  # N, V of the row kernels
    ranking: tuple[tuple[int, int, int], ...] = (  # B, n, tokens of a candidate
        *((4096, 64, tokens) for tokens in (1, 16, 64)),
        *((4096, 8, 64), (256, 8, 256), (32, 4, 512), (4096, 2, 64)),
    )
    score: tuple[tuple[int, int, int], ...] = tuple(  # N, H, V
        (N, H, V) for V in (32000, 128256) for H in (1024, 4096) for N in (512, 4096)
    )
    copy_bytes: int = 2 << 30
    rounds: int = 11
    inner: int = 20  # calls in one timing where a call takes microseconds


@dataclass
class Setting:
    """Where and how the parts run."""

    device: torch.device
    backend: str
    sizes: Sizes
    timer: Callable[[Step], float]

    def module(self) -> Any:
        """The backend.

        Raises:
            Refused: it cannot serve this device, with its reason.
        """
        reason = backends.refusal(self.backend, self.device, torch.bfloat16)
        if reason is not None:
            raise Refused(reason)
        return backends.get(self.backend)

    def randn(self, *size: int) -> Tensor:
        """Random bf16 numbers."""
        return torch.randn(*size, device=self.device, dtype=torch.bfloat16)

    def rows(
        self, part: str, case: str, steps: dict[str, Step], inner: int = 1, **moved: int
    ) -> Iterator[dict]:
        """A row each of interleaved steps; ``moved`` are the bytes of those that are known."""
        times = timed(steps, self.sizes.rounds, self.timer, warm=2)
        copy = times.get("copy")
        for name, taken in times.items():
            row = {"part": part, "case": case, "backend": self.backend, "name": name}
            row |= summary([seconds / inner for seconds in taken])
            row["over"] = {o: paired(taken, times[o]) for o in steps if o != name}
            if name in moved:
                row["bytes"], row["bytes_per_second"] = moved[name], moved[name] / row["seconds"]
            if name in moved and copy and name != "copy":
                a_byte = summary(copy)["seconds"] / moved["copy"]
                row["predicted"] = moved[name] * a_byte
            yield row


def rows(s: Setting, part: str = "rows", case: str = "") -> Iterator[dict]:
    """The row kernels against a copy; no row is unscored."""
    module, (N, V), options = s.module(), s.sizes.rows, LogitOptions()
    x = s.randn(N, V)
    targets = torch.randint(0, V, (N,), device=s.device)
    lse, weights = (torch.rand(N, device=s.device) + 10 for _ in range(2))
    out = torch.empty_like(x)
    source = torch.randn(s.sizes.copy_bytes // 4, device=s.device)
    target = torch.empty_like(source)

    def grad() -> Tensor:
        return module.logits_grad(x, lse, targets, weights, options=options, out=out)

    steps = {
        "copy": Step(lambda: target.copy_(source)),
        "logp": Step(lambda: module.logp(x, targets, options=options)),
        "logits_grad": Step(grad),
        # On its own output from the second call on: other numbers, the same bytes.
        "residual": Step(lambda: module.residual_(x, targets, options=options)),
    }
    size = N * V * 2
    moved = {"copy": 2 * s.sizes.copy_bytes, "logp": size, "logits_grad": 2 * size}
    yield from s.rows(part, case or f"N={N} V={V}", steps, residual=2 * size, **moved)


def ranking(s: Setting, part: str = "ranking", config: tuple = ()) -> Iterator[dict]:
    """The ranking kernel, many calls in one graph."""
    for B, n, tokens in s.sizes.ranking:
        module, reason = s.module(), backends.refusal(s.backend, s.device, torch.bfloat16, n)
        if reason is not None:
            raise Refused(reason)
        if config and _block(n) != config[0]:
            continue
        arguments = (
            -torch.rand(B * n * tokens, device=s.device),
            torch.arange(B * n + 1, device=s.device) * tokens,
            torch.full((B * n,), tokens, device=s.device),
            torch.arange(B * n, device=s.device).view(B, n),
            torch.rand(B, n, device=s.device).sort(1, descending=True).values,
            torch.zeros(B, dtype=torch.int64, device=s.device),
            torch.full((B,), 1 / B, device=s.device),
        )
        call = partial(module.ranking, *arguments, options=RankingOptions())
        case = f"n={n}, {B} prompts, {tokens} tokens a candidate"
        steps = {"ours": Step(_repeated(s, call))}
        yield from s.rows(part, f"{case}: {config}" if config else case, steps, s.sizes.inner)


def score(s: Setting) -> Iterator[dict]:
    """One matmul; then it and the row kernel; then both in one kernel where the backend has it."""
    module, options = s.module(), LogitOptions()
    for N, H, V in s.sizes.score:
        x, w = s.randn(N, H), s.randn(V, H).mul_(H**-0.5)
        targets = torch.randint(0, V, (N,), device=s.device)
        exact = (x.float() * w[targets].float()).sum(1)

        def both(x=x, w=w, targets=targets, exact=exact):  # noqa: ANN001, ANN202
            logits = torch.mm(x, w.t())
            return module.logp(logits, targets, target_logits=exact, options=options)

        steps = {"floor": Step(partial(torch.mm, x, w.t())), "ours": Step(both)}
        if module.score is not None:
            fused = partial(module.score, x, w, None, targets)
            steps["fused"] = Step(partial(fused, target_logits=exact, options=options))
        yield from s.rows("score", f"N={N} H={H} V={V}", steps)


def tuning(s: Setting) -> Iterator[dict]:
    """Triton's row and ranking kernels under every configuration worth trying."""
    if s.backend != "triton":
        raise Refused("only Triton's configurations are data")
    s.module()
    from pro_kernels.backends.triton import configs

    chosen = configs.row_config, configs.ranking_config
    try:
        for warps in (4, 8, 16, 32):
            for vectors in (1, 2, 4):
                row = configs.RowConfig(None, warps, vectors)
                configs.row_config = lambda *_, c=row, **__: c
                yield from _tried(rows, s, f"warps={warps} vectors={vectors}")
        for config in RANKING_CONFIGS:
            configs.ranking_config = lambda _, c=config: configs.RankingConfig(*c)
            yield from _tried(ranking, s, config)
    finally:
        configs.row_config, configs.ranking_config = chosen


PARTS = {"rows": rows, "ranking": ranking, "score": score, "tuning": tuning}


def _tried(part: Callable, s: Setting, config: Any) -> Iterator[dict]:
    try:
        yield from part(s, "tuning", config)
    except Exception as error:  # a configuration that needs too many registers, say
        yield {"part": "tuning", "case": str(config), "note": describe(error)}


def _block(n: int) -> int:
    """Candidates that a configuration of the ranking kernel is for, a power of two from 16."""
    return max(16, 1 << (n - 1).bit_length())


def _repeated(s: Setting, call: Callable[[], Any]) -> Callable[[], None]:
    """Many calls; on a GPU as one graph."""

    def run() -> None:
        for _ in range(s.sizes.inner):
            call()

    if s.device.type != "cuda":
        return run
    run()  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def run(setting: Setting, names: list[str], say: Callable[[dict], None]) -> int:
    """Run the parts, each for itself, saying every row and how each part ended."""
    for name in names:
        status, why = "ok", ""
        try:
            for row in PARTS[name](setting):
                say({"part": name, "row": row})
        except Refused as refused:
            status, why = "refused", str(refused)
        except Exception as error:  # a kernel that never ran may raise anything
            status, why = "failed", describe(error)
        say({"part": name, "status": status, "note": why})
        try:
            wait(setting.device)
            torch.cuda.empty_cache()
        except RuntimeError:  # the context is lost: the parts that are left need a new process
            return DEVICE_LOST
    return 0


def main(backend: str, *names: str) -> int:
    """Run the parts on the GPU; DEVICE_LOST if one left it unusable."""
    device = torch.device("cuda")
    setting = Setting(device, backend, Sizes(), Timer(device))
    return run(setting, list(names), lambda said: print(MARK + json.dumps(said), flush=True))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
