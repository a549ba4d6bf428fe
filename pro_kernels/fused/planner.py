"""Which tier a call takes and how large its chunks are.

Decided from shapes, ``requires_grad`` and a byte budget alone, never from device data, so that no
call waits for the device and equal shapes always take equal paths.

| tier | when | flops / (N H V) | extra memory |
|---|---|---|---|
| T0 | nothing needs a gradient | 2 | one chunk |
| T1 retain | dZ0 of all rows fits the budget | 6, any upstream gradient | dZ0 |
| T1f | the weight is frozen | 4, any upstream gradient | one chunk |
| T2 | scalar loss, every prompt fits | 6, gradients made in the forward | one chunk + fp32 dW |
| T3 | all else | 6 for retained rows, 8 for the others | the budget |

Legend: ``N`` scored rows, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from pro_kernels.fused.matmul import sums_dtype, upcasts, workspace
from pro_kernels.options import SettingError, constant_while_compiling
from pro_kernels.validate import check_budget

# A chunk this tall already runs the matmuls at full rate; a taller one only takes memory.
CHUNK_ROWS = 4096
# On a GPU: predictions, not measured. dZ0 W of a chunk has R/128 x H/256 tiles for 132 SMs (H100,
# H200); at R = 8192, H = 4096 that is 7.8 waves, so the ragged last one idles the card for 3 %.
# T2 adds each chunk to the fp32 dW, 8 V H bytes against 6 R V H flops: at 4.3 TB/s and
# 780 TFLOP/s that is 6 % of the time with 4096 rows, 1.5 % with 16384.
GPU_CHUNK_ROWS = 8192
GPU_SUMMED_ROWS = 16384
# Chunks of a GPU are equal, in whole tiles of the matmul.
GPU_TILE_ROWS = 256
# Below this many rows a chunk, T2's pass over the fp32 dW costs more than T3's recompute.
MIN_T2_ROWS = 512
MIN_ROWS = 64
_NO_COPIES = dict.fromkeys(("T1", "T2", "T3"), 0)
_MIN_BUDGET, _MAX_BUDGET = 256 << 20, 64 << 30


@dataclass(frozen=True)
class Plan:
    """How one call runs."""

    tier: str  # "T0", "T1", "T1f", "T2" or "T3"
    chunk: int  # most rows of logits held at a time (T1: all of them)
    retained: int = 0  # leading rows whose dZ0 is kept for the backward
    need_hidden: bool = False  # whether dHidden is wanted
    need_weight: bool = False  # whether dW (and the bias gradient) is wanted
    prompt_chunks: tuple[int, ...] = ()  # T2 only, prompts per chunk
    budget: int = 0  # bytes it was made for
    # Bytes beyond the inputs' gradients that it counts on; more than the budget where that is too
    # small for the least that a call takes.
    taken: int = 0


def make_plan(
    rows: int,  # N; while compiling without a layout, every position
    head: tuple[int, int, torch.dtype],  # V, H and the dtype of the matmuls
    device: torch.device,
    *,
    need_hidden: bool,
    need_weight: bool,  # of weight or bias
    budget: int | None = None,  # bytes beyond the inputs' gradients; None: ``default_budget``
    prompt_tokens: tuple[int, ...] | None = None,  # where the loss is a scalar over prompts: T2
    wide_logits: bool = False,  # they are fp32 although the matmuls are of lower precision
    fixed: int = 0,  # bytes the call takes in any tier (a cast weight, an fp32 dHidden)
    hidden_rows: int | None = None,  # R, rows of the hidden states; None for N
    filtered: bool = False,  # columns leave the gradients, which takes copies of those kept
    grad_size: int | None = None,  # bytes of a number of dW, 0: the bias alone; None: as of dtype
    entropy: bool = False,
) -> Plan:
    """Choose the tier for ``rows`` scored rows.

    With the gradient of an entropy too (``head.py``) T1 keeps logits and makes a dZ as large beside
    them, and a frozen weight makes no tier of its own.

    Raises:
        TypeError: budget is not an integer.
        ValueError: budget is not positive.
    """
    vocab, hidden, dtype = head
    named = default_budget(device) if budget is None else check_budget(budget)
    # Matmuls take memory of their own: fp32 copies of operands, or the library's scratch.
    scratch = min(workspace(device.type), named // 8)
    budget = max(1, named - fixed - scratch)
    size = dtype.itemsize
    operand = hidden * (4 if upcasts(dtype, device.type) else size)
    side = hidden * sums_dtype(dtype, device.type).itemsize
    # One row's share: its logits, and its slices of the gathered, weighted and gradient sides.
    row = vocab * size + 2 * operand + side + (4 * vocab if wide_logits else 0)
    # As integers: torch 2.10 cannot multiply a truth value by a size that it traces.
    of_hidden, of_weight = int(need_hidden), int(need_weight)
    kept_sides = rows * (of_hidden * side + of_weight * 2 * operand)
    grad_size = of_weight * (size if grad_size is None else grad_size)
    copies = _NO_COPIES
    if filtered:
        copies = _filter_copies(hidden * vocab, size, need_hidden, grad_size)
    on_gpu = device.type == "cuda"
    most = GPU_CHUNK_ROWS if on_gpu else CHUNK_ROWS

    def plan(
        tier: str, chunk: int, taken: int, retained: int = 0, prompts: tuple[int, ...] = ()
    ) -> Plan:
        taken += fixed + scratch
        return Plan(tier, max(1, chunk), retained, need_hidden, need_weight, prompts, named, taken)

    if not (need_hidden or need_weight):
        chunk = _equal_chunks(rows, min(budget // row, most), on_gpu)
        return plan("T0", chunk, chunk * row)
    if entropy:
        logits = vocab * (4 if wide_logits else size)
        if rows <= budget // (row + logits):
            return plan("T1", rows, rows * (row + logits), retained=rows)
        # X, w X, and the sum of dZ W over blocks of columns with its terms.
        sides = rows * (operand * (1 + of_weight) + of_hidden * (4 * hidden + side))
        fit = max(MIN_ROWS * row, budget - sides)
        chunk = min(max(MIN_ROWS, fit // 2 // row), most, rows)
        retained = max(0, min((fit - chunk * row) // logits, rows))
        return plan("T3", chunk, sides + chunk * row + retained * logits, retained)
    if not need_weight:
        fit = max(MIN_ROWS, (budget - copies["T1"] - kept_sides) // row)
        chunk = _equal_chunks(rows, min(fit, most), on_gpu)
        return plan("T1f", chunk, copies["T1"] + kept_sides + chunk * row)
    if rows <= (budget - copies["T1"]) // row:
        return plan("T1", rows, copies["T1"] + rows * row, retained=rows)
    if prompt_tokens:
        # Held from forward to backward: dW, while it grows at least in fp32, and dHidden.
        held = vocab * hidden * max(size, 4)
        held += (hidden_rows or rows) * hidden * size if need_hidden else 0
        t2_rows = (budget - held - copies["T2"]) // row
        if t2_rows >= max(MIN_T2_ROWS, *prompt_tokens):
            most = GPU_SUMMED_ROWS if on_gpu else CHUNK_ROWS
            t2_rows = min(t2_rows, max(most, *prompt_tokens))
            taken = held + copies["T2"] + t2_rows * row
            return plan("T2", t2_rows, taken, prompts=_group_prompts(prompt_tokens, t2_rows))
    fit = max(MIN_ROWS, (budget - copies["T3"] - kept_sides) // row)
    chunk = min(max(MIN_ROWS, fit // 2), most, rows)
    retained = max(0, min(fit - chunk, rows))
    return plan("T3", chunk, copies["T3"] + kept_sides + (chunk + retained) * row, retained)


def _filter_copies(numbers: int, size: int, need_hidden: bool, grad_size: int) -> dict[str, int]:
    """Bytes that ``grad_filter`` takes beside a chunk, if it keeps every one of the V H numbers.

    In the forward the kept rows of the weight, for dHidden; at another time those of dW, in fp32 as
    they are summed, and the fp32 sum of a 16-bit dW, which T2 holds anyway. T3's backward also
    gathers the weight again, before those of dW are made. Plain PyTorch does so for one group of
    rows after the other; the C++ kernels need less.
    """
    forward = int(need_hidden) * size
    summed = max(grad_size, 4) if grad_size else 0
    whole = 4 if grad_size in (1, 2) else 0
    return {
        "T1": numbers * max(forward, whole + summed),
        "T2": numbers * max(forward, summed),
        "T3": numbers * max(forward, whole + max(size, summed)),
    }


def _equal_chunks(rows: int, limit: int, on_gpu: bool) -> int:
    """Rows per chunk, at most ``limit``; on a GPU as many chunks, of near equal height."""
    limit = max(1, limit)
    if not on_gpu or rows <= limit:
        return min(rows, limit)
    chunk = -(-rows // -(-rows // limit))
    return min(limit, -(-chunk // GPU_TILE_ROWS) * GPU_TILE_ROWS)


@constant_while_compiling
def default_budget(device: torch.device) -> int:
    """Bytes the loss may take beyond the inputs' gradients when the caller names none.

    A power of two near an eighth of the memory, at most half of what was free at first use; fixed
    for the process, so that equal calls stay bitwise equal. ``PRO_KERNELS_BUDGET`` (bytes)
    overrides it.
    """
    return _default_budget(device.type, device.index)


@functools.cache
def _default_budget(device_type: str, index: int | None) -> int:
    chosen = os.environ.get("PRO_KERNELS_BUDGET")
    if chosen is not None:
        if not chosen.isdecimal() or int(chosen) == 0:
            raise SettingError(f"PRO_KERNELS_BUDGET must be a number of bytes > 0, got {chosen!r}")
        return int(chosen)
    if device_type == "cuda":
        free, total = torch.cuda.mem_get_info(index)
        # What the caching allocator holds for nobody is as good as free.
        free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    else:
        free, total = host_memory()
    budget = 1 << (max(1, min(total // 8, free // 2)).bit_length() - 1)
    return min(max(budget, _MIN_BUDGET), _MAX_BUDGET)


def host_memory() -> tuple[int, int]:
    """(available, total) bytes of this machine or of the container's limit."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        free = page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return 4 << 30, 8 << 30
    for path, parse in (("/proc/meminfo", _meminfo), ("/sys/fs/cgroup/memory.max", _cgroup)):
        if os.path.exists(path):
            with open(path) as f:
                found = parse(f.read())
            free = max(free, found) if parse is _meminfo else min(free, found)
            total = total if parse is _meminfo else min(total, found)
    return free, total


def _meminfo(text: str) -> int:
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024


def _cgroup(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 1 << 62


def _group_prompts(prompt_tokens: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Prompts per chunk so that no chunk has more than ``rows`` tokens."""
    chunks: list[int] = []
    held = 0
    for tokens in prompt_tokens:
        if not chunks or held + tokens > rows:
            chunks.append(0)
            held = 0
        chunks[-1] += 1
        held += tokens
    return tuple(chunks)
