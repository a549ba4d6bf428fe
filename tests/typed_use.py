"""The public API as a strictly typed program uses it; `make lint` runs `mypy --strict` on this.

Lines with `type: ignore` must be errors: mypy reports an ignore that is not needed.
"""

from __future__ import annotations

from torch import Tensor, nn

import pro_kernels as pk
from pro_kernels.losses import Ranked


def of_hidden_states(hidden: Tensor, weight: Tensor, targets: Tensor, rewards: Tensor) -> Tensor:
    layout: pk.Layout = pk.Layout.from_padded(targets)
    out: pk.PROOutput = pk.linear_pro_loss(
        hidden, weight, None, rewards, layout=layout, sft_weight=0.1
    )
    logps: Tensor = pk.linear_token_logps(hidden, weight, targets, logit_scale=0.5)
    lse: Tensor = pk.linear_token_logps(hidden, weight, targets, return_lse=True)[1]
    mean: Tensor = pk.linear_cross_entropy(hidden, weight, targets, z_loss=1e-4)
    stats = pk.linear_cross_entropy(hidden, weight, targets, return_stats=True)
    expected: Tensor = pk.reference.linear_pro_loss(hidden, weight, targets, rewards).loss
    pk.linear_pro_loss(hidden, weight, targets, 0.5)  # type: ignore[arg-type]
    pk.linear_token_logps(hidden, weight)  # type: ignore[call-overload]
    return out.loss + logps.sum() + lse.sum() + mean + stats.loss + expected


def of_logits(logits: Tensor, targets: Tensor, rewards: Tensor) -> Tensor:
    logps: Tensor = pk.token_logps(logits, targets)
    _, entropy = pk.token_logps(logits, targets, return_entropy=True)
    return pk.pro_loss(logits, targets, rewards).loss + logps.sum() + entropy.sum()


def of_log_probs(logps: Tensor, lengths: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    advantages: Tensor = pk.group_advantages(rewards)
    loss, _ = pk.losses.LOSSES["simpo"](logps, lengths, rewards=rewards)
    policy, _ = pk.policy_loss(logps, None, advantages, mask)
    return loss + policy


@pk.losses.register(sft_weight=0.0)
def margin(ranked: Ranked, *, least: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    scores = ranked.scores(True)
    return ranked.result((least - scores[:, 0]).relu(), scores)


def of_models(model: nn.Module) -> pk.OpenModel:
    attached: nn.Module = pk.attach(model, loss="ranking", rows="distinct")
    with pk.distinct_rows(model):
        pk.attach("gpt2")  # type: ignore[arg-type]
    pk.detach(attached)
    return pk.OpenModel(model)
