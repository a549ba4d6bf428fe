"""EXO: efficient exact optimization, a reverse KL to the candidates' rewards.

"Towards Efficient Exact Optimization of Language Model Alignment", arXiv 2402.00856.
h_i = β (S_i − S_ref,i), q = softmax(h):

    L = Σ_i q_i (log q_i − log p_i),   p = softmax(r / α)

With alpha=0 rewards only order, and p is 1 − ε for the best candidate with ε shared by the others:
for n = 2 that is the paper's equation 16, TRL's "exo_pair".
"""

from __future__ import annotations

from typing import Annotated

import torch

from pro_kernels.option_types import Beta, Limits, RewardTemperature

from .ranked import Ranked, Result
from .registry import register


@register(
    needs=lambda alpha, **_: ("ref_logps", "rewards") if alpha else ("ref_logps",),
    uses_gaps=lambda alpha, **_: alpha > 0,
)
def exo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    alpha: RewardTemperature = 0.0,
    label_smoothing: Annotated[
        float | None,
        Limits(above=0, at_most=0.5),
        "Share of labels taken to be wrong, of order alone; None: 0.001.",
    ] = None,
) -> Result:
    """EXO; label_smoothing is ε, for alpha=0 only."""
    if alpha > 0 and label_smoothing is not None:
        raise ValueError(
            f"label_smoothing must be None with alpha > 0, got {label_smoothing} and alpha={alpha}"
        )
    e = 1e-3 if label_smoothing is None else label_smoothing
    implicit = beta * ranked.log_ratios()
    log_q = ranked.log_softmax(implicit)
    if alpha > 0:
        log_p = ranked.log_softmax(ranked.gaps() / alpha)
    else:
        best, counts = ranked.best(), ranked.counts[:, None]
        chosen = best.sum(1, keepdim=True)
        wrong = e / (counts - chosen).clamp(min=1).to(log_q.dtype)
        right = (1 - e) / chosen.clamp(min=1).to(log_q.dtype)
        # Where no candidate is worse, the whole of p is shared by the best.
        right = torch.where(counts == chosen, 1 / counts.clamp(min=1), right)
        log_p = torch.where(best, right, wrong).log()
    losses = (ranked.softmax(implicit) * (log_q - log_p)).sum(1)
    return ranked.result(losses, implicit)
