"""From a results file of any benchmark to its report, its plots and its blocks in a page.

The same file always gives the same report.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bench import attached, filtering, tables
from bench.frameworks import page as frameworks
from bench.gpu import tables as gpu_tables
from bench.record import load
from bench.training import tables as training_tables

_BENCHMARKS = {
    "attached": attached, "filter": filtering, "frameworks": frameworks, "gpu": gpu_tables,
    "training": training_tables,
}  # fmt: skip


def write_report(results: Path, pages: Sequence[Path] = ()) -> list[Path]:
    """Write the report and PNGs beside a results file, and its blocks in these pages.

    Without matplotlib the report has no plots and says so. A page gets the blocks that it has marks
    for.

    Raises:
        ValueError: a page without a mark of this benchmark.
    """
    data, folder = load(results), results.parent
    images = _draw(data, folder)
    written = [folder / name for name in images or []]
    if (report := _report(data)) is not None:
        text = _tables(data).full_report(data, images or [])
        if images is None:
            text += "\nNo plots: matplotlib is not installed.\n"
        (folder / report).write_text(text)
        written.insert(0, folder / report)
    for page in pages:
        found = blocks(results, page)
        present = [name for name in found if tables.marks(name)[0] in page.read_text()]
        if not present:
            raise ValueError(f"{page} must hold the marks of one of the blocks {list(found)}")
        for name in present:
            tables.update_block(page, found[name], name)
    return written


def blocks(results: Path, page: Path) -> dict[str, str]:
    """What stands between the marks of ``page``, by name; with the plots that are there."""
    data, folder = load(results), results.parent
    link = os.path.relpath(folder.resolve(), page.resolve().parent).replace(os.sep, "/")
    found = _tables(data).blocks(data, {p.name: f"{link}/{p.name}" for p in folder.glob("*.png")})
    report = _report(data)
    more = "" if report is None else f"\n\n[All numbers]({link}/{report})"
    return {name: text + more for name, text in found.items()}


def _tables(data: dict) -> ModuleType:
    return _BENCHMARKS.get(data.get("benchmark"), tables)


def _report(data: dict) -> str | None:
    """The name of the report's file, None where the blocks say all."""
    return {"attached": None, "frameworks": None, "gpu": "gpu.md"}.get(
        data.get("benchmark"), "report.md"
    )


def _draw(data: dict, folder: Path) -> list[str] | None:
    """File names of the plots, None without matplotlib."""
    kind = data.get("benchmark")
    if kind in ("attached", "frameworks", "gpu"):
        return []
    try:
        from bench import curves, plots
        from bench.training import plots as training_plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    if kind == "filter":
        return filtering.draw(data, folder)
    if kind == "training":
        return training_plots.draw_all(data, folder)
    return [*plots.draw_all(data, folder), *curves.draw_all(data, folder)]
