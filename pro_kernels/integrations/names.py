"""Objects of another package, exchanged wherever a loaded module holds them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

Pair = tuple[Any, Any]  # what stands somewhere, and what shall stand there


def exchange(pairs: Sequence[Pair]) -> None:
    """In every loaded module, names of the first of a pair become names of the second.

    Modules that are loaded later import from these, so they get the second too. It must be an
    object that no module holds for another reason, or ``exchange_back`` would change that.
    """
    new = {id(old): value for old, value in pairs}
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if id(value) in new:
                    setattr(module, name, new[id(value)])


def exchange_back(pairs: list[Pair]) -> None:
    """Undo ``exchange``, in modules loaded since as well, and empty the list."""
    exchange([(new, old) for old, new in pairs])
    pairs.clear()
