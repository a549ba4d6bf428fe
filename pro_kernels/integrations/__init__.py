"""Switches of other projects, behind which the fused kernels stand.

- ``liger``: ``apply()`` has Liger's fused losses computed here: ``use_liger_kernel`` means these.
- ``verl``: ``apply()`` does that for verl's fused log-probs; ``verl_workers`` is for its workers.
- ``axolotl``: a plugin for its ``plugins:``.
- ``swift``: a file for ms-swift's ``--external_plugins``.

A module is imported when it is first named, and only ``axolotl`` needs its project for that.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_SWITCHES = ("axolotl", "liger", "swift", "verl")


def __getattr__(name: str) -> ModuleType:
    if name not in _SWITCHES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
