"""PNG plots of a results file: bars by provider, curves along an axis.

A panel shows who ran. Equal numbers give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.engine.case import is_main
from bench.report.tables import by_case
from bench.suites.filter import certified

Label = Callable[[dict], str]
_OURS, _FLOOR, _PEER = "#c2410c", "#94a3b8", "#3b6ea5"
_ENTRANCES = (
    *("real", "equal", "fp32", "fp16", "frozen"),
    *("score", "ce", "logits", "ranking", "small"),
)
_ERRORS = {
    "logp_error": "log-probs (largest, absolute)",
    "input_grad_error": "gradient of hidden states (relative)",
    "weight_grad_error": "gradient of the weight (relative)",
}
_GROWTH = {
    "growth N": ("scored", "scored tokens N"),
    "growth V": ("V", "vocabulary V"),
    "growth n": ("n", "candidates n (same tokens in all)"),
    "growth unscored": ("tokens", "positions (same scored tokens)"),
}
# Lines of one colour are told apart by these.
_DASHES = ("-", "--", ":", "-.")
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 110,
}


def draw(data: dict, folder: Path) -> list[str]:
    """Write every plot that the results have numbers for; returns their file names."""
    makers = {"loss": _loss, "step": _step, "filter": _filter}
    rows = [row for row in data["results"] if not row.get("wrong")]
    written = []
    with plt.rc_context(_STYLE):
        maker = makers.get(data["benchmark"], lambda *_: {})
        for name, figure in maker(rows, data.get("machine")).items():
            if figure is not None:
                # No date or version in the file.
                figure.savefig(folder / name, metadata={"Software": None}, bbox_inches="tight")
                plt.close(figure)
                written.append(name)
    return written


def _loss(rows: list[dict], machine: str) -> dict[str, Figure | None]:
    main = [row for row in rows if is_main(row)]
    others = [row for row in rows if row["group"] in _ENTRANCES]
    weighed = [row for row in rows if row["group"] in ("head", "logits")]
    return {
        "time.png": _times(main, f"PRO loss, forward + backward\n{machine}"),
        "errors.png": _errors(main),
        "entrances.png": _times(others, "PRO loss: the other entrances"),
        "memory.png": _memory(weighed, "PRO loss, forward + backward: peak extra memory"),
        "growth.png": _growth(rows),
        "memory-by-n.png": _memory_by_n(rows),
        "roofline.png": _roofline(rows),
    }


def _step(rows: list[dict], machine: str) -> dict[str, Figure | None]:
    shares = [{**r, "percent": 100 * r["head_share"]} for r in rows if r["head_share"] is not None]
    head = "One training step: share spent between hidden states and loss"
    return {
        "time.png": _times(rows, f"One training step\n{machine}"),
        "memory.png": _memory(rows, "One training step: peak memory beyond model and optimizer"),
        "head.png": _bars(shares, "percent", head, _percent, "% of the step"),
    }


def _times(rows: list[dict], title: str) -> Figure | None:
    return _bars(rows, "seconds", title, _time, "seconds")


def _percent(row: dict) -> str:
    return f"{row['percent']:.0f} % of {_seconds(row)}"


def _memory(rows: list[dict], title: str) -> Figure | None:
    """Peak extra memory by provider, the gradients' size as a line."""
    scaled = [
        {**r, "peak": r["peak_bytes"] / 2**20, "grads": r["gradient_bytes"] / 2**20}
        for r in rows
        if r["peak_bytes"] is not None
    ]
    name = "MB (dashed: the gradients)"
    return _bars(scaled, "peak", title, lambda r: f"{r['peak']:.0f} MB", name)


def _errors(rows: list[dict]) -> Figure | None:
    """Errors of log-probs and gradients in the first main case, log scale."""
    mine = [r for r in rows if r["logp_error"] is not None and r["case"] == rows[0]["case"]]
    if len(mine) < 3:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(17, 1.5 + 0.27 * len(mine)), squeeze=False)
    for axis, (key, title) in zip(axes.flat, _ERRORS.items(), strict=True):
        shown = [r for r in mine if r[key]]
        _bar(axis, title, shown, key, lambda row, key=key: f"{row[key]:.1e}")
        axis.set_xscale("log")
        axis.set_xlim(min(r[key] for r in shown) / 3, max(r[key] for r in shown) * 30)
    return _finished(figure, f"Error against fp64 ({mine[0]['case']})")


def _bars(rows: list[dict], value: str, title: str, label: Label, name: str) -> Figure | None:
    """A panel a case that has three bars or more, in two columns, bars of one height everywhere."""
    found = by_case([row for row in rows if row[value] is not None])
    items = [(case, bars) for case, bars in found.items() if len(bars) > 2]
    if not items:
        return None
    columns = min(len(items), 2)
    lines = [items[i : i + columns] for i in range(0, len(items), columns)]
    heights = [1.2 + 0.27 * max(len(bars) for _, bars in line) for line in lines]
    figure, axes = plt.subplots(
        len(lines), columns, figsize=(6.4 * columns, sum(heights) + 0.4), squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    for axis in axes.flat[len(items) :]:
        axis.set_visible(False)
    for axis, (case, bars) in zip(axes.flat, items, strict=False):
        _bar(axis, case, bars, value, label)
        if "grads" in bars[0]:
            axis.axvline(bars[0]["grads"], color="black", lw=1, ls="--")
        axis.set_xlabel(name)
    return _finished(figure, title)


def _bar(axis: Axes, title: str, rows: list[dict], value: str, label: Label) -> None:
    """Horizontal bars, each with its number."""
    most = max(row[value] for row in rows)
    for place, row in enumerate(rows):
        axis.barh(place, row[value], color=_color(row), height=0.72)
        axis.text(row[value] + most * 0.01, place, label(row), va="center", fontsize=8.5)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_title(title, fontsize=10)
    axis.set_xlim(0, most * 1.5)
    axis.locator_params(axis="x", nbins=6)


def _finished(figure: Figure, title: str, rect: tuple = (0, 0, 1, 1)) -> Figure:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout(rect=rect)
    return figure


def _color(row: dict) -> str:
    if row["provider"].startswith("ours-"):
        return _OURS
    return _FLOOR if row["provider"].startswith("floor") else _PEER


def _seconds(row: dict) -> str:
    return f"{row['seconds']:.3g} s" if row["seconds"] >= 0.1 else f"{row['seconds'] * 1e3:.3g} ms"


def _time(row: dict) -> str:
    """Seconds, and how far from ours, the official step or TRL."""
    for key, what in (("vs_ours", "x ours"), ("speedup", "x faster"), ("vs_trl", "x TRL")):
        ratio = row.get(key)
        if ratio is not None and ratio != 1.0 and not row["provider"].startswith("floor"):
            return f"{_seconds(row)} ({ratio:.1f}{what})"
    return _seconds(row)


def _growth(rows: list[dict]) -> Figure | None:
    """Time above, memory below, one column an axis of growth."""
    groups = [g for g in _GROWTH if sum(r["group"] == g for r in rows) > 3]
    if not groups:
        return None
    weighed = any(r["group"] in groups and r["peak_bytes"] is not None for r in rows)
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
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    return _finished(figure, "Growth of time and memory", (0, 0.06, 1, 1))


def _curves(axis: Axes, rows: list[dict], group: str, value: str, scale: float, unit: str) -> None:
    key, name = _GROWTH[group]
    _lines(axis, [r for r in rows if r[value] is not None], key, lambda r: r[value] * scale)
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


def _lines(axis: Axes, rows: list[dict], key: str, value: Callable[[dict], float]) -> None:
    """A line a provider; those of one colour differ by their dashes."""
    seen: dict[str, int] = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r[key])
        shade = _color(points[0])
        seen[shade] = seen.get(shade, -1) + 1
        axis.plot(
            [r[key] for r in points], [value(r) for r in points], marker="o", ms=4, color=shade,
            ls=_DASHES[seen[shade] % len(_DASHES)], label=points[0]["label"],
        )  # fmt: skip


def _memory_by_n(rows: list[dict]) -> Figure | None:
    """Peak extra memory of one prompt by its candidates, gradients of the inputs taken off."""
    mine = [
        {**r, "beyond": r["peak_bytes"] - r["gradient_bytes"]}
        for r in rows
        if r["group"] == "growth n" and r["peak_bytes"] is not None
    ]
    if len({r["n"] for r in mine}) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    _curves(axes, mine, "growth n", "beyond", 2**-20, "MB")
    axes.legend(frameon=False)
    first = mine[0]
    axes.set_xlabel("candidates n")
    return _finished(
        figure,
        f"Peak memory beyond the gradients, one prompt of n x {first['T']} positions\n"
        f"(H={first['H']} V={first['V']} {first['dtype']}, {first['masked']:.0%} not scored)",
    )


def _roofline(rows: list[dict]) -> Figure | None:
    """Share of the measured ceiling by vocabulary: logits in (copy), hidden states in (matmul)."""
    logits = [r for r in rows if r["group"] == "logits" and r["dtype"] == "bf16"]
    panels = {
        "logits in, bf16: share of the copy bandwidth": logits,
        "hidden states in, 60 % not scored: share of the matmul rate": [*filter(is_main, rows)],
    }
    panels = {k: [r for r in v if r["of_ceiling"]] for k, v in panels.items()}
    panels = {k: v for k, v in panels.items() if len({r["V"] for r in v}) > 1}
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(7.4 * len(panels), 5.2), squeeze=False)
    for axis, (title, mine) in zip(axes.flat, panels.items(), strict=True):
        vocabularies = sorted({row["V"] for row in mine})
        placed = [{**r, "place": vocabularies.index(r["V"])} for r in mine]
        _lines(axis, placed, "place", lambda r: r["of_ceiling"])
        axis.set_xticks(range(len(vocabularies)), [str(v) for v in vocabularies])
        axis.set_xlabel("vocabulary V")
        axis.set_ylim(0, max(1.05, 1.05 * max(row["of_ceiling"] for row in mine)))
        axis.axhline(1, color="gray", lw=0.8)
        axis.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3
        )
        axis.set_title(title, fontsize=10)
    return _finished(figure, "Share of this machine's ceiling")


def _filter(results: list[dict], _: str) -> dict[str, Figure | None]:
    """Time against tau, and against the certified error."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for which in dict.fromkeys((r["batch"], r["dtype"]) for r in results):
        own = [r for r in results if (r["batch"], r["dtype"]) == which]
        rows = [r for r in own if isinstance(r["tau"], float)]
        label = f"{', '.join(which)} (top-1 {rows[0]['top1']:.2f})"
        axes[0].plot([r["tau"] for r in rows], [r["of_floor"] for r in rows], "o-", label=label)
        told = [(certified(r), r["of_floor"]) for r in rows if 0 < certified(r) < float("inf")]
        axes[1].plot(*zip(*told, strict=True) if told else ((), ()), "o-")
    for axis, text in zip(axes, ("tau", "certified relative error"), strict=True):
        if any(len(line.get_xdata()) for line in axis.lines):
            axis.set_xscale("log", base=2)
        axis.set_xlabel(text)
        axis.axhline(1, color=_FLOOR, linewidth=1)
    axes[0].set_ylabel("time / dense floor")
    axes[0].set_ylim(0)
    axes[0].legend(frameon=False)
    return {"filter.png": figure}
