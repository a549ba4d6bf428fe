"""Direct Preference Optimization.

"Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv 2305.18290; label smoothing ε as in conservative DPO. d_i = S_i − S_ref,i:

    L = mean over pairs (i better than j) of
        −(1−ε) log σ(Δ) − ε log σ(−Δ),   Δ = β (d_i − d_j) + α (m_i − m_j)

α > 0 keeps candidates from winning by length alone: R-DPO, "Disentangling Length from Quality in
Direct Preference Optimization", arXiv 2403.19159, equation 9. The paper's DPO has α = 0.
Pairs of equal reward are left out.
"""

from __future__ import annotations

from typing import Annotated

from pro_kernels.option_types import Beta, LabelSmoothing, Limits, Pairs

from .ranked import Ranked, Result, differences, logistic, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def dpo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelSmoothing = 0.0,
    alpha: Annotated[float, Limits(), "Weight of the difference in length (R-DPO)."] = 0.0,
    pairs: Pairs = "all",
) -> Result:
    """DPO over all pairs, or best-versus-rest with pairs="best"."""
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    if alpha:
        margins = margins + alpha * differences(ranked.lengths)
    selected = ranked.better(pairs)
    losses = pair_mean(logistic(margins, label_smoothing), selected)
    return ranked.result(losses, implicit, selected)
