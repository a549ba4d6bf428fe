"""``pro-kernels bench SUITE``, also ``python -m bench SUITE``: measure, report, compare."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.engine import isolate
from bench.engine.run import DeviceLost, Settings, run
from bench.report.compare import THRESHOLD, compare
from bench.report.pages import DOCS, write_committed, write_report
from bench.suites import attach, filter, load
from bench.suites.frameworks import measure as frameworks
from bench.suites.ranks import measure as ranks

_RESULTS = isolate.ROOT / "bench" / "results"
_CUDA = torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 0 if all went well, 1 if interrupted or worse, 2 for a wrong call.

    75: a provider left the GPU unusable; the same call with ``--resume`` goes on without it.
    """
    args = _parser().parse_args(argv)
    try:
        for page in getattr(args, "update", ()):
            if not page.is_file():
                raise ValueError(f"--update: no file {page}")
        for name in ("repeats", "seconds"):
            value = getattr(args, name, None)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be > 0, got {value}")
        return args.action(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def command(argv: list[str] | None = None) -> int:
    """``main``; what may die (the suites with peers) in a process of its own."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    if args.action is not _providers or args.list:
        return main(argv)
    return isolate.watched(argv, _path(args), args.device.type == "cuda")


def _providers(args: argparse.Namespace) -> int:
    """The suites ``loss`` and ``step``."""
    suite = load(args.suite)
    if args.list:
        cases = suite.cases(args.preset, tuple(args.case), args.device.type == "cuda")
        print("\n".join(case.name for case in cases))
        return 0
    settings = Settings(
        args.preset, tuple(args.case), tuple(args.provider), tuple(args.without), args.repeats,
        not args.no_memory, seconds=args.seconds,
    )  # fmt: skip
    try:
        run(suite, settings, _path(args), args.device, resume=args.resume)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, marked partial", file=sys.stderr)
        _write(_path(args), [])
        return 1
    except DeviceLost as lost:
        print(f"the GPU was lost in {lost}; --resume goes on without it", file=sys.stderr)
        return isolate.DEVICE_LOST
    return _write(_path(args), args.update)


def _ours(args: argparse.Namespace) -> int:
    """A suite that measures ours alone: ``run(path, rounds)``."""
    data = args.module.run(_path(args), args.repeats or args.module.ROUNDS)
    return _write(_path(args), args.update) or int(not data.get("clean", True))


def _frameworks(args: argparse.Namespace) -> int:
    data = frameworks.run(_path(args), args.folder, args.model, args.only)
    return _write(_path(args), args.update) or int(any("note" in row for row in data["results"]))


def _gpu(args: argparse.Namespace) -> int:
    from bench.suites.gpu import jobs

    device = torch.device("cpu" if args.dry else "cuda")
    if not args.dry and not _CUDA:
        raise ValueError(
            f"gpu needs a GPU, and torch {torch.__version__} finds none (built for CUDA: "
            f"{torch.version.cuda or 'no'}); nothing was measured. --dry rehearses it on the CPU"
        )
    end = time.monotonic() + 0.97 * args.seconds  # the pages take the rest
    jobs.turns(device, args.parts)  # names are right, before anything is built
    jobs.prepare(device, end)
    folder = isolate.ROOT / "build" / "gpu-round" if args.dry else _RESULTS / "gpu" / "round"
    path = (args.out or folder) / "results.json"
    todo, left = jobs.turns(device, args.parts), end - time.monotonic()
    data = jobs.run(todo, path, left, device, again=bool(args.parts))
    if not data["complete"]:
        print("not all of it was measured: the same call goes on where this one stopped")
    ended = {part["status"] for part in data["parts"]}
    pages = args.update or ([] if args.dry or args.out else [DOCS / "benchmarks.md"])
    return _write(path, pages) or int(bool(ended & {"failed", "timeout"}))


def _report(args: argparse.Namespace) -> int:
    if not args.results:
        print("\n".join(f"wrote {path}" for path in write_committed(_RESULTS)))
    for path in args.results:
        _write(path, args.update)
    return 0


def _compare(args: argparse.Namespace) -> int:
    text, worse = compare(*args.files, threshold=args.threshold)
    print(text)
    return 1 if worse else 0


def _write(results: Path, pages: list[Path]) -> int:
    for path in write_report(results, pages):
        print(f"wrote {path}")
    return 0


def _path(args: argparse.Namespace) -> Path:
    name = f"{args.suite}-{args.preset}" if args.action is _providers else args.suite
    return (args.out or _RESULTS / name) / "results.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pro-kernels bench",
        description="Time and weigh the fused loss and training steps against floors and peers.",
    )
    commands = parser.add_subparsers(dest="suite", required=True, metavar="COMMAND")

    def add(name: str, text: str, action: Callable, *options: str, **known: Any) -> Callable:
        """A command with these of the options that several have; its ``add_argument``."""
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(action=action, **known)
        for option in options:
            one.add_argument(option, **_SHARED[option])
        return one.add_argument

    measuring = ("--repeats", "--out", "--update")
    for name, text in (
        ("loss", "The loss alone, forward and backward, against floor and peers."),
        ("step", "Whole training steps against the official procedure and TRL."),
    ):
        option = add(name, text, _providers, *measuring)
        presets, device = ", ".join(load(name).presets), "cuda" if _CUDA else "cpu"
        option("--preset", default="gpu-quick" if _CUDA else "cpu-small", metavar="NAME",
               help=f"case table: {presets} (default: %(default)s)")  # fmt: skip
        for flag, what in (
            ("--case", "only cases whose name holds this, or of the group of this name"),
            ("--provider", "only this one"),
            ("--without", "not this one"),
        ):
            several = {"action": "append", "default": [], "metavar": "NAME"}
            option(flag, **several, help=f"{what} (repeatable)")
        option("--no-memory", action="store_true", help="do not weigh")
        option("--device", type=torch.device, default=device, help="default: %(default)s")
        option("--seconds", type=float, metavar="S", help="start nothing more after S seconds")
        option("--resume", action="store_true", help="go on with an interrupted results file")
        option("--list", action="store_true", help="print the cases and stop")
    what = "Time and error of grad_filter on real models and peaked distributions."
    add("filter", what, _ours, *measuring, module=filter)
    what = "What attach costs, and what the swap under TRL saves."
    add("attach", what, _ours, *measuring, module=attach)
    add("ranks", "The head over ranks on this machine, over gloo.", _ours, *measuring, module=ranks)
    what = "DPO in other frameworks, without and with pro-kernels run."
    option = add("frameworks", what, _frameworks, "--out", "--update")
    option("--folder", type=Path, default=Path(".frameworks"), help="of the environments")
    option("--model", type=Path, required=True, help="folder made by tests/models/build.py")
    option("--only", nargs="+", default=[""], metavar="TEXT", help="those whose name holds TEXT")
    what = "What a card must tell us, part by part; goes on where it stopped."
    option = add("gpu", what, _gpu, "--out", "--update")
    option("--seconds", type=float, default=540.0, metavar="S", help="default: %(default)s")
    option("--parts", nargs="+", default=[], metavar="NAME", help="only these, even if measured")
    option("--dry", action="store_true", help="rehearse it on the CPU, with tiny sizes")
    what = "Write reports, plots and pages from results; of all committed ones where none is named."
    option = add("report", what, _report, "--update")
    option("results", type=Path, nargs="*", metavar="JSON")
    what = "Ratios of two results files, or pytest-benchmark's; exit code 1 if one of ours is worse"
    option = add("compare", f"{what} by more than the threshold.", _compare)
    option("files", type=Path, nargs=2, metavar="JSON")
    option("--threshold", type=float, default=THRESHOLD, help="default: %(default)s")
    return parser


_SHARED = {
    "--repeats": {"type": int, "metavar": "N", "help": "rounds (default: those of the suite)"},
    "--out": {"type": Path, "metavar": "DIR", "help": "folder of the results (default: in bench/)"},
    "--update": {"type": Path, "action": "append", "default": [], "metavar": "PAGE",
                 "help": "replace the text between this suite's marks in PAGE (repeatable)"},
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
