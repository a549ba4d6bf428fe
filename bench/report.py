"""From a results file, of either benchmark, to ``report.md`` and its plots, and into README.md.

The same file always gives the same report.
"""

from __future__ import annotations

import os
from pathlib import Path

from bench import tables
from bench.record import load
from bench.training import tables as training_tables


def write_report(results: Path, readme: Path | None = None) -> list[Path]:
    """Write ``report.md`` and PNGs beside a results file; update README's block if given.

    Without matplotlib the report has no plots and says so.
    """
    data = load(results)
    folder = results.parent
    training = data.get("benchmark") == "training"
    pages = training_tables if training else tables
    images = _draw(data, folder, training)
    text = pages.full_report(data, images or [])
    if images is None:
        text += "\nNo plots: matplotlib is not installed.\n"
    report = folder / "report.md"
    report.write_text(text)
    if readme is not None:
        link = os.path.relpath(folder, readme.resolve().parent).replace(os.sep, "/")
        image = f"{link}/time.png" if "time.png" in (images or []) else None
        block = pages.summary(data, image)
        block += f"\n\nAll numbers: [{link}/report.md]({link}/report.md)"
        tables.update_block(readme, block, pages.BLOCK)
    return [report, *(folder / name for name in images or [])]


def _draw(data: dict, folder: Path, training: bool) -> list[str] | None:
    """File names of the plots, None without matplotlib."""
    try:
        from bench import plots
        from bench.training import plots as training_plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    return (training_plots if training else plots).draw_all(data, folder)
