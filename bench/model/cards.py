"""The card that predictions are made for, and where its numbers come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU as the model sees it.

    Attributes:
        name: as in the tables.
        copy: bytes read and written in a second by a device-to-device copy.
        matmul: flops in a second of large bf16 matmuls on random data.
        sms: streaming multiprocessors.
        clock: SM cycles in a second, assumed under load; only exponentials depend on it.
        memory: bytes.
        source: where ``copy`` and ``matmul`` come from.
    """

    name: str
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


H200 = Card(
    "H200", 4.3e12, 785e12, 132, 1.7e9, 141_000_000_000,
    "public record of measurements: copy 4.3 TB/s, bf16 770-800 TFLOP/s (here the middle)",
)  # fmt: skip
