"""RPO: reward-aware preference optimization.

"Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment",
arXiv 2502.00203. h_i = β (S_i − S_ref,i), pairs i, j of a prompt, p = σ(η (r_i − r_j)),
q = σ(h_i − h_j):

    L = mean over pairs of KL(p ‖ q)         divergence="forward" (NeMo's rpo_bwd_kl)
                           KL(q ‖ p)         divergence="backward" (NeMo's rpo_fwd_kl)

KL of two Bernoulli distributions. Pairs of equal reward count: their p is 1/2.
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, Limits
from pro_kernels.ranking import later_pairs

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register(needs=["ref_logps", "rewards"], uses_gaps=True)
def rpo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    eta: Annotated[float, Limits(above=0), "Factor on reward differences."] = 1.0,
    divergence: Annotated[
        Literal["forward", "backward"], "KL of the rewards' probability to the model's, or back."
    ] = "forward",
) -> Result:
    """RPO over all pairs."""
    assert ranked.rewards is not None
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    p, q = eta * differences(ranked.rewards).to(margins.dtype), margins
    if divergence == "backward":
        p, q = q, p
    losses = _share(p, q) + _share(-p, -q)
    return ranked.result(pair_mean(losses, later_pairs(ranked.valid)), implicit)


def _share(x: Tensor, y: Tensor) -> Tensor:
    """σ(x) (log σ(x) − log σ(y))."""
    return logsigmoid(x).exp() * (logsigmoid(x) - logsigmoid(y))
