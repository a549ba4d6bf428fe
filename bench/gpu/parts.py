"""What is measured on a card: each part is a generator of rows, for one backend.

A new part is a function here and its name in ``BACKEND_PARTS``. ``part``, ``name`` and ``shape`` of
a row say which prediction of ``bench.model`` is its own (``tables.predicted``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import pro_kernels as pk
from bench.gpu.measure import (
    Batch,
    Setting,
    captured,
    copy_step,
    make_rewards,
    make_targets,
    measure,
    peak,
    randn,
    repeat,
)
from bench.losses import plain_loss
from bench.step import Refused, Step, backward_step
from pro_kernels import backends
from pro_kernels.options import LogitOptions, RankingOptions

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def floors(s: Setting) -> Iterator[dict]:
    """Copy bandwidth, rate of the three head matmuls, cost of a launch."""
    copy = {"copy": copy_step(s)}
    yield from measure(s, "floors", "copy", copy, bytes=2 * s.sizes.copy_bytes)
    batch = Batch(s, s.sizes.linear)
    flops = 2.0 * batch.N * batch.H * batch.V
    yield from measure(s, "floors", "matmul", batch.matmuls(), flops=flops)
    one = torch.zeros(1, device=s.device)

    def launches() -> None:
        for _ in range(s.sizes.inner):
            one.zero_()

    yield from measure(s, "floors", "launch", {"launch": Step(launches)}, inner=s.sizes.inner)


def linear(s: Setting) -> Iterator[dict]:
    """``linear_pro_loss`` forward + backward against the three matmuls on the scored rows."""
    s.module()
    batch = Batch(s, s.sizes.linear)
    steps = {"floor": batch.floor(3), "ours": batch.ours(True)}
    for row in measure(s, "linear", "trained", steps, shape=batch.shape):
        if row["name"] == "ours" and s.device.type == "cuda":
            row["peak_bytes"] = peak(steps["ours"])
        yield row


def frozen(s: Setting) -> Iterator[dict]:
    """The same with the head frozen, against its two matmuls and against the full time."""
    s.module()
    batch = Batch(s, s.sizes.linear)
    steps = {"full": batch.ours(True), "floor": batch.floor(2), "ours": batch.ours(False)}
    yield from measure(s, "linear", "frozen", steps, shape=batch.shape)


def score(s: Setting) -> Iterator[dict]:
    """One matmul; then it and the row kernel; then both in one kernel where the backend has it."""
    module, options = s.module(), LogitOptions()
    for N, H, V in s.sizes.score:
        x, w = randn(s, N, H), randn(s, V, H, scale=H**-0.5)
        targets = torch.randint(0, V, (N,), device=s.device)
        exact = (x.float() * w[targets].float()).sum(1)

        def both(x=x, w=w, targets=targets, exact=exact):  # noqa: ANN001, ANN202
            logits = torch.mm(x, w.t())
            return module.logp(logits, targets, target_logits=exact, options=options)

        steps = {"floor": Step(partial(torch.mm, x, w.t())), "ours": Step(both)}
        if module.score is not None:
            fused = partial(module.score, x, w, None, targets)
            steps["fused"] = Step(partial(fused, target_logits=exact, options=options))
        shape = {"N": N, "H": H, "V": V}
        yield from measure(s, "score", f"N={N} H={H} V={V}", steps, shape=shape)


def logits(s: Setting) -> Iterator[dict]:
    """``pro_loss`` forward + backward against a copy, by the bytes the maths needs."""
    s.module()
    B, n, T, _, V = s.sizes.linear
    targets, rewards = make_targets(s, B, n, T, V), make_rewards(s, B, n)
    x = randn(s, B, n, T, V).requires_grad_()

    def loss() -> Tensor:
        return pk.pro_loss(x, targets, rewards, backend=s.backend).loss

    N = int((targets >= 0).sum())
    moved = {"ours": (2 * N + B * n * T) * V * 2, "copy": 2 * s.sizes.copy_bytes}
    steps = {"copy": copy_step(s), "ours": backward_step(loss, (x,))}
    shape = {"R": B * n * T, "N": N, "V": V, "B": B, "n": n}
    yield from measure(s, "logits", "logits in", steps, bytes=moved, shape=shape)


def rows(s: Setting) -> Iterator[dict]:
    """The row kernels alone against a copy; no row is unscored."""
    yield from _row_kernels(s, {})


def ranking(s: Setting) -> Iterator[dict]:
    """The ranking kernel alone, warm: some calls in one graph, so that no host is waited for."""
    s.module()
    for sizes in s.sizes.ranking:
        yield from _ranking_kernel(s, sizes, {})


def small(s: Setting) -> Iterator[dict]:
    """Two prompts: launches and host work, by the wall clock, against plain PyTorch."""
    s.module()
    batch = Batch(s, s.sizes.small)
    leaves = (batch.hidden, batch.weight)

    def plain() -> Tensor:
        product = (batch.hidden @ batch.weight.t()).view(*batch.targets.shape, batch.V)
        return plain_loss(product, batch.targets, batch.rewards)

    once = {"plain": backward_step(plain, leaves), "ours": batch.ours(True)}
    steps = {name: Step(partial(repeat, step, s.sizes.inner)) for name, step in once.items()}
    yield from measure(s, "small", "two prompts", steps, clock=s.wall, inner=s.sizes.inner)


def accuracy(s: Setting) -> Iterator[dict]:
    """Errors against fp64 beside those of plain PyTorch in the same dtype."""
    s.module()
    B, n, T, H, V = s.sizes.accuracy
    targets, rewards = make_targets(s, B, n, T, V), make_rewards(s, B, n)
    for dtype in _DTYPES:
        x = randn(s, B, n, T, H, dtype=dtype)
        w = randn(s, V, H, scale=H**-0.5, dtype=dtype)
        ours = partial(pk.linear_pro_loss, backend=s.backend)
        plain = pk.reference.linear_pro_loss
        exact = _results(plain, x.double(), w.double(), targets, rewards)
        got = _results(ours, x, w, targets, rewards)
        eager = _results(plain, x, w, targets, rewards)
        names = ("log-probs", "loss", "gradient of hidden", "gradient of weight")
        for name, a, b, truth in zip(names, got, eager, exact, strict=True):
            yield {
                "part": "accuracy",
                "case": f"{str(dtype).removeprefix('torch.')}, {name}",
                "backend": s.backend,
                "name": "ours",
                "error": _error(a, truth),
                "plain_error": _error(b, truth),
            }


# Of the ranking kernel: (block_n, block_k, warps, block_t).
RANKING_CONFIGS = (
    *((16, 16, 1, 16), (16, 16, 2, 16), (16, 16, 2, 32), (16, 16, 4, 32), (16, 16, 4, 64)),
    *((16, 8, 1, 16), (16, 8, 1, 32), (16, 8, 2, 64), (16, 4, 1, 16)),
    *((64, 4, 4, 8), (64, 8, 2, 8), (64, 8, 4, 8), (64, 8, 4, 16), (64, 16, 4, 8)),
    *((64, 16, 4, 32), (64, 16, 8, 16), (64, 16, 8, 32), (64, 32, 8, 16)),
)


def tuning(s: Setting) -> Iterator[dict]:
    """Triton's row and ranking kernels under every configuration worth trying."""
    if s.backend != "triton":
        raise Refused("only Triton's configurations are data")
    s.module()
    from pro_kernels.backends.triton import configs

    rows, lists = configs.row_config, configs.ranking_config
    try:
        for warps in (4, 8, 16, 32):
            for vectors in (1, 2, 4):
                row = configs.RowConfig(None, warps, vectors)
                configs.row_config = lambda *_, c=row, **__: c
                name = {"config": f"warps={warps} vectors={vectors}"}
                yield from _tried(name, lambda name=name: _row_kernels(s, name))
        for sizes in s.sizes.ranking:
            for config in RANKING_CONFIGS:
                if config[0] == lists(sizes[1]).block_n:
                    configs.ranking_config = lambda _, c=config: configs.RankingConfig(*c)
                    name = {"config": f"{_ranking_case(*sizes)}: {config}"}
                    yield from _tried(
                        name, lambda name=name, sizes=sizes: _ranking_kernel(s, sizes, name)
                    )
    finally:
        configs.row_config, configs.ranking_config = rows, lists


def _tried(name: dict, kernels: Callable[[], Iterator[dict]]) -> Iterator[dict]:
    try:
        yield from kernels()
    except Exception as error:  # a configuration that needs too many registers, say
        yield {"part": "tuning", "case": name["config"], "note": str(error)[:200]}


BACKEND_PARTS: dict[str, Callable[[Setting], Iterator[dict]]] = {
    "accuracy": accuracy,
    "linear": linear,
    "logits": logits,
    "frozen": frozen,
    "ranking": ranking,
    "score": score,
    "small": small,
    "rows": rows,
}
PARTS = {"floors": floors, "tuning": tuning, **BACKEND_PARTS}


def _row_kernels(s: Setting, extra: dict) -> Iterator[dict]:
    module, (N, V), options = s.module(), s.sizes.rows, LogitOptions()
    x = randn(s, N, V)
    targets = torch.randint(0, V, (N,), device=s.device)
    lse, weights = (torch.rand(N, device=s.device) + 10 for _ in range(2))
    out = torch.empty_like(x)

    def grad() -> Tensor:
        return module.logits_grad(x, lse, targets, weights, options=options, out=out)

    steps = {
        "copy": copy_step(s),
        "logp": Step(lambda: module.logp(x, targets, options=options)),
        "logits_grad": Step(grad),
        # On its own output from the second call on: other numbers, the same bytes.
        "residual": Step(lambda: module.residual_(x, targets, options=options)),
    }
    size = N * V * 2
    moved = {"copy": 2 * s.sizes.copy_bytes, "logp": size, "logits_grad": 2 * size,
             "residual": 2 * size}  # fmt: skip
    case = extra.get("config", f"N={N} V={V}")
    part = "tuning" if extra else "rows"
    yield from measure(s, part, case, steps, bytes=moved, shape={"N": N, "V": V}, **extra)


def _ranking_kernel(s: Setting, sizes: tuple[int, int, int], extra: dict) -> Iterator[dict]:
    module, (B, n, tokens) = s.module(), sizes
    reason = backends.refusal(s.backend, s.device, torch.bfloat16, n)
    if reason is not None:
        raise Refused(reason)
    arguments = (
        -torch.rand(B * n * tokens, device=s.device),
        torch.arange(B * n + 1, device=s.device) * tokens,
        torch.full((B * n,), tokens, device=s.device),
        torch.arange(B * n, device=s.device).view(B, n),
        torch.rand(B, n, device=s.device).sort(1, descending=True).values,
        torch.zeros(B, dtype=torch.int64, device=s.device),
        torch.full((B,), 1 / B, device=s.device),
    )

    def run() -> None:
        for _ in range(s.sizes.inner):
            module.ranking(*arguments, options=RankingOptions())

    graph = captured(s, run)  # it reads the arguments, which live as long as this frame
    part = "tuning" if extra else "ranking"
    case = extra.get("config", _ranking_case(*sizes))
    shape = {"B": B, "n": n, "tokens": tokens}
    yield from measure(
        s, part, case, {"ours": Step(graph)}, inner=s.sizes.inner, shape=shape, **extra
    )


def _ranking_case(B: int, n: int, tokens: int) -> str:
    return f"n={n}, {B} prompts, {tokens} tokens a candidate"


def _results(function, x, w, targets, rewards) -> list[Tensor]:  # noqa: ANN001
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    out = function(*leaves, targets, rewards)
    return [out.logps, out.loss.detach().reshape(1), *torch.autograd.grad(out.loss, leaves)]


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
