"""What may die runs in a process of its own: the weighing of a provider, or a whole run.

    python -m bench.engine.isolate SUITE PROVIDER DEVICE

is the child that weighs: cases on its standard input, one line of JSON a case on its output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.engine import memory
from bench.engine.timing import describe

ROOT = Path(__file__).resolve().parents[2]
MARK = "@bench "
DEVICE_LOST = 75  # exit code of a run in which a provider left the GPU unusable
STALLED = 120.0  # seconds; torch.compile of a peer takes half of that
_CHILDREN = 8


def weigh(
    suite: str,
    provider: str,
    cases: list,
    device: torch.device,
    on_answer: Callable[[dict], None],
) -> None:
    """Weigh one provider on several cases of a suite, calling ``on_answer`` as each is done.

    A case that kills the process (out of memory) gets a note; the others go on in a new one.
    """
    memory.trim()  # what was timed before held on to its memory
    left = list(cases)
    while left:
        for answer in _child(suite, provider, left, device):
            left = [case for case in left if case.name != answer["case"]]
            on_answer(answer)
        if left:
            on_answer({"case": left.pop(0).name, "note": "memory: the process died (too large?)"})


def _child(suite: str, provider: str, cases: list, device: torch.device) -> Iterator[dict]:
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.engine.isolate", suite, provider, str(device)],
        env={**os.environ, **memory.CHILD_ENV, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert child.stdin is not None and child.stdout is not None
        try:
            with child.stdin as pipe:
                json.dump([dataclasses.asdict(case) for case in cases], pipe)
        except BrokenPipeError:
            return
        for line in child.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
    finally:
        child.kill()
        child.wait()


def main(argv: list[str] | None = None) -> int:
    """The child: cases on stdin, one answer a case on stdout."""
    from bench.suites import load

    parser = argparse.ArgumentParser(prog="python -m bench.engine.isolate")
    parser.add_argument("suite")
    parser.add_argument("provider")
    parser.add_argument("device", type=torch.device)
    args = parser.parse_args(argv)
    suite = load(args.suite)
    provider = suite.providers(args.device)[args.provider]
    for raw in json.load(sys.stdin):
        answer = {"case": raw["name"]}
        try:
            case = suite.case_type(**{**raw, "only": tuple(raw["only"])})
            answer.update(suite.weigh(provider, case, args.device))
        except Exception as error:
            answer["note"] = f"memory: {describe(error)}"
        print(MARK + json.dumps(answer), flush=True)
    return 0


def watched(argv: list[str], results: Path, on_gpu: bool) -> int:
    """Run ``python -m bench`` in a child: a peer that crashes or hangs costs its own row only.

    Where it dies of a signal, loses the GPU or, on a GPU, writes nothing for ``STALLED`` seconds,
    another goes on with ``--resume``, which leaves out who was running.
    """
    child = [sys.executable, "-m", "bench.cli", *argv]
    code = 0
    for _ in range(_CHILDREN):
        code = wait_for(child, results, on_gpu)
        if code >= 0 and code != DEVICE_LOST:
            return code
        print(f"the process ended with code {code}: going on without who ran", file=sys.stderr)
        child = [sys.executable, "-m", "bench.cli", *argv, "--resume"]
    return 1 if code < 0 else code


def wait_for(command: list[str], results: Path, on_gpu: bool) -> int:
    """A command's exit code; on a GPU it is killed where its results file stands still."""
    started = time.time()
    process = subprocess.Popen(command, cwd=ROOT)
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


if __name__ == "__main__":
    sys.exit(main())
