"""How many CTAs and warps one SM holds, as NVIDIA's ``cuda_occupancy.h`` computes it."""

from __future__ import annotations

from dataclasses import dataclass

_WARP = 32
_WARPS = 64  # an SM; the same on the three targets
_CTAS = 32
_REGISTERS = 65536
_REGISTER_UNIT = 256  # registers are given to a warp in this unit
_PARTITIONS = 4  # an SM's registers are four files, a warp lives in one
_MAX_THREADS, _MAX_REGISTERS = 1024, 255
_RESERVED = 1024  # bytes of shared memory the driver takes in each CTA
_SHARED_UNIT = 128
_SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # bytes an SM

ARCHS = tuple(_SHARED)


@dataclass(frozen=True)
class Occupancy:
    """What an SM holds of one kernel.

    Attributes:
        ctas: resident CTAs; 0 where one does not fit.
        warps: resident warps.
        share: of the warps an SM can hold.
        limit: what allows no further CTA: "registers", "shared memory", "warps" or "CTAs".
    """

    ctas: int
    warps: int
    share: float
    limit: str


def occupancy(arch: str, registers: int, threads: int, shared: int = 0) -> Occupancy:
    """Occupancy of a kernel with ``registers`` a thread and ``shared`` bytes a CTA.

    The shared-memory carve-out is taken at its largest, as a kernel that asks for it gets it.

    Raises:
        ValueError: an unknown target, or sizes that no kernel has.
    """
    base = arch.removesuffix("a")
    if base not in _SHARED:
        raise ValueError(f"arch must be one of {list(_SHARED)}, got {arch!r}")
    if not 0 < threads <= _MAX_THREADS:
        raise ValueError(f"threads must be in 1 ... {_MAX_THREADS}, got {threads}")
    if not 0 < registers <= _MAX_REGISTERS:
        raise ValueError(f"registers must be in 1 ... {_MAX_REGISTERS}, got {registers}")
    if shared < 0:
        raise ValueError(f"shared must be >= 0 bytes, got {shared}")
    warps = -(-threads // _WARP)
    a_warp = _up(registers * _WARP, _REGISTER_UNIT)
    in_a_file = _REGISTERS // _PARTITIONS // a_warp
    # A CTA is placed whole: its warps are dealt to the four files in equal parts.
    dealt = _up(warps, _PARTITIONS)
    by_registers = in_a_file * _PARTITIONS // warps if a_warp * dealt <= _REGISTERS else 0
    a_cta = _up(shared + _RESERVED, _SHARED_UNIT)
    limits = {
        "warps": _WARPS // warps,
        "registers": by_registers,
        "shared memory": _SHARED[base] // a_cta,
        "CTAs": _CTAS,
    }
    # Of equal limits the first: at full occupancy that is the warps.
    limit = min(limits, key=lambda name: limits[name])
    ctas = limits[limit]
    return Occupancy(ctas, ctas * warps, ctas * warps / _WARPS, limit)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
