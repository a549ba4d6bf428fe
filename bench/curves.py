"""PNG plots along an axis: growth of time and memory, memory by n, the roofline by vocabulary."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.plots import STYLE, color, save

_GROWTH = {
    "growth N": ("scored", "scored tokens N"),
    "growth V": ("V", "vocabulary V"),
    "growth n": ("n", "candidates n (same tokens in all)"),
    "growth unscored": ("tokens", "positions (same scored tokens)"),
}
# Lines of one colour are told apart by these.
_DASHES = ("-", "--", ":", "-.")


def draw_all(data: dict, folder: Path) -> list[str]:
    """Write every plot that the results have numbers for; returns their file names."""
    rows = data["results"]
    figures = {
        "growth.png": _growth(rows),
        "memory-by-n.png": _memory_by_n(rows),
        "roofline.png": _roofline(rows),
    }
    return save(figures, folder)


def _growth(rows: list[dict]) -> Figure | None:
    """Time above, memory below, one column an axis of growth."""
    groups = [g for g in _GROWTH if sum(r["group"] == g for r in rows) > 3]
    if not groups:
        return None
    weighed = any(r["group"] in groups and r["peak_bytes"] is not None for r in rows)
    with plt.rc_context(STYLE):
        lines = 1 + weighed
        figure, axes = plt.subplots(
            lines, len(groups), figsize=(4.1 * len(groups), 3.1 * lines + 0.5), squeeze=False
        )
        for column, group in enumerate(groups):
            mine = [r for r in rows if r["group"] == group]
            _curves(axes[0, column], mine, group, "seconds", 1e3, "ms")
            if weighed:
                _curves(axes[1, column], mine, group, "peak_bytes", 2**-20, "peak extra MB")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.suptitle("Growth of time and memory", x=0.01, ha="left", fontweight="bold")
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    return figure


def _curves(axis: Axes, rows: list[dict], group: str, value: str, scale: float, unit: str) -> None:
    key, name = _GROWTH[group]
    seen: dict[str, int] = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = [r for r in rows if r["provider"] == provider and r[value] is not None]
        if points:
            axis.plot(
                [r[key] for r in points], [r[value] * scale for r in points], marker="o", ms=4,
                label=points[0]["label"], **_line(points[0], seen),
            )  # fmt: skip
    if key == "n":
        axis.set_xscale("log", base=2)
        ticks = sorted({row["n"] for row in rows})
        axis.set_xticks(ticks, [str(n) for n in ticks])
    else:
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=5)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(name)
    axis.set_ylabel(unit)


def _memory_by_n(rows: list[dict]) -> Figure | None:
    """Peak extra memory of one prompt by its candidates, gradients of the inputs taken off."""
    mine = [
        {**r, "beyond": (r["peak_bytes"] - r["gradient_bytes"])}
        for r in rows
        if r["group"] == "growth n" and r["peak_bytes"] is not None
    ]
    if len({r["n"] for r in mine}) < 2:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        _curves(axes, mine, "growth n", "beyond", 2**-20, "MB")
        axes.legend(frameon=False)
        first = mine[0]
        axes.set_title(
            f"Peak memory beyond the gradients, one prompt of n x {first['T']} positions\n"
            f"(H={first['H']} V={first['V']} {first['dtype']}, "
            f"{first['masked']:.0%} not scored)", fontsize=10,
        )  # fmt: skip
        axes.set_xlabel("candidates n")
        figure.tight_layout()
    return figure


def _roofline(rows: list[dict]) -> Figure | None:
    """Share of the measured ceiling by vocabulary: logits in (copy), hidden states in (matmul)."""
    panels = {
        "logits in, bf16: share of the copy bandwidth": [
            r for r in rows if r["group"] == "logits" and r["dtype"] == "bf16"
        ],
        "hidden states in, bf16, 60 % not scored: share of the matmul rate": [
            r for r in rows if r["group"] == "head" and r["masked"] == 0.6 and r["n"] == 4
        ],
    }
    panels = {k: [r for r in v if r["of_ceiling"] and not r["wrong"]] for k, v in panels.items()}
    panels = {k: v for k, v in panels.items() if len({r["V"] for r in v}) > 1}
    if not panels:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(7.4 * len(panels), 5.2), squeeze=False)
        for axis, (title, mine) in zip(axes.flat, panels.items(), strict=True):
            _shares(axis, mine)
            axis.set_title(title, fontsize=10)
        figure.suptitle("Share of this machine's ceiling", x=0.01, ha="left", fontsize=11)
        figure.tight_layout()
    return figure


def _shares(axis: Axes, rows: list[dict]) -> None:
    vocabularies = sorted({row["V"] for row in rows})
    seen: dict[str, int] = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r["V"])
        axis.plot(
            [vocabularies.index(r["V"]) for r in points], [r["of_ceiling"] for r in points],
            marker="o", ms=4, label=points[0]["label"], **_line(points[0], seen),
        )  # fmt: skip
    axis.set_xticks(range(len(vocabularies)), [str(v) for v in vocabularies])
    axis.set_xlabel("vocabulary V")
    axis.set_ylim(0, max(1.05, 1.05 * max(row["of_ceiling"] for row in rows)))
    axis.axhline(1, color="gray", lw=0.8)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _line(row: dict, seen: dict[str, int]) -> dict[str, str]:
    """Colour by kind of provider; lines of one colour differ by their dashes."""
    shade = color(row)
    place = seen.setdefault(shade, 0)
    seen[shade] += 1
    return {"color": shade, "ls": _DASHES[place % len(_DASHES)]}
