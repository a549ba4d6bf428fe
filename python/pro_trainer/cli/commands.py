"""Entry points of ``pro-kernels train``, ``inspect``, ``eval`` and ``prepare``.

Every field of a command's dataclasses is a flag; ``--config run.yaml`` gives them from a file, and
flags win over the file. What the user can put right (options, data, model, folder) is one line
``error: ...`` and exit code 2; a run that has to stop is one line and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from pro_trainer.cli import stop
from pro_trainer.cli import train as run
from pro_trainer.cli.evaluate import EvalArguments, evaluate_files
from pro_trainer.cli.inspect import InspectArguments
from pro_trainer.cli.inspect import inspect as inspect_lists
from pro_trainer.cli.prepare import PrepareArguments
from pro_trainer.cli.prepare import prepare as prepare_lists
from pro_trainer.cli.train import TrainArguments
from pro_trainer.text.options import ListOptions
from pro_trainer.train import distributed
from pro_trainer.train.checkpoints import IDENTITY
from pro_trainer.train.config import LossOptions, PROConfig
from pro_trainer.train.objective import NEEDS_REFERENCE


def train(argv: Sequence[str] | None = None) -> int:
    """``pro-kernels train``: ``TrainArguments`` and ``PROConfig``. Returns the exit code."""
    return _run("train", (TrainArguments, PROConfig), run.train, argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``pro-kernels eval``: ``EvalArguments`` and ``PROConfig``. Returns the exit code."""
    return _run("eval", (EvalArguments, PROConfig), evaluate_files, argv)


def inspect(argv: Sequence[str] | None = None) -> int:
    """``pro-kernels inspect``: ``InspectArguments`` and ``PROConfig``. Returns the exit code."""
    return _run("inspect", (InspectArguments, PROConfig), inspect_lists, argv)


def prepare(argv: Sequence[str] | None = None) -> int:
    """``pro-kernels prepare``: the fields of ``PrepareArguments``. Returns the exit code."""
    return _run("prepare", (PrepareArguments,), prepare_lists, argv)


class _Loader(yaml.SafeLoader):
    """Safe, and only true and false are booleans: on, off and no are values of some options."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def config_flags(path: str) -> list[str]:
    """The flags that a YAML file of ``key: value`` lines stands for.

    Raises:
        ValueError: no such file, not YAML, or not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _Loader) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--config {path}: must hold 'option: value' lines, got {values!r:.80}")
    if "config" in values:
        raise ValueError(f"--config {path}: names a file of its own, {values['config']!r}")
    flags: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        if items:
            flags += [f"--{key}", *map(_flag_value, items)]
    return flags


def _flag_value(value: Any) -> str:
    if isinstance(value, (dict, bool)):
        return json.dumps(value, default=str)
    return str(value)


def _run(
    name: str,
    kinds: tuple[type, ...],
    action: Callable[..., object],
    argv: Sequence[str] | None,
) -> int:
    code = _code(name, kinds, action, argv)
    if distributed.several():
        distributed.leave(code)
    return code


def _code(
    name: str,
    kinds: tuple[type, ...],
    action: Callable[..., object],
    argv: Sequence[str] | None,
) -> int:
    parser = HfArgumentParser(kinds, prog=f"pro-kernels {name}", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags win over it.")
    argv = list(sys.argv[1:] if argv is None else argv)
    with stop.signals() as caught:
        try:
            known, _ = _first_parser().parse_known_args(argv)
            flags = config_flags(known.config) + argv if known.config else argv
            if name == "eval":
                flags = run_flags(flags) + flags
            *options, namespace, rest = parser.parse_args_into_dataclasses(
                flags, return_remaining_strings=True, look_for_args_file=False
            )
            if rest:
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            action(*options)
        except (Exception, KeyboardInterrupt) as error:
            return stop.code(error, caught)
    return 0


def run_flags(flags: Sequence[str]) -> list[str]:
    """The options that the run of the model to be evaluated was trained with, as flags.

    Those of data and loss; a loss with a reference model only where one is given. They are printed
    where ``flags`` do not set them.
    """
    known, _ = _first_parser().parse_known_args(flags)
    file = Path(known.model or "") / IDENTITY
    if not known.model or not file.is_file():
        return []
    run = json.loads(file.read_text())
    if not isinstance(run, dict):
        raise ValueError(f"{file} must hold the options of a run, got {run!r:.80}")
    names = {f.name for kind in (ListOptions, LossOptions) for f in fields(kind)}
    options = {name: run[name] for name in names & run.keys() if run[name] is not None}
    given = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags}
    if "loss_type" in given:  # what belongs to the run's own loss goes with it
        own = ("loss_type", "loss_kwargs", "compat")
        options = {name: x for name, x in options.items() if name not in own}
    elif options.get("loss_type") in NEEDS_REFERENCE and not known.ref_model:
        print(f"the loss of the run, {options['loss_type']}, needs --ref_model; pro is reported")
        options = {name: x for name, x in options.items() if not name.startswith("loss_")}
    defaults = {f.name: f.default for kind in (ListOptions, LossOptions) for f in fields(kind)}
    taken = [
        f"{name} {value}" for name, value in sorted(options.items())
        if value != defaults[name] and name not in given and value != {}
    ]  # fmt: skip
    if taken:
        print(f"options of the run in {known.model}: {', '.join(taken)}")
    return [flag for name, x in options.items() for flag in (f"--{name}", _flag_value(x))]


def _first_parser() -> argparse.ArgumentParser:
    """Of what is read before all options are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--model", "--model_name_or_path", "--model-name-or-path")
    parser.add_argument("--ref_model", "--ref-model")
    return parser
