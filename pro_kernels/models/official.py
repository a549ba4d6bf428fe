"""The fused loss for the authors' PRO code: its batches, its loss, its gradients, in one forward.

Their training step runs the model once for each of the n candidates and takes ``log_softmax`` over
every position. ``compute_loss`` takes the same batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.models.attach import attach, attached_options, loss_options
from pro_kernels.options import PROOptions
from pro_kernels.reference import official_targets

_KEYS = ("input_ids", "attention_mask", "prefix_mask", "rewards")


def compute_loss(
    model: nn.Module, batch: Mapping[str, Any], *, sft_weight: float = 0.05, **options: Any
) -> Any:
    """The authors' loss of one batch; call ``.loss.backward()`` on what it returns.

    The model is attached at the first call, with ``compat="official"`` and terms cast to the dtype
    of its weights, as the authors' code casts them to that of its hidden states. Attach it yourself
    (``attach(model, compat="official", ...)``) before DDP or the like wraps it.

    Args:
        model: a causal LM of transformers, or what wraps an attached one.
        batch: ``input_ids``, ``attention_mask`` and ``prefix_mask`` (1 on the prompt but its last
            token) (B, n, T); ``rewards`` (B, n), best first; ``labels`` (B, n, T), by default the
            ids; ``sft_index`` (B,), by default 0. The masks of tokens may be bool or integer.
        sft_weight: w of ``w (n-1)^2 (-S_sft)``.
        options: of ``attach``, the same at each call.

    Returns:
        The model's output with ``loss``, ``rank_losses`` (n - 1,), ``sft_loss``, ``scores``,
        ``logps`` and ``lengths`` (B, n).

    Raises:
        ValueError: a part of the batch is missing or of another shape; the model is attached with
            other options.
    """
    _check(batch)
    lm: Any = model
    while isinstance(getattr(lm, "module", None), nn.Module):
        lm = lm.module
    wanted = {"final_dtype": next(lm.parameters()).dtype, **options}
    wanted |= {"compat": "official", "sft_weight": sft_weight}
    found = attached_options(lm)
    if found is None:
        attach(lm, **wanted)
    elif _loss_options(found) != _loss_options(wanted):
        raise ValueError(
            f"the model is attached with {found}, and the batch is to be scored with {wanted}; "
            "attach(model, ...) it with those, or detach(model) first"
        )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    given = {name: value for name, value in batch.items() if value is not None}
    targets = official_targets(given.get("labels", ids), mask, batch["prefix_mask"])
    return model(
        input_ids=ids.flatten(0, 1),
        attention_mask=mask.flatten(0, 1),
        shift_labels=targets.flatten(0, 1),
        rewards=batch["rewards"],
        sft_index=given.get("sft_index", torch.zeros(ids.shape[0], dtype=torch.int64)),
    )


def _loss_options(options: Mapping[str, Any]) -> PROOptions:
    """Those that change the loss; terms are fp32 before they are cast."""
    found = loss_options(options)
    return replace(found, final_dtype=None) if found.final_dtype == torch.float32 else found


def _check(batch: Mapping[str, Any]) -> None:
    missing = [key for key in _KEYS if not isinstance(batch.get(key), Tensor)]
    if missing:
        raise ValueError(f"batch must hold tensors {list(_KEYS)}, got none for {missing}")
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 3:
        raise ValueError(f"batch['input_ids'] must have shape (B, n, T), got {shape}")
    expected = dict.fromkeys(("attention_mask", "prefix_mask", "labels"), shape)
    for key, want in {**expected, "rewards": shape[:2], "sft_index": shape[:1]}.items():
        value = batch.get(key)
        if value is not None and tuple(value.shape) != want:
            raise ValueError(f"batch[{key!r}] must have shape {want}, got {tuple(value.shape)}")
