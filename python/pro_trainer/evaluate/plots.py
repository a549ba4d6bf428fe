"""Plots as image files, drawn without a display.

``draw_curves`` one run, ``draw_runs`` several runs beside each other, ``draw_evaluation`` what one
evaluation found. Runs are given as transformers' ``trainer.state.log_history``: dicts with ``step``
and numbers by name, those of held-out lists with ``eval_`` before the name. A file is replaced at
once or not at all; numbers that are not finite are left out.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pro_trainer.prepare.output import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pro_trainer.evaluate.metrics import Row

History = Sequence[Mapping[str, Any]]
Panel = Callable[["Axes"], None]
Curves = Mapping[str, tuple[tuple[list[float], list[float]], dict[str, Any]]]  # of steps; a style

_NATS = "loss (nats)"
_CHANCE = {"color": "grey", "linewidth": 0.8, "linestyle": ":"}
_RANK_LOSS = re.compile(r"(?:eval_)?rank_loss_(\d+)")
_RANKING = {
    "pairwise accuracy": ("eval_pairwise_accuracy", "C0"),
    "top-1 accuracy": ("eval_top1_accuracy", "C2"),
    "Kendall's tau-b": ("eval_kendall_tau", "C3"),
}
_LINES_AT_MOST = 6  # of score by rank, one for each list size


def draw_curves(path: str | Path, log_history: History) -> bool:
    """Draw what ``log_history`` holds of: losses, terms of the loss, held-out ranking, margins.

    Returns:
        Whether there was anything to draw; without, no file is written.
    """

    def both(name: str) -> Curves:
        """In training and on the held-out lists."""
        held_out = _points(log_history, f"eval_{name}"), {"color": "C1", "linestyle": "--"}
        return {"training": (_points(log_history, name), {"color": "C0"}), "held out": held_out}

    ranking = {
        label: (_points(log_history, name), {"color": colour})
        for label, (name, colour) in _RANKING.items()
    }
    panels = [
        _panel("Loss", _NATS, both("loss")),
        _panel(
            "Loss of each rank (dashed: held out)",
            "term of the loss (nats)",
            _curves_of_ranks(log_history),
        ),
        _panel("SFT loss", "SFT term, weighted (nats)", both("sft_loss")),
        _panel(
            "Held-out ranking",
            "accuracy (share), tau-b (-1 to 1)",
            ranking,
            chance="chance: accuracy of a pair",
        ),
        _panel("Margin", "score of the better minus the worse (nats)", both("rewards/margins")),
    ]
    return _draw(path, panels)


def draw_runs(path: str | Path, runs: Mapping[str, History]) -> None:
    """Draw the training loss and the held-out pairwise accuracy of each named run.

    Raises:
        ValueError: no run has either.
    """

    def curves(name: str) -> Curves:
        """Runs that agree lie on one another: the later ones are dashed and thinner."""
        return {
            run: (
                _points(history, name),
                {"linestyle": ("-", "--", ":", "-.")[i % 4], "linewidth": max(1.0, 2.4 - 0.6 * i)},
            )
            for i, (run, history) in enumerate(runs.items())
        }

    panels = [
        _panel("Training loss", _NATS, curves("loss")),
        _panel(
            "Held-out pairwise accuracy",
            "accuracy (share)",
            curves("eval_pairwise_accuracy"),
            chance="chance",
        ),
    ]
    if not _draw(path, panels):
        raise ValueError(
            f"nothing to draw: no run of {list(runs)} has logged loss or eval_pairwise_accuracy"
        )


def draw_evaluation(
    path: str | Path,
    by_reward_gap: Sequence[Row],
    by_rank: Sequence[Row],
    kendall_tau: Tensor,  # (L,), NaN where it is undefined
    *,
    title: str = "",
    score_label: str = "score",
    gap_label: str = "difference in reward",
) -> None:
    """Draw accuracy by reward gap, mean score by rank, and how tau is distributed over lists.

    ``by_reward_gap`` and ``by_rank`` are rows of ``ranking.accuracy_by_reward_gap`` and
    ``ranking.score_by_rank``.

    Raises:
        ValueError: there is nothing in any of them.
    """
    taus = [x for x in kendall_tau.tolist() if math.isfinite(x)]
    panels = [
        partial(_draw_gaps, rows=by_reward_gap, label=gap_label) if by_reward_gap else None,
        partial(_draw_ranks, rows=by_rank, score_label=score_label) if by_rank else None,
        partial(_draw_taus, taus=taus) if taus else None,
    ]
    if not _draw(path, panels, title):
        raise ValueError("nothing to draw: no pairs of different reward, no scores, no tau")


def draw_intervals(
    path: str | Path,
    panels: Mapping[str, Mapping[str, tuple[float, ...]]],
    lines: Mapping[str, tuple[str, float]],
) -> None:
    """Draw values with their intervals: a panel a measure, a row a method.

    Args:
        path: the image.
        panels: measure -> method -> value and the ends of its interval.
        lines: measure -> a name and the value of a line across all rows.
    """

    def panel_of(measure: str, rows: Mapping[str, tuple[float, ...]]) -> Panel:
        def draw(axes: Axes) -> None:
            for place, (value, low, high) in enumerate(rows.values()):
                axes.errorbar(
                    value, place, xerr=[[value - low], [high - value]], fmt="o", capsize=3,
                    color="C0",
                )  # fmt: skip
            if measure in lines:
                name, value = lines[measure]
                axes.axvline(value, label=name, **_CHANCE)
            axes.set_yticks(range(len(rows)), list(rows))
            axes.invert_yaxis()
            axes.set(xlabel="held-out lists, 95 % interval", title=measure)

        return draw

    _draw(path, [panel_of(measure, rows) for measure, rows in panels.items()])


def _draw(path: str | Path, panels: Sequence[Panel | None], title: str = "") -> bool:
    """One figure, its panels in rows of at most three; whether there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in panels if panel is not None]
    if not panels:
        return False
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        panel(axes)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        labels = axes.get_legend_handles_labels()[1]
        if labels:
            axes.legend(fontsize=8, framealpha=0.8, ncols=1 + (len(labels) > 6))
    if title:
        figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format=Path(path).suffix[1:] or "png")
    write_atomically(Path(path), [image.getvalue()])
    return True


def _points(history: History, name: str) -> tuple[list[float], list[float]]:
    """Steps, and the finite values logged under ``name`` at them."""
    points = [
        (entry["step"], entry[name])
        for entry in history
        if "step" in entry and _is_number(entry.get(name))
    ]
    points.sort(key=lambda point: point[0])
    return [step for step, _ in points], [value for _, value in points]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _curves_of_ranks(history: History) -> Curves:
    names = {name for entry in history for name in entry}
    ranks = sorted({int(match[1]) for match in map(_RANK_LOSS.fullmatch, names) if match})
    curves: dict[str, Any] = {}
    for place, k in enumerate(ranks):
        style = {"color": _shade(place, len(ranks))}
        curves[f"rank {k}"] = trained = _points(history, f"rank_loss_{k}"), style
        # One entry of the legend for both, unless there is nothing but held-out lists.
        label = "_" if trained[0][0] else ""
        held_out = _points(history, f"eval_rank_loss_{k}")
        curves[f"{label}rank {k}, held out"] = held_out, {**style, "linestyle": "--"}
    return curves


def _panel(title: str, ylabel: str, curves: Curves, chance: str = "") -> Panel | None:
    """A panel of curves over steps, or None where none has a point; ``chance``: a line at 1/2."""
    found = {label: curve for label, curve in curves.items() if curve[0][0]}

    def draw(axes: Axes) -> None:
        for label, ((steps, values), style) in found.items():
            marker = "o" if len(steps) <= 30 else None
            axes.plot(steps, values, marker=marker, markersize=3.5, label=label, **style)
        axes.set(xlabel="optimizer step", ylabel=ylabel, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))  # where training begins
        if chance:
            axes.axhline(0.5, label=chance, **_CHANCE)
            low = min(min(values) for (_, values), _ in found.values())
            axes.set_ylim(min(0, low) - 0.03, 1.03)

    return draw if found else None


def _draw_gaps(axes: Axes, rows: Sequence[Row], label: str) -> None:
    labels = [f"{row['gap_from']:.3g}–{row['gap_to']:.3g}\n{row['pairs']:,} pairs" for row in rows]
    bars = axes.bar(labels, [row["pairwise_accuracy"] for row in rows], width=0.7)
    axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(0.5, label="chance", **_CHANCE)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(
        xlabel=label,
        ylabel="pairwise accuracy (share)",
        ylim=(0, 1.08),
        title="Accuracy by reward gap",
    )


def _draw_ranks(axes: Axes, rows: Sequence[Row], score_label: str) -> None:
    counts: dict[float, float] = {}
    for row in rows:
        counts[row["candidates"]] = max(row["count"], counts.get(row["candidates"], 0))
    # A line of a few lists is noise beside one of hundreds.
    common = [n for n in counts if counts[n] * 10 >= max(counts.values())]
    sizes = sorted(sorted(common, key=lambda n: -counts[n])[:_LINES_AT_MOST])
    for place, n in enumerate(sizes):
        own = [row for row in rows if row["candidates"] == n]
        errors = [row["standard_error"] if _is_number(row["standard_error"]) else 0 for row in own]
        axes.errorbar(
            [row["rank"] for row in own],
            [row["score"] for row in own],
            yerr=errors,
            color=_shade(place, len(sizes)),
            marker="o",
            markersize=3.5,
            capsize=2,
            label=f"{n} candidates",
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(
        xlabel="rank by reward (1: best)",
        ylabel=f"{score_label},\nminus the mean of its list",
        title="Mean score by rank (± standard error)",
    )


def _draw_taus(axes: Axes, taus: Sequence[float]) -> None:
    mean = math.fsum(taus) / len(taus)
    axes.hist(taus, bins=[-1 + i / 10 for i in range(21)], color="C0", edgecolor="white")
    axes.axvline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:.3f}")
    axes.set(xlabel="Kendall's tau-b of a list", ylabel="lists", title="Rank correlation")
    axes.yaxis.get_major_locator().set_params(integer=True)


def _shade(place: int, of: int) -> Any:
    """Colours of an ordered series, from dark to light, without the palest."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * place / max(1, of - 1))
