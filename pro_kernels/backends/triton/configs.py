"""Launch configurations, as data: change a number here to tune.

A row kernel reads its row in tiles of ``BLOCK_V = vectors * threads * (16 / itemsize)`` columns:
each thread has ``vectors`` loads of 16 bytes in flight. Its grid is at most ``programs`` times the
SMs, and each program walks the rows with the grid as its stride. The numbers follow from these
rules, and tests/backends/test_triton_compile.py asserts that none spills; those of sm_90 for wide
rows, and the ranking of up to 16 and of 64 candidates, were chosen among others on an H200:

* about 16-32 KB in flight on an SM hide the latency of HBM3 (3.35 TB/s * 700 ns / 132 SMs = 18 KB),
  twice that at the 8 TB/s of sm_100;
* ``residual`` reads a row twice, so the rows under way must fit in the L2 cache. A row of 128256
  bf16 columns is 256 KB; eight programs of 256 threads on each of 132 SMs would have 270 MB of
  them under way. Hence few, wide programs, and a grid of no more rows than ``L2_BYTES`` holds and
  of no more programs than are resident at once, so that all walk equally many rows;
* ``logp`` and ``logits_grad`` touch each column once and only need loads in flight. Rows that are
  not scored cost them nothing or half, so equal numbers of rows are not equal work: their grid is
  eight times what is resident, and the card's own scheduler evens it out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

VECTOR_BYTES = 16
KERNELS = ("logp", "residual", "logits_grad")


class Tile(NamedTuple):
    """Columns that a row kernel reads at a time: vectors, and elements in a vector."""

    # What a kernel is compiled with is a tuple: Triton's hooks write it as JSON.

    lanes: int
    group: int


@dataclass(frozen=True)
class RowConfig:
    """How a row kernel is launched for rows of up to ``max_columns`` columns (None: any)."""

    max_columns: int | None
    num_warps: int
    vectors: int
    programs: int = 8  # in the grid, for each SM
    num_stages: int = 1  # nothing to pipeline through shared memory: a column is used once

    def tile(self, itemsize: int, warp_size: int, softcap: bool) -> Tile:
        """The tile for elements of this size."""
        vectors = 1 if softcap else self.vectors  # a tanh takes four times the registers
        return Tile(vectors * self.num_warps * warp_size, VECTOR_BYTES // itemsize)


class RankingConfig(NamedTuple):
    """How the ranking kernel is launched for up to ``block_n`` candidates a prompt."""

    block_n: int
    block_k: int  # rank terms in a tile of the (k, i) plane
    num_warps: int
    block_t: int  # tokens of every sequence read at a time


class ScoreConfig(NamedTuple):
    """Tiles of the score kernel: ``block_n`` rows by ``block_v`` columns, ``block_h`` at a time."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    group: int = 8  # tiles of rows that share a tile of the weight while it is in the L2 cache


@dataclass(frozen=True)
class Target:
    """What a launch depends on: the table's family, the threads in a warp and the SMs."""

    family: str
    warp_size: int
    sms: int = 1


def _rows(*configs: tuple[int | None, ...]) -> tuple[RowConfig, ...]:
    """Configurations by rising ``max_columns``, the last of which takes any width."""
    return tuple(RowConfig(*config) for config in configs)  # type: ignore[arg-type]


_WIDE = {
    "logp": _rows((2048, 4, 1, 128), (16384, 8, 1, 64), (None, 8, 4, 64)),
    "residual": _rows((2048, 4, 1, 16), (16384, 8, 1, 8), (65536, 8, 2, 4), (None, 32, 2, 1)),
    "logits_grad": _rows((2048, 4, 1, 128), (None, 8, 2, 64)),
}

# family -> kernel -> its configurations: max_columns, num_warps, vectors, programs.
ROWS: dict[str, dict[str, tuple[RowConfig, ...]]] = {
    # 2 TB/s over 108 SMs: 16 KB in flight suffice, and 32 would spill where V is odd.
    "sm_80": {**_WIDE, "residual": (*_WIDE["residual"][:-1], RowConfig(None, 32, 1, 1))},
    "sm_90": {**_WIDE, "logits_grad": _rows((2048, 4, 1, 128), (None, 8, 1, 64))},
    # More bandwidth an SM, and an L2 cache that holds two wide rows an SM.
    "sm_100": {
        "logp": (*_WIDE["logp"][:-1], RowConfig(None, 8, 2, 64)),
        "residual": (*_WIDE["residual"][:-1], RowConfig(None, 16, 2, 2)),
        "logits_grad": _rows((2048, 4, 1, 128), (None, 8, 4, 64)),
    },
    # sm_86, sm_89, sm_120: 1536 threads an SM, so a program of 1024 would leave a third idle.
    "sm_86": {
        "logp": _rows((2048, 4, 1, 96), (16384, 8, 1, 48), (None, 8, 4, 48)),
        "residual": _rows((2048, 4, 1, 12), (16384, 8, 1, 6), (None, 16, 2, 3)),
        "logits_grad": _rows((2048, 4, 1, 96), (None, 8, 2, 48)),
    },
    # Warps of 64: at most 16 of them in a program.
    "gfx942": {
        "logp": _rows((4096, 4, 1, 64), (None, 4, 4, 64)),
        "residual": _rows((4096, 4, 1, 8), (32768, 8, 2, 4), (None, 16, 2, 2)),
        "logits_grad": _rows((4096, 4, 1, 64), (None, 4, 2, 64)),
    },
    "xpu": {
        "logp": _rows((None, 8, 2, 64)),
        "residual": _rows((None, 16, 2, 2)),
        "logits_grad": _rows((None, 8, 2, 64)),
    },
}

# The cache that a second read of a row should hit, by family: A100, H100 and H200, B200, L4 (the
# smallest of sm_89; the 6 MB of sm_86 hold no such row anyway), MI300X (its Infinity Cache).
L2_BYTES = {
    "sm_80": 40 << 20,
    "sm_90": 50 << 20,
    "sm_100": 126 << 20,
    "sm_86": 48 << 20,
    "gfx942": 256 << 20,
    "xpu": 192 << 20,
}
# The share of it that rows under way may take: writes and the other inputs pass through it too.
_L2_SHARE = 0.75

# Where sm_* numbers have no table of their own.
_SMALL_ARCHS = (86, 87, 89, 110, 120, 121)

# family -> tiles of the score kernel for 16-bit operands that allow 16-byte loads.
SCORE = {
    "sm_80": ScoreConfig(128, 128, 64, 8, 3),  # two programs an SM
    "sm_90": ScoreConfig(128, 256, 64, 8, 3),  # one, with 144 KB of operands in flight
    "sm_100": ScoreConfig(128, 256, 64, 8, 3),
    "sm_86": ScoreConfig(128, 128, 32, 8, 3),  # 100 KB of shared memory
    "gfx942": ScoreConfig(128, 128, 64, 8, 2),
    "xpu": ScoreConfig(128, 128, 32, 8, 2),
}
# Without 16-byte loads operands pass through registers, and large tiles would spill.
SCORE_UNALIGNED = ScoreConfig(64, 64, 32, 8, 2)
SCORE_FP32 = ScoreConfig(64, 64, 16, 8, 2)  # IEEE products: no tensor cores
# (family, bytes of an element) -> largest hidden size at which the score kernel was measured to
# beat the platform's matmul and the row kernel. Both do the same 2 H flops a logit; only the
# matmul writes and reads the logit, so a small H favours the kernel. On an H200 it lost at every
# shape tried (H 1024 and 4096, V 32000 and 128256, 512 and 4096 rows): 1.07 to 1.4 times as long.
SCORE_UP_TO_HIDDEN: dict[tuple[str, int], int] = {}

SIDE_BLOCK = 1024  # columns of a thin side in a tile
MERGE_BLOCK = 256  # pairs of a row that the score's second kernel merges at a time
FILTER_BLOCK = 2048  # vocabulary columns that a pass of grad_filter reads at a time

# One binary each. Up to 32 candidates the whole (k, i) plane is one tile.
RANKING = (
    RankingConfig(16, 16, 2, 16),
    RankingConfig(32, 16, 4, 16),
    RankingConfig(64, 8, 4, 8),
    RankingConfig(128, 8, 8, 16),
    RankingConfig(256, 4, 8, 8),
    RankingConfig(512, 2, 8, 4),
    RankingConfig(1024, 2, 16, 4),
)


def row_config(kernel: str, target: Target, columns: int) -> RowConfig:
    """The configuration of a row kernel for rows of ``columns`` columns."""
    for config in ROWS[target.family][kernel]:
        if config.max_columns is None or columns <= config.max_columns:
            return config
    raise AssertionError(f"{target.family}/{kernel}: the last configuration must take any width")


def row_programs(kernel: str, target: Target, config: RowConfig, row_bytes: int) -> int:
    """The largest grid of a row kernel, a multiple of the SMs."""
    programs = config.programs
    if kernel == "residual":
        fitting = int(_L2_SHARE * L2_BYTES[target.family]) // (target.sms * max(1, row_bytes))
        programs = min(programs, max(1, fitting))
    return programs * target.sms


def row_plan(
    kernel: str, device_type: str, index: int | None, columns: int, itemsize: int, softcap: bool
) -> tuple[int, dict[str, Any]]:
    """The largest grid of a row kernel and its keyword arguments; none depends on the rows."""
    target = target_of(device_type, index)
    config = row_config(kernel, target, columns)
    tile = config.tile(itemsize, target.warp_size, softcap)
    keywords = {"TILE": tile, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return row_programs(kernel, target, config, columns * itemsize), keywords


def score_config(family: str, itemsize: int, aligned: bool) -> ScoreConfig:
    """Tiles of the score kernel; ``aligned``: 16-byte loads of the operands are possible."""
    if itemsize == 4:
        return SCORE_FP32
    return SCORE[family] if aligned else SCORE_UNALIGNED


def ranking_config(candidates: int) -> RankingConfig:
    """The configuration of the ranking kernel for ``candidates`` candidates a prompt."""
    for config in RANKING:
        if candidates <= config.block_n:
            return config
    raise AssertionError(f"{candidates} candidates: refused before this")


def family(backend: str, arch: int | str) -> str:
    """The family of a Triton target: ``("cuda", 90)``, ``("hip", "gfx942")``, ``("xpu", ...)``."""
    if backend != "cuda":
        return "xpu" if backend == "xpu" else "gfx942"
    if int(arch) in _SMALL_ARCHS:
        return "sm_86"
    return "sm_80" if int(arch) < 90 else "sm_90" if int(arch) < 100 else "sm_100"


@functools.cache
def target_of(device_type: str, index: int | None) -> Target:
    """The target of a torch device, asked of the drivers once."""
    if device_type == "cpu":
        return Target("sm_90", 32)  # the interpreter: one SM, so that programs walk rows
    import torch
    import triton

    module = getattr(torch, device_type)
    with module.device(index):
        found = triton.runtime.driver.active.get_current_target()
    properties = module.get_device_properties(index)
    # XPU counts its Xe cores under another name.
    sms = getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count
    return Target(family(found.backend, found.arch), found.warp_size, sms)
