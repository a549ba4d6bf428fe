"""``python -m bench filter``: time and error of ``grad_filter`` on peaked distributions.

For each batch and tau, interleaved rounds of: the floor (the three dense head matmuls on the scored
rows, operands in fp32 where that is the faster route), the loss without a filter, the loss with it.
Errors are relative, of the gradients with a filter against those without; "certified" is the bound
of ``GradFilter.error_bounds`` over the norm that the true gradient has at least.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pro_kernels as pk
from bench.engine.record import facts
from bench.engine.rounds import timed
from bench.engine.run import collect
from bench.engine.timing import Step, Timer, paired
from bench.suites.peaked import Peaked, trained, zipf
from pro_kernels.fused import matmul

TAUS = tuple(2.0**-k for k in range(4, 13))
ERROR = 2.0**-8  # certified error that the table picks the fastest run for
SIZES = {"zipf": (4, 4, 128, 1024, 32000), "trained": (4, 4, 128, 1024, 32000)}
FOLDER = Path(__file__).resolve().parents[1] / "results" / "filter"
ROUNDS = 5
_STEPS = 60


def run(path: Path, rounds: int = ROUNDS, log: Callable[[str], None] = print) -> dict:
    """Measure both batches into the JSON file ``path``; returns its content."""
    made = (lambda: zipf(*SIZES["zipf"]), lambda: trained(*SIZES["trained"], steps=_STEPS))
    parts = [lambda make=make: measure(make(), TAUS, rounds) for make in made]
    return collect("filter", parts, path, _line, log, **facts(torch.device("cpu"), rounds=rounds))


def measure(batch: Peaked, taus: tuple[float, ...], rounds: int) -> list[dict]:
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
        bounds, mass = [0.0, 0.0], 0.0
        if out.grad_filter is not None:
            bounds = [b.item() for b in out.grad_filter.error_bounds(batch.hidden)]
            mass = out.grad_filter.dropped_mass.max().item()
        errors = [
            (g.double() - e).norm().item() / x for g, e, x in zip(grads, exact, norms, strict=True)
        ]
        rows.append(
            {
                "batch": batch.name,
                "top1": batch.top1,
                "scored": int((batch.targets != -100).sum()),
                "H": batch.weight.shape[1],
                "V": batch.weight.shape[0],
                "tau": tau,
                "largest_dropped_mass": mass,
                "columns_with_gradient": (grads[1] != 0).any(1).double().mean().item(),
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
    for name in dict.fromkeys(row["batch"] for row in rows):
        fit = [r for r in rows if r["batch"] == name and r["tau"] and certified(r) <= ERROR]
        found += sorted(fit, key=lambda r: r["of_floor"])[:1]
    return found


def _loss(batch: Peaked, tau: float | None) -> tuple[pk.PROOutput, list[Tensor]]:
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
    tau = "none" if row["tau"] is None else f"{row['tau']:.2g}"
    return f"{row['batch']:8} tau {tau:7} {row['of_floor']:.2f} of the dense floor"
