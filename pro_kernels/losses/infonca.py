"""InfoNCA: noise contrastive alignment, by a softmax over the candidates.

"Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369.
h_i = β (S_i − S_ref,i):

    L = −Σ_i softmax(r / α)_i · log softmax(h)_i

With alpha=0 all weight is on the best candidate, and rewards only order: for n = 2 that is DPO.
"""

from __future__ import annotations

from pro_kernels.option_types import Beta, RewardTemperature

from .ranked import Ranked, Result
from .registry import register


@register(
    needs=lambda alpha, **_: ("ref_logps", "rewards") if alpha else ("ref_logps",),
    uses_gaps=lambda alpha, **_: alpha > 0,
)
def infonca(ranked: Ranked, *, beta: Beta = 0.01, alpha: RewardTemperature = 0.01) -> Result:
    """InfoNCA with the temperature alpha of the rewards."""
    implicit = beta * ranked.log_ratios()
    losses = -(ranked.reward_softmax(alpha) * ranked.log_softmax(implicit)).sum(1)
    return ranked.result(losses, implicit)
