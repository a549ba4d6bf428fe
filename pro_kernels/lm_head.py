"""What a causal LM's output embedding multiplies by: plain, in PEFT's wrapper, or with adapters.

``resolve`` takes the module apart at each call, because PEFT and FSDP replace modules after a model
was attached, and adapters are switched on and off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FALLBACK = (
    "call pro_kernels.linear_pro_loss with the hidden states and weight yourself, or "
    "pro_kernels.pro_loss with the logits"
)


class HeadInputs(NamedTuple):
    """``logits = softcap(logit_scale * (hidden @ weight.T + bias))`` of one call."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0

    def options(self) -> dict[str, Any]:
        """All but ``hidden`` and ``weight``, as the fused functions take it."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def resolve(module: Any, hidden: Tensor) -> HeadInputs:
    """The matmul that ``module(hidden)`` stands for.

    LoRA on the head (arXiv 2106.09685) becomes one wider matmul ``[x, s dropout(x) A^T] [W, B]^T``:
    its meaning to the last bit of W, dropout included, which ``W + s B A`` would lose. DoRA (arXiv
    2402.09353) scales its rows.

    Raises:
        ValueError: the module is no linear layer, is quantised, or has an adapter whose arithmetic
            is not known here.
    """
    module = _unwrapped(module)
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return _with_lora(module, hidden)
    _check_plain(module)
    return HeadInputs(hidden, module.weight, getattr(module, "bias", None))


def gathers_itself(module: Any) -> bool:
    """Whether the module's own hooks gather its parameters for its forward and backward.

    That is so of a unit of FSDP2 and of every module under DeepSpeed ZeRO-3. The root of FSDP2
    holds what is in no other unit throughout.
    """
    weight = getattr(module, "weight", None)
    return hasattr(module, "set_requires_gradient_sync") or hasattr(weight, "ds_id")


def _unwrapped(module: Any) -> Any:
    """The module that PEFT's ``modules_to_save`` has in use."""
    if not hasattr(module, "modules_to_save") or not hasattr(module, "original_module"):
        return module
    active = [] if module.disable_adapters else list(module.active_adapters)
    return module.modules_to_save[active[0]] if active else module.original_module


def _check_plain(module: Any) -> None:
    name = type(module).__name__
    if type(module).forward is not nn.Linear.forward:
        raise ValueError(
            "the LM head must be a torch.nn.Linear, possibly with LoRA, DoRA or modules_to_save of "
            f"PEFT, got {name}; {FALLBACK}"
        )
    if not module.weight.is_floating_point() or module.weight.dim() != 2:
        raise ValueError(
            f"the LM head's weight must be a floating-point (V, H) matrix, got "
            f"{tuple(module.weight.shape)} {module.weight.dtype} in {name}; keep quantisation off "
            f"the head, or {FALLBACK}"
        )


def _with_lora(layer: Any, hidden: Tensor) -> HeadInputs:
    base = layer.base_layer
    _check_plain(base)
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if not all(isinstance(layer.lora_A[name], nn.Linear) for name in adapters):
        raise ValueError(
            f"the LM head has adapters of kind {type(layer).__name__}, which is not known here; "
            f"use LoRA or DoRA, or {FALLBACK}"
        )
    if layer.disable_adapters and layer.merged:
        raise ValueError(
            "the LM head's adapters are disabled but merged into it; unmerge them first"
        )
    if layer.disable_adapters or layer.merged or not adapters:
        return HeadInputs(hidden, base.weight, base.bias)
    if hasattr(base.weight, "full_tensor"):
        raise ValueError(
            "the LM head has adapters and its weight is a DTensor (tensor parallel, or sharded "
            f"below the adapters), which is not supported together; {FALLBACK}"
        )
    parts, columns = [hidden], [base.weight]
    bias, rows = base.bias, None
    for name in adapters:
        a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        dropout = layer.lora_dropout[name]
        if name in layer.lora_variant:
            if len(adapters) > 1:
                raise ValueError(
                    f"the LM head has adapters {adapters}; one DoRA adapter is supported"
                )
            rows = _dora_rows(layer, name, base.weight)
        parts.append(a(dropout(hidden.to(a.weight.dtype))).to(hidden.dtype) * scale)
        columns.append(b.weight.to(base.weight.dtype))
        if b.bias is not None:
            added = (scale * b.bias).to(base.weight.dtype)
            bias = added if bias is None else bias + added
    weight = torch.cat(columns, 1)
    if rows is not None:
        weight = weight * rows[:, None]
    return HeadInputs(torch.cat(parts, -1), weight, bias)


def _dora_rows(layer: Any, name: str, weight: Tensor) -> Tensor:
    """DoRA's factor of each row, ``m / ||W + s B A||``, the norm without gradient as there."""
    variant = layer.lora_variant[name]
    if getattr(variant, "__name__", type(variant).__name__) != "DoraLinearVariant":
        raise ValueError(
            f"the LM head's adapter {name!r} is of kind {variant}, which is not known here; use "
            f"LoRA or DoRA, or {FALLBACK}"
        )
    if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
        raise ValueError(
            f"the LM head's DoRA adapter {name!r} has dropout {layer.lora_dropout[name]}, under "
            "which it is no linear layer; set lora_dropout=0"
        )
    dora = layer.lora_magnitude_vector[name]
    with torch.no_grad():
        delta = layer.lora_B[name].weight @ layer.lora_A[name].weight
        norm = dora.get_weight_norm(
            weight.to(delta.dtype), delta, layer.scaling[name], adapter_name=name
        )
    return (dora.weight / norm).to(weight.dtype)
