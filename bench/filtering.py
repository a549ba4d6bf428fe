"""``python -m bench --filter``: time and error of ``grad_filter`` on peaked distributions.

For each batch and tau, interleaved rounds of: the floor (the three dense head matmuls on the scored
rows, operands in fp32 where that is the faster route), the loss without a filter, the loss with it.
Errors are relative, of the gradients with a filter against those without; "certified" is the bound
of ``GradFilter.error_bounds`` over the norm that the true gradient has at least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pro_kernels as pk
from bench.peaked import Peaked, trained, zipf
from bench.record import Record, facts
from pro_kernels.fused import matmul

BLOCK = "filter"
TAUS = tuple(2.0**-k for k in range(4, 13))
ERROR = 2.0**-8  # certified error that the table picks the fastest run for
SIZES = {"zipf": (4, 4, 128, 1024, 32000), "trained": (4, 4, 128, 1024, 32000)}
FOLDER = Path(__file__).resolve().parent / "results" / "filter"
ROUNDS = 5
_STEPS = 60
_HEAD = (
    "| distribution | mean top-1 | tau | columns kept | of the dense floor | of no filter | "
    "certified error | error |\n|---|---|---|---|---|---|---|---|"
)


def run(path: Path, rounds: int = ROUNDS, log: Callable[[str], None] = print) -> dict:
    """Measure both batches into the JSON file ``path``; returns its content."""
    record = Record(path, {**facts(torch.device("cpu"), rounds=rounds), "benchmark": "filter"})
    for make in (lambda: zipf(*SIZES["zipf"]), lambda: trained(*SIZES["trained"], steps=_STEPS)):
        rows = measure(make(), TAUS, rounds)
        record.add(rows)
        log("\n".join(_cells(row) for row in rows))
    record.finish()
    return record.data


def measure(batch: Peaked, taus: tuple[float, ...], rounds: int) -> list[dict]:
    """One row a tau, the first without a filter."""
    floor = _floor(batch)
    exact = [g.double() for g in _loss(batch, None)[1]]
    rows = []
    for tau in (None, *taus):
        out, grads = _loss(batch, tau)
        times: dict[str, list[float]] = {"floor": [], "plain": [], "ours": []}
        for _ in range(rounds):
            times["floor"].append(_seconds(floor))
            times["plain"].append(_seconds(lambda: _loss(batch, None)))
            times["ours"].append(_seconds(lambda tau=tau: _loss(batch, tau)))
        bounds, mass = [0.0, 0.0], 0.0
        if out.grad_filter is not None:
            bounds = [b.item() for b in out.grad_filter.error_bounds(batch.hidden)]
            mass = out.grad_filter.dropped_mass.max().item()
        kept = (grads[1] != 0).any(1).double().mean().item()
        norms = [e.norm().item() for e in exact]
        rows.append(
            {
                "batch": batch.name,
                "top1": batch.top1,
                "scored": int((batch.targets != -100).sum()),
                "H": batch.weight.shape[1],
                "V": batch.weight.shape[0],
                "tau": tau,
                "largest_dropped_mass": mass,
                "columns_with_gradient": kept,
                "seconds": statistics.median(times["ours"]),
                "of_floor": _ratio(times["ours"], times["floor"]),
                "of_plain": _ratio(times["ours"], times["plain"]),
                "certified_hidden": bounds[0] / norms[0],
                "certified_weight": bounds[1] / norms[1],
                "error_hidden": (grads[0].double() - exact[0]).norm().item() / norms[0],
                "error_weight": (grads[1].double() - exact[1]).norm().item() / norms[1],
            }
        )
    return rows


def blocks(data: dict, _: dict[str, str]) -> dict[str, str]:
    """What a page shows: for each batch the fastest run within ``ERROR``."""
    where = f"{data['machine']}; torch {data['versions']['torch']}; {data['date'][:10]}."
    return {BLOCK: "\n".join([where, "", _HEAD, *(_cells(row) for row in best(data["results"]))])}


def best(rows: list[dict]) -> list[dict]:
    """The fastest row of each batch whose certified errors are at most ``ERROR``."""
    found = []
    for name in dict.fromkeys(row["batch"] for row in rows):
        fit = [r for r in rows if r["batch"] == name and r["tau"] and _certified(r) <= ERROR]
        found += sorted(fit, key=lambda r: r["of_floor"])[:1]
    return found


def full_report(data: dict, images: list[str]) -> str:
    """The whole table."""
    lines = [
        "# grad_filter: time against tau and error",
        "",
        f"{data['machine']}; torch {data['versions']['torch']}; commit {data['commit']}; medians "
        f"of {data['settings']['rounds']} interleaved rounds. Floor: the three dense head matmuls "
        "on the scored rows. Errors are relative to the norm of the gradient without a filter; one "
        "above the certified error is the rounding of bf16 gradients.",
        "",
        _HEAD,
        *(_cells(row) for row in data["results"]),
        *("" if i == 0 else f"![{name}]({name})" for i, name in enumerate(["", *images])),
    ]
    return "\n".join(lines) + "\n"


def draw(data: dict, folder: Path) -> list[str]:
    """Time against tau, and against the certified error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for name in dict.fromkeys(row["batch"] for row in data["results"]):
        rows = [r for r in data["results"] if r["batch"] == name and r["tau"]]
        label = f"{name} (top-1 {rows[0]['top1']:.2f})"
        axes[0].plot([r["tau"] for r in rows], [r["of_floor"] for r in rows], "o-", label=label)
        moved = [r for r in rows if _certified(r) > 0]
        axes[1].plot([_certified(r) for r in moved], [r["of_floor"] for r in moved], "o-")
    for axis, text in zip(axes, ("tau", "certified relative error"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(text)
        axis.axhline(1, color="#94a3b8", linewidth=1)
    axes[0].set_ylabel("time / dense floor")
    axes[0].set_ylim(0)
    axes[0].legend(frameon=False)
    figure.savefig(folder / "filter.png", metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)
    return ["filter.png"]


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


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def _certified(row: dict) -> float:
    """Bound over the least norm that the true gradient can have: ``b / (1 - b)``."""
    bounds = (row["certified_hidden"], row["certified_weight"])
    return max(b / (1 - b) if b < 1 else float("inf") for b in bounds)


def _cells(row: dict) -> str:
    tau = "none" if row["tau"] is None else f"{row['tau']:.2g}"
    error = max(row["error_hidden"], row["error_weight"])
    return (
        f"| {row['batch']} | {row['top1']:.2f} | {tau} | {row['columns_with_gradient']:.0%} | "
        f"{row['of_floor']:.2f} | {row['of_plain']:.2f} | {_certified(row):.1e} | {error:.1e} |"
    )
