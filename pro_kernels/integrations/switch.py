"""What of another package is replaced while one of the switches is on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

Pair = tuple[Any, Any]  # what stands somewhere, and what shall stand there


class Switch:
    """Replacements in a ``package``, which ``name`` needs; ``so`` says what they do."""

    def __init__(self, name: str, package: str, so: str, undo: str = "restore") -> None:
        self.name, self.package, self.so, self.undo = name, package, so, undo
        self.pairs: list[Pair] = []
        self._saved: list[tuple[Any, str, Any]] = []  # thing, name, None for what it inherits

    def modules(self, *names: str) -> list[Any]:
        """Modules of the package: ImportError where it is missing, ValueError when it is on."""
        if self.pairs or self._saved:
            raise ValueError(f"{self.so} already; call {self.undo}() first")
        try:
            return [importlib.import_module(name) for name in names]
        except ImportError as error:
            needed = f"{self.package} (pip install {self.package.lower()})"
            raise ImportError(f"{self.name} needs {needed}: {error}") from error

    def put(self, thing: Any, name: str, value: Any) -> None:
        """Replace an attribute."""
        self._saved.append((thing, name, vars(thing).get(name)))
        setattr(thing, name, value)

    def exchange(self, pairs: Sequence[Pair]) -> None:
        """In every loaded module, names of the first of a pair become names of the second.

        Modules that are loaded later import from these, so they get the second too. It must be an
        object that no module holds for another reason, or ``restore`` would change that.
        """
        self.pairs += pairs
        new = {id(old): value for old, value in pairs}
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType):
                for name, value in list(vars(module).items()):
                    if id(value) in new:
                        setattr(module, name, new[id(value)])

    def restore(self) -> None:
        """Undo all, in modules loaded since as well."""
        if self.pairs:
            self.exchange([(new, old) for old, new in self.pairs])
            self.pairs.clear()
        while self._saved:
            thing, name, value = self._saved.pop()
            if value is None:
                delattr(thing, name)
            else:
                setattr(thing, name, value)
