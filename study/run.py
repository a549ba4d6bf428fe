"""Both parts of the study as rounds of jobs in worker processes, and what they ran on.

A part is a generator that yields jobs which do not depend on each other, and is sent their results.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import io
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from study import known, real
from study.report import Results

PROCESSES = 2
_PACKAGES = ("torch", "transformers", "pro-kernels")
Job = tuple[Callable[..., Any], tuple[Any, ...]]
Round = Callable[[Sequence[Job]], list[Any]]  # runs independent jobs, results in their order
Part = Generator[list[Job], list[Any], dict[str, Any]]  # yields rounds, is sent their results


def study(
    real_data: str | None = None,
    processes: int = PROCESSES,
    known_settings: known.KnownSettings | None = None,
    real_settings: real.RealSettings | None = None,
) -> Results:
    """Run both parts, the second with ``real_data`` only, side by side.

    Raises:
        DataError, ValueError: real data that cannot be used.
    """
    started, busy, facts = time.monotonic(), sum(os.times()[:4]), _facts(processes)
    known_settings = known_settings or known.KnownSettings()
    real_settings = real_settings or real.RealSettings()
    if real_data:
        real.read(real_settings, real_data)  # bad data shows before any work
    with tempfile.TemporaryDirectory(prefix="pro_study_") as name, _workers(processes) as run:
        parts = {"known": known_part(known_settings, Path(name))}
        if real_data:  # first, since its jobs are the long ones
            parts = {"real": real_part(real_settings, real_data, Path(name)), **parts}
        results = _side_by_side(parts, run)
    seconds = time.monotonic() - started
    facts["processor_seconds"] = sum(os.times()[:4]) - busy  # of the workers too: they have ended
    return {"facts": facts, "seconds": seconds, "real": None, **results}


def known_part(settings: known.KnownSettings, folder: Path) -> Part:
    """Clones; the choice of learning rates; the runs that are reported."""
    seeds = (*settings.choice_seeds, *settings.seeds)
    clones = yield [(known.clone, (settings, seed, folder)) for seed in seeds]
    clones = clones[len(settings.choice_seeds) :]
    tried = yield [(known.fit, (settings, run, folder)) for run in known.choices(settings)]
    runs = known.final_fits(settings, known.best_rates(tried))
    fits = yield [(known.fit, (settings, run, folder)) for run in runs]
    return {
        "settings": asdict(settings),
        "summary": known.summary(settings, clones, fits),
        "advantages": known.advantages(settings, fits),
        "clones": clones,
        "choices": tried,
        "fits": fits,
    }


def real_part(settings: real.RealSettings, path: str, folder: Path) -> Part:
    """The pretrained model; the choice of settings; the runs that are reported."""
    (pretrained,) = yield [(real.pretrain, (settings, path, folder))]
    tried = yield [(real.rank, (settings, path, run, folder)) for run in real.choices(settings)]
    runs = real.final_runs(settings, tried)
    ranked = yield [(real.rank, (settings, path, run, folder)) for run in runs]
    return {
        "settings": asdict(settings),
        "pretrain": pretrained,
        "choices": tried,
        "runs": sorted(ranked, key=lambda run: run["candidates"]),
    }


def _side_by_side(parts: dict[str, Part], run: Round) -> dict[str, Any]:
    """Run the parts' rounds together, the first of all, then the second ...; results by name."""
    waiting = {name: next(part) for name, part in parts.items()}
    results: dict[str, Any] = {}
    while waiting:
        owners = [name for name, jobs in waiting.items() for _ in jobs]
        done = run([job for jobs in waiting.values() for job in jobs])
        for name in list(waiting):
            own = [x for owner, x in zip(owners, done, strict=True) if owner == name]
            try:
                waiting[name] = parts[name].send(own)
            except StopIteration as end:
                results[name] = end.value
                del waiting[name]
    return results


@contextlib.contextmanager
def _workers(processes: int) -> Iterator[Round]:
    """A function that runs a round of jobs and returns their results in order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_one_quiet_thread) as pool:

        def run(jobs: Sequence[Job]) -> list[Any]:
            started = time.monotonic()
            futures = [pool.submit(_quietly, function, arguments) for function, arguments in jobs]
            results = []
            try:
                for done, future in enumerate(futures, 1):
                    results.append(future.result())
                    minutes = (time.monotonic() - started) / 60
                    print(f"job {done} of {len(jobs)}, {minutes:.1f} minutes", flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return results

        yield run


def _one_quiet_thread() -> None:
    import datasets
    from transformers.utils import logging

    torch.set_num_threads(1)  # as fast for so small a model; two runs go side by side
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _quietly(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def _facts(processes: int) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[3]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} threads",
        "processes": processes,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _git(root, "rev-parse", "--short=12", "HEAD"),
        "modified": bool(_git(root, "status", "--porcelain")),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
