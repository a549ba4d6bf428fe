"""What is measured. ``loss`` and ``step`` are tables of cases for every provider (``engine.run``).

``filter``, ``attach`` and ``ranks`` measure ours alone, each a table of cases and a function that
gives their rows; ``gpu`` is a table of parts of all kinds, for a card; ``frameworks`` runs other
people's programs.
"""

from __future__ import annotations

import importlib

from bench.engine.run import Suite


def load(name: str) -> Suite:
    return importlib.import_module(f"bench.suites.{name}").SUITE
