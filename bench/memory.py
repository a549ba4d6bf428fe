"""Peak extra memory of a provider, in a process of its own.

CPU: the kernel's high-water mark of resident memory (``/proc/self/clear_refs`` resets it), in
a process whose allocator returns every freed block at once, so that no reuse hides a peak; exact to
about a megabyte, as the kernel counts pages. GPU:
``torch.cuda.max_memory_allocated``. The parent sends cases; each answer is one line of JSON.

    peak extra = high water during forward + backward, minus what was held before it
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.inputs import make_inputs, make_truth
from bench.providers import all_providers
from bench.step import Step, describe

_ROOT = Path(__file__).resolve().parent.parent
_MARK = "@bench "
# Blocks of 64 KiB and more are mapped one by one and unmapped when freed; MKL keeps no buffers.
CHILD_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MKL_DISABLE_FAST_MM": "1",
}


def weigh(
    provider: str,
    cases: list,
    device: torch.device,
    on_answer: Callable[[dict], None],
    module: str = "bench.memory",
) -> None:
    """Weigh one provider on several cases, calling ``on_answer`` as each is done.

    ``module`` is what the child runs; it reads the cases, dataclasses with a name, and answers with
    ``answer_all``. A case that kills the process (out of memory) gets a note; the others go on in a
    new one.
    """
    _trim()  # what was timed before held on to its memory
    left = list(cases)
    while left:
        for answer in _child(module, provider, left, device):
            on_answer(answer)
            left = [case for case in left if case.name != answer["case"]]
        if left:
            on_answer({"case": left.pop(0).name, "note": "memory: the process died (too large?)"})


def _child(module: str, provider: str, cases: list, device: torch.device) -> Iterator[dict]:
    command = [sys.executable, "-m", module, provider, str(device)]
    env = {**os.environ, **CHILD_ENV, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(
        command, cwd=_ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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
            if line.startswith(_MARK):
                yield json.loads(line.removeprefix(_MARK))
    finally:
        child.kill()
        child.wait()


def main(argv: list[str] | None = None) -> int:
    """The child: cases on stdin, one answer a case on stdout."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory")
    parser.add_argument("provider")
    parser.add_argument("device", type=torch.device)
    args = parser.parse_args(argv)
    cases = [Case(**{**raw, "only": tuple(raw["only"])}) for raw in json.load(sys.stdin)]
    provider = all_providers(args.device)[args.provider]
    answer_all(cases, lambda case: _weigh_case(provider, case, args.device))
    return 0


def answer_all(cases: list, weigh_case: Callable[[Any], dict]) -> None:
    """Print the answer to each case, or why there is none; for the child."""
    for case in cases:
        answer = {"case": case.name}
        try:
            answer.update(weigh_case(case))
        except Exception as error:
            answer["note"] = f"memory: {describe(error)}"
        print(_MARK + json.dumps(answer), flush=True)


def _weigh_case(provider, case: Case, device: torch.device) -> dict:  # noqa: ANN001
    torch._dynamo.reset()
    alone = case.kind == "memory"
    # The large case warms up on a short one: libraries load, nothing depends on its length.
    warm = provider.build(make_inputs(replace(case, T=16) if alone else case, device))
    warm.run()
    warm.clear()
    if alone:
        del warm
        inputs = make_inputs(case, device)
        step = provider.build(inputs)
    else:
        step = warm
    start = time.perf_counter()
    peak, value = peak_extra_bytes(step, device)
    answer = {"peak_bytes": peak, "gradient_bytes": step.gradient_bytes}
    if alone:
        answer["seconds"] = time.perf_counter() - start
        answer["loss"] = float(value)
        answer |= make_truth(inputs).errors(answer["loss"], replace(step, logps=None))
    return answer


def peak_extra_bytes(step: Step, device: torch.device) -> tuple[int, object]:
    """High water of one step above what is held before it, and what the step returned."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        value = step.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held, value
    _trim()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    held = _status("VmRSS")
    value = step.run()
    return _status("VmHWM") - held, value


def _trim() -> None:
    """Give freed memory back to the system (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    with open("/proc/self/status") as f:
        line = next(x for x in f if x.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
