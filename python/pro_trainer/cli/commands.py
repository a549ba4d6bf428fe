"""The commands ``train``, ``inspect``, ``eval``, ``prepare``, ``rounds``: options and exit codes.

Every field of a command's dataclasses is a flag; ``--config run.yaml`` gives them from a file, and
flags win over the file. What the user can put right (options, data, model, folder) is one line
``error: ...`` and exit code 2; a run that has to stop is one line and exit code 1.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from pro_trainer.cli import flags, stop
from pro_trainer.cli.arguments import (
    EvalArguments,
    InspectArguments,
    RoundsArguments,
    TrainArguments,
)
from pro_trainer.cli.evaluate import evaluate_files
from pro_trainer.cli.inspect import inspect as inspect_lists
from pro_trainer.cli.prepare import prepare as prepare_lists
from pro_trainer.cli.rounds import rounds as run_rounds
from pro_trainer.cli.train import train as train_model
from pro_trainer.models import base_of
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.text.options import ListOptions
from pro_trainer.train import distributed
from pro_trainer.train.checkpoints import IDENTITY, read_identity
from pro_trainer.train.config import PROConfig
from pro_trainer.train.losses import LOSS_SETTINGS
from pro_trainer.train.options import LossOptions

# What each does, and the dataclasses that it takes.
ACTIONS: dict[str, tuple[Any, ...]] = {
    "train": (train_model, TrainArguments, PROConfig),
    "eval": (evaluate_files, EvalArguments, PROConfig),
    "inspect": (inspect_lists, InspectArguments, PROConfig),
    "prepare": (prepare_lists, PrepareArguments),
    "rounds": (run_rounds, RoundsArguments, PROConfig),
}


# Options whose values name the output folder where it is not given.
_NAMED_BY = {
    "train": ("model", "data", "loss_type"),
    "eval": ("model",),
    "rounds": ("model", "prompts"),
}


class _Parser(HfArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # What begins as a negative number is a value: -0.5*my_rewards:long, say.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        """Raise ValueError: one line, and no usage of two screens."""
        raise ValueError(re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message))


def run(name: str, argv: Sequence[str] | None = None, loss_type: str | None = None) -> int:
    """Run a command; returns its exit code.

    ``loss_type`` is the one where neither command line nor file names any.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    action, *kinds = ACTIONS[name]
    code = 0
    with stop.signals() as caught:
        where: dict[str, str] = {}
        try:
            action(*_options(name, kinds, argv, where, loss_type))
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, ValueError):
                error = _placed(error, where)
            code = stop.code(error, caught)
    if distributed.several():
        distributed.leave(code)
    return code


train = functools.partial(run, "train")
evaluate = functools.partial(run, "eval")
inspect = functools.partial(run, "inspect")
prepare = functools.partial(run, "prepare")
rounds = functools.partial(run, "rounds")


def _options(
    name: str,
    kinds: Sequence[type],
    argv: Sequence[str],
    where: dict[str, str],
    loss_type: str | None,
) -> Sequence[Any]:
    """The dataclasses that the command line fills; ``where`` gets the lines of the YAML file."""
    parser = _Parser(kinds, prog=f"pro-kernels {name}", allow_abbrev=False)
    actions = {action.dest: action for action in parser._actions}
    given = flags.parse(argv)
    unset: flags.Flags = []  # lines of the file without a value: only their names count
    if config := flags.config_file(given):
        of_line = {flag for flag, _ in given}
        of_file, lines = flags.config_flags(config)
        where |= {option: line for option, line in lines.items() if option not in of_line}
        unset = [(option, []) for option in lines.keys() - {flag for flag, _ in of_file}]
        of_file = [flag for flag in of_file if flag[0] not in of_line]
        given = of_file + [flag for flag in given if flag[0] != "config"]
    if loss_type:
        given.insert(0, ("loss_type", [loss_type]))
    given = flags.ours(given, actions)
    for option, _ in given + flags.ours(unset, actions):
        if option not in actions:
            raise ValueError(f"--{option} is no option of {name}{flags.near(option, actions)}")
    if name == "eval":
        given = run_flags(given) + given
    if name in _NAMED_BY and flags.last(given, "output_dir") is None:
        folder = _folder_name(given, _NAMED_BY[name]) + ("" if name == "train" else f"-{name}")
        given.append(("output_dir", [folder]))
        _say(f"output_dir: {folder}")
    lists = {option for option, action in actions.items() if action.nargs in ("+", "*")}
    switches = {o for o, a in actions.items() if a.type is string_to_bool}
    empty = {option for option, values in given if not values and option in lists}
    written = [
        (option, values or (["true"] if option in switches else []))
        for option, values in given
        if option not in empty or values
    ]
    *options, rest = parser.parse_args_into_dataclasses(
        flags.words(written), return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: give one value to an option")
    for part in options:
        for option in empty & vars(part).keys():
            setattr(part, option, [])
    return options


def _placed(error: ValueError, where: dict[str, str]) -> ValueError:
    """The error with the line of the file that the option it is about was read from."""
    named = re.match(r"(?:--)?(\w+)", str(error))
    about = named and named[1]
    if about not in where:
        return error
    placed = type(error)(f"{where[about]}: {error}")
    placed.__cause__ = error.__cause__
    vars(placed).update(vars(error))
    return placed


def _folder_name(given: flags.Flags, options: Sequence[str]) -> str:
    """A name made of the values of some options."""
    parts = []
    for option in options:
        without = "pro" if option == "loss_type" else "demo"
        name = Path(flags.last(given, option) or without).resolve().name
        parts.append(re.sub(r"(\.(jsonl?|csv|parquet|gz|zst))+$|:\w+$", "", name))
    return "-".join(dict.fromkeys(parts))


def run_flags(given: flags.Flags) -> flags.Flags:
    """The options that the run of the model to be evaluated was trained with.

    Those of data and loss, and the model it started from. What differs from the defaults and is not
    in ``given`` is printed.
    """
    model = flags.last(given, "model")
    file = Path(model or "") / IDENTITY
    if not model or not file.is_file():
        return []
    run = read_identity(Path(model))
    known = {f.name: f.default for kind in (ListOptions, LossOptions) for f in fields(kind)}
    names = {name for name, _ in given}
    options = {name: run[name] for name in known if run.get(name) is not None}
    if "loss_type" in names:  # what belongs to the run's own loss goes with it
        own = ("loss_type", "loss_module", "loss_options", "compat", *LOSS_SETTINGS)
        options = {name: x for name, x in options.items() if name not in own}
    options = {name: x for name, x in options.items() if name not in names}
    changed = sorted((name, x) for name, x in options.items() if x != known[name])
    if taken := ", ".join(f"{name} {x}" for name, x in changed):
        _say(f"options of the run in {model}: {taken}")
    if "base" not in names and (base := base_of(model, run.get("base_model"))):
        if Path(base).is_absolute() and not Path(base).exists():
            _say(f"the model that the run started from, {base}, is not there: give it as --base")
        else:
            options["base"] = base
    return [(name, [flags.as_text(x)]) for name, x in options.items()]


def _say(line: str) -> None:
    """Print, from one process of several."""
    if os.environ.get("RANK", "0") == "0":
        print(line)
