"""``python -m study --model MODEL --data LISTS``: run the study, write its page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pro_trainer.models import quiet
from study import report
from study.run import METHODS, Settings, study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("--model", required=True, help="folder (or hub name) of a causal LM")
    parser.add_argument("--data", required=True, help="file of ranked lists with rewards")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page")
    parser.add_argument(
        "--work", type=Path, default=Path("study-runs"), help="folder of the single runs"
    )
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(METHODS), metavar="METHOD",
        help=f"these, with one seed each: {', '.join(METHODS)}",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    if given.processes < 1:
        parser.error(f"--processes must be at least 1, got {given.processes}")
    try:
        with quiet():
            settings = Settings(tuple((x, 1) for x in given.only)) if given.only else None
            found = study(given.model, given.data, given.work, settings, given.processes)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = f"make study MODEL={Path(given.model).name} DATA={Path(given.data).name}"
    report.write({**found, "facts": report.facts(given.processes, command)}, given.out)
    print(f"wrote {given.out}/study.md, study.json and study.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
