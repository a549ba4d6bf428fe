"""KTO: Kahneman–Tversky optimization, from desirable and undesirable candidates.

"KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306.
h_i = β (S_i − S_ref,i):

    L = mean over candidates of  λ_D (1 − σ(h_i − z0))  desirable,
                                 λ_U (1 − σ(z0 − h_i))  undesirable

z0 = β max(0, KL) is a constant of the gradient. TRL's KTOTrainer estimates KL from completions of
other prompts: give the mean of their S − S_ref as ``kl``. Without it KL of desirable candidates is
the mean of S − S_ref over the undesirable ones of the batch, and the other way round.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from pro_kernels.option_types import Beta, Limits
from pro_kernels.validate import check_device, check_float, check_mask, check_same_shape

from .ranked import Ranked, Result
from .registry import register


@register(needs=["ref_logps"])
def kto(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    desirable_weight: Annotated[float, Limits(at_least=0), "Weight of desirable candidates."] = 1.0,
    undesirable_weight: Annotated[
        float, Limits(at_least=0), "Weight of undesirable candidates."
    ] = 1.0,
    desirable: Tensor | None = None,  # (B, n) bool
    kl: Tensor | None = None,  # 0-dim
) -> Result:
    """KTO; ``desirable`` says which are, by original column (default: the best of each prompt)."""
    good = ranked.best()
    if desirable is not None:
        check_same_shape("desirable", check_mask("desirable", desirable), ranked.shape, "(B, n)")
        check_device("desirable", desirable, "logps", ranked.logps)
        good = ranked.valid & desirable.gather(1, ranked.order)
    bad = ranked.valid & ~good
    ratios = ranked.log_ratios()
    if kl is not None:
        check_same_shape("kl", check_float("kl", kl), (), "()")
        z_good = z_bad = kl.detach().to(ratios.dtype)
    else:
        z_good, z_bad = (
            torch.where(others, ratios.detach(), 0.0).sum() / others.sum().clamp(min=1)
            for others in (bad, good)
        )
    implicit = beta * ratios
    of_good = desirable_weight * torch.sigmoid(beta * z_good.clamp(min=0) - implicit)
    of_bad = undesirable_weight * torch.sigmoid(implicit - beta * z_bad.clamp(min=0))
    losses = torch.where(good, of_good, torch.where(bad, of_bad, 0.0))
    return ranked.result(losses.sum(1) / ranked.counts.clamp(min=1), implicit)
