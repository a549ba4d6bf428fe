"""``pro-kernels bench``, also ``python -m bench``: the loss, or with ``--training`` whole steps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import filtering, gpu
from bench.cases import PRESETS, cases_of
from bench.model import page, resources
from bench.report import write_report
from bench.runner import Settings, run
from bench.training.cases import cases_of as training_cases
from bench.training.runner import run as run_training


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 0 if all went well, 1 if interrupted, 2 for a wrong call."""
    args = _parser().parse_args(argv)
    try:
        if args.model:
            return _model(args.resources)
        if args.gpu:
            return gpu.main(args.out, args.seconds, tuple(args.parts), tuple(args.backends))
        if args.filter:
            return _filter(args)
        args.preset = args.preset or ("full" if args.training else "quick")
        if args.list:
            table = training_cases if args.training else cases_of
            print("\n".join(case.name for case in table(args.preset, tuple(args.case))))
            return 0
        if args.report is not None:
            _write(args.report, args.update)
            return 0
        if args.repeats is not None and args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
        if args.update is not None and not args.update.is_file():
            raise ValueError(f"--update: no file {args.update}")
        return _measure(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    settings = Settings(
        args.preset, tuple(args.case), tuple(args.provider), args.repeats, not args.no_memory
    )
    name = "training" if args.training else args.preset
    folder = args.out or Path(__file__).resolve().parent / "results" / name
    path = folder / "results.json"
    try:
        (run_training if args.training else run)(settings, path, args.device)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, marked partial", file=sys.stderr)
        _write(path, None)
        return 1
    _write(path, args.update)
    return 0


def _filter(args: argparse.Namespace) -> int:
    folder = args.out or filtering.FOLDER
    if args.report is None:
        filtering.run(folder / "results.json", args.repeats or 5)
    for path in filtering.write(args.report or folder / "results.json", args.update):
        print(f"wrote {path}")
    return 0


def _model(again: bool) -> int:
    if again:
        resources.save(resources.collect())
    print(page.update(resources.load()))
    print(f"\nwrote {page.PAGE}")
    return 0


def _write(results: Path, readme: Path | None) -> None:
    for path in write_report(results, readme):
        print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pro-kernels bench",
        description="Time and weigh the fused loss, or a training step, against floor and peers.",
    )
    parser.add_argument(
        "--training", action="store_true",
        help="whole training steps against the official procedure, instead of the loss alone",
    )  # fmt: skip
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="case table (default: quick; with --training full)"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="TEXT",
        help="only cases whose name holds TEXT, or of the group TEXT (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--provider", action="append", default=[], metavar="NAME", help="only this one (repeatable)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds (default: each case's)")
    parser.add_argument("--no-memory", action="store_true", help="do not weigh")
    parser.add_argument(
        "--device", type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"), help="cpu or cuda",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder of results.json, report.md and plots (default: bench/results/PRESET, or "
        "bench/results/training)",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="measure nothing; report this results file"
    )
    parser.add_argument(
        "--update", type=Path, metavar="README",
        help="replace the text between the bench (or training) marks of this file",
    )  # fmt: skip
    parser.add_argument(
        "--filter", action="store_true",
        help="time and error of grad_filter on peaked distributions, on the CPU",
    )  # fmt: skip
    parser.add_argument(
        "--model", action="store_true",
        help="print the times predicted for a GPU and rewrite docs/performance.md",
    )  # fmt: skip
    parser.add_argument(
        "--resources", action="store_true",
        help="with --model: read registers and shared memory from the built binaries first",
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="everything that needs a GPU, at once")
    parser.add_argument(
        "--seconds", type=float, default=600.0, metavar="S", help="with --gpu: stop by then"
    )
    parser.add_argument(
        "--parts", action="append", default=[], metavar="NAME",
        help="with --gpu: only this part (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--backends", action="append", default=[], metavar="NAME",
        help="with --gpu: only this backend (repeatable)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser
