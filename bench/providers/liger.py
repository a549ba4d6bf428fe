"""Liger's fused linear losses."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.engine.losses import SFT_WEIGHT
from bench.engine.timing import Refused, Step, backward_step
from bench.engine.truth import Inputs
from bench.providers.base import Provider, mean_step, refuse, rows_step


def providers(_: torch.device) -> list[Provider]:
    preference = "Liger 0.8 fused linear preference"
    return [
        Provider("liger", preference, liger_preference, compiles=True),
        Provider("liger-ce", "Liger 0.8 fused linear CE (mean)", liger_ce),
        Provider("liger-sm90", "Liger 0.8 scaled CE, SM90", liger_sm90, compiles=True),
        Provider("liger-sm90-mean", "Liger 0.8 linear CE, SM90 (mean)",
                 partial(liger_sm90, mean=True), compiles=True),
    ]  # fmt: skip


def liger_preference(inputs: Inputs) -> Step:
    """Liger's fused linear SimPO, which for pairs of one reward gap is exactly PRO.

    n = 2, tau = r_1 - r_2 the same for every prompt: the rank term is
    ``-log sigmoid(tau (s_1 - s_2))``, SimPO with beta = tau and gamma = 0; its NLL term, a mean
    over chosen tokens, is the SFT term with alpha = w (chosen tokens) / B.
    """
    case = inputs.case
    refuse(inputs, "ranking", "logits", "score", "ce", softcap=True, package="liger-kernel")
    if case.n != 2:
        raise Refused("n > 2: its fused preference losses take pairs")
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    taus = inputs.rewards[:, 0] - inputs.rewards[:, 1]
    if float(taus.max() - taus.min()) > 1e-5:
        raise Refused("its SimPO takes one reward gap for all prompts")
    chosen = int((inputs.targets[:, 0] != -100).sum())
    module = LigerFusedLinearSimPOLoss(
        beta=float(taus.mean()), gamma=0.0, alpha=SFT_WEIGHT * chosen / case.B
    )
    pairs = inputs.targets.transpose(0, 1).reshape(2 * case.B, case.T)

    def loss() -> Tensor:
        stacked = inputs.hidden.transpose(0, 1).reshape(2 * case.B, case.T, case.H)
        with torch.enable_grad():
            return module(inputs.weight, stacked, pairs)[0]

    return backward_step(loss, inputs.leaves)


def liger_ce(inputs: Inputs) -> Step:
    """Liger's fused linear cross-entropy, a mean: it has no gradient per token."""
    refuse(inputs, "ranking", "logits", "score", scalar=True, gpu=True, package="liger-kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(softcap=inputs.case.softcap)
    return mean_step(inputs, lambda x, y: module(inputs.weight, x, y))


def liger_sm90(inputs: Inputs, mean: bool = False) -> Step:
    """Liger's CuTe kernels for sm_90, per token or a mean; they need NVIDIA's CUTLASS DSL."""
    refuse(inputs, "ranking", "logits", "score", softcap=True, scalar=mean, gpu=True,
           package="liger-kernel")  # fmt: skip
    if torch.cuda.get_device_capability(inputs.device) != (9, 0):
        raise Refused("its kernels need sm_90")
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as linear
    from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90 as scaled

    def of_rows(x: Tensor, labels: Tensor) -> Tensor:
        per_token = scaled.LigerFusedScaledCrossEntropySM90Function
        return -per_token.apply(x, inputs.weight, labels).float()

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return linear.liger_fused_linear_cross_entropy_sm90(x, inputs.weight, labels)

    return mean_step(inputs, loss) if mean else rows_step(inputs, of_rows)
