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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pro_trainer.prepare.output import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pro_trainer.evaluate.metrics import Row

History = Sequence[Mapping[str, Any]]
Panel = Callable[["Axes"], None]

_STEPS = "optimizer step"
_NATS = "loss (nats)"
_CHANCE = {"color": "grey", "linewidth": 0.8, "linestyle": ":"}
_RANK_LOSS = re.compile(r"(?:eval_)?rank_loss_(\d+)")
_LINES_AT_MOST = 6  # of score by rank, one for each list size


def draw_curves(path: str | Path, log_history: History, title: str = "") -> bool:
    """Draw what ``log_history`` holds of: losses, terms of the loss, held-out ranking, margins.

    Returns:
        Whether there was anything to draw; without, no file is written.
    """
    panels = [
        panel
        for panel in (
            _both_panel(log_history, "loss", _NATS, "Loss"),
            _rank_panel(log_history),
            _both_panel(log_history, "sft_loss", "SFT term, weighted (nats)", "SFT loss"),
            _ranking_panel(log_history),
            _both_panel(
                log_history,
                "rewards/margins",
                "score of the better minus the worse (nats)",
                "Margin",
            ),
        )
        if panel is not None
    ]
    if panels:
        _draw(path, panels, title)
    return bool(panels)


def draw_runs(path: str | Path, runs: Mapping[str, History], title: str = "") -> None:
    """Draw the training loss and the held-out pairwise accuracy of each named run.

    Raises:
        ValueError: no run has either.
    """
    shown = {"loss": "Training loss", "eval_pairwise_accuracy": "Held-out pairwise accuracy"}
    panels: list[Panel] = []
    for name, label in shown.items():
        curves = {run: _curve(history, name) for run, history in runs.items()}
        if any(steps for steps, _ in curves.values()):
            panels.append(_runs_panel(curves, label, is_share=name != "loss"))
    if not panels:
        raise ValueError(f"nothing to draw: no run of {list(runs)} has logged {' or '.join(shown)}")
    _draw(path, panels, title)


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
    panels: list[Panel] = []
    if by_reward_gap:
        panels.append(lambda axes: _draw_gaps(axes, by_reward_gap, gap_label))
    if by_rank:
        panels.append(lambda axes: _draw_ranks(axes, by_rank, score_label))
    if taus:
        panels.append(lambda axes: _draw_taus(axes, taus))
    if not panels:
        raise ValueError("nothing to draw: no pairs of different reward, no scores, no tau")
    _draw(path, panels, title)


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

    _draw(path, [panel_of(measure, rows) for measure, rows in panels.items()], "")


def _draw(path: str | Path, panels: Sequence[Panel], title: str) -> None:
    """One figure, its panels in rows of at most three."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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


def _curve(history: History, name: str) -> tuple[list[float], list[float]]:
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


def _plot(axes: Axes, steps: Sequence[float], values: Sequence[float], style: str, **how: Any):
    """A line, with its points marked where they are few."""
    marker = "o" if len(steps) <= 30 else None
    return axes.plot(steps, values, style, marker=marker, markersize=3.5, **how)


def _both_panel(history: History, name: str, ylabel: str, title: str) -> Panel | None:
    """One number, in training and on the held-out lists."""
    curves = {
        "training": (_curve(history, name), "-", "C0"),
        "held out": (_curve(history, f"eval_{name}"), "--", "C1"),
    }
    return _curves_panel(curves, ylabel, title)


def _rank_panel(history: History) -> Panel | None:
    found = [match for match in map(_RANK_LOSS.fullmatch, _names(history)) if match]
    ranks = sorted({int(match[1]) for match in found})
    curves = {}
    for place, k in enumerate(ranks):
        colour = _shade(place, len(ranks))
        curves[f"rank {k}"] = (_curve(history, f"rank_loss_{k}"), "-", colour)
        held_out = _curve(history, f"eval_rank_loss_{k}")
        # One entry of the legend for both, unless there is nothing but held-out lists.
        label = "_" if curves[f"rank {k}"][0][0] else ""
        curves[f"{label}rank {k}, held out"] = (held_out, "--", colour)
    return _curves_panel(curves, "term of the loss (nats)", "Loss of each rank (dashed: held out)")


def _ranking_panel(history: History) -> Panel | None:
    curves = {
        "pairwise accuracy": (_curve(history, "eval_pairwise_accuracy"), "-", "C0"),
        "top-1 accuracy": (_curve(history, "eval_top1_accuracy"), "-", "C2"),
        "Kendall's tau-b": (_curve(history, "eval_kendall_tau"), "-", "C3"),
    }
    panel = _curves_panel(curves, "accuracy (share), tau-b (-1 to 1)", "Held-out ranking")
    if panel is None:
        return None

    def draw(axes: Axes) -> None:
        panel(axes)
        axes.axhline(0.5, label="chance: accuracy of a pair", **_CHANCE)
        low = min((min(values) for (_, values), *_ in curves.values() if values), default=0)
        axes.set_ylim(min(0, low) - 0.03, 1.03)

    return draw


def _curves_panel(
    curves: Mapping[str, tuple[tuple[list[float], list[float]], str, Any]], ylabel: str, title: str
) -> Panel | None:
    """A panel of curves over steps, or None where none has a point."""
    found = {label: curve for label, curve in curves.items() if curve[0][0]}
    if not found:
        return None

    def draw(axes: Axes) -> None:
        for label, ((steps, values), style, colour) in found.items():
            _plot(axes, steps, values, style, color=colour, label=label)
        axes.set(xlabel=_STEPS, ylabel=ylabel, title=title)
        _whole_steps(axes)

    return draw


def _whole_steps(axes: Axes) -> None:
    """Steps are whole, and begin where training does."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))


def _runs_panel(
    curves: Mapping[str, tuple[list[float], list[float]]], label: str, is_share: bool
) -> Panel:
    def draw(axes: Axes) -> None:
        for i, (run, (steps, values)) in enumerate(curves.items()):
            # Runs that agree lie on one another: the later ones are dashed and thinner.
            style, width = ("-", "--", ":", "-.")[i % 4], max(1.0, 2.4 - 0.6 * i)
            if steps:
                _plot(axes, steps, values, style, linewidth=width, label=run)
        axes.set(xlabel=_STEPS, ylabel="accuracy (share)" if is_share else _NATS, title=label)
        _whole_steps(axes)
        if is_share:
            axes.axhline(0.5, label="chance", **_CHANCE)
            axes.set_ylim(0, 1.03)

    return draw


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
    counts = {n: max(r["count"] for r in rows if r["candidates"] == n) for n in _sizes(rows)}
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


def _names(history: History) -> Iterable[str]:
    return {name for entry in history for name in entry}


def _sizes(rows: Sequence[Row]) -> list[float]:
    return sorted({row["candidates"] for row in rows})
