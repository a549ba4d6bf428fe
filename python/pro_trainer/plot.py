"""Curves of a run as a PNG, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curves(path: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Training loss, and held-out loss and pairwise accuracy, of each named run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    styles: Sequence[str] = ("-", "--", ":")
    for i, (name, run) in enumerate(runs.items()):
        style = styles[i % len(styles)]
        losses = run["train_loss"]
        loss.plot(range(1, len(losses) + 1), losses, style, label=f"{name}, training")
        points = run["eval"]
        if points:
            steps = [p["step"] for p in points]
            marks = "o" + (style if len(points) > 2 else "")  # two points say nothing of the way
            loss.plot(steps, [p["loss"] for p in points], marks, ms=4, label=f"{name}, held out")
            accuracy.plot(steps, [p["pairwise_accuracy"] for p in points], marks, ms=4, label=name)
    loss.set(xlabel="step", ylabel="loss", title="PRO loss")
    loss.legend(fontsize=7)
    accuracy.set(xlabel="step", ylim=(0, 1.02), title="held-out pairwise ranking accuracy")
    accuracy.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    if accuracy.get_legend_handles_labels()[0]:
        accuracy.legend(fontsize=7)
    figure.savefig(path, dpi=130)
