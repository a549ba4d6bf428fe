"""What failures of servers mean for those who ask, and what may be said of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

_BUSY = (429, 502, 503, 504)
_FOR_ALL = (401, 403, 404)  # what one request is told, all are


@dataclass(frozen=True)
class Failure:
    """A request that has no answer: ``reason``, to count by, and what the server said of it."""

    reason: str
    detail: str = ""


class ServerError(ConnectionError):
    """No server can go on: none answers, or (``for_all``) all requests are refused alike."""

    def __init__(self, text: str, for_all: bool = False) -> None:
        super().__init__(text)
        self.for_all = for_all


class Failed(Exception):
    """One try that failed; its server asks to be left alone for ``wait`` seconds."""

    def __init__(self, reason: str, kind: str, detail: str = "", wait: float = 0.0) -> None:
        self.reason, self.kind, self.detail, self.wait = reason, kind, detail, wait


def readable(text: str, key: str) -> str:
    """What a server said, in one short line, without the key that it may have repeated."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        for name in ("error", "detail", "message"):
            value = value.get(name, value) if isinstance(value, dict) else value
        text = value if isinstance(value, str) else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text.replace(key, "[key]") if key else text
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_url(url: str) -> None:
    """Raise ValueError unless it is an http URL that holds no secret, none of which is repeated."""
    try:
        parsed = urlsplit(url)
        host, _ = parsed.hostname, parsed.port
    except (ValueError, AttributeError):
        parsed, host = urlsplit(""), None
    if "@" in parsed.netloc or parsed.query or parsed.fragment:
        raise ValueError(
            f"server: the URL of {host} holds a user, a password or a query: give a key by "
            "api_key_env, the name of an environment variable"
        )
    if parsed.scheme not in ("http", "https") or not host:
        raise ValueError(f"server: a URL http://... or https://... was expected, got {url!r}")


def read_key(name: str | None) -> str:
    """The key in an environment variable ("" without a name); ValueError where none can be sent."""
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:  # what was given is not repeated: it may be the key itself
        raise ValueError("api_key_env: there is no environment variable of the name given, or it "
                         "is empty")  # fmt: skip
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"api_key_env: the value of {name} cannot be sent: it is not plain ASCII")
    return key


def kind_of(status: int) -> str:
    """Whose fault a status is."""
    if status in _BUSY:
        return "busy" if status == 429 else "server"
    if status in _FOR_ALL:
        return "all"
    return "own" if status >= 500 or status == 408 else "final"


def retry_after(value: str) -> float:
    """Seconds of the header ``Retry-After``: a number or a date; 0 where it says nothing."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        seconds = float(value) if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value) else (
            parsedate_to_datetime(value).timestamp() - time.time()
        )  # fmt: skip
        return min(max(0.0, seconds), 600.0)
    return 0.0
