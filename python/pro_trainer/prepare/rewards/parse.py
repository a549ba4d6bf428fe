"""How a reward is written on the command line: ``[WEIGHT*]WHAT``, the kind told by its form."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

Kind = Literal["classifier", "function", "score", "classify", "pooling", "judge"]

_WEIGHTED = re.compile(r"(?:([-+\w.]*)\*)?(.+)")
_FUNCTION = re.compile(r"(.+\.py|[\w.]+):(\w+)")
_SERVER = re.compile(r"(?:(.+)@)?(https?://[^@]+)")
# Where a server is asked for it.
PATHS: dict[Kind, str] = {
    "score": "/score", "classify": "/classify", "pooling": "/pooling",
    "judge": "/chat/completions",
}  # fmt: skip


class Spec(NamedTuple):
    """One reward: ``target`` is a folder or hub name, a module or file, or a URL.

    ``part`` is the function, or the model that a server is asked for ("": its only one).
    """

    weight: float
    kind: Kind
    target: str
    part: str
    name: str


def parse(written: Sequence[str]) -> list[Spec]:
    """What ``--reward`` says.

    Raises:
        ValueError: a weight that is no number or 0, a URL whose path says nothing, the same reward
            twice.
    """
    specs = [_spec(text) for text in written]
    short = [spec.name for spec in specs]
    if len(set(short)) < len(short):
        whole = [text.rpartition("*")[2] for text in written]
        if len(set(whole)) < len(whole):
            twice = next(text for text in whole if whole.count(text) > 1)
            raise ValueError(f"reward {twice} was given twice: add up its weights")
        specs = [spec._replace(name=text) for spec, text in zip(specs, whole, strict=True)]
    return specs


def _spec(text: str) -> Spec:
    factor, what = _WEIGHTED.fullmatch(text).groups() if text else (None, "")
    try:
        weight = 1.0 if factor is None else float(factor)
    except ValueError:
        weight = math.nan
    if not what or not math.isfinite(weight) or weight == 0:
        raise ValueError(
            f"reward {text!r}: [WEIGHT*]WHAT was expected with a weight that is a finite number "
            "other than 0"
        )
    if match := _SERVER.fullmatch(what):
        model, url = match[1] or "", match[2].rstrip("/")
        path = urlsplit(url).path
        kind = next((kind for kind, end in PATHS.items() if path.endswith(end)), None)
        if kind is None:
            raise ValueError(
                f"reward {what}: the path of the URL must say what is asked for and end in one of "
                f"{', '.join(PATHS.values())}"
            )
        return Spec(weight, kind, url, model, model.rpartition("/")[2] or kind)
    if "://" in what:
        raise ValueError(f"reward {what}: a URL was expected as [MODEL@]http://HOST:PORT/PATH")
    if match := _FUNCTION.fullmatch(what):
        return Spec(weight, "function", match[1], match[2], match[2])
    name = what.rstrip("/").rpartition("/")[2]
    return Spec(weight, "classifier", what, "", name)
