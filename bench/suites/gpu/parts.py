"""What a round on a card measures, in order: ``PARTS``, each of them data and a function.

    python -m bench.suites.gpu.parts DEVICE RESULTS SCRATCH "PART: UNIT" ...

is the process that measures. It says a line for each row and each unit's end (``jobs`` reads them).
On a CPU it is a dry run: tiny sizes, numbers that mean nothing.

Legend: as in ``engine.case``; ``N`` scored positions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pro_kernels as pk
from bench import roofline
from bench.engine.case import Case, head_case
from bench.engine.isolate import DEVICE_LOST, ROOT, say
from bench.engine.record import Record, facts
from bench.engine.run import Run, Settings
from bench.engine.step import TrainingCase
from bench.engine.timing import Clock, Refused, Step, Timer, backward_step, describe, wait
from bench.engine.truth import make_inputs
from bench.providers.base import all_providers, ours_name, select
from bench.report.targets import PEERS
from bench.suites import filter, loss, step
from bench.suites.gpu import kernels
from bench.suites.gpu.kernels import Setting
from bench.suites.peaked import Peaked, real, zipf
from pro_kernels import backends
from pro_kernels.backends.protocol import Rows
from pro_kernels.distinct import gpu as attention
from pro_kernels.distinct.attention import tree_attention
from pro_kernels.options import LogitOptions

STATES = "PRO_KERNELS_STATES"  # names a file of ``save_states``
H, V = 4096, 128256


@dataclass(frozen=True)
class Part:
    section: int  # of the list in docs/benchmarks.md
    name: str  # as on the command line and in the results
    what: str  # it measures
    measure: Callable[..., Iterator[dict]]  # rows of one unit, which is its arguments
    sizes: tuple[tuple, ...]  # the units
    dry: tuple[tuple, ...]  # those of a dry run
    limit: float = 45.0  # seconds for each unit

    def units(self, device: torch.device | str) -> dict[str, tuple]:
        chosen = self.dry if torch.device(device).type == "cpu" else self.sizes
        names = (" ".join(str(getattr(x, "name", x)) for x in unit) for unit in chosen)
        return {f"{self.name}: {name}": unit for name, unit in zip(names, chosen, strict=True)}


def check(s: Setting, what: str) -> Iterator[dict]:
    """``pro-kernels check``."""
    path = s.scratch / "check.json"
    command = [sys.executable, "-m", "pro_kernels", what, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not path.exists():
        raise RuntimeError(done.stderr[-500:])
    found = json.loads(path.read_text())
    failed = sum(not row["passed"] for row in found)
    text = f"{len(found) - failed} of {len(found)} comparisons passed"
    yield {"case": "against fp64", "failed": failed, "found": text}


def gpu_tests(s: Setting, where: str) -> Iterator[dict]:
    """Tests marked gpu, files that were fastest before first; what did not run is counted."""
    known = _rows(s.results, "tests")
    fast = sorted((r["seconds"], r["case"]) for r in known if "seconds" in r)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, *(name for _, name in fast if (ROOT / name).is_file()), where],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    ender = threading.Timer(s.seconds, process.kill)
    ender.start()
    selected, counts, start = 0, {}, time.monotonic()
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"(\d+) selected|^collected (\d+) items?$", line):
            selected, start = int(found[1] or found[2]), time.monotonic()
        if found := re.match(r"(\S+\.py)::.* (PASSED|FAILED|ERROR|SKIPPED)", line):
            count = counts.setdefault(found[1], Counter())
            count[found[2].lower()] += 1
            count["seconds"] += time.monotonic() - start
            start = time.monotonic()
    ender.cancel()
    process.wait()
    for name, count in counts.items():
        text = ", ".join(f"{n} {what}" for what, n in count.items() if what != "seconds")
        yield {"case": name, "seconds": count["seconds"], "found": text}
    total = sum(counts.values(), Counter())
    failed = total["failed"] + total["error"]
    not_run = selected - failed - total["passed"] - total["skipped"]
    text = f"{total['passed']} of {selected} passed, {failed} failed, {not_run} did not run"
    yield {"case": "all", "failed": failed, "not_run": not_run, "found": text}


def providers(s: Setting, case: Case | TrainingCase) -> Iterator[dict]:
    """A case of ``loss`` or ``step``; in a second try without who was running when it died."""
    suite = step.SUITE if isinstance(case, TrainingCase) else loss.SUITE
    about = facts(s.device, preset="round")
    path = s.scratch / f"{re.sub(r'[^a-zA-Z0-9]+', '-', case.name)}.json"
    settings = Settings("round", repeats=1 if s.rounds == 1 else None)
    run = Run(settings, s.device, Clock(0.6 * s.seconds), Record(path, about, resume=True))
    yield from suite.measure(case, select(suite.providers(s.device), case.only), run)


def gemm(s: Setting, N: int, H: int, V: int) -> Iterator[dict]:
    """The matmuls with our residual kernel, and with QuACK's epilogue.

    That stores E = 2^(z log2 e - k), sums by tile and the target logits, so that dZ never exists.
    """
    module, options = s.module("auto"), LogitOptions()
    x, w, y = s.randn(N, H), s.randn(V, H, scale=H**-0.5), s.tokens(V, N)

    def ours() -> Tensor:
        logits = torch.mm(x, w.t())
        module.residual_(Rows(logits, y, options))
        return logits

    def three(first: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        dz = first()
        return torch.mm(dz, w), torch.mm(dz.t(), x)

    def stored() -> Tensor:
        quack = _quack()
        tile = quack._pick_tile_n1(V)
        sums, shifts = (torch.empty(N, V // tile, device=s.device) for _ in range(2))
        given = {"max_log2": tile, "sum_exp": sums, "max_log2_out": shifts, "target": y,
                 "target_logit": torch.empty(N, device=s.device)}  # fmt: skip
        out = x.new_empty(N, V)
        quack.scaled_exp_target_epi.gemm(
            x, w, out, epi_args=given, tile_M=128, tile_N=tile, cluster_M=2, cluster_N=1,
            pingpong=tile <= 208,
        )  # fmt: skip
        return out

    rows, plain = -(-N // 128) * 128, partial(torch.mm, x, w.t())
    steps = {
        "matmul": plain, "ours": ours, "QuACK": stored, "matmuls": partial(three, plain),
        "ours, three": partial(three, ours),
        "QuACK, three": lambda: _quack().scaled_exp_linear_cross_entropy_fwd(x, w, y, rows),
    }  # fmt: skip
    yield from s.rows(f"N={N} H={H} V={V}", {name: Step(run) for name, run in steps.items()})


def _quack() -> Any:
    """QuACK's module, as its release 0.6 has it; ImportError, which a row says, without it."""
    from quack import linear_cross_entropy

    return linear_cross_entropy


def scoring(s: Setting, N: int, H: int, V: int) -> Iterator[dict]:
    """Log-probs without gradients against one matmul: the device alone, and with the host."""
    x, w, y = s.randn(1, 2, N // 2, H), s.randn(V, H, scale=H**-0.5), s.tokens(V, 1, 2, N // 2)
    rewards = torch.rand(1, 2, device=s.device)
    layout = pk.Layout.from_padded(y.cpu()).to(s.device)
    given = partial(pk.linear_pro_loss, x.flatten(0, 2), w, None, rewards, layout=layout)
    steps = {
        "floor": Step(partial(torch.mm, x.view(N, H), w.t())),
        "ours": Step(lambda: pk.linear_token_logps(x, w, y)),
        "ours, loss, layout given": Step(lambda: given().loss),
        "QuACK's epilogue": Step(
            lambda: _quack()._scaled_exp_lce_loss_only(x.view(N, H), w, y.view(N), -100)
        ),
    }
    case = f"N={N} H={H} V={V}"
    yield from s.rows(f"{case}, device", steps)
    yield from s.rows(f"{case}, with the host", steps, timer=s.clock)
    for name in [*steps][1:3]:
        with torch.profiler.profile() as found:
            steps[name].run()
            wait(s.device)
        events = found.key_averages()
        took = {e.key: (e.self_device_time_total, e.self_cpu_time_total, e.count) for e in events}
        for key, (card, host, count) in sorted(took.items(), key=lambda e: -max(e[1][:2]))[:6]:
            text = f"{count} x {key[:60]}: {card:.0f} us on the device, {host:.0f} on the host"
            yield {"case": f"{case}, profile", "name": name, "found": text}


def logits_in(s: Setting, case: Case) -> Iterator[dict]:
    """The loss from logits and its gradient against a copy of as many bytes."""
    ours = all_providers(s.device)[ours_name(s.device)].build(make_inputs(case, s.device))
    steps = {"copy": roofline.copy(s.device, s.copy_bytes), "ours": ours}
    yield from s.rows(case.name, steps, copy=2 * s.copy_bytes, ours=case.bytes or 0)


def filtered(s: Setting, name: str, *sizes: int) -> Iterator[dict]:
    """``grad_filter``: on hidden states of a file that was brought along, or on a Zipf law."""
    path = os.environ.get(STATES)
    if name == "states" and not path:
        raise Refused(f"no hidden states: {STATES} names no file")
    batch = zipf(*sizes) if name == "zipf" else Peaked(**torch.load(path or ""))
    there = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {k: x.to(s.device) if isinstance(x, Tensor) else x for k, x in there.items()}
    for row in filter.measure(Peaked(**moved), filter.TAUS[-s.rounds :], s.rounds):
        yield {"case": batch.name, **row}


def save_states(path: Path, data: str = "ranked 4", model: str = "smollm2-135m-instruct") -> None:
    """Write real hidden states, head, targets and rewards, for ``filtered`` on a card."""
    batch = real(model, data, sys.maxsize, torch.bfloat16)
    torch.save({f.name: getattr(batch, f.name) for f in fields(batch)}, path)


def packed(
    s: Setting, B: int, n: int, P: int, R: int, heads: int, groups: int, d: int
) -> Iterator[dict]:
    """Attention over distinct tokens (varlen, FlexAttention) against padded rows, both passes."""
    ids = torch.randint(1000, (B, P + n * R)).tolist()
    sequences = [x[:P] + x[P + i * R : P + (i + 1) * R] for x in ids for i in range(n)]
    tree, scale = pk.TokenTree.from_sequences(sequences), d**-0.5
    segments = tree.as_mask()

    def of(attend: Callable[..., Tensor], rows: int, length: int) -> Step:
        leaves = [s.randn(rows, k, length, d, grad=True) for k in (heads, groups, groups)]

        def run() -> None:
            out = attend(*leaves)
            out.backward(torch.ones_like(out))

        return Step(run, tuple(leaves))

    sdpa = torch.nn.functional.scaled_dot_product_attention
    ways = {
        "varlen": lambda *x: attention.by_varlen(*x, segments, scale, None),
        "FlexAttention": lambda *x: attention.by_flex(*x, None, segments, scale, None, None),
        "plain": lambda *x: tree_attention(*x, None, tree.segments, scale, None, None)[0],
    }
    steps = {"padded": of(partial(sdpa, is_causal=True, enable_gqa=True), B * n, P + R)}
    steps |= {name: of(way, 1, tree.num_tokens) for name, way in ways.items()}
    case = f"B={B} n={n} P={P} R={R}, {heads} heads of {d}, {tree.num_tokens} distinct tokens"
    yield from s.rows(case, steps)


def blocks(s: Setting, N: int, H: int, V: int) -> Iterator[dict]:
    """The plain backend in blocks of several sizes, against the backend that is picked."""
    x, w, y = s.randn(1, 1, N, H, grad=True), s.randn(V, H, scale=H**-0.5), s.tokens(V, 1, 1, N)
    plain = backends.get("torch")
    chosen = {name: getattr(plain, name) for name in ("_BLOCK_BYTES", "_GPU_BLOCK_BYTES")}

    def of(backend: str, size: int = 0) -> Step:
        def total() -> Tensor:
            for name in chosen:
                setattr(plain, name, size)
            return pk.linear_token_logps(x, w, y, backend=backend).sum()

        return backward_step(total, (x,))

    steps = {"auto": of("auto")} | {f"{k} MiB": of("torch", k << 20) for k in (16, 64, 256, 1024)}
    try:
        yield from s.rows(f"N={N} H={H} V={V}", steps)
    finally:
        for name, size in chosen.items():
            setattr(plain, name, size)


def dtensor(s: Setting, N: int, H: int, V: int) -> Iterator[dict]:
    """A head that is a DTensor on a mesh of this one device against the tensor itself."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    kind = "nccl" if s.device.type == "cuda" else "gloo"
    dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(s.device.type, (1,))
        x, y = s.randn(1, 1, N, H, grad=True), s.tokens(V, 1, 1, N)
        head = s.randn(V, H, scale=H**-0.5)
        heads = {"tensor": head.clone().requires_grad_()}
        for name, place in (("DTensor, sharded", Shard(0)), ("DTensor, replicated", Replicate())):
            heads[name] = distribute_tensor(head, mesh, [place]).requires_grad_()
        steps = {
            name: backward_step(lambda w=w: pk.linear_token_logps(x, w, y).sum(), (x, w))
            for name, w in heads.items()
        }
        yield from s.rows(f"N={N} H={H} V={V}", steps)
    finally:
        dist.destroy_process_group()


def _cases(preset: str, *patterns: str, only: tuple[str, ...] = (), **more: Any) -> tuple:
    """Cases of the loss as units; ``only`` narrows who takes part."""
    found = loss.SUITE.cases(preset, patterns, on_gpu=preset != "tiny")
    return tuple((replace(case, only=only or case.only, **more),) for case in found)


WITH_PEERS = (providers, gemm, scoring)  # their results are of the peers' versions, too
_BOTH = ("floor", "ours")
_SIZES = tuple((tokens, masked) for masked in (0.0, 0.6) for tokens in (4096, 8192, 16384))
_CE = _cases("gpu", "ce H")[0][0].only
_PEERS = (
    *((head_case(H, V, m, tokens=t, kind="ce", group="ce", only=_CE),) for t, m in _SIZES),
    *_cases("gpu", "n=4 R=16384 masked", only=(*_BOTH, "official", *PEERS))[:2],
)
_STEP = ("floor", "ours-padded", "ours-lists")
_BACKENDS = ("cuda", "triton")
_TINY = {"only": _BOTH, "memory": False}

PARTS = (
    Part(1, "check", "`pro-kernels check`", check, (("check",),), (("check",),), 90),
    Part(1, "tests", "tests marked gpu", gpu_tests, (("tests",),), (("tests/test_gpu.py",),), 120),
    Part(2, "peers", "cross-entropy and PRO beside every peer", providers, _PEERS,
         _cases("tiny", "tiny ce", only=(*_BOTH, "quack", "quack-mean", "liger-sm90")), 75),
    Part(3, "gemm", "an epilogue that stores exponentials", gemm, ((6528, H, V), (16384, H, V)),
         ((8, 16, 64),)),
    Part(4, "scoring", "log-probs without gradients", scoring, ((6528, H, V), (512, H, V)),
         ((8, 16, 64),)),
    Part(5, "budgets", "the least memory (T3)", providers,
         _cases("gpu", "n=4 R=16384 masked 60%", only=(*_BOTH, "ours-T2", "ours-T3"))[:1],
         _cases("tiny", "tiny head", only=(*_BOTH, "ours-T3"), memory=False)),
    Part(5, "frozen", "a frozen head", providers, _cases("gpu", "frozen"),
         _cases("tiny", "tiny frozen", only=(*_BOTH, "ours-trained-head"))),
    Part(5, "logits", "logits in", logits_in,
         tuple((head_case(0, v, 0.6, tokens=16384, kind="logits"),) for v in (32000, V)),
         _cases("tiny", "tiny logits")),
    Part(5, "rows", "row kernels", kernels.rows, tuple((b, 4096, V) for b in _BACKENDS),
         (("torch", 8, 211),)),
    Part(5, "ranking", "the ranking kernel", kernels.ranking,
         tuple((b, *size) for b in _BACKENDS for size in (
             *((4096, 64, tokens) for tokens in (1, 16, 64)), (4096, 8, 64), (256, 8, 256))),
         (("torch", 4, 64, 3),), 20),
    Part(6, "filter", "`grad_filter`", filtered, (("states",), ("zipf", *filter.SIZES["zipf"])),
         (("states",), ("zipf", 1, 2, 32, 32, 400))),
    Part(6, "packed", "attention on distinct tokens", packed,
         ((4, 8, 512, 64, 32, 8, 128), (16, 2, 128, 128, 32, 8, 128)), ((2, 3, 12, 9, 4, 2, 16),)),
    Part(6, "step", "a training step on distinct rows", providers,
         tuple((replace(c, only=_STEP, repeats=3),)
               for c in step.SUITE.cases("gpu", ("0.5B",), on_gpu=True)),
         tuple((replace(c, only=_STEP),) for c in step.SUITE.cases("tiny")[:1]), 90),
    Part(7, "growth", "time and memory along one axis", providers, _cases("gpu", "growth"),
         _cases("tiny", "growth N", **_TINY), 20),
    Part(7, "heads", "the heads of other models", providers,
         tuple((head_case(H, V, 0.6, tokens=4096, softcap=cap,
                          only=(*_BOTH, "trl", "cce", "liger-ce")),)
               for H, V, cap in loss.MODELS.values()), _cases("tiny", "tiny softcap", **_TINY)),
    Part(7, "blocks", "the plain backend's blocks", blocks, ((6528, H, V),), ((8, 16, 64),)),
    Part(7, "dtensor", "heads that are DTensors", dtensor, ((6528, H, V),), ((8, 16, 64),)),
)  # fmt: skip


def _rows(results: Path, part: str) -> list[dict]:
    """Rows of a part that are there already."""
    found = json.loads(results.read_text())["results"] if results.exists() else []
    return [row for row in found if row["part"] == part]


def main(kind: str, results: str, scratch: str, *names: str) -> int:
    """Measure these units, each for itself; DEVICE_LOST if one left the device unusable."""
    device, dry = torch.device(kind), kind == "cpu"
    setting = Setting(
        device, Timer(device), Timer(device, lead=False), Path(results), Path(scratch),
        **({"rounds": 1, "inner": 1, "copy_bytes": 1 << 12} if dry else {}),
    )  # fmt: skip
    every = {name: (part, unit) for part in PARTS for name, unit in part.units(device).items()}

    for name in names:
        part, unit = every[name]
        status, why = "ok", ""
        try:
            for row in part.measure(replace(setting, seconds=0.9 * part.limit), *unit):
                say(part=name, row=row)
        except Refused as refused:
            status, why = "refused", str(refused)
        except Exception as error:  # a kernel that never ran may raise anything
            status, why = "failed", describe(error)
        say(part=name, status=status, note=why)
        try:
            wait(device)
            torch.cuda.empty_cache()
        except RuntimeError:  # the context is lost: the units that are left need a new process
            return DEVICE_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
