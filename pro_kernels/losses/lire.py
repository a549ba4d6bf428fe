"""LIRE: listwise reward enhancement.

"LIRE: listwise reward enhancement for preference alignment", arXiv 2405.13516:

    L = −Σ_i softmax(S / T)_i · r_i

Rewards count as they are given, so a number added to all of them is added to −L.
"""

from __future__ import annotations

from typing import Annotated

from pro_kernels.option_types import LengthNormalize, Limits

from .ranked import Ranked, Result
from .registry import register


@register(needs=["rewards"], uses_gaps=True)
def lire(
    ranked: Ranked,
    *,
    temperature: Annotated[float, Limits(above=0), "Temperature of the scores."] = 1.0,
    length_normalize: LengthNormalize = False,
) -> Result:
    """LIRE on S (S/m where length_normalize is True)."""
    assert ranked.rewards is not None
    scores = ranked.scores(length_normalize)
    shares = ranked.softmax(scores / temperature)
    # What all rewards share has no gradient, and would round that of their gaps.
    best = ranked.rewards[:, 0].to(scores.dtype)
    return ranked.result(-(shares * ranked.gaps()).sum(1) - best, scores)
