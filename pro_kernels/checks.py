"""Checks of user input, before any work; messages name the argument and show its value."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_float(name: str, value: object) -> Tensor:
    """The tensor, if it is one of a floating dtype the kernels know."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: its to_local(), say")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    return value


def check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Both tensors on one device."""
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name} ({like.device}), got {value.device}"
        )


def check_head(hidden: object, weight: object, bias: object) -> torch.dtype:
    """Check ``hidden[..., H]``, ``weight[V, H]``, ``bias[V]``; return the dtype of the matmuls.

    Under autocast that is autocast's dtype, else all three must have one dtype.
    """
    hidden = check_float("hidden", hidden)
    weight = check_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (V, H), got {tuple(weight.shape)}")
    if hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape (..., H) with H = {weight.shape[1]} as in weight "
            f"{tuple(weight.shape)}, got {tuple(hidden.shape)}"
        )
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
    check_device("weight", weight, "hidden", hidden)
    if bias is not None:
        bias = check_float("bias", bias)
        check_device("bias", bias, "hidden", hidden)
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(
                f"bias must have shape ({weight.shape[0]},) and dtype {weight.dtype} as weight, "
                f"got {tuple(bias.shape)} and {bias.dtype}"
            )
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype outside autocast, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    return hidden.dtype


def check_logits_dtype(logits_dtype: torch.dtype | None, compute: torch.dtype) -> torch.dtype:
    """Dtype the logits are held in: the matmuls' own, or fp32."""
    if logits_dtype is None or logits_dtype == compute:
        return compute
    if logits_dtype != torch.float32 or compute == torch.float64:
        raise ValueError(
            f"logits_dtype must be None, float32 or the compute dtype {compute}, got {logits_dtype}"
        )
    return logits_dtype


def check_same_shape(name: str, value: Tensor, shape: tuple[int, ...], legend: str) -> None:
    """``value`` has ``shape``, described by ``legend``."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {legend} = {shape}, got {tuple(value.shape)}")


def check_tensor(name: str, value: object) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")


def check_all(text: str, good: Tensor, value: Tensor) -> None:
    """Raise ValueError with ``text`` and the values unless all are good; queued on a GPU."""
    if value.device.type != "cpu":
        torch._assert_async(good.all(), text)
    elif not good.all():
        raise ValueError(f"{text}, got {value.tolist()}")


def check_finite(name: str, value: Tensor, mask: Tensor | None) -> None:
    """``value`` (B, n) is finite where ``mask`` holds (None: everywhere); queued on a GPU."""
    good = torch.isfinite(value)
    if mask is not None:
        good = good | ~mask
    if value.device.type != "cpu":
        torch._assert_async(good.all(), f"{name} must be finite")
    elif not good.all():
        b, i = (~good).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {value[b, i]} for prompt {b} candidate {i}")
