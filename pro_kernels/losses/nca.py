"""NCA: noise contrastive alignment, candidate by candidate.

"Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369.
h_i = β (S_i − S_ref,i):

    L = −Σ_i [ softmax(r / α)_i · log σ(h_i) + (1/n) · log σ(−h_i) ]

With alpha=0 all weight is on the best candidate, and rewards only order: for n = 2 that is TRL's
"nca_pair".
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, RewardTemperature

from .ranked import Ranked, Result
from .registry import register


@register(
    needs=lambda alpha, **_: ("ref_logps", "rewards") if alpha else ("ref_logps",),
    uses_gaps=lambda alpha, **_: alpha > 0,
)
def nca(ranked: Ranked, *, beta: Beta = 0.01, alpha: RewardTemperature = 0.01) -> Result:
    """NCA with the temperature alpha of the rewards."""
    implicit = beta * ranked.log_ratios()
    noise = torch.where(ranked.valid, logsigmoid(-implicit), 0.0).sum(1)
    data = (ranked.reward_softmax(alpha) * logsigmoid(implicit)).sum(1)
    return ranked.result(-data - noise / ranked.counts.clamp(min=1), implicit)
