"""The losses of ``pro_kernels`` and their options, as the trainer's flags.

Read from the source, since importing it would import torch, and help has to come at once.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import itertools
import runpy
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any, Literal

from pro_trainer.options import option


def declared() -> dict[str, dict[str, tuple[Any, Any]]]:
    """Loss -> its options -> type (``pro_kernels.option_types.OptionType``) and default."""
    package = importlib.util.find_spec("pro_kernels")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent
    names = runpy.run_path(str(folder / "option_types.py"))
    losses: dict[str, dict[str, tuple[Any, Any]]] = {}
    for path in (folder / "losses").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in filter(_registers, node.decorator_list):
                own = {
                    argument.arg: (kind, ast.literal_eval(default))
                    for argument, default in zip(
                        node.args.kwonlyargs, node.args.kw_defaults, strict=True
                    )
                    if (kind := _option_type(argument.annotation, names)) and kind.text
                }
                losses[node.name] = own | _shared(own, decorator, names)
    by_name = sorted(losses, key=lambda name: (name != "pro", name))  # help begins with PRO
    return {name: losses[name] for name in by_name}


def _registers(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register"


def _shared(own: Any, decorator: Any, names: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options that every loss has, with the defaults that its decorator gives."""
    given = {
        keyword.arg: keyword.value.value
        for keyword in decorator.keywords
        if isinstance(keyword.value, ast.Constant)
    }
    compares = "'ref_logps'" in ast.unparse(decorator)
    found = names["shared_options"](own, compares, **given)
    return {name: (names["option_type"](hint), default) for name, (hint, default) in found.items()}


def _option_type(annotation: ast.expr | None, names: dict[str, Any]) -> Any:
    """None of what is no option, as a tensor."""
    if annotation is None:
        return None
    used = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    if not used <= names.keys() | vars(builtins).keys():
        return None
    return names["option_type"](eval(ast.unparse(annotation), dict(names)))


_MANY = 6  # losses, which are no longer named one by one


def _field(name: str, losses: dict[str, dict[str, tuple[Any, Any]]]) -> tuple[str, Any, Any]:
    """The flag of an option: a type that a command line can give, None by default, and its help."""
    users: dict[str, dict[str, list[str]]] = {}  # help -> default -> losses
    choices: list[str] = []
    kinds: tuple[type, ...] = ()
    for loss, options in losses.items():
        if name in options:
            kind, default = options[name]
            kinds, choices = kind.kinds, list(dict.fromkeys([*choices, *kind.choices]))
            of_text = users.setdefault(kind.text, {})
            of_text.setdefault(str(default).lower(), []).append(loss)
    hint: Any = Literal[tuple(choices)] if choices else kinds[0]
    if choices and kinds:
        hint = str
    parts = []
    for text, defaults in users.items():
        # Of many losses: which differ from most.
        *others, (most, names) = sorted(defaults.items(), key=lambda item: len(item[1]))
        given = [f"{default} ({', '.join(few)})" for default, few in others]
        last = (
            f"{most} ({', '.join(names)})"
            if len(names) < _MANY
            else f"{'else ' * bool(others)}{most}"
        )
        parts.append(f"{text} Default: {', '.join([*given, last])}.")
    return name, hint | None, option(None, " ".join(parts))


_LOSSES = declared()
_OPTIONS = [_field(name, _LOSSES) for name in dict.fromkeys(itertools.chain(*_LOSSES.values()))]
LOSS_SETTINGS = tuple(name for name, _, _ in _OPTIONS)
# Options that are a number or a word: flags hold them as text.
MIXED = {name for name, hint, _ in _OPTIONS if hint == str | None}
_TYPE = f"The loss on sequence log-probs: {', '.join(_LOSSES)}, or one of loss_module."
LossSettings: Any = make_dataclass(
    "LossSettings",
    [("loss_type", str, option("pro", _TYPE)), *_OPTIONS],
    namespace={"group": "loss", "__doc__": "Which loss, and what it is told; None: its default."},
)
