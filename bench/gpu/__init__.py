"""Everything that needs a GPU, in one command: ``python -m bench --gpu --out FOLDER``.

Offline, with the torch and Triton that are there; ``make bench-gpu`` is the same. FOLDER gets
``gpu.json`` and ``gpu.md`` (builds, tests, kernels against the model's predictions) and, of the
preset ``gpu`` with every peer that is installed, ``results.json``, ``report.md`` and plots;
``training`` the same of whole training steps of a model of half a billion parameters.

``parts`` (what is measured), ``measure`` (how), ``worker`` (one backend's parts in a process of its
own), ``jobs`` (runs the processes against the clock and keeps what they say), ``tables`` (the
Markdown).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bench.gpu import jobs, tables

NO_GPU = 2
SECONDS = 480.0


def main(
    out: Path | None, seconds: float, names: tuple[str, ...] = (), backends: tuple[str, ...] = ()
) -> int:
    """Run all jobs and write gpu.json and gpu.md; 0 if every part went well, 1 if not, 2 no GPU.

    Raises:
        ValueError: no folder, no time, or an unknown part or backend.
    """
    if out is None:
        raise ValueError("--gpu needs --out FOLDER")
    if not seconds > 0:
        raise ValueError(f"--seconds must be > 0, got {seconds}")
    chosen = jobs.make_jobs(out, names, backends)
    if not torch.cuda.is_available():
        print(
            f"error: --gpu needs a GPU, and torch {torch.__version__} finds none "
            f"(built for CUDA: {torch.version.cuda or 'no'}); nothing was measured",
            file=sys.stderr,
        )
        return NO_GPU
    data = jobs.run(chosen, out / "gpu.json", seconds)
    (out / "gpu.md").write_text(tables.full_report(data))
    print(f"wrote {out / 'gpu.json'}\nwrote {out / 'gpu.md'}")
    return 0 if all(part["status"] in ("ok", "refused") for part in data["parts"]) else 1
