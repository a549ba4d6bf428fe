"""A Python function as a reward, called as TRL calls one.

It takes keyword arguments: ``prompts`` and ``completions``, a list each with an item a candidate
(strings, or lists of messages), and those of the data's other columns that it names, or all where
it has ``**columns``. It returns a list of as many numbers. It is called once for each group of
lists that is saved together.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pro_trainer.data.fields import Text
from pro_trainer.options import import_module
from pro_trainer.prepare.rewards.base import Score, Scored, Scorer, Spec, as_score, excerpt

_TEXTS = ("prompts", "completions")


class Function(Scorer):
    """A function of a module on the path (the working folder is looked into first) or of a file."""

    def __init__(self, spec: Spec) -> None:
        """Import it; ValueError where it cannot be, or takes no prompts and completions."""
        super().__init__(spec)
        module, function = spec.target, spec.part
        self._written = f"reward {module}:{function}"
        loaded = _imported(module, self._written)
        self._function: Callable[..., Any] = getattr(loaded, function, None)
        if not callable(self._function):
            functions = inspect.getmembers(loaded, inspect.isfunction)
            there = [n for n, x in functions if x.__module__ == loaded.__name__]
            raise ValueError(
                f"{self._written}: {module} has no function {function!r}, it has "
                f"{', '.join(there) or 'none'}"
            )
        self.source = getattr(loaded, "__file__", None)
        parameters = inspect.signature(self._function).parameters.values()
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        self._named = {p.name for p in by_name} - set(_TEXTS)
        self._needed = {p.name for p in by_name if p.default is p.empty} - set(_TEXTS)
        self._texts = [x for x in _TEXTS if self._takes_all or x in {p.name for p in by_name}]
        if "completions" not in self._texts:
            raise ValueError(
                f"{self._written}: a function of the keyword arguments prompts and completions "
                f"was expected, got {function}{inspect.signature(self._function)}"
            )

    def identity(self) -> dict[str, Any]:
        """A hash of the source file."""
        if self.source is None:
            return {}
        return {f"the source of {self._written}": _digest(self.source)}

    def columns(self, known: Collection[str]) -> None:
        """Take those it names, or all."""
        if missing := sorted(self._needed - set(known)):
            raise ValueError(
                f"{self._written}: it needs a column {missing[0]!r} of the data; the columns that "
                f"nothing else uses are {', '.join(sorted(known)) or 'none'}"
            )
        self.taken = sorted(known if self._takes_all else self._named & set(known))

    def score(self, texts: Sequence[Scored]) -> list[Score]:
        """Call it once for all texts; a column that a record lacks is None there."""
        if not texts:
            return []
        arguments: dict[str, list[Any]] = {
            "prompts": [_given(ranked.prompts[0]) for ranked, _ in texts],
            "completions": [_given(completion) for _, completion in texts],
        }
        arguments = {name: arguments[name] for name in self._texts}
        for name in self.taken:
            arguments[name] = [ranked.columns.get(name) for ranked, _ in texts]
        try:
            values = self._function(**arguments)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"{self._written} raised {type(error).__name__}: {error} "
                f"({Path(frame.filename).name}:{frame.lineno})"
            ) from error
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or len(values) != len(texts):
            got = f"{len(values)}" if isinstance(values, (list, tuple)) else type(values).__name__
            raise ValueError(
                f"{self._written}: a list of {len(texts)} numbers was expected, one for each "
                f"completion, got {got}"
            )
        return [
            Score(as_score(value, f"{self._written}, {excerpt(*text)}"))
            for value, text in zip(values, texts, strict=True)
        ]


def _given(text: Text) -> str | list[dict[str, Any]]:
    """A text as data sets hold it, which a function may change."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def _imported(module: str, written: str) -> ModuleType:
    """The module; a file that has changed since is another one."""
    if os.getcwd() not in sys.path:  # as of python -m
        sys.path.insert(0, os.getcwd())
    path = Path(module).resolve()
    key = f"{path}:{_digest(path)}" if module.endswith(".py") and path.is_file() else None
    return import_module(written, module, key)


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
