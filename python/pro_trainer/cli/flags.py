"""From what a user wrote to the options of a command: files of options, names of TRL, near misses.

Options are (name, values) pairs here, in the order written; what comes later wins.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Flags = list[tuple[str, list[str]]]

# TRL's name of an option -> ours for the same thing.
RENAMED = {"model_name_or_path": "model", "dataset_name": "data", "torch_dtype": "dtype"}
_LOSSES = {"sigmoid": "dpo"}
_SPLITS = ("dataset_train_split", "dataset_test_split")
# Options of TRL's DPO that have no counterpart -> what to do.
_WITHOUT = {
    "padding_free": "leave it out: no padding is run",
    "dataset_num_proc": "leave it out: lists are tokenised in one process",
    "dataset_streaming": "leave it out: hub data sets are streamed while they are read",
    "dataset_config": "save that configuration with datasets' save_to_disk and give the folder",
    "max_completion_length": "give --max_length and --max_prompt_length",
    "generate_during_eval": "give --sample_steps",
    "loss_weights": "one loss is minimised",
    "lora_task_type": "leave it out: it is CAUSAL_LM",
    "model_revision": "download that revision and give its folder",
    "activation_offloading": "give --gradient_checkpointing",
}


def parse(argv: Sequence[str]) -> Flags:
    """``--name value``, ``--name=value``, ``--no_name``; ValueError for a value before any."""
    flags: Flags = []
    for word in argv:
        if re.match(r"--\w", word):
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise ValueError(f"unexpected argument {word!r}: options are written --name value")
    return flags


def words(flags: Iterable[tuple[str, list[str]]]) -> list[str]:
    """The command line that gives these flags; one value may begin with a dash."""
    found = []
    for name, values in flags:
        found += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return found


def last(flags: Flags, name: str) -> str | None:
    """The value an option was given last, or None."""
    return next((values[-1] for n, values in reversed(flags) if n == name and values), None)


def config_file(flags: Flags) -> str | None:
    """The file of options that is named, or None. ValueError: the option stands without one."""
    if any(name == "config" and len(values) != 1 for name, values in flags):
        raise ValueError("--config: one YAML file is needed, as --config run.yaml")
    return last(flags, "config")


def config_flags(path: str) -> tuple[Flags, dict[str, str]]:
    """What a YAML file of ``key: value`` lines stands for, and in which line each option is.

    Only true and false are booleans: on, off and no are values of some options.

    Raises:
        ValueError: no such file, not YAML, or not a mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":bool")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    boolean = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", boolean, list("tTfF"))
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, Loader) or {}
        node = yaml.compose(text, Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--config {path}: must hold 'option: value' lines, got {values!r:.80}")
    if "config" in values:
        raise ValueError(f"--config {path}: names a file of its own, {values['config']!r}")
    where = {}
    for key, _ in node.value if values else ():
        where[key.value.replace("-", "_")] = f"{path}:{key.start_mark.line + 1}"
    flags: Flags = []
    for key, value in values.items():
        if value is not None:
            items = value if isinstance(value, list) else [value]
            flags.append((key.replace("-", "_"), [as_text(item) for item in items]))
    return flags, where


def as_text(value: Any) -> str:
    """A value as a command line holds it."""
    return json.dumps(value, default=str) if isinstance(value, (dict, bool)) else str(value)


def ours(flags: Flags, known: Iterable[str]) -> Flags:
    """The same flags under our names: those of TRL, and ``--no_name`` as ``--name false``.

    Raises:
        ValueError: an option of TRL that has no counterpart.
    """
    known = set(known)
    found: Flags = []
    splits = {name: values[-1] for name, values in flags if name in _SPLITS and values}
    for name, values in flags:
        if name in _SPLITS and name not in known:
            continue
        if name not in known:
            if name in _WITHOUT:
                raise ValueError(
                    f"--{name} is an option of TRL that has none here: {_WITHOUT[name]}"
                )
            if name.startswith("no_") and name[3:] in known and not values:
                name, values = name[3:], ["false"]
            name = RENAMED.get(name, name)
        if name == "loss_type":
            values = [_LOSSES.get(value, value) for value in values]
        found.append((name, values))
    sources = [value for name, values in found if name == "data" for value in values]
    for option, split in splits.items() if sources else ():
        # A file holds one split: it is the data, and no other.
        named = [x if Path(x).exists() else f"{x}:{split}" for x in sources]
        if option == "dataset_train_split" or "eval_data" not in known:
            found = [(n, named if n == "data" else values) for n, values in found]
        elif any(name == "eval_data" for name, _ in found):
            raise ValueError(f"--{option} {split} and --eval_data were both given: choose one")
        elif named == sources:
            raise ValueError(
                f"--{option} {split}: {', '.join(sources)} holds one split; give the held-out "
                "lists as --eval_data, or leave it out, and eval_fraction is held out"
            )
        else:
            found.append(("eval_data", [x for x in named if x not in sources]))
    return found


def near(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` where one has nearly this name, else nothing."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""
