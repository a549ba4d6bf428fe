"""Tree attention as an attention implementation of transformers.

``distinct_sdpa`` is what ``sdpa`` is, but for rows of a ``TokenTree``; so with every other name.
The tree's segments come in the place of the mask, which models hand on as it is: (1, 1, K, 4)
int64, which no mask is. So nothing is kept between calls, and a checkpointed layer that runs again
in the backward finds what it was given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.distinct import gpu
from pro_kernels.distinct.attention import tree_attention

PREFIX = "distinct_"
WINDOWS = "_windows"  # an attribute of segments: a list that each layer adds its window to


def registered(name: str) -> str:
    """The implementation that is ``name`` for everything but trees."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    ours = PREFIX + name
    if ours not in AttentionInterface._global_mapping:
        AttentionInterface.register(ours, _implementation(name))
        if name in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(ours, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return ours


def _implementation(name: str) -> Callable[..., tuple[Tensor, Any]]:
    def attention(
        module: nn.Module,
        query: Tensor,  # (1, h, S, d)
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if attention_mask is not None and is_tree(attention_mask):
            return over_tree(module, query, key, value, attention_mask, **kwargs), None
        original = _original(name, module)
        if "flash" not in name:
            return original(module, query, key, value, attention_mask, **kwargs)
        config: Any = module.config  # where transformers looks for the kernels by name
        config._attn_implementation = name
        try:
            return original(module, query, key, value, attention_mask, **kwargs)
        finally:
            config._attn_implementation = PREFIX + name

    return attention


def is_tree(mask: Any) -> bool:
    """Whether it is no mask but segments."""
    is_integer = getattr(mask, "dtype", None) == torch.int64
    return is_integer and mask.dim() == 4 and mask.shape[:2] == (1, 1) and mask.shape[3] == 4


def _original(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    from transformers import AttentionInterface

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get(name, eager)  # ``get_interface`` is of transformers 5


def over_tree(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,  # (1, 1, K, 4)
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """(1, S, h, e).

    Raises:
        ValueError: dropout, or an argument that this attention does not know.
    """
    tensors = (k for k, x in others.items() if isinstance(x, Tensor) and x.dim())
    strange = sorted(k for k in tensors if k not in ("position_ids", "cache_position"))
    if strange or dropout:
        what = f"the arguments {strange}" if strange else f"attention dropout of {dropout}"
        raise ValueError(f"attention over distinct tokens does not know {what}")
    if not torch.compiler.is_compiling() and hasattr(segments, WINDOWS):
        getattr(segments, WINDOWS).append(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as of PyTorch's own attention
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if kind == "cpu":
        return tree_attention(query, key, value, s_aux, segments, scale, softcap, sliding_window)[0]
    if gpu.takes_varlen(query, value, s_aux, softcap, sliding_window):
        return gpu.by_varlen(query, key, value, segments, scale, sliding_window)
    return gpu.by_flex(query, key, value, s_aux, segments, scale, softcap, sliding_window)
