"""The authors' training step, written from its description: what ``compat="official"`` must equal.

Every candidate is a forward of the whole model of its own, ``log_softmax`` covers every position
and the whole vocabulary in the model's dtype, and most of both is then masked out. It is here to be
compared with: the trainer's own step gives the same loss and gradients for a fraction of the work.

For one prompt, S_i is the sum and s_i the mean of candidate i's scored log-probs, r_i its reward:

    term k  = log(1e-10 + exp(s_k tau_kk) + sum_{i>k} exp(s_i tau_ki)) - s_k tau_kk
    tau_ki  = r_k - r_i   (i > k),      tau_kk = max_{i>k} tau_ki
    loss    = sum_{k<n} mean over prompts of term k  -  w (n-1)^2 mean over prompts of S_sft

each mean cast to the dtype of the hidden states. Position t of a row counts where its token is real
and not masked as prompt, with token t + 1 as its label. The collator masks all of the prompt but
its last token, so every completion token is scored; so is, in a padded row only, the position of
the last token, with the padding after it as its label.

Legend: ``B`` prompts, ``n`` candidates, ``T`` positions, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pro_kernels.reference import official_targets
from pro_trainer.batch.collate import padded_rows, read_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EPS = 1e-10
SFT_WEIGHT = 0.05


class OfficialLoss(NamedTuple):
    """The loss and, detached, the terms it is the sum of; all in the hidden states' dtype."""

    loss: Tensor  # ()
    rank_losses: Tensor  # (n - 1,)
    sft_loss: Tensor  # ()


def official_batch(features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Tokenised lists as the authors' collator lays them out.

    Args:
        features: lists with ``prompts`` (1 or n token lists), ``completions`` (n), ``rewards`` (n)
            and ``sft_index`` (None: the first candidate).
        pad_token_id: what fills rows on the right, up to the longest candidate of the batch.

    Returns:
        ``input_ids``, ``attention_mask``, ``prefix_mask`` ``(B, n, T)`` int64, ``rewards``
        ``(B, n)`` float32, ``sft_index`` ``(B,)`` int64.

    Raises:
        ValueError: no lists, lists of different n, without rewards, with an empty prompt or with an
            ``sft_index`` out of range.
    """
    _check(features)
    sequences = read_sequences(features)
    batch, _ = padded_rows(sequences, pad_token_id)
    masked = torch.from_numpy(sequences.prompt_lengths)[:, None] - 1
    batch["prefix_mask"] = (torch.arange(batch["input_ids"].shape[1]) < masked).long()
    return {
        **{name: x.unflatten(0, (len(features), -1)) for name, x in batch.items()},
        "rewards": torch.tensor([list(f["rewards"]) for f in features], dtype=torch.float32),
        "sft_index": torch.tensor([f.get("sft_index") or 0 for f in features]),
    }


def official_loss(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    sft_weight: float = SFT_WEIGHT,
    **forward: Any,
) -> OfficialLoss:
    """The loss of one batch, by n forwards of ``model``; call ``.loss.backward()`` on it.

    Args:
        model: a causal LM of transformers.
        batch: as ``official_batch`` makes it, on the model's device.
        sft_weight: w.
        forward: further arguments of each forward. The authors ask for all hidden states, of which
            they read the dtype only, and leave the key-value cache on; neither changes the result.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return loss_of_logits(
        lambda i: model(input_ids=ids[:, i], attention_mask=mask[:, i], **forward).logits,
        official_targets(ids, mask, batch["prefix_mask"]),
        batch["rewards"],
        batch["sft_index"],
        sft_weight,
        dtype=model.get_input_embeddings().weight.dtype,
    )


def official_logps(
    logits_of: Callable[[int], Tensor],  # candidate -> (B, T, V)
    targets: Tensor,  # (B, n, T), -100 where nothing is scored
) -> list[Tensor]:
    """Log-probs of each candidate, in the logits' dtype: n of (B, T)."""
    return [
        torch.log_softmax(logits_of(i), dim=2).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        for i, labels in enumerate(targets.unbind(1))
    ]


def loss_of_logits(
    logits_of: Callable[[int], Tensor],  # candidate -> (B, T, V)
    targets: Tensor,  # (B, n, T), -100 where nothing is scored
    rewards: Tensor,  # (B, n)
    sft_index: Tensor | None = None,  # (B,)
    sft_weight: float = SFT_WEIGHT,
    *,
    dtype: torch.dtype | None = None,
) -> OfficialLoss:
    """The loss, given each candidate's logits; ``dtype``: what each term is cast to (theirs)."""
    masks = (targets != -100).unbind(1)
    logps = official_logps(logits_of, targets)
    sums = torch.stack([x.where(live, 0).sum(1) for live, x in zip(masks, logps, strict=True)], 1)
    means = sums / torch.stack([live.sum(1) for live in masks], 1)
    dtype, n = dtype or sums.dtype, targets.shape[1]
    terms = [_rank_term(means[:, k:], rewards[:, k:]).to(dtype) for k in range(n - 1)]
    best = sums[:, 0] if sft_index is None else sums.gather(1, sft_index[:, None])[:, 0]
    sft = sft_weight * (n - 1) ** 2 * (-best).mean().to(dtype)
    rank_losses = torch.stack(terms).detach() if terms else sft.detach().new_zeros(0)
    return OfficialLoss(sum(terms, sft.new_zeros(())) + sft, rank_losses, sft.detach())


def _rank_term(means: Tensor, rewards: Tensor) -> Tensor:
    """The first candidate against all others: the mean over prompts; both ``(B, n - k)``."""
    tau = rewards[:, :1] - rewards[:, 1:]
    own = means[:, 0] * tau.amax(1)
    others = (means[:, 1:] * tau).exp().sum(1)
    return (torch.log(EPS + own.exp() + others) - own).mean()


def _check(features: Sequence[Mapping[str, Any]]) -> None:
    if not features:
        raise ValueError("features must hold a list, got none")
    sizes = [len(feature["completions"]) for feature in features]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the official procedure takes lists of one length n, got features of n = {sizes}"
        )
    for index, feature in enumerate(features):
        if feature["rewards"] is None or len(feature["rewards"]) != sizes[0]:
            raise ValueError(
                f"features[{index}] must have a reward for each of its {sizes[0]} candidates, got "
                f"{feature['rewards']}"
            )
        if not 0 <= (feature.get("sft_index") or 0) < sizes[0]:
            raise ValueError(
                f"features[{index}] must have an sft_index in [0, {sizes[0]}), got "
                f"{feature['sft_index']}"
            )
