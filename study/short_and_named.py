"""A reward with a known best, 2: 5 to 20 words that name the subject of the prompt."""

from __future__ import annotations

from typing import Any


def short_and_named(completions: list[str], subject: list[str], **_: Any) -> list[float]:
    """Up to 1 for its length, 0.5 at 40 words, and 1 for the name; ``subject`` is a column."""
    found = []
    for text, name in zip(completions, subject, strict=True):
        words = len(text.split())
        found.append(min(1.0, words / 5, 20 / max(words, 1)) + (name in text.lower()))
    return found
