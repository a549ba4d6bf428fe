"""Backends and how one is chosen.

Every backend module has the same names: ``NAME``, ``DTYPES`` (logits it takes), ``MAX_CANDIDATES``,
``unusable(device) -> reason | None``, ``details()`` (for ``pro-kernels env``) and the functions
``logp``, ``residual_``, ``logits_grad``, ``ranking`` (contract: ``backends/torch.py``). They never
import each other. ``auto`` walks ``ORDER`` and keeps every refusal; an explicit choice never falls
back. A new backend is its module and one entry in ``ORDER``.

Optional, and used by ``head.py`` where a backend has them: ``gather_rows``, ``scatter_rows``,
``target_logits`` for the thin sides, and ``score`` with ``scores_fused``: log-probs straight from
hidden states and weight. A backend with kernels of its own for GPUs has in ``VERIFIED`` the
architectures that its tests passed on, and the card; on any other ``auto`` does not pick it, unless
``PRO_KERNELS_UNVERIFIED=1``.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

# Not ``import torch``: the backend of that name takes its place once it is loaded.
from torch import device as Device
from torch import dtype as DType
from torch.compiler import is_compiling
from torch.cuda import get_device_capability, is_available
from torch.version import hip

from pro_kernels.options import constant_while_compiling, setting

# Fastest first; on a GPU "cpu" refuses.
ORDER = ("cpu", "cuda", "triton", "torch")
# All of them take lists of this length.
_CANDIDATES = 1024


@functools.cache
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


def passed_over(
    name: str, device: Device, dtype: DType, candidates: int | None = None
) -> str | None:
    """Why ``auto`` does not take ``name``: it cannot serve, or only those who name it get it."""
    return refusal(name, device, dtype, candidates) or not_by_itself(name, device)


def not_by_itself(name: str, device: Device) -> str | None:
    """Why ``auto`` leaves a backend that could serve to those who name it (None: it does not)."""
    if device.type == "cpu":
        return "on CPU tensors it runs interpreted, only when named" if name == "triton" else None
    verified = getattr(get(name), "VERIFIED", None)
    if verified is None or _unverified_allowed() or _arch(device) in verified:
        return None
    where = f"a GPU of {_arch(device) or 'this kind'}" if verified else "a GPU"
    return f"its kernels never ran on {where}: only when named, or with PRO_KERNELS_UNVERIFIED=1"


def _arch(device: Device) -> str | None:
    """Architecture of a GPU, such as sm_90; None where there is none, or it is not NVIDIA's."""
    if device.type != "cuda" or hip is not None or not is_available():
        return None
    major, minor = get_device_capability(device)
    return f"sm_{major}{minor}"


def _unverified_allowed() -> bool:
    return setting("PRO_KERNELS_UNVERIFIED", ("0", "1"), "0") == "1"


def resolve(choice: str, device: Device, dtype: DType, candidates: int | None = None) -> str:
    """Name of the backend that serves the request.

    Raises:
        ValueError: an unknown name, or an explicit choice that cannot serve (with its reason).
    """
    if is_compiling() and candidates is not None and candidates <= _CANDIDATES:
        candidates = None  # it may be symbolic, which no constant function takes
    return _resolve(choice, device, dtype, candidates)


@constant_while_compiling
def _resolve(choice: str, device: Device, dtype: DType, candidates: int | None) -> str:
    if choice == "auto":
        reasons = {}
        for name in ORDER:
            reasons[name] = passed_over(name, device, dtype, candidates)
            if reasons[name] is None:
                return name
        raise ValueError(f"no backend can serve {device} {dtype}: {reasons}")
    reason = refusal(choice, device, dtype, candidates)
    if reason is not None:
        raise ValueError(f"backend={choice!r} cannot serve this call: {reason}")
    return choice
