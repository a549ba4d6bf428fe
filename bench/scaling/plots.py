"""PNG plots of the predictions."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.model.cards import Card
from bench.plots import STYLE, save
from bench.scaling import predict
from bench.scaling.predict import GPUS, MODELS, ONE, TP, Batch, Layout

_COLORS = ("#c2410c", "#3b6ea5", "#15803d", "#7c3aed")
_PARTS = ("#94a3b8", "#c2410c", "#cbd5e1", "#3b6ea5")


def draw_all(card: Card, folder: Path) -> list[str]:
    """Write the plots; returns their file names."""
    figures: dict[str, Figure | None] = {
        "efficiency.png": _efficiency(card),
        "tensor-parallel.png": _tensor_parallel(card),
        "memory.png": _memory(card),
    }
    return save(figures, folder)


def _efficiency(card: Card) -> Figure:
    """Of one global batch, as it runs and with the weight's transfers hidden."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 4.2))
        for model, color in zip(MODELS.values(), _COLORS, strict=True):
            steps = [predict.best(model, Batch(), gpus, card) for gpus in GPUS]
            for hidden, dashes in ((False, "-"), (True, "--")):
                shares = [predict.efficiency(steps[0], s, hidden) for s in steps]
                label = None if hidden else model.name
                axis.plot(GPUS, shares, dashes, color=color, marker="o", ms=3, label=label)
        _gpus(axis, GPUS)
        axis.set_ylim(0, 1.08)
        axis.set_ylabel("efficiency")
        axis.legend(frameon=False, loc="lower left")
        figure.suptitle(
            f"Predicted for {card.name}: the head loss of one global batch\n(dashed: the head "
            "weight's transfers beside the decoder)", x=0.01, ha="left", fontsize=11,
        )  # fmt: skip
        figure.tight_layout()
    return figure


def _tensor_parallel(card: Card) -> Figure:
    """Computing and transfers of a micro-batch by tensor parallel ranks."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(MODELS), figsize=(3.6 * len(MODELS), 3.6))
        for axis, model in zip(axes, MODELS.values(), strict=True):
            steps = predict.tensor_parallel(model, card)
            axis.plot(TP, [s.compute * 1e3 for s in steps], color=_COLORS[1], marker="o", ms=4,
                      label="computing")  # fmt: skip
            axis.plot(TP[1:], [s.communication * 1e3 for s in steps[1:]], color=_COLORS[0],
                      marker="o", ms=4, label="transfers")  # fmt: skip
            _gpus(axis, TP)
            axis.set_yscale("log")
            axis.set_title(f"{model.name}\nH={model.H} V={model.V}", fontsize=10)
        axes[0].set_ylabel("ms")
        axes[0].legend(frameon=False)
        figure.suptitle(
            f"Predicted for {card.name}: a micro-batch, V over GPUs", x=0.01, ha="left", fontsize=11
        )
        figure.tight_layout()
    return figure


def _memory(card: Card) -> Figure:
    """Bytes of a rank by tensor parallel ranks, stacked."""
    sizes = (1, 2, 4, 8)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(MODELS), figsize=(3.2 * len(MODELS), 3.8), sharey=True)
        for axis, model in zip(axes, MODELS.values(), strict=True):
            found = [predict.step(model, ONE, Layout(tp=tp), card).memory for tp in sizes]
            below = [0.0] * len(sizes)
            for name, color in zip(found[0], _PARTS, strict=True):
                heights = [memory[name] / 1e9 for memory in found]
                axis.bar(range(len(sizes)), heights, bottom=below, color=color, label=name)
                below = [a + b for a, b in zip(below, heights, strict=True)]
            axis.set_xticks(range(len(sizes)), map(str, sizes))
            axis.set_xlabel("tensor parallel ranks")
            axis.set_title(model.name, fontsize=10)
        axes[0].set_ylabel("GB a rank")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.suptitle("Memory of the head by the planner", x=0.01, ha="left", fontsize=11)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    return figure


def _gpus(axis: Axes, counts: tuple[int, ...]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, map(str, counts))
    axis.set_xlabel("GPUs")
