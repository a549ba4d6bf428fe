"""Odds Ratio Preference Optimization.

"ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691.
s_i = S_i / m_i, log-odds o_i = s_i − log(1 − exp(s_i)):

    L = NLL(best) + mean over pairs (i better than j) of −β log σ(o_i − o_j)

β is the paper's λ. NLL is per token by default; sft_reduction="tokens" averages over the tokens of
the whole batch as TRL does. A score closer to 0 than the dtype's epsilon is taken as −epsilon in
the log-odds, so probability 1 has finite odds. Pairs of equal reward are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, Pairs

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register(sft_weight=1.0)
def orpo(ranked: Ranked, *, beta: Beta = 0.1, pairs: Pairs = "all") -> Result:
    """ORPO over all pairs, or best-versus-rest with pairs="best"."""
    scores = ranked.scores()
    clamped = scores.clamp(max=-torch.finfo(scores.dtype).eps)
    log_odds = clamped - log1mexp(clamped)
    selected = ranked.better(pairs)
    losses = pair_mean(-beta * logsigmoid(differences(log_odds)), selected)
    return ranked.result(losses, beta * scores, selected)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, accurate at both ends and in its gradient."""
    near_zero = x > -math.log(2)
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, near, far)
