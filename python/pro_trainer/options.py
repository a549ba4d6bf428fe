"""Options are dataclass fields: each is a flag of the commands, a key of their YAML file, its help
and its default.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field with help text; a list default is copied for each instance."""
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_choices(config: object, kind: type) -> None:
    """Raise ValueError where a field of ``kind`` is none of those its ``Literal`` names."""
    for name, hint in get_type_hints(kind).items():
        optional = type(None) in get_args(hint)
        if optional and getattr(config, name) is None:
            continue
        literal = get_args(hint)[0] if optional else hint
        allowed = get_args(literal)
        if get_origin(literal) is Literal and getattr(config, name) not in allowed:
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


def json_object(config: object, name: str) -> dict[str, Any]:
    """What the JSON of the named field says, {} for None; ValueError unless it is an object."""
    given = getattr(config, name)
    try:
        found = json.loads(given or "{}")
    except ValueError as error:
        raise ValueError(f"{name} must be a JSON object: {error}, got {given}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a JSON object, got {given}")
    return found


def import_module(written: str, name: str, key: str | None = None) -> ModuleType:
    """A module, or that of a Python file, imported once.

    Args:
        written: the option and what was given, for messages.
        name: of the module; or a path that ends in .py.
        key: what a file's module is known by. Default: the path.

    Raises:
        ValueError: there is none, or it cannot be imported.
    """
    key = key or name
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, name)
            assert spec is not None and spec.loader is not None
            sys.modules[key] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return sys.modules[key]
    except Exception as error:  # whatever the module does
        sys.modules.pop(key, None)
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{written} cannot be imported: {said}") from error


@dataclass
class ModelOptions:
    """Which model, and how it is loaded."""

    group: ClassVar[str] = "model"

    model: str | None = option(
        None,
        "Folder (or hub name) of a transformers causal LM with its LM head.",
    )
    tokenizer: str | None = option(None, "Folder of the tokenizer. Default: the model's.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "Of the weights as loaded; --bf16 is mixed precision."
    )
    attn_implementation: str | None = option(
        None, "eager, sdpa, flex_attention, flash_attention_2, ...; default: the model's."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoint.")
    load_in_4bit: bool = option(False, "Quantised weights under adapters (needs bitsandbytes).")
    load_in_8bit: bool = option(False, "The same with 8 bits.")

    def quantization(self) -> Any:
        """What transformers takes for it, or None.

        Raises:
            ValueError: both widths, or bitsandbytes is not installed.
        """
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        name = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit were both given; choose one")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"{name} needs bitsandbytes: pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=None if self.dtype == "auto" else self.dtype,
        )
