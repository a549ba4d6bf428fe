"""Backends and how one is chosen.

``protocol.Backend`` says what a backend has. The package's are modules of this folder, which never
import each other; ``register`` takes others. ``auto`` walks ``ORDER`` and keeps every refusal; an
explicit choice never falls back. A backend with kernels of its own for GPUs has in ``VERIFIED`` the
architectures that its tests passed on, and the card; on any other ``auto`` does not pick it, unless
``PRO_KERNELS_UNVERIFIED=1``.
"""

from __future__ import annotations

import importlib
from typing import Any

# Not ``import torch``: the backend of that name takes its place once it is loaded.
from torch import device as Device
from torch import dtype as DType
from torch.compiler import is_compiling
from torch.cuda import get_device_capability, is_available
from torch.version import hip

from pro_kernels.backends.protocol import OPTIONAL, REQUIRED, Backend
from pro_kernels.options import constant_while_compiling, setting

# Fastest first; on a GPU "cpu" refuses.
ORDER = ["cpu", "cuda", "triton", "torch"]
_loaded: dict[str, Backend] = {}


def get(name: str) -> Backend:
    """The backend ``name``; its launchers and libraries load on first use.

    Raises:
        ValueError: there is none of this name.
    """
    found = _loaded.get(name)
    if found is None:
        if name not in ORDER:
            raise ValueError(f"backend must be 'auto' or one of {ORDER}, got {name!r}")
        found = _loaded[name] = importlib.import_module(f"{__name__}.{name}")
    return found


def register(backend: Any, before: str | None = None) -> None:
    """Add a backend from outside the package; callers name it by its ``NAME``.

    Args:
        backend: a module or another object with the names of ``protocol.Backend``; optional ones
            that it lacks are set to None.
        before: ``auto`` tries it before the backend of this name; None: only those who name it get
            it where another can serve.

    Raises:
        TypeError: it lacks a name that every backend has.
        ValueError: another backend has its name already, or there is none of the name ``before``.
    """
    if missing := [name for name in REQUIRED if not hasattr(backend, name)]:
        raise TypeError(f"backend must have {list(REQUIRED)}, got {backend!r} without {missing}")
    name = backend.NAME
    if name in ORDER or name == "auto":
        raise ValueError(f"a backend of the name {name!r} is there already: {ORDER}")
    if before is not None and before not in ORDER:
        raise ValueError(f"before must be None or one of {ORDER}, got {before!r}")
    for optional in OPTIONAL:
        if not hasattr(backend, optional):
            setattr(backend, optional, None)
    _loaded[name] = backend
    ORDER.insert(len(ORDER) if before is None else ORDER.index(before), name)


def unregister(name: str) -> None:
    """Undo ``register``."""
    _loaded.pop(get(name).NAME)
    ORDER.remove(name)


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
    backend = get(name)
    if backend.only_when_named and (reason := backend.only_when_named(device)):
        return reason
    verified = backend.VERIFIED
    if (
        device.type == "cpu"
        or verified is None
        or _unverified_allowed()
        or _arch(device) in verified
    ):
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
    if is_compiling() and candidates is not None:  # symbolic is no constant
        longer_than = [limit for limit in _limits() if candidates > limit]
        candidates = max(longer_than) + 1 if longer_than else None
    return _resolve(choice, device, dtype, candidates)


@constant_while_compiling
def _limits() -> list[int]:
    """Of the backends that have one."""
    return [x for name in ORDER if (x := get(name).MAX_CANDIDATES) is not None]


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
