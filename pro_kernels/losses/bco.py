"""BCO: binary classifier optimization.

"Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656.
h_i = β (S_i − S_ref,i):

    L = mean over pairs (i better than j) of −log σ(h_i − δ) − log σ(−(h_j − δ))

δ is a constant of the gradient: the running mean of h over all batches, where ``running`` keeps it
(the trainer does); the mean of h over this batch, where nothing does; or a number. delta=0 is TRL's
"bco_pair". Pairs of equal reward are left out.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, Limits, Pairs
from pro_kernels.validate import check_device, check_same_shape, check_tensor

from .ranked import Ranked, Result, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def bco(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    delta: Annotated[float | None, Limits(), "Reward shift; None: the mean reward so far."] = None,
    pairs: Pairs = "all",
    running: Tensor | None = None,  # (2,) float64
) -> Result:
    """BCO; ``running`` (sum and number of all h so far) is added to where gradients are enabled."""
    implicit = beta * ranked.log_ratios()
    so_far = torch.stack([implicit.detach().sum(), ranked.valid.sum()]).double()
    if running is not None:
        check_same_shape("running", check_tensor("running", running), (2,), "(2,)")
        if running.dtype != torch.float64:
            raise TypeError(f"running must be float64, got {running.dtype}")
        check_device("running", running, "logps", implicit)
        if torch.is_grad_enabled():
            running += so_far
        so_far = running
    shift = (so_far[0] / so_far[1].clamp(min=1)).to(implicit) if delta is None else delta
    losses = -logsigmoid(implicit - shift)[:, :, None] - logsigmoid(shift - implicit)[:, None, :]
    selected = ranked.better(pairs)
    return ranked.result(pair_mean(losses, selected), implicit, selected)
