"""Direct Preference Optimization.

"Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv 2305.18290; label smoothing ε as in conservative DPO. d_i = S_i − S_ref,i:

    L = mean over pairs (i better than j) of
        −(1−ε) log σ(β (d_i − d_j)) − ε log σ(−β (d_i − d_j))

Pairs of equal reward are left out.
"""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, Limits, Pairs

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def dpo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float, Limits(at_least=0, at_most=0.5), "Share of labels taken to be wrong."
    ] = 0.0,
    pairs: Pairs = "all",
) -> Result:
    """DPO over all pairs, or best-versus-rest with pairs="best"."""
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    selected = ranked.better(pairs)
    return ranked.result(pair_mean(losses, selected), implicit, selected)
