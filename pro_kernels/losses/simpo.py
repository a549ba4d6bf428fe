"""SimPO: reference-free preference optimization with a target margin.

"SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv 2405.14734.
s_i = S_i / m_i:

    L = mean over pairs (i better than j) of −log σ( β (s_i − s_j) − γ )

γ is the paper's (TRL's ``simpo_gamma``), not the ratio γ/β. label_smoothing is as in
``dpo``. Pairs of equal reward are left out.
"""

from __future__ import annotations

from typing import Annotated

from pro_kernels.option_types import Beta, LabelSmoothing, Limits, Pairs

from .ranked import Ranked, Result, differences, logistic, pair_mean
from .registry import register


@register()
def simpo(
    ranked: Ranked,
    *,
    beta: Beta = 2.0,
    gamma: Annotated[float, Limits(at_least=0), "Target margin."] = 0.5,
    label_smoothing: LabelSmoothing = 0.0,
    pairs: Pairs = "all",
) -> Result:
    """SimPO over all pairs, or best-versus-rest with pairs="best"."""
    implicit = beta * ranked.scores()
    selected = ranked.better(pairs)
    losses = logistic(differences(implicit) - gamma, label_smoothing)
    return ranked.result(pair_mean(losses, selected), implicit, selected)
