"""The command ``pro-kernels``, also ``python -m pro_kernels``.

``env`` and ``check`` are here, ``bench`` in that folder of a checkout, all others in
``pro_trainer.cli.main``; each is imported only when asked for.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from pro_kernels.options import SettingError


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code (2 for a wrong call)."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    if argv and argv[0] == "bench":
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        try:
            bench = importlib.import_module("bench.cli")
        except ModuleNotFoundError as error:
            print(f"error: bench needs {error.name}: run it from a checkout", file=sys.stderr)
            return 2
        return bench.command(argv[1:])
    if not argv or argv[0] not in ("env", "check"):
        return importlib.import_module("pro_trainer.cli.main").main(argv)
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "env":
        from pro_kernels.selfcheck import env

        return env.run(args.json)
    if args.full:
        if args.json is not None:
            parser.error("--json belongs to the short check; --full writes trust.json into --out")
        from pro_kernels.selfcheck.trust import report

        return report.run(args.out or Path("trust-report"))
    if args.out is not None:
        parser.error("--out belongs to check --full")
    from pro_kernels.selfcheck import check

    return check.run(args.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pro-kernels", description="Fused kernels for preference losses."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="what is built and usable here, and why the rest is not")
    env.add_argument("--json", action="store_true", help="print JSON")
    check = commands.add_parser(
        "check", help="fused path against the reference; exit code 1 if off"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    check.add_argument("--full", action="store_true", help="the trust report: every path and peer")
    check.add_argument("--out", type=Path, metavar="FOLDER", help="of --full (./trust-report)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
