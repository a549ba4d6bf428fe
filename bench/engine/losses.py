"""The PRO loss as peers would write it: plain PyTorch, independent of pro_kernels.

Columns are best first, as the authors' code has them. Legend: ``B`` prompts, ``n`` candidates,
``T`` positions, ``V`` vocabulary. Targets are -100 where nothing is scored.
"""

from __future__ import annotations

import torch
from torch import Tensor

SFT_WEIGHT = 0.05
# How the authors and the peers take the SFT term; our default is a mean over tokens.
SFT = {"sft_weight": SFT_WEIGHT, "sft_reduction": "sum"}


def loss_of_logps(
    logps: Tensor,  # (B, n, T), any value where targets are -100
    targets: Tensor,  # (B, n, T)
    rewards: Tensor,  # (B, n)
) -> Tensor:
    """PRO from per-token log-probs: the mean over prompts of all rank terms and the SFT term."""
    live, n = targets != -100, targets.shape[1]
    sums = torch.where(live, logps, 0.0).sum(-1)
    scores = sums / live.sum(-1)
    loss = -SFT_WEIGHT * (n - 1) ** 2 * sums[:, 0].mean()
    for k in range(n - 1):
        tau = rewards[:, k : k + 1] - rewards[:, k + 1 :]
        own = scores[:, k : k + 1] * tau.amax(1, keepdim=True)
        entries = torch.cat([own, scores[:, k + 1 :] * tau], 1)
        loss = loss + (entries.logsumexp(1) - own[:, 0]).mean()
    return loss


def plain_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """fp32 log_softmax of every token's logits (B, n, T, V), then gather: (B, n, T)."""
    logps = logits.float().log_softmax(-1)
    return logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
