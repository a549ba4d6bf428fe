"""``pro-kernels bench``, also ``python -m bench``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.cases import PRESETS, cases_of
from bench.report import write_report
from bench.runner import Settings, run


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 0 if all went well, 1 if interrupted, 2 for a wrong call."""
    args = _parser().parse_args(argv)
    try:
        if args.list:
            print("\n".join(case.name for case in cases_of(args.preset, tuple(args.case))))
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
    folder = args.out or Path(__file__).resolve().parent / "results" / args.preset
    path = folder / "results.json"
    try:
        run(settings, path, args.device)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, marked partial", file=sys.stderr)
        _write(path, None)
        return 1
    _write(path, args.update)
    return 0


def _write(results: Path, readme: Path | None) -> None:
    for path in write_report(results, readme):
        print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pro-kernels bench",
        description="Time and weigh the fused loss against its floor and its peers.",
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="quick", help="case table")
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
        help="folder of results.json, report.md and the plots (default: bench/results/PRESET)",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="measure nothing; report this results file"
    )
    parser.add_argument(
        "--update", type=Path, metavar="README",
        help="replace the text between the bench marks of this file",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser
