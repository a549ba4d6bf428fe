"""Running our own forward inside a wrapped model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def call_through(wrapper: nn.Module, module: nn.Module, function: Callable[[], Any]) -> Any:
    """Call ``function`` in the place of ``module``'s forward, through ``wrapper``.

    DistributedDataParallel and FSDP do their work in hooks around the wrapped model's forward.
    The fused loss runs the decoder and reads the head's weight, which is not that forward; this
    runs it where the hooks expect the forward to be, once.
    """
    if wrapper is module:
        return function()
    own = vars(module).get("forward")  # accelerate puts one on the instance, for autocast

    def restore() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own

    def forward(*args: Any) -> Any:
        restore()
        return function()

    module.forward = forward
    try:
        return wrapper(())  # a wrapper may expect an argument; it is not used
    finally:
        restore()
