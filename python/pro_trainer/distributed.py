"""Running our own forward inside a wrapped model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def call_through(wrapper: nn.Module, module: nn.Module, function: Callable[[], Any]) -> Any:
    """Call ``function`` in the place of ``module``'s forward, through ``wrapper``.

    DistributedDataParallel does its work around the wrapped model's forward, FSDP2 in hooks of the
    model's own. The fused loss runs the decoder and reads the head's weight, which is not that
    forward; this runs it where the forward is expected to be, once.
    """
    if wrapper is module and not isinstance(module, FSDPModule):
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
