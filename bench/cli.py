"""``pro-kernels bench``, also ``python -m bench``: the loss, or with ``--training`` whole steps."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import attached, filtering, gpu
from bench.case_run import DeviceLost, Settings
from bench.compare import THRESHOLD, compare
from bench.presets import NAMES, cases_of
from bench.report import write_report
from bench.runner import run
from bench.training.cases import cases_of as training_cases
from bench.training.runner import run as run_training

_RESULTS = Path(__file__).resolve().parent / "results"
DEVICE_LOST = 75
STALLED = 120.0  # seconds; torch.compile of a peer takes half of that
_CHILDREN = 8


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 0 if all went well, 1 if interrupted or worse, 2 for a wrong call.

    75: a provider left the GPU unusable; the same call with ``--resume`` goes on without it.
    """
    args = _parsed(argv)
    try:
        if args.gpu:
            seconds = gpu.SECONDS if args.seconds is None else args.seconds
            return gpu.main(args.out, seconds, tuple(args.parts), tuple(args.backends))
        if args.compare is not None:
            return _compare(args)
        if args.list:
            print("\n".join(case.name for case in _cases(args)))
            return 0
        if args.report is not None:
            _write(args.report, args.update)
            return 0
        if args.repeats is not None and args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
        if args.seconds is not None and not args.seconds > 0:
            raise ValueError(f"--seconds must be > 0, got {args.seconds}")
        for page_ in args.update:
            if not page_.is_file():
                raise ValueError(f"--update: no file {page_}")
        if args.filter or args.attached:
            module = filtering if args.filter else attached
            results = (args.out or module.FOLDER) / "results.json"
            module.run(results, args.repeats or module.ROUNDS)
            _write(results, args.update)
            return 0
        return _measure(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def command(argv: list[str] | None = None) -> int:
    """``main`` in a process that may die: a peer that crashes or hangs costs its own row only.

    The loss's benchmark runs in a child; where that dies of a signal, loses the GPU or, on a GPU,
    writes nothing for ``STALLED`` seconds, another goes on with ``--resume``, which leaves out who
    was running.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parsed(argv)
    elsewhere = (args.gpu, args.filter, args.attached, args.compare,
                 args.list)  # fmt: skip
    if args.report or args.training or any(elsewhere):
        return main(argv)
    child = [sys.executable, "-m", "bench.cli", *argv]
    code = 0
    for _ in range(_CHILDREN):
        code = _watched(child, _results_path(args), args.device.type == "cuda")
        if code >= 0 and code != DEVICE_LOST:
            return code
        print(f"the process ended with code {code}: going on without who ran", file=sys.stderr)
        child = [sys.executable, "-m", "bench.cli", *argv, "--resume"]
    return 1 if code < 0 else code


def _watched(child: list[str], results: Path, on_gpu: bool) -> int:
    """The child's exit code; killed where its results file stands still."""
    started = time.time()
    process = subprocess.Popen(child, cwd=_RESULTS.parent.parent)
    try:
        while True:
            try:
                return process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                written = results.stat().st_mtime if results.exists() else started
                if on_gpu and time.time() - max(written, started) > STALLED:
                    process.kill()
    except KeyboardInterrupt:  # it has it too, and keeps what it measured
        return process.wait()


def _cases(args: argparse.Namespace) -> list:
    patterns, on_gpu = tuple(args.case), args.device.type == "cuda"
    if args.training:
        return training_cases(args.preset, patterns, on_gpu)
    return cases_of(args.preset, patterns, on_gpu)


def _measure(args: argparse.Namespace) -> int:
    settings = Settings(
        args.preset, tuple(args.case), tuple(args.provider), tuple(args.without), args.repeats,
        not args.no_memory, seconds=args.seconds,
    )  # fmt: skip
    path = _results_path(args)
    try:
        if args.training:
            run_training(settings, path, args.device)
        else:
            run(settings, path, args.device, resume=args.resume)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, marked partial", file=sys.stderr)
        _write(path, [])
        return 1
    except DeviceLost as lost:
        print(f"the GPU was lost in {lost}; --resume goes on without it", file=sys.stderr)
        return DEVICE_LOST
    _write(path, args.update)
    return 0


def _results_path(args: argparse.Namespace) -> Path:
    name = f"training-{args.preset}" if args.training else args.preset
    return (args.out or _RESULTS / name) / "results.json"


def _compare(args: argparse.Namespace) -> int:
    text, worse = compare(*args.compare, threshold=args.threshold)
    print(text)
    return 1 if worse else 0


def _write(results: Path, pages: list[Path]) -> None:
    for path in write_report(results, pages):
        print(f"wrote {path}")


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    args = _parser().parse_args(argv)
    args.preset = args.preset or ("gpu-quick" if args.device.type == "cuda" else "cpu-small")
    return args


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
        "--preset", choices=NAMES, default=None, help="case table (default: cpu-small, on a GPU "
        "gpu-quick); a model's name measures its head",
    )  # fmt: skip
    parser.add_argument(
        "--case", action="append", default=[], metavar="TEXT",
        help="only cases whose name holds TEXT, or of the group TEXT (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--provider", action="append", default=[], metavar="NAME", help="only this one (repeatable)"
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="NAME", help="not this one (repeatable)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds (default: each case's)")
    parser.add_argument("--no-memory", action="store_true", help="do not weigh")
    parser.add_argument(
        "--device", type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"), help="cpu or cuda",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of results.json, report.md and plots (default: bench/results/PRESET)",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="start nothing more after S seconds"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run's results file"
    )
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="measure nothing; report this results file"
    )
    parser.add_argument(
        "--update", type=Path, action="append", default=[], metavar="FILE",
        help="replace the text between this benchmark's marks in FILE (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("OLD", "NEW"),
        help="measure nothing; ratios of two results files (or pytest-benchmark's JSON); exit code "
        "1 if one is worse by more than the threshold",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, metavar="SHARE",
        help=f"with --compare (default: {THRESHOLD})",
    )  # fmt: skip
    parser.add_argument(
        "--filter", action="store_true",
        help="time and error of grad_filter on peaked distributions, on the CPU",
    )  # fmt: skip
    parser.add_argument(
        "--attached", action="store_true",
        help="what attach costs, and what the swap under TRL saves, on the CPU",
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="everything that needs a GPU, at once")
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


if __name__ == "__main__":
    sys.exit(main())
