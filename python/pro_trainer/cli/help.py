"""What ``--help`` shows: two screens first, ``--help GROUP`` and ``--help all`` for the rest."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pro_trainer.cli.arguments import (
    EvalArguments,
    InspectArguments,
    RoundsArguments,
    TrainArguments,
)
from pro_trainer.cli.flags import RENAMED, near, parse
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.text.options import ListOptions
from pro_trainer.train.options import LossOptions, StepOptions


class Option(NamedTuple):
    """One option as help shows it; ``default`` None: there is none to name."""

    name: str
    values: str
    default: Any
    text: str


class Command(NamedTuple):
    """``first``: the most used options, as a command line; ``groups``: in the order shown."""

    does: str
    kinds: tuple[type, ...]
    first: str
    groups: str


_RUN = (LossOptions, StepOptions, ListOptions)
_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMANDS = {
    "train": Command(
        "Fine-tune a causal language model on ranked lists of responses.",
        (TrainArguments, *_RUN),
        f"--model {_MODEL} --data lists.jsonl.gz --output_dir runs/first --loss_type dpo "
        "--num_candidates 4 --max_length 1024 --per_device_train_batch_size 4 "
        "--learning_rate 1e-5 --num_train_epochs 2 --use_peft",
        "data text loss batch model run",
    ),
    "eval": Command(
        "Say how well a model ranks, beside the model it was trained from.",
        (EvalArguments, *_RUN),
        f"--model runs/first --data lists.jsonl.gz --base {_MODEL} --output_dir runs/first-eval "
        "--generate 8 --per_device_eval_batch_size 4",
        "eval data text loss batch model",
    ),
    "inspect": Command(
        "Show what the model will see of some data, before anything is trained.",
        (InspectArguments, ListOptions),
        f"--model {_MODEL} --data lists.jsonl.gz --num 5 --max_length 1024",
        "inspect data text model",
    ),
    "prepare": Command(
        "Make ranked lists: sample candidates, score them, rank them.",
        (PrepareArguments,),
        f"--data lists.jsonl.gz --output longer.jsonl.gz --generator {_MODEL} "
        "--server http://localhost:8000 --reward org/reward-model --num_samples 4 "
        "--ranking_length 4",
        "prepare rewards server text",
    ),
    "rounds": Command(
        "From prompts to a better model: sample, score, train, evaluate, and again.",
        (RoundsArguments, *_RUN),
        f"--model {_MODEL} --prompts prompts.jsonl --reward my_rewards.py:short "
        "--output_dir runs/rounds --rounds 3 --num_samples 8 --ranking_length 4 "
        "--learning_rate 1e-5 --num_train_epochs 2",
        "rounds prepare rewards server data text loss batch model run",
    ),
}

# Of ``StepOptions``; the others are of the run.
_OF_BATCHES = ("batching", "tokens_per_batch", "disable_dropout")
# Options of transformers that are met most; the others come with --help all.
_OF_TRANSFORMERS = {
    "batch": [
        Option("per_device_train_batch_size", "INT", 8, "Lists of a batch on each device."),
        Option("per_device_eval_batch_size", "INT", 8, "The same where held-out lists are scored."),
        Option("gradient_accumulation_steps", "INT", 1, "Batches of an optimizer step."),
        Option("gradient_checkpointing", "BOOL", False,
               "Keep fewer activations, and run each layer's forward twice."),
    ],
    "run": [
        Option("config", "FILE", None, "YAML file of options; flags win over it."),
        Option("output_dir", "FOLDER", None,
               "Where all is written. Default: a name made of the model, the data and the loss."),
        Option("learning_rate", "FLOAT", 5e-6, "Highest learning rate."),
        Option("lr_scheduler_type", "NAME", "linear", "linear, cosine, constant, ..."),
        Option("warmup_steps", "FLOAT", 0, "Steps up to it; below 1: a share of all steps."),
        Option("num_train_epochs", "FLOAT", 3.0, "How often the lists are gone through."),
        Option("max_steps", "INT", None, "Optimizer steps; overrides num_train_epochs."),
        Option("bf16", "BOOL", False, "Mixed precision."),
        Option("seed", "INT", 42, "Of all that is random."),
        Option("logging_steps", "FLOAT", 10, "Steps between two lines."),
        Option("eval_strategy", "NAME", "no", "When held-out lists are scored: no, steps, epoch."),
        Option("eval_steps", "FLOAT", None, "Steps between two of these."),
        Option("save_strategy", "NAME", "steps", "When checkpoints are written: no, steps, epoch."),
        Option("save_steps", "FLOAT", 500, "Steps between two of these."),
        Option("save_total_limit", "INT", None, "How many checkpoints are kept. Default: all."),
        Option("resume_from_checkpoint", "auto|FOLDER", None,
               "Go on from the last whole checkpoint of output_dir, or from this one."),
        Option("report_to", "NAME ...", None, "wandb, tensorboard, trackio, ..."),
        Option("use_cpu", "BOOL", False, "No accelerator."),
    ],
}  # fmt: skip


def asked(argv: Sequence[str]) -> str | None:
    """The topic that help is asked about, '' for the first screens; None: it is not asked for."""
    for i, word in enumerate(argv):
        if word.startswith("--help="):
            return word.partition("=")[2]
        if word in ("-h", "--help"):
            return argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("-") else ""
    return None


def overview() -> str:
    """What ``pro-kernels --help`` shows."""
    lines = ["usage: pro-kernels COMMAND [--OPTION VALUE ...]", "", "Train on ranked lists:"]
    lines += [f"  {name:9}{command.does}" for name, command in COMMANDS.items()]
    lines += [
        "  dpo      The same as train --loss_type dpo; it takes a command line of TRL's dpo.",
        "",
        "Train with another program:",
        "  run      Run a training command with the fused loss in the models that it loads.",
        "",
        "The kernels:",
        "  env      Say what is built and usable here, and why the rest is not.",
        "  check    Compare the fused path with the reference on this machine.",
        "  bench    Run the benchmarks (from a checkout of the repository).",
        "",
        "pro-kernels COMMAND --help tells about one of them.",
    ]
    return "\n".join(lines)


def page(command: str, topic: str = "") -> str:
    """The help of a command: its first screens, a group, one option, or all; else ValueError."""
    about, groups = COMMANDS[command], options(command)
    known = {option.name: option for listed in groups.values() for option in listed}
    if topic in groups:
        return _described(groups[topic])
    name = topic.lstrip("-").replace("-", "_")
    name = RENAMED.get(name, name)
    if name in known:
        return _described([known[name]])
    if topic:
        of_others = _of_transformers() if StepOptions in about.kinds else ()
        others = [option for option in of_others if option.name not in known]
        if topic == "all":
            parts = groups | ({"transformers' own": others} if others else {})
            return "\n\n".join(f"{part}\n{_described(parts[part])}" for part in parts)
        if found := [option for option in others if option.name == name]:
            return _described(found)
        raise ValueError(
            f"--help {topic}: no such group or option of {command}; groups are "
            f"{', '.join(groups)} and all{near(topic, known)}"
        )
    lines = [f"usage: pro-kernels {command} [--OPTION VALUE ...]", "", about.does, "", "Most used:"]
    for name, example in parse(about.first.split()):
        lines += _entry(" ".join([f"--{name}", *example]), known[name].text)
    lines += ["", f"All options by group (pro-kernels {command} --help GROUP describes them):"]
    for group, listed in groups.items():
        lines += _wrapped(f"{group}: " + ", ".join(o.name for o in listed), "    ")
    lines += ["", f"pro-kernels {command} --help OPTION describes one, --help all every one"]
    lines[-1] += ", transformers' included." if StepOptions in about.kinds else "."
    return "\n".join(lines)


def options(command: str) -> dict[str, list[Option]]:
    """The options of a command by group."""
    about = COMMANDS[command]
    groups: dict[str, list[Option]] = {group: [] for group in about.groups.split()}
    for kind in about.kinds:
        hints = get_type_hints(kind)
        for field in fields(kind):
            group = _group(kind, field.name)
            if group in groups:
                groups[group].append(_option(field, hints[field.name]))
    if command in ("train", "rounds"):
        for group, listed in _OF_TRANSFORMERS.items():
            groups[group] = [*listed, *groups[group]]
    else:  # of these, what a command without steps reads
        wanted = {"eval": ("output_dir", "per_device_eval_batch_size", "bf16", "use_cpu")}
        every = [o for listed in _OF_TRANSFORMERS.values() for o in listed]
        names = ("config", *wanted.get(command, ()))
        groups[next(iter(groups))] += [o for o in every if o.name in names]
    return groups


def _group(kind: type, name: str) -> str:
    """The group of the class that declares the field; what lists are shown at last, of the run."""
    owner = next(c for c in kind.__mro__ if name in vars(c).get("__annotations__", ()))
    if owner is StepOptions and name not in _OF_BATCHES:
        return "run"
    return owner.group


def _option(field: Field, hint: Any) -> Option:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return Option(field.name, _values(hint), default, field.metadata.get("help", ""))


def _values(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"{_values(get_args(hint)[0])} ..."
    inner = [x for x in get_args(hint) if x is not type(None)]
    return _values(inner[0]) if inner else getattr(hint, "__name__", str(hint)).upper()


def _of_transformers() -> Iterator[Option]:
    from transformers import TrainingArguments

    for field in fields(TrainingArguments):
        if field.init:
            text = " ".join(str(field.metadata.get("help", "")).split())
            yield _option(field, str)._replace(values="VALUE", text=text)


def _described(listed: Iterable[Option]) -> str:
    lines = []
    for option in listed:
        silent = option.default in (None, "", [], MISSING) or "Default:" in option.text
        default = "" if silent else f" ({_shown(option.default)})"
        lines += _entry(f"--{option.name} {option.values}{default}", option.text)
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if isinstance(default, list):
        return " ".join(map(repr, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _entry(head: str, text: str) -> list[str]:
    return [f"  {head}", *_wrapped(text, "      ")]


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(100, shutil.get_terminal_size().columns)
    first = indent if indent.strip() or len(indent) > 4 else "  "
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=indent,
                         break_on_hyphens=False)  # fmt: skip
