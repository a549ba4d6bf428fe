"""From a results file to its report, its plots and its blocks in a page.

The same file always gives the same report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.engine.record import load
from bench.report import providers, round, suites
from bench.report.suites import Links
from bench.report.tables import block_of, update_block

DOCS = Path(__file__).resolve().parents[2] / "docs"


class Report(NamedTuple):
    """What is made of a suite's results file."""

    blocks: Callable[[dict, Links], dict[str, str]]  # what pages show, by the names of the blocks
    # report.md, given the plots beside it; None where the blocks say all.
    text: Callable[[dict, Sequence[str]], str] | None = None


REPORTS = {
    "loss": Report(providers.loss_blocks, providers.loss_report),
    "step": Report(providers.step_blocks, providers.step_report),
    "filter": Report(suites.filter_blocks, suites.filter_report),
    "attach": Report(suites.attach_blocks),
    "ranks": Report(suites.ranks_blocks),
    "gpu-round": Report(round.blocks, round.report),
    "frameworks": Report(suites.frameworks_blocks),
}


def write_report(results: Path, pages: Sequence[Path] = ()) -> list[Path]:
    """Write the report and PNGs beside a results file, and its blocks in these pages.

    Without matplotlib the report has no plots and says so. A page gets the blocks that it has marks
    for.

    Raises:
        ValueError: a page without a mark of this benchmark.
    """
    data, folder = load(results), results.parent
    report, images = REPORTS[data["benchmark"]], _draw(data, folder)
    written = [folder / name for name in images or []]
    if report.text is not None:
        text = report.text(data, images or [])
        if images is None:
            text += "\nNo plots: matplotlib is not installed.\n"
        (folder / "report.md").write_text(text)
        written.insert(0, folder / "report.md")
    for page in pages:
        found = blocks(results, page)
        present = [name for name in found if block_of(page, name) is not None]
        if not present:
            raise ValueError(f"{page} must hold the marks of one of the blocks {list(found)}")
        for name in present:
            update_block(page, found[name], name)
    return written


def write_committed(folder: Path) -> list[Path]:
    """Reports, plots and pages of every results file under ``folder``."""
    pages = [page for page in sorted(DOCS.rglob("*.md")) if ":begin -->" in page.read_text()]
    written: list[Path] = []
    for results in committed(folder):
        names = blocks(results, DOCS / "x.md")
        own = [p for p in pages if any(block_of(p, name) is not None for name in names)]
        written += [*write_report(results, own), *own]
    return written


def committed(folder: Path) -> list[Path]:
    """Every results file under ``folder``."""
    return sorted(folder.rglob("results.json"))


def blocks(results: Path, page: Path) -> dict[str, str]:
    """What stands between the marks of ``page``, by name; with the plots that are there."""
    data, folder = load(results), results.parent
    report = REPORTS[data["benchmark"]]
    link = os.path.relpath(folder.resolve(), page.resolve().parent).replace(os.sep, "/")
    found = report.blocks(data, {p.name: f"{link}/{p.name}" for p in folder.glob("*.png")})
    more = f"\n\n[All numbers]({link}/report.md)" if report.text else ""
    return {name: text + more for name, text in found.items()}


def _draw(data: dict, folder: Path) -> list[str] | None:
    """File names of the plots, None without matplotlib."""
    try:
        from bench.report import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    return plots.draw(data, folder)
