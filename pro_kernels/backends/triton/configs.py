"""Launch configurations, as data: change a number here to tune.

A row kernel reads its row in tiles of ``BLOCK_V = vectors * threads * (16 / itemsize)`` columns:
each thread has ``vectors`` loads of 16 bytes in flight. Nothing is tuned on a device yet; the
numbers follow from these rules, and tests/backends/test_triton_compile.py asserts that none spills:

* about 16-32 KB in flight on an SM hide the latency of HBM3 (3.35 TB/s * 700 ns / 132 SMs = 18 KB);
* ``residual`` reads a row twice, so the rows under way at one time should fit in the L2 cache
  (50 MB on H100). A row of 128256 bf16 columns is 256 KB, and 2048 threads an SM are that many rows
  when a program has 256 threads: 8 * 132 * 256 KB = 270 MB. Hence few, wide programs there;
* ``logp`` and ``logits_grad`` touch each column once and only need loads in flight.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

VECTOR_BYTES = 16
KERNELS = ("logp", "residual", "logits_grad")


@dataclass(frozen=True)
class RowConfig:
    """How a row kernel is launched for rows of up to ``max_columns`` columns (None: any)."""

    max_columns: int | None
    num_warps: int
    vectors: int
    num_stages: int = 1  # nothing to pipeline through shared memory: a column is used once

    def tile(self, itemsize: int, warp_size: int, softcap: bool) -> tuple[int, int]:
        """``(LANES, GROUP)``: vectors in a tile, and elements in a vector of 16 bytes."""
        vectors = 1 if softcap else self.vectors  # a tanh takes four times the registers
        return vectors * self.num_warps * warp_size, VECTOR_BYTES // itemsize


@dataclass(frozen=True)
class RankingConfig:
    """How the ranking kernel is launched for up to ``block_n`` candidates a prompt."""

    block_n: int
    block_k: int  # rank terms in a tile of the (k, i) plane
    num_warps: int
    block_t: int = 1024  # tokens of a sequence read at a time


@dataclass(frozen=True)
class Target:
    """What a configuration depends on: the table's family and the threads in a warp."""

    family: str
    warp_size: int


_WIDE = {
    "logp": (RowConfig(2048, 4, 1), RowConfig(16384, 8, 1), RowConfig(None, 8, 4)),
    "residual": (
        RowConfig(2048, 4, 1),
        RowConfig(16384, 8, 1),
        RowConfig(65536, 16, 2),
        RowConfig(None, 32, 2),
    ),
    "logits_grad": (RowConfig(2048, 4, 1), RowConfig(None, 8, 2)),
}

# family -> kernel -> configurations by rising max_columns.
ROWS: dict[str, dict[str, tuple[RowConfig, ...]]] = {
    # sm_80, sm_90, sm_100: 2048 threads an SM, large L2.
    "cuda": _WIDE,
    # sm_86, sm_89, sm_120: 1536 threads an SM, so a program of 1024 would leave a third idle.
    "cuda_small": {
        **_WIDE,
        "residual": (RowConfig(2048, 4, 1), RowConfig(16384, 8, 1), RowConfig(None, 16, 2)),
    },
    # Warps of 64: at most 16 of them in a program.
    "hip": {
        "logp": (RowConfig(4096, 4, 1), RowConfig(None, 4, 4)),
        "residual": (RowConfig(4096, 4, 1), RowConfig(32768, 8, 2), RowConfig(None, 16, 2)),
        "logits_grad": (RowConfig(4096, 4, 1), RowConfig(None, 4, 2)),
    },
    "xpu": {
        "logp": (RowConfig(None, 8, 2),),
        "residual": (RowConfig(None, 16, 2),),
        "logits_grad": (RowConfig(None, 8, 2),),
    },
}

_SMALL_ARCHS = (86, 87, 89, 110, 120, 121)

# One binary each. Up to 32 candidates the whole (k, i) plane is one tile.
RANKING = (
    RankingConfig(16, 16, 4),
    RankingConfig(32, 32, 2),
    RankingConfig(64, 32, 4),
    RankingConfig(128, 8, 4),
    RankingConfig(256, 4, 8),
    RankingConfig(512, 2, 8),
    RankingConfig(1024, 4, 8),
)


def row_config(kernel: str, target: Target, columns: int) -> RowConfig:
    """The configuration of a row kernel for rows of ``columns`` columns."""
    for config in ROWS[target.family][kernel]:
        if config.max_columns is None or columns <= config.max_columns:
            return config
    raise AssertionError(f"{target.family}/{kernel}: the last configuration must take any width")


def ranking_config(candidates: int) -> RankingConfig:
    """The configuration of the ranking kernel for ``candidates`` candidates a prompt."""
    for config in RANKING:
        if candidates <= config.block_n:
            return config
    raise AssertionError(f"{candidates} candidates: refused before this")


def family(backend: str, arch: int | str) -> str:
    """The family of a Triton target: ``("cuda", 90)``, ``("hip", "gfx942")``, ``("xpu", ...)``."""
    if backend != "cuda":
        return backend if backend in ROWS else "hip"
    return "cuda_small" if int(arch) in _SMALL_ARCHS else "cuda"


@functools.cache
def target_of(device_type: str, index: int | None) -> Target:
    """The target of a torch device, asked of Triton's driver once (it must be the current one)."""
    if device_type == "cpu":
        return Target("cuda", 32)  # the interpreter
    import triton

    found = triton.runtime.driver.active.get_current_target()
    return Target(family(found.backend, found.arch), found.warp_size)
