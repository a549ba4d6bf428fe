"""Options are dataclass fields: each is a flag of the commands, a key of their YAML file, its help
and its default.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, Literal, get_args, get_origin, get_type_hints


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field with help text; a list default is copied for each instance."""
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_choices(config: object, kind: type) -> None:
    """Raise ValueError where a field of ``kind`` is none of those its ``Literal`` names."""
    for name, hint in get_type_hints(kind).items():
        allowed = get_args(hint)
        if get_origin(hint) is Literal and getattr(config, name) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, "
                f"got {getattr(config, name)!r}"
            )


def check_integers(config: object, *names: str) -> None:
    """Raise TypeError unless the named fields are None or integers."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer, got {value!r}")


def check_positive(config: object, *names: str) -> None:
    """Raise TypeError or ValueError unless the named fields are None, or finite and > 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value}")
