"""A call of a decoder on the distinct tokens of a padded batch: what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pro_kernels.distinct import interface
from pro_kernels.distinct.tree import TokenTree

# A batch is run as it is where less than this share of it would be left out.
_WORTH = 0.05
# An attribute of hidden states: those of the row, with one for padding, and each one's place there.
SPREAD = "_pro_kernels_spread"
# What the row has in another form, or has no use for: ``margin`` is a number a row, which TRL's
# reward trainer hands on with the batch, and no decoder reads it.
_OURS = ("input_ids", "attention_mask", "position_ids", "use_cache", "past_key_values",
         "cache_position", "return_dict", "margin")  # fmt: skip


class Row(NamedTuple):
    """What the decoder is given, and where each position of the batch finds what comes out."""

    input_ids: Tensor  # (1, S)
    position_ids: Tensor  # (1, S)
    segments: Tensor  # (1, 1, K, 4), on the CPU
    places: Tensor  # (R T,), S for padding

    @classmethod
    def of(cls, tree: TokenTree, ids: Tensor, mask: Tensor | None) -> Row:
        """For a padded batch, on its device."""

        def there(x: Tensor) -> Tensor:
            return x.to(ids.device, non_blocking=True)

        index = tree.index(ids.shape, mask)
        row = there(tree.input_ids)[None], there(tree.position_ids)[None]
        return cls(*row, tree.as_mask(), there(index))


def row_of(decoder: Any, relative: bool, given: Mapping[str, Any]) -> tuple[int, Row | None]:
    """How many tokens a call runs, and on which row; None: on what it is given.

    0 tokens: it is not about such a batch. ``relative``: a row may as a whole stand further on.

    Raises:
        ValueError: it is, and cannot be run so.
    """
    ids, mask, cached = (given.get(k) for k in ("input_ids", "attention_mask", "use_cache"))
    if cached is None and not torch.is_grad_enabled():
        cached = getattr(decoder.config, "use_cache", False)  # somebody may want it
    if ids is None or given.get("inputs_embeds") is not None or ids.dim() != 2:
        return 0, None
    if cached or given.get("past_key_values") is not None or interface.is_tree(mask):
        return 0, None
    if given.get("output_attentions"):
        raise ValueError("output_attentions asks for attention weights, which are not made")
    if given.get("is_causal") is False:
        raise ValueError("is_causal=False asks for attention to later tokens")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        kind = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"its attention_mask is no (R, T) tensor: {kind}")
    others = {k: x for k, x in given.items() if k not in _OURS and isinstance(x, Tensor)}
    strange = [k for k, x in others.items() if x.dim()]  # a number is no matter of rows
    if strange:
        raise ValueError(f"{sorted(strange)} are tensors whose meaning is not known")
    embeddings = decoder.get_input_embeddings()
    if getattr(embeddings, "neftune_noise_alpha", None) and embeddings.training:
        raise ValueError("NEFTune's noise goes by the length of a row")
    ids_there, ids = ids, ids.cpu()  # waits for the device, once
    mask = None if mask is None else mask.cpu()
    tree = TokenTree.from_padded(ids, mask)
    if tree.num_tokens > (1 - _WORTH) * ids.numel():
        return ids.numel(), None
    tree.check_positions(given.get("position_ids"), mask, relative)
    return tree.num_tokens, Row.of(tree, ids_there, mask)


def spread_from(hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """What hidden states (R, T, H) of a padded batch were spread from: (S + 1, H) and (R, T)."""
    whole = hidden if hidden._base is None else hidden._base
    found = getattr(whole, SPREAD, None)
    if found is None or hidden.numel() != whole.numel() or not hidden.is_contiguous():
        return None
    return found[0], found[1].view(hidden.shape[:-1])


def run_row(run: Callable[..., Any], row: Row, given: Mapping[str, Any]) -> Any:
    """The decoder on the distinct tokens, and its output as of the padded batch."""
    shape = given["input_ids"].shape
    others = {k: x for k, x in given.items() if k not in _OURS}
    out = run(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=row.segments,
        use_cache=False,
        return_dict=True,
        **others,
    )

    def spread(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(map(spread, x))
        if not isinstance(x, Tensor):
            return x
        if x.dim() > 2:  # (1, S, ...)
            rows = nn.functional.pad(x[0], (0, 0) * (x.dim() - 2) + (0, 1))
            places = row.places.to(x.device)
            whole = rows.index_select(0, places)
            setattr(whole, SPREAD, (rows, places))
            return whole.unflatten(0, shape)
        rows = nn.functional.pad(x, (0, 0, 0, 1))  # a router's, (S, E)
        return rows.index_select(0, row.places.to(x.device))

    for name, value in list(out.items()):
        out[name] = spread(value)
    wanted = given.get("return_dict")
    return out.to_tuple() if wanted is not None and not wanted else out
