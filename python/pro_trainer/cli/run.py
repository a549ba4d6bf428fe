"""``pro-kernels run``: any training command, with the causal LMs attached that it loads.

The command's Python processes, and those that they start, find ``pro_kernels/hook`` on PYTHONPATH.
Each leaves a report in a folder; what all of them say is one line at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

_USAGE = "pro-kernels run [--rows distinct] [--explain] -- COMMAND ..."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise ValueError: one line, as of the other commands."""
        raise ValueError(message)


def run(argv: Sequence[str]) -> int:
    """Run a command with its models attached; returns its exit code (128 + n after signal n)."""
    at = argv.index("--") if "--" in argv else len(argv)
    command = argv[at + 1 :]
    try:
        given = _parser().parse_args(argv[:at])
        if not command:
            raise ValueError("there is no command")
    except ValueError as error:
        print(f"error: {error}; usage: {_USAGE}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="pro-kernels-run-") as folder:
        try:
            process = subprocess.Popen(command, env=_environment(folder, given))
        except OSError as error:
            print(f"error: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
            return 127 if isinstance(error, FileNotFoundError) else 126
        code = _wait(process)
        print(f"pro-kernels run: {summary(_reports(Path(folder)))}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pro-kernels run",
        usage=_USAGE,
        description="Run a training command. Every causal LM that transformers loads in it, or in "
        "a process that it starts, is attached (pk.attach) where that computes the same. No file "
        "is changed. The last line says what was attached and what that left out, or why not.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rows",
        choices=("padded", "distinct"),
        default="padded",
        help="distinct: run every token of a batch once, where a model can (default: padded)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say what becomes of each model when it is loaded (PRO_KERNELS_EXPLAIN=1)",
    )
    return parser


def _environment(folder: str, given: argparse.Namespace) -> dict[str, str]:
    spec = find_spec("pro_kernels")  # not imported: that would take torch
    assert spec is not None and spec.origin is not None
    paths = (str(Path(spec.origin).with_name("hook")), os.environ.get("PYTHONPATH"))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PRO_KERNELS_RUN": folder,
        "PRO_KERNELS_RUN_ROWS": given.rows,
        **({"PRO_KERNELS_EXPLAIN": "1"} if given.explain else {}),
    }


def _wait(process: subprocess.Popen) -> int:
    """The exit code of a process, which gets the signals that this one gets."""

    def forward(number: int, _: Any) -> None:
        if number != signal.SIGINT or not _typed():
            process.send_signal(number)

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, forward)
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _typed() -> bool:
    """Whether Ctrl-C on the terminal reaches the command by itself, as one of the foreground."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return os.name == "nt"


def _reports(folder: Path) -> Iterable[dict[str, dict[str, int]]]:
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(ValueError):  # of a process that was killed while it wrote
            yield json.loads(path.read_text())


def summary(reports: Iterable[dict[str, dict[str, int]]]) -> str:
    """One line on the reports of all processes (``pro_kernels.models.loaded``)."""
    total: defaultdict[str, Counter[str]] = defaultdict(Counter)
    processes = 0
    for report in reports:
        processes += bool(report.get("attached"))
        for kind, numbers in report.items():
            total[kind].update(numbers)
    tokens, logits = total["tokens"], total["logits"]
    names = ", ".join(f"{n} {name}" for name, n in sorted(total["attached"].items()))
    said = [f"attached {names} in {processes} process{'es' * (processes > 1)}."]
    if not processes:
        said = ["nothing was attached."]
    if tokens["padded"]:
        share = 1 - tokens["run"] / tokens["padded"]
        said.append(f"{share:.0%} of {tokens['padded']} tokens were not run.")
    if logits["rows"]:
        share = 1 - logits["made"] / logits["rows"]
        said.append(f"{share:.0%} of the logits of {logits['rows']} tokens were never made.")
    elif processes:
        said.append("No logits were left out.")
    others = total["said"] + Counter({f"{x}.": n for x, n in total["failed"].items()})
    said += [text if n == 1 else f"{text} ({n} times)" for text, n in others.items()]
    if not processes and not others:
        said.append("No causal LM was loaded by transformers.")
    return " ".join(said)
