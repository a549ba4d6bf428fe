"""From a results file, of either benchmark, to ``report.md`` and its plots, and into README.md.

The same file always gives the same report.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bench import tables
from bench.gpu import tables as gpu_tables
from bench.record import load
from bench.targets import outcomes
from bench.training import tables as training_tables

GPU_RESULTS = Path(__file__).resolve().parent / "results" / "gpu" / "results.json"


def write_report(results: Path, pages: Sequence[Path] = ()) -> list[Path]:
    """Write ``report.md`` and PNGs beside a results file, and its blocks in these pages.

    Without matplotlib the report has no plots and says so. What a page gets is decided by the marks
    it has: "bench" (targets and main table), "training", "measured" (ceilings and plots), "gpu". Of
    ``gpu.json``, ``gpu.md`` is written, and the block "gpu-measured".

    Raises:
        ValueError: a page without a mark of this benchmark.
    """
    data = load(results)
    folder = results.parent
    if data.get("benchmark") == "gpu":
        report = folder / "gpu.md"
        report.write_text(gpu_tables.report(data))
        for page in pages:
            tables.update_block(page, gpu_tables.summary(data), gpu_tables.BLOCK)
        return [report]
    training = data.get("benchmark") == "training"
    images = _draw(data, folder, training)
    text = (training_tables if training else tables).full_report(data, images or [])
    if images is None:
        text += "\nNo plots: matplotlib is not installed.\n"
    report = folder / "report.md"
    report.write_text(text)
    for page in pages:
        _update(page, data, folder, images or [], training)
    return [report, *(folder / name for name in images or [])]


def _update(page: Path, data: dict, folder: Path, images: list[str], training: bool) -> None:
    link = os.path.relpath(folder, page.resolve().parent).replace(os.sep, "/")
    links = {name: f"{link}/{name}" for name in images}
    more = f"\n\nAll numbers: [{link}/report.md]({link}/report.md)"
    if training:
        blocks = {training_tables.BLOCK: training_tables.summary(data, links.get("time.png"))}
    else:
        blocks = {
            tables.BLOCK: tables.summary(data, links.get("time.png")),
            tables.MEASURED: tables.details(data, links),
        }
    text = page.read_text()
    present = {name: block for name, block in blocks.items() if tables.marks(name)[0] in text}
    if not present:
        raise ValueError(f"{page} must hold the marks of one of the blocks {list(blocks)}")
    for name, block in present.items():
        tables.update_block(page, block + more, name)
    if tables.marks(tables.GPU)[0] in text:
        tables.update_block(page, _gpu_block(), tables.GPU)


def _gpu_block() -> str:
    """The targets on a GPU: from its results file where there is one."""
    if not GPU_RESULTS.exists():
        return tables.outcome_table(outcomes([], on_gpu=True))
    data = load(GPU_RESULTS)
    return tables.summary(data, None)


def _draw(data: dict, folder: Path, training: bool) -> list[str] | None:
    """File names of the plots, None without matplotlib."""
    try:
        from bench import curves, plots
        from bench.training import plots as training_plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    if training:
        return training_plots.draw_all(data, folder)
    return [*plots.draw_all(data, folder), *curves.draw_all(data, folder)]
