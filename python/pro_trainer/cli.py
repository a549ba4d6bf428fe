"""Entry points of ``pro-kernels train`` and ``pro-kernels eval``.

What the user can put right (options, data, model, folder) is one line ``error: ...`` and exit code
2; a run that has to stop is one line and exit code 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from pro_trainer.config import EvalConfig, TrainConfig
from pro_trainer.evaluate import evaluate_files
from pro_trainer.trainer import TrainingError
from pro_trainer.trainer import train as run_training

Config = TypeVar("Config", bound=EvalConfig)


def train(argv: Sequence[str] | None = None) -> int:
    """``pro-kernels train``: the flags are the fields of ``TrainConfig``. Returns the exit code."""
    return _run("train", TrainConfig, run_training, argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``pro-kernels eval``: the flags are the fields of ``EvalConfig``. Returns the exit code."""
    return _run("eval", EvalConfig, lambda c: print(json.dumps(evaluate_files(c), indent=1)), argv)


def _run(
    name: str,
    config_type: type[Config],
    action: Callable[[Config], object],
    argv: Sequence[str] | None,
) -> int:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(config_type, prog=f"pro-kernels {name}", allow_abbrev=False)
    try:
        config, rest = parser.parse_args_into_dataclasses(
            sys.argv[1:] if argv is None else list(argv),
            return_remaining_strings=True,
            look_for_args_file=False,
        )
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        action(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
