"""What a causal LM's output embedding multiplies by: plain, in PEFT's wrapper, or with adapters.

``resolve`` takes the module apart at each call, because PEFT and FSDP replace modules after a model
was attached, and adapters are switched on and off.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pro_kernels.options import LogitOptions

_COLUMNS = 4096  # of the head multiplied in a wide dtype at a time
_USE_LORA = "use LoRA or DoRA, or "


def unfit(text: str, instead: str = "") -> ValueError:
    """The error for a model that the fused path would not repeat, and what to use ``instead``."""
    return ValueError(
        f"{text}; {instead}call pro_kernels.linear_pro_loss with the hidden states and weight "
        "yourself, or pro_kernels.pro_loss with the logits"
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

    def raw_logits(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the head multiplies, in its own dtype or in this one."""
        given = (x if x is None or dtype is None else x.to(dtype) for x in self[:3])
        return nn.functional.linear(*given)  # type: ignore[arg-type]

    def after(self, z: Tensor) -> Tensor:
        """What the model makes of raw logits z."""
        return LogitOptions(self.softcap, self.logit_scale).transform(z)

    def exact_logits(self) -> Tensor:
        """The logits in fp64, a block of columns at a time: a wide weight may be too large."""
        h = widened(self.hidden)
        z = torch.cat(
            [nn.functional.linear(h, widened(w)) for w in self.weight.split(_COLUMNS)], -1
        )
        return self.after(z if self.bias is None else z + self.bias)


def widened(x: Tensor) -> Tensor:
    """In fp64, or fp32 where the device has no wider numbers."""
    return x.float() if x.is_mps else x.double()


def head_for(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) in the dtype of hidden states; autocast casts them by itself."""
    if torch.is_autocast_enabled(hidden.device.type):
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def resolve(module: Any, hidden: Tensor) -> HeadInputs:
    """The matmul that ``module(hidden)`` stands for.

    LoRA on the head (arXiv 2106.09685) becomes one wider matmul ``[x, s dropout(x) A^T] [W, B]^T``:
    its meaning to the last bit of W, dropout included, which ``W + s B A`` would lose. DoRA (arXiv
    2402.09353) scales its rows.

    ValueError: it is no linear layer, is quantised, or has an adapter that is not known here.
    """
    # PEFT's ``modules_to_save``: the one in use.
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [] if module.disable_adapters else list(module.active_adapters)
        module = module.modules_to_save[active[0]] if active else module.original_module
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


def own_of_head(head: nn.Module) -> dict[Any, str]:
    """What would change the output of the head beside its class, which the fused path leaves out.

    Hooks of FSDP, tensor parallel and DeepSpeed move weights and outputs about, and are not meant.
    """
    found: dict[Any, str] = {}
    for name, module in head.named_modules():
        hooks = dict(module._forward_hooks)
        if name:  # a part, which the loss reads and does not call
            hooks |= module._forward_pre_hooks
        for key, hook in hooks.items():
            if not _origin(hook).startswith(("torch.distributed.", "deepspeed.")):
                found[key] = f"a forward hook ({getattr(hook, '__qualname__', hook)})"
        forward = module.__dict__.get("forward")
        forward = getattr(forward, "__func__", forward)
        if forward is not None and forward is not type(module).forward:
            found[forward] = f"another forward ({getattr(forward, '__qualname__', forward)})"
    return found


def _origin(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(getattr(hook, "__func__", hook), "__module__", type(hook).__module__)


def _check_plain(module: Any) -> None:
    name = type(module).__name__
    if type(module).forward is not nn.Linear.forward:
        raise unfit(
            "the LM head must be a torch.nn.Linear, possibly with LoRA, DoRA or modules_to_save of "
            f"PEFT, got {name}"
        )
    if not module.weight.is_floating_point() or module.weight.dim() != 2:
        raise unfit(
            "the LM head's weight must be a floating-point (V, H) matrix, got "
            f"{tuple(module.weight.shape)} {module.weight.dtype} in {name}",
            "keep quantisation off the head, or ",
        )


def _with_lora(layer: Any, hidden: Tensor) -> HeadInputs:
    base = layer.base_layer
    _check_plain(base)
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if not all(isinstance(layer.lora_A[name], nn.Linear) for name in adapters):
        raise unfit(
            f"the LM head has adapters of kind {type(layer).__name__}, which is not known here",
            _USE_LORA,
        )
    if layer.disable_adapters and layer.merged:
        raise ValueError(
            "the LM head's adapters are disabled but merged into it; unmerge them first"
        )
    if layer.disable_adapters or layer.merged or not adapters:
        return HeadInputs(hidden, base.weight, base.bias)
    if hasattr(base.weight, "full_tensor"):
        raise unfit(
            "the LM head has adapters and its weight is a DTensor (tensor parallel, or sharded "
            "below the adapters), which is not supported together"
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
        raise unfit(
            f"the LM head's adapter {name!r} is of kind {variant}, which is not known here",
            _USE_LORA,
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
