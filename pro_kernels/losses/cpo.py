"""Contrastive Preference Optimization.

"Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
Translation", arXiv 2401.08417:

    L = mean over pairs (i better than j) of −log σ( β (S_i − S_j) ) + α · NLL(best)

α is sft_weight. NLL is per token by default, as in the official code and TRL; sft_reduction="sum"
is −S as the paper writes it, "tokens" averages over the tokens of the whole batch exactly as TRL
does. label_smoothing is as in ``dpo``. Pairs of equal reward are left out.
"""

from __future__ import annotations

from pro_kernels.option_types import Beta, LabelSmoothing, Pairs

from .ranked import Ranked, Result, differences, logistic, pair_mean
from .registry import register


@register(sft_weight=1.0)
def cpo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelSmoothing = 0.0,
    pairs: Pairs = "all",
) -> Result:
    """CPO over all pairs, or best-versus-rest with pairs="best"."""
    implicit = beta * ranked.logps
    selected = ranked.better(pairs)
    losses = pair_mean(logistic(differences(implicit), label_smoothing), selected)
    return ranked.result(losses, implicit, selected)
