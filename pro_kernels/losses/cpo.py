"""Contrastive Preference Optimization.

"Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
Translation", arXiv 2401.08417:

    L = mean over pairs (i better than j) of −log σ( β (S_i − S_j) ) + α · NLL(best)

NLL is per token by default, as in the official code and TRL; sft_reduction="sum" is −S as the
paper writes it, "tokens" averages over the tokens of the whole batch exactly as TRL does. Pairs
of equal reward are left out.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, Pairs, SftReductionOfBatch, SftWeight

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register()
def cpo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    cpo_alpha: SftWeight = 1.0,
    sft_reduction: SftReductionOfBatch = "mean",
    pairs: Pairs = "all",
) -> Result:
    """CPO over all pairs, or best-versus-rest with pairs="best"."""
    implicit = beta * ranked.logps
    selected = ranked.better(pairs)
    losses = pair_mean(-logsigmoid(differences(implicit)), selected)
    return ranked.result(losses, implicit, selected, cpo_alpha * ranked.sft(sft_reduction))
