"""ListNet: cross-entropy between the top-one distributions of rewards and scores.

"Learning to Rank: From Pairwise Approach to Listwise Approach" (Cao et al., ICML 2007):

    L = −Σ_i softmax(r / T)_i · log softmax(s)_i

Equal rewards need no special case.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch

from pro_kernels.option_types import LengthNormalize, Limits

from .ranked import Ranked, Result
from .registry import register


@register(needs=["rewards"], uses_gaps=True)
def listnet(
    ranked: Ranked,
    *,
    length_normalize: LengthNormalize = True,
    reward_temperature: Annotated[float, Limits(above=0), "Temperature of the rewards."] = 1.0,
) -> Result:
    """ListNet on s = S/m (S where length_normalize is False)."""
    assert ranked.rewards is not None
    scores = ranked.scores(length_normalize)
    # An empty prompt keeps its first place, so that no softmax is over nothing.
    absent = ~ranked.valid & (torch.arange(scores.shape[1], device=scores.device) > 0)
    gaps = (ranked.rewards - ranked.rewards[:, :1]).to(scores.dtype)
    targets = (gaps / reward_temperature).masked_fill(absent, -math.inf).softmax(1)
    predicted = scores.masked_fill(absent, -math.inf).log_softmax(1).masked_fill(absent, 0.0)
    return ranked.result(-(targets * predicted).sum(1), scores)
