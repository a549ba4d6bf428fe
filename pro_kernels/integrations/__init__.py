"""Other projects with the kernels and losses of this package.

Switches, behind which the fused kernels stand:

- ``liger``: ``apply()`` has Liger's fused losses computed here: ``use_liger_kernel`` means these.
- ``verl``: ``apply()`` does that for verl's fused log-probs; ``verl_workers`` is for its workers.
- ``axolotl``: a plugin for its ``plugins:``.
- ``swift``: a file for ms-swift's ``--external_plugins``.

PRO on ranked lists:

- ``trl``: ``RankingTrainer``, an ``SFTTrainer``.
- ``llamafactory``: a command in the place of ``llamafactory-cli train``.

A module is imported when it is first named.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_NAMES = ("axolotl", "liger", "llamafactory", "swift", "trl", "verl")


def __getattr__(name: str) -> ModuleType:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
