"""Attention masks of prefix-shared rows: one rule, in each form an attention takes it.

Query q attends to key k of the same row iff k belongs to the shared prefix or to q's own candidate,
and stands at q's position or before; in a sliding-window layer also at less than the window before
it. Positions count along the candidate: in the row, other candidates may lie in between. Padding
(segment -1, position 0) is seen by padding alone, which sees itself, so no row is empty.

All is computed from ``segments`` and ``position_ids`` where they are; nothing waits for the device.

Legend: ``B`` rows, ``L`` their length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedConfig

Mask = Any  # a Tensor or a BlockMask; torch has no common type
FULL, SLIDING = "full_attention", "sliding_attention"
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


def attends(
    query_segment: Tensor,
    query_position: Tensor,
    key_segment: Tensor,
    key_position: Tensor,
    window: int | None,
) -> Tensor:
    """The rule, for segments and positions that broadcast; bool."""
    distance = query_position - key_position
    seen = ((key_segment == 0) | (key_segment == query_segment)) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def dense_mask(
    segments: Tensor,  # (B, L) int32
    position_ids: Tensor,  # (B, L) int64
    window: int | None = None,
) -> Tensor:
    """(B, 1, L, L) bool, True where a query (third dimension) attends to a key (fourth)."""
    position = position_ids.int()
    mask = attends(
        segments[:, :, None], position[:, :, None], segments[:, None], position[:, None], window
    )
    return mask[:, None]


def mask_mod(
    segments: Tensor, position_ids: Tensor, window: int | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as FlexAttention asks for it: of row, head, query index and key index."""
    position = position_ids.int()

    def mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        here, there = (row, query), (row, key)
        return attends(segments[here], position[here], segments[there], position[there], window)

    return mod


def block_mask(segments: Tensor, position_ids: Tensor, window: int | None = None) -> BlockMask:
    """FlexAttention's mask, which lets it leave out the blocks between candidates."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = segments.shape
    mod = mask_mod(segments, position_ids, window)
    return create_block_mask(mod, rows, None, length, length, device=segments.device)


def mask_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The window (None: all) of each type of layer; what ``layer_types`` leaves open is "all"."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return {SLIDING if window else FULL: window}
    return {name: window if name == SLIDING else None for name in sorted(set(types))}


def attention_masks(
    segments: Tensor,  # (B, L) int32
    position_ids: Tensor,  # (B, L) int64
    config: PreTrainedConfig,
    dtype: torch.dtype,
) -> Mask | dict[str, Mask]:
    """What a decoder of this config takes as ``attention_mask``; each different mask is built once.

    Where layers differ in their window, models take one mask for each type of layer, by name; else
    the mask itself. ``sdpa`` takes (B, 1, L, L) bool, ``eager`` a number of ``dtype`` to add, and
    ``flex_attention`` a ``BlockMask``.

    Raises:
        ValueError: an attention implementation that takes no such mask.
    """
    implementation = config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} takes no mask of its own; prefix sharing "
            f"needs one of {', '.join(IMPLEMENTATIONS)}"
        )

    def build(window: int | None) -> Mask:
        if implementation == "flex_attention":
            return block_mask(segments, position_ids, window)
        mask = dense_mask(segments, position_ids, window)
        return mask if implementation == "sdpa" else _additive(mask, dtype)

    length = segments.shape[1]
    windows = {
        name: None if window is None or window >= length else window
        for name, window in mask_windows(config).items()
    }
    built = {window: build(window) for window in set(windows.values())}
    if len(built) == 1:
        return next(iter(built.values()))
    return {name: built[window] for name, window in windows.items()}


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is True, the lowest number elsewhere."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
