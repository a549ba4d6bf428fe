"""PNG plots from a results file: bars of time, memory and error by provider; see ``curves``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.cases import is_main

Label = Callable[[dict], str]
_OURS, _FLOOR, _PEER = "#c2410c", "#94a3b8", "#3b6ea5"
_ENTRANCES = ("fp32", "fp16", "frozen", "score", "ce", "logits", "ranking", "small")
_ERRORS = {
    "logp_error": "log-probs (largest, absolute)",
    "input_grad_error": "gradient of hidden states (relative)",
    "weight_grad_error": "gradient of the weight (relative)",
}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 110,
}


def draw_all(data: dict, folder: Path) -> list[str]:
    """Write every plot that the results have numbers for; returns their file names."""
    rows = data["results"]
    figures = {
        "time.png": _time(rows, data["machine"]),
        "errors.png": _errors(rows),
        "entrances.png": _entrances(rows),
        "memory.png": _memory(rows),
    }
    return save(figures, folder)


def save(figures: dict[str, Figure | None], folder: Path) -> list[str]:
    """Write the figures that there are; returns their file names."""
    written = []
    for name, figure in figures.items():
        if figure is not None:
            # No date or version in the file: equal numbers give equal bytes.
            figure.savefig(folder / name, metadata={"Software": None}, bbox_inches="tight")
            plt.close(figure)
            written.append(name)
    return written


def color(row: dict) -> str:
    if row["provider"].startswith("ours-"):
        return _OURS
    return _FLOOR if row["provider"].startswith("floor") else _PEER


def panels_of(rows: list[dict], value: str) -> dict[str, list[dict]]:
    """Rows with a number, by case; cases with three bars or more."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row[value] is not None and not row["wrong"]:
            found.setdefault(row["case"], []).append(row)
    return {case: bars for case, bars in found.items() if len(bars) > 2}


def _time(rows: list[dict], machine: str) -> Figure | None:
    """The main cases side by side, the same providers on the same lines."""
    panels = panels_of([r for r in rows if is_main(r)], "seconds")
    if not panels:
        return None
    fullest_first = sorted(panels.values(), key=len, reverse=True)
    labels = list(dict.fromkeys(row["label"] for bars in fullest_first for row in bars))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(2.6 + 3.7 * len(panels), 1.7 + 0.3 * len(labels)),
            squeeze=False, sharey=True,
        )  # fmt: skip
        for axis, bars in zip(axes.flat, panels.values(), strict=True):
            first = bars[0]
            title = f"H={first['H']} V={first['V']}"
            _bars(axis, title, bars, labels, "seconds", _time_label)
            axis.set_xlabel("seconds")
        what = f"{first['dtype']}, n={first['n']}, {first['masked']:.0%} of tokens not scored"
        figure.suptitle(
            f"PRO loss, forward + backward ({what})\n{machine}", x=0.01, ha="left", fontsize=11
        )
        figure.tight_layout()
    return figure


def _entrances(rows: list[dict]) -> Figure | None:
    """fp32, frozen head, scoring and logits in: one panel each."""
    panels = panels_of([r for r in rows if r["group"] in _ENTRANCES], "seconds")
    return stacked(panels, "PRO loss: the other entrances", "seconds", _time_label, "seconds")


def _errors(rows: list[dict]) -> Figure | None:
    """Largest error of a log-prob and both gradients' errors, the first main case, log scale."""
    main = [r for r in rows if is_main(r) and r["logp_error"] is not None and not r["wrong"]]
    mine = [r for r in main if r["case"] == main[0]["case"]]
    if len(mine) < 3:
        return None
    labels = [row["label"] for row in mine]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 3, figsize=(13, 1.5 + 0.27 * len(labels)), squeeze=False, sharey=True
        )
        for axis, (key, title) in zip(axes.flat, _ERRORS.items(), strict=True):
            shown = [row for row in mine if row[key]]
            least = min(row[key] for row in shown)
            _bars(axis, title, shown, labels, key, lambda row, key=key: f"{row[key]:.1e}")
            axis.set_xscale("log")
            axis.set_xlim(least / 3, max(row[key] for row in shown) * 30)
        figure.suptitle(f"Error against fp64 ({mine[0]['case']})", x=0.01, ha="left", fontsize=11)
        figure.tight_layout()
    return figure


def _memory(rows: list[dict]) -> Figure | None:
    """Peak extra memory by provider, the gradients' size as a line."""
    scaled = [
        {**r, "peak": r["peak_bytes"] / 2**20, "grads": r["gradient_bytes"] / 2**20}
        for r in rows
        if r["group"] in ("head", "logits") and r["peak_bytes"] is not None
    ]
    name = "MB (dashed: the inputs' gradients)"
    return stacked(
        panels_of(scaled, "peak"), "PRO loss, forward + backward: peak extra memory", "peak",
        lambda r: f"{r['peak']:.0f} MB", name,
    )  # fmt: skip


def stacked(
    panels: dict[str, list[dict]], title: str, value: str, label: Label, name: str
) -> Figure | None:
    """Two columns of panels, bars of one height everywhere."""
    if not panels:
        return None
    columns = min(len(panels), 2)
    items = list(panels.items())
    lines = [items[i : i + columns] for i in range(0, len(items), columns)]
    heights = [1.2 + 0.27 * max(len(bars) for _, bars in line) for line in lines]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(lines), columns, figsize=(6.4 * columns, sum(heights) + 0.4), squeeze=False,
            height_ratios=heights,
        )  # fmt: skip
        for axis, item in zip_longest(axes.flat, items):
            if item is None:
                axis.set_visible(False)
                continue
            case, bars = item
            _bars(axis, case, bars, [row["label"] for row in bars], value, label)
            if "grads" in bars[0]:
                axis.axvline(bars[0]["grads"], color="black", lw=1, ls="--")
            axis.set_xlabel(name)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.tight_layout()
    return figure


def _time_label(row: dict) -> str:
    ratio = row["vs_ours"]
    text = f"{row['seconds']:.3g} s" if row["seconds"] >= 0.1 else f"{row['seconds'] * 1e3:.3g} ms"
    if ratio is None or ratio == 1.0 or row["provider"].startswith("floor"):
        return text
    return f"{text} ({ratio:.1f}x ours)"


def _bars(
    axis: Axes, title: str, rows: list[dict], labels: list[str], value: str, label: Label
) -> None:
    """Horizontal bars on the lines of ``labels``, each with its number."""
    by_label = {row["label"]: row for row in rows}
    most = max(row[value] for row in rows)
    for place, name in enumerate(labels):
        row = by_label.get(name)
        if row is None:
            axis.text(most * 0.01, place, "not run", va="center", fontsize=8.5, color="gray")
            continue
        axis.barh(place, row[value], color=color(row), height=0.72)
        axis.text(row[value] + most * 0.01, place, label(row), va="center", fontsize=8.5)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_title(title, fontsize=10)
    axis.set_xlim(0, most * 1.5)
    axis.locator_params(axis="x", nbins=6)
