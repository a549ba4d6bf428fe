"""``python -m bench filter``: time and error of ``grad_filter`` on real and peaked distributions.

For each batch and tau, interleaved rounds of: the floor (the three dense head matmuls on the scored
rows, operands in fp32 where that is the faster route), the loss without a filter, the loss with it.
Errors are relative, of the gradients with a filter against those without; "certified" is the bound
of ``GradFilter.error_bounds`` over the norm that the true gradient has at least.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import pro_kernels as pk
from bench.engine.record import facts
from bench.engine.run import collect
from bench.engine.timing import Step, Timer, paired, timed
from bench.suites.peaked import Peaked, real, trained, zipf
from pro_kernels.fused import matmul

TAUS = (2.0**-6, 0.0024, 0.0018, 0.0015, "auto")
ROWS = 1024  # scored rows of real lists, at least
REAL = (("smollm2-135m-instruct", "ranked 4"), ("gemma3-270m", "ranked, Gemma 3"))
ERROR = 2.0**-8  # certified error that the table picks the fastest run for
SIZES = {"zipf": (4, 4, 128, 1024, 32000), "trained": (4, 4, 128, 1024, 32000)}
ROUNDS = 3
_STEPS = 60


def run(path: Path, rounds: int = ROUNDS) -> dict:
    """Measure all batches into the JSON file ``path``; returns its content."""
    made = [partial(real, *which, ROWS, dtype) for which in REAL for dtype in _dtypes()]
    made += [partial(zipf, *SIZES["zipf"]), partial(trained, *SIZES["trained"], steps=_STEPS)]
    parts = [lambda make=make: measure(make(), TAUS, rounds) for make in made]
    return collect("filter", parts, path, _line, **facts(torch.device("cpu"), rounds=rounds))


def _dtypes() -> list[torch.dtype]:
    """Those that the machine multiplies without help."""
    emulated = matmul.upcasts(torch.bfloat16, "cpu")
    return [torch.float32] if emulated else [torch.float32, torch.bfloat16]


def measure(batch: Peaked, taus: tuple[float | str, ...], rounds: int) -> list[dict]:
    """One row a tau, the first without a filter."""
    floor, timer = Step(_floor(batch)), Timer(batch.hidden.device)
    exact = [g.double() for g in _loss(batch, None)[1]]
    norms = [e.norm().item() for e in exact]
    rows = []
    for tau in (None, *taus):
        out, grads = _loss(batch, tau)
        steps = {
            "floor": floor,
            "plain": Step(lambda: _loss(batch, None)),
            "ours": Step(lambda tau=tau: _loss(batch, tau)),
        }
        times = timed(steps, rounds, timer, warm=0)
        bounds, mass, kept = [0.0, 0.0], 0.0, 1.0
        if out.grad_filter is not None:
            bounds = [b.item() for b in out.grad_filter.error_bounds()]
            mass = out.grad_filter.dropped_mass.mean().item()
            kept = out.grad_filter.kept.mean().item()
        errors = [
            (g.double() - e).norm().item() / x for g, e, x in zip(grads, exact, norms, strict=True)
        ]
        rows.append(
            {
                "batch": batch.name,
                "dtype": str(batch.hidden.dtype).removeprefix("torch."),
                "top1": batch.top1,
                "scored": int((batch.targets != -100).sum()),
                "H": batch.weight.shape[1],
                "V": batch.weight.shape[0],
                "tau": tau,
                "mean_dropped_mass": mass,
                "columns_kept": kept,
                "seconds": statistics.median(times["ours"]),
                "of_floor": paired(times["ours"], times["floor"]),
                "of_plain": paired(times["ours"], times["plain"]),
                "certified_hidden": bounds[0] / norms[0],
                "certified_weight": bounds[1] / norms[1],
                "error_hidden": errors[0],
                "error_weight": errors[1],
            }
        )
    return rows


def best(rows: list[dict]) -> list[dict]:
    """The fastest row of each batch whose certified errors are at most ``ERROR``."""
    found = []
    for which in dict.fromkeys((row["batch"], row["dtype"]) for row in rows):
        own = (r for r in rows if (r["batch"], r["dtype"]) == which)
        fit = [r for r in own if r["tau"] and certified(r) <= ERROR]
        found += sorted(fit, key=lambda r: r["of_floor"])[:1]
    return found


def _loss(batch: Peaked, tau: float | str | None) -> tuple[pk.PROOutput, list[Tensor]]:
    hidden, weight = (x.detach().requires_grad_() for x in (batch.hidden, batch.weight))
    out = pk.linear_pro_loss(hidden, weight, batch.targets, batch.rewards, grad_filter=tau)
    return out, list(torch.autograd.grad(out.loss, [hidden, weight]))


def _floor(batch: Peaked) -> Callable[[], object]:
    x = batch.hidden.reshape(-1, batch.hidden.shape[-1])[batch.targets.reshape(-1) >= 0]
    weight, x_side = batch.weight, x
    if matmul.upcasts(x.dtype, x.device.type):
        x_side = x.float()
    logits, d_weight = x.new_empty(len(x), len(weight)), torch.empty_like(weight)

    def matmuls() -> None:
        matmul.logits_into(logits, x, weight, None)
        matmul.hidden_grad(logits, weight)
        matmul.weight_grad(logits, x_side, d_weight, accumulate=False)

    return matmuls


def certified(row: dict) -> float:
    """Bound over the least norm that the true gradient can have: ``b / (1 - b)``."""
    bounds = (row["certified_hidden"], row["certified_weight"])
    return max(b / (1 - b) if b < 1 else float("inf") for b in bounds)


def _line(row: dict) -> str:
    return f"{row['batch']:8} tau {shown(row):7} {row['of_floor']:.2f} of the dense floor"


def shown(row: dict) -> str:
    tau = row["tau"] or "none"
    return tau if isinstance(tau, str) else f"{tau:.2g}"
