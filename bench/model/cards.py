"""The cards that predictions are made for, and where their numbers come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU as the model sees it.

    Attributes:
        name: as in the tables.
        arch: the target that serves it.
        copy: bytes read and written in a second by a device-to-device copy.
        matmul: flops in a second of large bf16 matmuls on random data.
        sms: streaming multiprocessors.
        clock: SM cycles in a second, assumed under load; only exponentials depend on it.
        memory: bytes.
        source: where ``copy`` and ``matmul`` come from.
    """

    name: str
    arch: str
    copy: float
    matmul: float
    sms: int
    clock: float
    memory: int
    source: str

    @property
    def exps(self) -> float:
        """Exponentials in a second: 16 a cycle and SM (CUDA Programming Guide, throughput)."""
        return 16 * self.sms * self.clock


CARDS = {
    card.name: card
    for card in (
        Card(
            "H200", "sm_90", 4.3e12, 785e12, 132, 1.7e9, 141_000_000_000,
            "public record of measurements: copy 4.3 TB/s, bf16 770-800 TFLOP/s (here the middle)",
        ),
        Card(
            "H100 SXM", "sm_90", 3.35e12, 989.4e12, 132, 1.7e9, 80_000_000_000,
            "NVIDIA's data sheet, peak numbers that no kernel reaches: its times are lower bounds",
        ),
    )
}  # fmt: skip
