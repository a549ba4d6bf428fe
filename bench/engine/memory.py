"""Peak extra memory of one step: its high water, minus what was held before it.

CPU: the kernel's high-water mark of resident memory (``/proc/self/clear_refs`` resets it), in a
process whose allocator returns every freed block at once (``CHILD_ENV``), so that no reuse hides a
peak; exact to about a megabyte, as the kernel counts pages. GPU:
``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import ctypes
import gc

import torch

from bench.engine.timing import Step

# Blocks of 64 KiB and more are mapped one by one and unmapped when freed; MKL keeps no buffers.
CHILD_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MKL_DISABLE_FAST_MM": "1",
}


def peak_extra_bytes(step: Step, device: torch.device) -> tuple[int, object]:
    """High water of one step above what is held before it, and what the step returned."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        value = step.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held, value
    trim()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    held = _status("VmRSS")
    value = step.run()
    return _status("VmHWM") - held, value


def trim() -> None:
    """Give freed memory back to the system (glibc)."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def _status(field: str) -> int:
    with open("/proc/self/status") as f:
        line = next(x for x in f if x.startswith(field))
    return int(line.split()[1]) * 1024
