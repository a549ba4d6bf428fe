"""``python -m study --out docs [--real-data LISTS]``: run the study, write its page."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from study import report
from study.run import PROCESSES, study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the results")
    parser.add_argument("--real-data", help="file of real ranked lists with rewards")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="of one thread each")
    given = parser.parse_args(arguments)
    if given.processes < 1:
        parser.error(f"--processes must be at least 1, got {given.processes}")
    try:
        results = study(given.real_data, given.processes)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = ["python", "-m", "study", "--out", given.out.name]
    if given.real_data:
        command += ["--real-data", Path(given.real_data).name]
    results["facts"]["command"] = shlex.join(command)
    report.write(results, given.out)
    print(f"wrote {given.out}/study.md, study.json and the plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
