"""The two plots of the study, from its results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes"], None]
LABELS = {
    "greedy_reward": "true reward, greedy",
    "sampled_reward": "true reward, sampled",
    "pairwise_accuracy": "pairwise accuracy",
    "kendall_tau": "Kendall's tau",
    "top1_accuracy": "top-1 accuracy",
}
METHODS = {
    "clone": "behaviour clone",
    "sft": "SFT on the best of n",
    "pro": "PRO on all n",
    "pro_constant": "PRO, constant SFT term",
    "pro_order": "PRO, constant SFT term, temperature 1",
}
STYLES = {"sft": "C1-", "pro": "C0-", "pro_constant": "C2--", "pro_order": "C3:"}


def draw_known(path: Path, known: dict[str, Any]) -> None:
    """Each measure over n, both methods with error bars, the clone as a line."""
    names = ("greedy_reward", "sampled_reward", "pairwise_accuracy")
    _draw(path, [_measure_panel(known, name) for name in names])


def draw_real(path: Path, real: dict[str, Any]) -> None:
    """Held-out accuracy and tau over the steps of PRO, one line for each n."""
    _draw(path, [_curve_panel(real, name) for name in ("pairwise_accuracy", "kendall_tau")])


def replace_file(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Write a file that is either whole or not there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_to(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _draw(path: Path, panels: Sequence[Panel]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels) + 2.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        panel(axes)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if place == len(panels):
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    replace_file(path, lambda part: figure.savefig(part, dpi=130, format="png"))


def _measure_panel(known: dict[str, Any], name: str) -> Panel:
    def panel(axes: Axes) -> None:
        axes.axhline(known["summary"][0][name][0], color="grey", ls=":", label=METHODS["clone"])
        for method, style in STYLES.items():
            rows = [row for row in known["summary"] if row["method"] == method]
            axes.errorbar(
                [row["candidates"] for row in rows],
                [row[name][0] for row in rows],
                yerr=[_or_zero(row[name][1]) for row in rows],
                fmt=style,
                marker="o",
                markersize=4,
                capsize=3,
                label=METHODS[method],
            )
        axes.set(xlabel="candidates a prompt, n", ylabel=f"{LABELS[name]} (± standard error)")
        axes.set_xticks(known["settings"]["candidates"])

    return panel


def _curve_panel(real: dict[str, Any], name: str) -> Panel:
    def panel(axes: Axes) -> None:
        by_length = real["pretrain"]["by_length"][name][0]
        axes.axhline(by_length, color="grey", ls=":", label="longer is better (no model)")
        for place, run in enumerate(real["runs"]):
            summary, colour = run["summary"]["all"], f"C{place}"
            steps = [0, *(point["step"] for point in run["curve"])]
            values = [summary["before"][name][0], *(point[name] for point in run["curve"])]
            label = f"n = {run['candidates']}"
            axes.plot(steps, values, marker="o", markersize=3.5, color=colour, label=label)
            value, error = summary["after"][name]
            axes.errorbar([run["steps"]], [value], yerr=error, capsize=3, color=colour)
        axes.set(xlabel="optimizer step of PRO", ylabel=f"{LABELS[name]}, held out")

    return panel


def _or_zero(error: float) -> float:
    return 0.0 if error != error else error
