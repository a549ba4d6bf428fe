"""``python -m bench.scaling``: gloo ranks on this machine, and docs/scaling.md from them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.scaling import measure, page
from bench.tables import update_block


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if a run was not clean or a rank failed, 2 for a wrong call."""
    args = _parser().parse_args(argv)
    path = args.out / "results.json"
    try:
        if args.report:
            data = measure.read(path)
        else:
            data = measure.run(path, args.rounds)
            print(f"{page.load_line(data)}\nwrote {path}")
        update_block(args.page, page.measured_block(data), page.BLOCK)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.page}")
    return 0 if args.report or data["clean"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--page", type=Path, default=page.PAGE, help="default: docs/scaling.md")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; write the page from the results"
    )
    parser.add_argument(
        "--rounds", type=int, default=measure.ROUNDS, help=f"default: {measure.ROUNDS}"
    )
    parser.add_argument(
        "--out", type=Path, default=measure.FOLDER, metavar="DIR",
        help="folder of results.json (default: bench/results/scaling)",
    )  # fmt: skip
    return parser
