"""How much two texts have in common, by the pieces of five characters that they are made of.

Pieces of characters and not of words, so that it works for languages without spaces, too. Case and
the amount of white space do not count.
"""

from __future__ import annotations

from pro_trainer.data.fields import Text, plain

_PIECE = 5  # characters


def pieces(text: Text) -> frozenset[str]:
    """The different pieces of a text; of a text shorter than a piece, the text itself."""
    letters = " ".join(plain(text).casefold().split())
    return frozenset(letters[i : i + _PIECE] for i in range(max(1, len(letters) - _PIECE + 1)))


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """The share of their pieces that both have (Jaccard): 1 for equal texts, 0 for unlike ones."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)
