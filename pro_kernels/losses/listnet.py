"""ListNet: cross-entropy between the top-one distributions of rewards and scores.

"Learning to Rank: From Pairwise Approach to Listwise Approach" (Cao et al., ICML 2007):

    L = −Σ_i softmax(r / T)_i · log softmax(s)_i

Equal rewards need no special case.
"""

from __future__ import annotations

from typing import Annotated

from pro_kernels.option_types import LengthNormalize, Limits

from .ranked import Ranked, Result
from .registry import register


@register(needs=["rewards"], uses_gaps=True)
def listnet(
    ranked: Ranked,
    *,
    length_normalize: LengthNormalize = True,
    temperature: Annotated[float, Limits(above=0), "Temperature of the rewards."] = 1.0,
) -> Result:
    """ListNet on s = S/m (S where length_normalize is False)."""
    scores = ranked.scores(length_normalize)
    losses = -(ranked.reward_softmax(temperature) * ranked.log_softmax(scores)).sum(1)
    return ranked.result(losses, scores)
