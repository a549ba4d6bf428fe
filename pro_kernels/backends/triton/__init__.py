"""The Triton backend: NVIDIA (sm_80 and newer), AMD, and CPU tensors through the interpreter.

State: the tests passed on an H200. For sm_80, sm_100 and gfx942 the kernels are compiled ahead of
time, and what they compute is checked under Triton's interpreter (``TRITON_INTERPRET=1``) only.

Files: ``rows.py`` (a program walks rows of logits) on ``elementwise.py``; ``prompts.py`` (one
program a prompt); ``gather_scatter.py`` (gather, scatter, the target's logit); ``scoring.py``
(log-probs, no logit written); ``filtered.py`` (passes of ``grad_filter``); ``configs.py`` (launch
configurations, as data); ``launch.py`` (checks, allocations, launches); ``aot.py`` (compile without
a GPU: registers, shared memory, spills).
Contract: ``backends/torch.py``. Importing this package imports no Triton; the first use of one of
its launchers does.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

# Functions of ``launch.py``.
_LAUNCHERS = {"gather_rows", "logits_grad", "logp", "ranking", "residual_", "scatter_rows"}
_LAUNCHERS |= {"score", "scores_fused", "target_logits"}

NAME = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One program holds a prompt's scores in registers and walks its (k, i) plane in tiles.
MAX_CANDIDATES = 1024
# Architecture -> the card of it that the gpu tests passed on.
VERIFIED: dict[str, str] = {"sm_90": "NVIDIA H200"}

# What is compiled and checked ahead of time; older ones have no bf16 arithmetic.
_MIN_CAPABILITY = (8, 0)


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device`` (None: it can)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        if device.type in ("cpu", "cuda"):
            return None
        return f"Triton's interpreter serves cpu and cuda tensors, not {device.type}"
    if device.type == "cpu":
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the first use"
    if device.type == "cuda":  # ROCm devices have this type too
        return _cuda_unusable(device)
    if device.type == "xpu":
        return None if torch.xpu.is_available() else "no XPU device is available"
    return f"device type {device.type} has no Triton compiler"


def only_when_named(device: torch.device) -> str | None:
    """Why ``auto`` leaves it to those who name it."""
    return "on CPU tensors it runs interpreted, only when named" if device.type == "cpu" else None


def details() -> dict[str, str]:
    """What ``pro-kernels env`` shows."""
    ran = ", ".join(f"{card} ({arch})" for arch, card in VERIFIED.items())
    return {"state": f"tests passed on {ran}; elsewhere compiled, and run interpreted"}


def interpreted() -> bool:
    """Whether kernels run on the CPU through Triton's interpreter (decided when Triton loads)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _cuda_unusable(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            found, least = (".".join(map(str, c)) for c in (capability, _MIN_CAPABILITY))
            return f"compute capability is {found}; it needs {least} or newer"
    return None


def __getattr__(name: str) -> Any:
    # The launchers import triton, so they load when one is first asked for.
    if name == "filtered":
        return importlib.import_module(f"{__name__}.filtered")
    if name in _LAUNCHERS:
        function = getattr(importlib.import_module(f"{__name__}.launch"), name)
        globals()[name] = function  # the next call finds it without coming here
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
