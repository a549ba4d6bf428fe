"""PNG plots of the training benchmark: time and memory of each step, and its head's share."""

from __future__ import annotations

from pathlib import Path

from bench.plots import panels_of, save, stacked


def draw_all(data: dict, folder: Path) -> list[str]:
    """Write every plot that the results have numbers for; returns their file names."""
    timed = panels_of(data["results"], "seconds")
    scaled = [
        {**r, "peak": r["peak_bytes"] / 2**20, "grads": r["gradient_bytes"] / 2**20}
        for r in data["results"]
        if r["peak_bytes"] is not None
    ]
    shares = [
        {**r, "percent": 100 * r["head_share"]}
        for r in data["results"]
        if r["head_share"] is not None
    ]
    figures = {
        "time.png": stacked(
            timed, f"One training step\n{data['machine']}", "seconds", _time_label, "seconds"
        ),
        "memory.png": stacked(
            panels_of(scaled, "peak"),
            "One training step: peak memory beyond model and optimizer",
            "peak",
            lambda row: f"{row['peak']:.0f} MB",
            "MB (dashed: the gradients)",
        ),
        "head.png": stacked(
            panels_of(shares, "percent"),
            "One training step: share spent between hidden states and loss",
            "percent",
            lambda row: f"{row['percent']:.0f} % of {_seconds(row)}",
            "% of the step",
        ),
    }
    return save(figures, folder)


def _time_label(row: dict) -> str:
    text = _seconds(row)
    if row["speedup"] is not None and row["provider"] != "official":
        return f"{text} ({row['speedup']:.1f}x faster)"
    if row["vs_trl"] is not None and row["provider"] != "trl-dpo":
        return f"{text} ({row['vs_trl']:.1f}x TRL)"
    return text


def _seconds(row: dict) -> str:
    return f"{row['seconds']:.3g} s" if row["seconds"] >= 0.1 else f"{row['seconds'] * 1e3:.3g} ms"
