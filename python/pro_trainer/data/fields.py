"""The fields of a record: read in each form they come in, and refused by name where they are unfit.

All functions raise ``DataError`` that names the field, what was given and what was expected.
Legend: a text is a string, or a conversation: a tuple of messages {"role": str, "content": str},
which may hold further keys (``tool_calls``, ``name``, ...) for the chat template.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

Message = dict[str, Any]
Text = str | tuple[Message, ...]

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
# Of ``apply_chat_template``; the trainer decides them.
_TAKEN_OPTIONS = {
    "conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding",
    "truncation", "max_length", "add_generation_prompt", "continue_final_message",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
_LARGEST = 3.4028234663852886e38  # of fp32, which rewards are taken in


class DataError(ValueError):
    """Data that cannot be used; the message names file and line, or record, and what is wrong."""


def plain(text: Text) -> str:
    """What a text says: the string, or the contents of its messages."""
    return text if isinstance(text, str) else "\n\n".join(m["content"] for m in text)


def kind(value: Any) -> str:
    """The type of a value in the words of JSON, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def as_list(value: Any, name: str, what: str = "a list") -> list[Any]:
    """A list as it comes from JSON, Arrow or NumPy."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{name} must be {what}, got {kind(value)}")
    return list(value)


def as_text(value: Any, name: str) -> Text:
    """A string, or a conversation: a list of messages, or one message alone."""
    if isinstance(value, str):
        return as_string(value, name)
    if isinstance(value, Mapping):
        return (as_message(value, name),)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{name} must be a string or a list of messages, got {kind(value)}")
    return tuple(as_message(message, f"{name}[{i}]") for i, message in enumerate(value))


def as_message(value: Any, name: str) -> Message:
    """A message with ``role`` and ``content``, and whatever else it holds that is not null."""
    if not isinstance(value, Mapping):
        raise DataError(f"{name} must be a message, got {kind(value)}")
    message = {key: without_nulls(item) for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:  # ShareGPT
        role = as_string(message.pop("from"), f"{name}.from")
        message = {"role": _ROLES.get(role, role), "content": message.pop("value", None)} | message
    role = as_string(message.get("role"), f"{name}.role")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    elif content is None and message.get("tool_calls"):
        content = ""
    message |= {"role": role, "content": as_string(content, f"{name}.content")}
    return _encodable(message, name)


def _part(part: Any, name: str) -> str:
    """The text of one part of a content that is a list."""
    if isinstance(part, Mapping) and part.get("type", "text") != "text":
        raise DataError(f"{name} is of type {part['type']!r}; only text can be ranked")
    return as_string(part.get("text") if isinstance(part, Mapping) else part, f"{name}.text")


def as_tools(value: Any, name: str) -> list[Any]:
    """Tools as TRL has them: a list of objects, or JSON for all or each of them."""
    tools = [_parsed(tool, name) for tool in as_list(_parsed(value, name), name)]
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise DataError(f"{name}[{i}] must be an object, got {kind(tool)}")
    return _encodable(without_nulls(tools), name)


def as_template_options(value: Any, name: str) -> dict[str, Any]:
    """Keywords for the chat template: an object, or JSON for one."""
    value = _parsed(value, name)
    if not isinstance(value, Mapping):
        raise DataError(f"{name} must be an object, got {kind(value)}")
    if taken := sorted(_TAKEN_OPTIONS & value.keys()):
        raise DataError(f"{name} must hold variables of the template, got {taken}")
    return _encodable(without_nulls(value), name)


def _parsed(value: Any, name: str) -> Any:
    """A value, or what its JSON says."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{name} must be JSON where it is a string: {error}") from None


def _encodable(value: Any, name: str) -> Any:
    """The value, if UTF-8 can encode all of its strings."""
    try:
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{name} holds a lone surrogate, which is not text") from None
    return value


def without_nulls(value: Any) -> Any:
    """The same without keys that hold null: Arrow gives every record the keys of all of them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def as_string(value: Any, name: str) -> str:
    """A string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise DataError(f"{name} must be a string, got {kind(value)}")
    return _encodable(value, name)


def as_numbers(values: Any, name: str, n: int) -> tuple[float, ...]:
    """As many finite numbers as there are completions, ``n``."""
    values = as_list(values, f"'{name}'", "a list of numbers")
    if len(values) != n:
        raise DataError(f"{n} completions but {len(values)} {name}")
    return tuple(as_number(value, f"{name}[{i}]") for i, value in enumerate(values))


def as_number(value: Any, name: str) -> float:
    """A finite number, or a string that writes one."""
    if isinstance(value, str):  # as CSV has it
        with contextlib.suppress(ValueError):
            value = float(value)
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
