"""``python -m bench.scaling``: predictions and docs/scaling.md; ``--measure``: the gloo runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.scaling import measure, page
from bench.scaling.predict import GPUS, Batch, Model, card


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if a run was not clean or a rank failed, 2 for a wrong call."""
    args = _parser().parse_args(argv)
    try:
        batch = any(getattr(args, name) is not None for name in vars(Batch()))
        if args.measure:
            if args.gpus or batch or args.hidden is not None or args.vocab is not None:
                raise ValueError("--measure takes no head, --gpus or batch: those are predicted")
            return _measure(args)
        if args.rounds is not None:
            raise ValueError("--rounds wants --measure")
        if args.hidden is None and args.vocab is None:
            if args.gpus or batch:
                raise ValueError("--gpus and the batch want --hidden and --vocab")
            print(page.update(args.page, args.out))
            print(f"\nwrote {args.page}")
            return 0
        if args.hidden is None or args.vocab is None:
            raise ValueError("--hidden and --vocab want each other")
        print(_head(args))
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _measure(args: argparse.Namespace) -> int:
    rounds = measure.ROUNDS if args.rounds is None else args.rounds
    path = args.out / "results.json"
    data = measure.run(path, rounds)
    print(f"{page.load_line(data)}\nwrote {path}")
    return 0 if data["clean"] else 1


def _head(args: argparse.Namespace) -> str:
    """The table of one head on the GPU counts asked for."""
    for name in ("hidden", "vocab"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if wrong := [gpus for gpus in args.gpus if gpus < 1 or gpus & (gpus - 1)]:
        raise ValueError(f"--gpus must be powers of two, got {wrong[0]}")
    given = {k: getattr(args, k) for k in vars(Batch()) if getattr(args, k) is not None}
    model = Model(f"H={args.hidden} V={args.vocab}", args.hidden, args.vocab)
    return page.growth(model, Batch(**given), tuple(args.gpus) or GPUS, card()[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--page", type=Path, default=page.PAGE, help="default: docs/scaling.md")
    parser.add_argument(
        "--measure", action="store_true",
        help="run gloo ranks on this machine; exit code 1 if it was not idle",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help=f"with --measure (default: {measure.ROUNDS})")
    parser.add_argument(
        "--out", type=Path, default=measure.FOLDER, metavar="DIR",
        help="folder of results.json and plots (default: bench/results/scaling)",
    )  # fmt: skip
    parser.add_argument("--hidden", type=int, metavar="H", help="with --vocab: a head to predict")
    parser.add_argument("--vocab", type=int, metavar="V")
    parser.add_argument(
        "--gpus", type=int, action="append", default=[], metavar="N",
        help="with a head: how many (repeatable; default: 1 to 1024)",
    )  # fmt: skip
    for name, value in vars(Batch()).items():
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help=f"with a head: its batch (default: {value})"
        )
    return parser
