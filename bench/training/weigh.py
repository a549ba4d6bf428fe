"""Peak memory of a training step beyond model and optimizer, in a process of its own.

The child of ``bench.memory.weigh``. What is held before the step: the weights, AdamW's two moments,
the batch. What is weighed: activations, logits, gradients and everything else of forward, backward
and AdamW.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

import torch

from bench.memory import answer_all, peak_extra_bytes
from bench.step import Step
from bench.training.cases import TrainingCase
from bench.training.providers import Provider, all_providers
from bench.training.workload import Workload


def main(argv: list[str] | None = None) -> int:
    """Cases on stdin, one answer a case on stdout."""
    parser = argparse.ArgumentParser(prog="python -m bench.training.weigh")
    parser.add_argument("provider")
    parser.add_argument("device", type=torch.device)
    args = parser.parse_args(argv)
    cases = [TrainingCase(**{**raw, "only": tuple(raw["only"])}) for raw in json.load(sys.stdin)]
    provider = all_providers()[args.provider]
    answer_all(cases, partial(_weigh_case, provider, device=args.device))
    return 0


def _weigh_case(provider: Provider, case: TrainingCase, device: torch.device) -> dict:
    work = Workload(case, device)
    step = provider.build(work)
    step.run()  # AdamW makes its moments
    peak, _ = peak_extra_bytes(Step(partial(step.run, keep_gradients=True)), device)
    return {"peak_bytes": peak, "gradient_bytes": work.gradient_bytes}


if __name__ == "__main__":
    sys.exit(main())
