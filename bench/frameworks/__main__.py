"""``python -m bench.frameworks``: install, run, and rewrite docs/integrations/frameworks.md."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from bench.frameworks import measure, page, prepare
from bench.frameworks.table import FRAMEWORKS
from bench.record import Record, facts, load
from bench.report import write_report


def main(argv: list[str] | None = None) -> int:
    """0 if every run ended well, 1 if not."""
    args = _parser().parse_args(argv)
    model = prepare.model(args.model.expanduser(), args.folder / "model")
    pairs = prepare.pairs(args.folder / "data")
    rows = load(args.out)["results"] if args.out.exists() else []
    ours = {**facts(torch.device("cpu"), packages=("pro-kernels",)), "threads": measure.THREADS}
    record = Record(args.out, {**ours, "benchmark": "frameworks"})
    chosen = [x for x in FRAMEWORKS if any(text in x.key for text in args.only)]
    names = [x.key for x in chosen]
    record.add([row for row in rows if row["framework"] not in names])  # are not measured again
    for framework in chosen:
        python = prepare.environment(args.folder.absolute(), framework)
        for way in measure.WAYS:
            record.add([measure.row(framework, way, python, model, pairs)])
            print(page.cells(record.data["results"][-1], record.data["results"]), flush=True)
    record.finish()
    write_report(args.out, [page.PAGE])
    return int(any("note" in row for row in record.data["results"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.frameworks", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".frameworks"), help="environments")
    parser.add_argument("--model", type=Path, required=True, help="by tests/models/build.py")
    parser.add_argument("--out", type=Path, default=page.RESULTS, help="the results file")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="frameworks whose name holds TEXT"
    )
    return parser


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)  # the frameworks' environments say what they see
    sys.exit(main())
