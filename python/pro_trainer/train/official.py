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
    rows = [_rows(feature) for feature in features]
    n = len(rows[0])
    length = max(len(prompt) + len(completion) for pairs in rows for prompt, completion in pairs)
    input_ids = torch.full((len(rows), n, length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    prefix_mask = torch.zeros_like(input_ids)
    for b, pairs in enumerate(rows):
        for i, (prompt, completion) in enumerate(pairs):
            tokens = [*prompt, *completion]
            input_ids[b, i, : len(tokens)] = torch.tensor(tokens)
            attention_mask[b, i, : len(tokens)] = 1
            prefix_mask[b, i, : len(prompt) - 1] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "prefix_mask": prefix_mask,
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

    def logits_of(i: int) -> Tensor:
        ids, mask = batch["input_ids"][:, i], batch["attention_mask"][:, i]
        return model(input_ids=ids, attention_mask=mask, **forward).logits

    return loss_of_logits(
        logits_of, batch, sft_weight, dtype=model.get_input_embeddings().weight.dtype
    )


def loss_of_logits(
    logits_of: Callable[[int], Tensor],
    batch: Mapping[str, Tensor],
    sft_weight: float = SFT_WEIGHT,
    *,
    dtype: torch.dtype,
) -> OfficialLoss:
    """The loss, given each candidate's logits.

    Args:
        logits_of: candidate -> logits ``(B, T, V)``.
        batch: as ``official_batch`` makes it.
        sft_weight: w.
        dtype: of the hidden states; each term is cast to it.
    """
    n = batch["input_ids"].shape[1]
    scored = [
        _scored_sum(
            logits_of(i), *(batch[k][:, i] for k in ("input_ids", "attention_mask", "prefix_mask"))
        )
        for i in range(n)
    ]
    sums = torch.stack([total for total, _ in scored], dim=1)
    means = sums / torch.stack([count for _, count in scored], dim=1)
    terms = [_rank_term(means[:, k:], batch["rewards"][:, k:]).to(dtype) for k in range(n - 1)]
    best = sums.gather(1, batch["sft_index"][:, None])[:, 0]
    sft = sft_weight * (n - 1) ** 2 * (-best).mean().to(dtype)
    rank_losses = torch.stack(terms).detach() if terms else sft.detach().new_zeros(0)
    return OfficialLoss(sum(terms, sft.new_zeros(())) + sft, rank_losses, sft.detach())


def _scored_sum(
    logits: Tensor,  # (B, T, V)
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T)
    prefix_mask: Tensor,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """Sum of one candidate's scored log-probs, in the logits' dtype, and their number; ``(B,)``."""
    logps = torch.log_softmax(logits[:, :-1], dim=2)
    logps = logps.gather(2, input_ids[:, 1:, None])[..., 0]
    counts = ((attention_mask == 1) & (prefix_mask == 0))[:, :-1]
    return logps.masked_fill(~counts, 0.0).sum(1), counts.sum(1)


def _rank_term(means: Tensor, rewards: Tensor) -> Tensor:
    """The first candidate against all others: the mean over prompts; both ``(B, n - k)``."""
    tau = rewards[:, :1] - rewards[:, 1:]
    own = means[:, 0] * tau.amax(1)
    others = (means[:, 1:] * tau).exp().sum(1)
    return (torch.log(EPS + own.exp() + others) - own).mean()


def _rows(feature: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of each candidate."""
    prompts, completions = feature["prompts"], feature["completions"]
    if len(prompts) == 1:
        prompts = [prompts[0]] * len(completions)
    return list(zip(prompts, completions, strict=True))


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
        if len(feature["prompts"]) not in (1, sizes[0]) or not all(feature["prompts"]):
            lengths = [len(prompt) for prompt in feature["prompts"]]
            raise ValueError(
                f"features[{index}] must have 1 or {sizes[0]} prompts of a token or more, got "
                f"prompts of lengths {lengths}"
            )
