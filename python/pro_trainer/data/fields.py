"""The fields of a record: taken out by name, and refused by name where they are unfit.

All functions raise ``DataError`` that names the field, what was given and what was expected.
Legend: a text is a string, or a conversation: a tuple of messages {"role": str, "content": str}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

Message = dict[str, str]
Text = str | tuple[Message, ...]

_LARGEST = 3.4028234663852886e38  # of fp32, which rewards are taken in


class DataError(ValueError):
    """Data that cannot be used; the message names file and line, or record, and what is wrong."""


def kind(value: Any) -> str:
    """The type of a value in the words of JSON, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def required(record: Mapping[str, Any], key: str) -> Any:
    """The value of a key that must be there and not null."""
    if record.get(key) is None:
        raise DataError(f"'{key}' is missing")
    return record[key]


def prompt_text(record: Mapping[str, Any], key: str) -> Text:
    """The prompt under this key, which holds something where it is a conversation."""
    prompt = as_text(required(record, key), f"'{key}'")
    if prompt == ():
        raise DataError(f"'{key}' holds no messages")
    return prompt


def ranked_member(item: Any, key: str, name: str) -> Any:
    """A member of one of NeMo's ranked completions."""
    if not isinstance(item, Mapping) or item.get(key) is None:
        raise DataError(
            f"{name} must be an object with 'completion' and 'rank' as others of its list are"
        )
    return item[key]


def as_list(value: Any, name: str) -> list[Any]:
    """A list as it comes from JSON or Arrow."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{name} must be a list, got {kind(value)}")
    return list(value)


def as_text(value: Any, name: str) -> Text:
    """A string, or a conversation as a tuple of messages with nothing but role and content."""
    if isinstance(value, str):
        return as_string(value, name)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{name} must be a string or a list of messages, got {kind(value)}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(f"{name}[{i}] must be a message, got {kind(message)}")
        if message.get("tool_calls"):
            raise DataError(f"{name}[{i}] has tool calls, which cannot be scored as text")
        messages.append(
            {key: as_string(message.get(key), f"{name}[{i}].{key}") for key in ("role", "content")}
        )
    return tuple(messages)


def as_string(value: Any, name: str) -> str:
    """A string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise DataError(f"{name} must be a string, got {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{name} holds a lone surrogate, which is not text") from None
    return value


def as_numbers(values: Any, name: str, n: int) -> tuple[float, ...]:
    """As many finite numbers as there are completions, ``n``."""
    if not isinstance(values, (list, tuple)):
        raise DataError(f"'{name}' must be a list of numbers, got {kind(values)}")
    if len(values) != n:
        raise DataError(f"{n} completions but {len(values)} {name}")
    return tuple(as_number(value, f"{name}[{i}]") for i, value in enumerate(values))


def as_number(value: Any, name: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise DataError(f"{name} must be a number, got {kind(value)}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise DataError(f"{name} must be finite, got {value}")
    if abs(value) > _LARGEST:
        raise DataError(f"{name} must fit fp32, got {value}")
    return value
