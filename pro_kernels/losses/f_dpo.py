"""f-DPO: DPO under another divergence from the reference model.

"Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
Constraints", arXiv 2309.16240. u_i = exp(S_i − S_ref,i):

    L = mean over pairs (i better than j) of −log σ( β (f'(u_i) − f'(u_j)) )

    f'(u) = log u                 reverse_kl (DPO)
            1 − 1/u               forward_kl
            log(2u / (1+u))       js_divergence
            (1 − u^−α) / α        alpha_divergence (TRL's coefficient is 1 − α)

Exponents are cut at 80, as TRL does it, so that u^−α stays finite in fp32. Constants of f' cancel.
Pairs of equal reward are left out.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, Limits, Pairs

from .ranked import Ranked, Result, differences, logistic, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def f_dpo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    divergence: Annotated[
        Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        "Divergence from the reference model.",
    ] = "reverse_kl",
    alpha: Annotated[
        float | None, Limits(above=0, at_most=1), "Of the alpha divergence; None: 0.5."
    ] = None,
    pairs: Pairs = "all",
) -> Result:
    """f-DPO over all pairs, or the best with the rest with pairs="best"."""
    if alpha is not None and divergence != "alpha_divergence":
        raise ValueError(f"alpha must be None with divergence={divergence!r}, got {alpha}")
    implicit = beta * _slope(ranked.log_ratios(), divergence, 0.5 if alpha is None else alpha)
    selected = ranked.better(pairs)
    return ranked.result(pair_mean(logistic(differences(implicit)), selected), implicit, selected)


def _slope(log_u: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(u), up to a constant."""
    if divergence == "reverse_kl":
        return log_u
    if divergence == "js_divergence":
        return logsigmoid(log_u)
    alpha = 1.0 if divergence == "forward_kl" else alpha
    return -torch.exp((-alpha * log_u).clamp(max=80)) / alpha
