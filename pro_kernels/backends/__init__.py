"""Backends and how one is chosen.

Every backend module has the same names: ``NAME``, ``DTYPES`` (logits it takes), ``MAX_CANDIDATES``,
``unusable(device) -> reason | None``, ``details()`` (for ``pro-kernels env``) and the functions
``logp``, ``residual_``, ``logits_grad``, ``ranking`` (contract: ``backends/torch.py``). They never
import each other. ``auto`` walks ``ORDER`` and keeps every refusal; an explicit choice never falls
back. A new backend is its module and one entry in ``ORDER``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import device as Device
from torch import dtype as DType

from pro_kernels.options import constant_while_compiling

# Fastest first; on a GPU "cpu" refuses.
ORDER = ("cpu", "triton", "torch")
# Usable, but only when asked for by name.
_NOT_BY_ITSELF = {("triton", "cpu"): "on CPU tensors it runs interpreted, only when named"}


def get(name: str) -> ModuleType:
    """The backend module ``name``; its launchers and libraries load on first use."""
    if name not in ORDER:
        raise ValueError(f"backend must be 'auto' or one of {list(ORDER)}, got {name!r}")
    return importlib.import_module(f"pro_kernels.backends.{name}")


def refusal(name: str, device: Device, dtype: DType, candidates: int | None = None) -> str | None:
    """Why ``name`` cannot serve this device, logits dtype and list length (None: it can)."""
    module = get(name)
    reason = module.unusable(device)
    if reason is None and dtype not in module.DTYPES:
        takes = ", ".join(str(d).removeprefix("torch.") for d in module.DTYPES)
        reason = f"logits are {str(dtype).removeprefix('torch.')}; it takes {takes}"
    limit = module.MAX_CANDIDATES
    if reason is None and candidates is not None and limit is not None and candidates > limit:
        reason = f"{candidates} candidates a prompt; it takes at most {limit}"
    return reason


@constant_while_compiling
def resolve(choice: str, device: Device, dtype: DType, candidates: int | None = None) -> str:
    """Name of the backend that serves the request.

    Raises:
        ValueError: an unknown name, or an explicit choice that cannot serve (with its reason).
    """
    if choice == "auto":
        reasons = {}
        for name in ORDER:
            reasons[name] = _NOT_BY_ITSELF.get((name, device.type)) or refusal(
                name, device, dtype, candidates
            )
            if reasons[name] is None:
                return name
        raise ValueError(f"no backend can serve {device} {dtype}: {reasons}")
    reason = refusal(choice, device, dtype, candidates)
    if reason is not None:
        raise ValueError(f"backend={choice!r} cannot serve this call: {reason}")
    return choice
