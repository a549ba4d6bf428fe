"""The command ``pro-kernels``, also ``python -m pro_kernels``.

``train``, ``inspect``, ``eval`` and ``prepare`` belong to ``pro_trainer``, ``bench`` to that folder
of a checkout; both are imported only when asked for.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

_ELSEWHERE = {
    "train": ("pro_trainer.cli.commands", "train", "pip install 'pro-kernels[train]'"),
    "inspect": ("pro_trainer.cli.commands", "inspect", "pip install 'pro-kernels[train]'"),
    "eval": ("pro_trainer.cli.commands", "evaluate", "pip install 'pro-kernels[train]'"),
    "prepare": ("pro_trainer.cli.commands", "prepare", "pip install 'pro-kernels[train]'"),
    "bench": ("bench.cli", "command", "run it from a checkout of the repository"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code (2 for a wrong call)."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        if not str(error).startswith("PRO_KERNELS_"):  # what the environment may not say
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    if argv and argv[0] in _ELSEWHERE:
        module, function, remedy = _ELSEWHERE[argv[0]]
        if argv[0] == "bench":
            sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        try:
            run = getattr(importlib.import_module(module), function)
        except ModuleNotFoundError as error:
            print(f"error: {argv[0]} needs {error.name}: {remedy}", file=sys.stderr)
            return 2
        return run(argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "env":
        from pro_kernels import env

        return env.run(args.json)
    if args.full:
        if args.json is not None:
            parser.error("--json belongs to the short check; --full writes trust.json into --out")
        from pro_kernels.trust import report

        return report.run(args.out or Path("trust-report"))
    if args.out is not None:
        parser.error("--out belongs to check --full")
    from pro_kernels import check

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
    commands.add_parser("bench", help="benchmarks (from a checkout)")
    commands.add_parser("train", help="fine-tune a causal LM on ranked lists")
    commands.add_parser("inspect", help="lists as the model will see them, and what is cut")
    commands.add_parser("eval", help="ranking accuracy of a model on ranked lists")
    commands.add_parser("prepare", help="sample, score and rank candidates: the paper's data")
    return parser


if __name__ == "__main__":
    sys.exit(main())
