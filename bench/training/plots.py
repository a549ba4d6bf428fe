"""PNG plots of the training benchmark: time and memory of each step."""

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
    }
    return save(figures, folder)


def _time_label(row: dict) -> str:
    text = f"{row['seconds']:.3g} s" if row["seconds"] >= 0.1 else f"{row['seconds'] * 1e3:.3g} ms"
    if row["speedup"] is None or row["provider"] == "official":
        return text
    return f"{text} ({row['speedup']:.1f}x faster)"
