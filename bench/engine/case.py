"""What a case of the loss is: one batch and what is done with it. ``suites.loss`` has the tables.

Legend: ``B`` prompts, ``n`` candidates, ``T`` positions, ``R = B n T``, ``N`` scored positions,
``H`` hidden, ``V`` vocabulary. ``masked`` is the share of the R positions that are not scored
(prompt and padding).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.engine import lists
from pro_kernels.fused.matmul import upcasts

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What is done, and the head matmuls on the scored rows that no exact method of it avoids.
KINDS = {
    "linear": 3,  # hidden states and head are trained
    "memory": 3,  # the same, weighed only, never interleaved
    "ce": 3,  # mean cross-entropy of the scored tokens instead of PRO
    "frozen": 2,  # the head is frozen
    "score": 1,  # no gradient
    "logits": 0,  # the logits are the input
    "ranking": 0,  # log-probs are the input
}
# Below this many bytes a case is measured warm too: larger ones never fit a cache.
_WARM_BYTES = 128 << 20

_FACTS = ("group", "kind", "dtype", "H", "V", "B", "n", "T", "masked", "tokens", "scored", "budget",
          "softcap", "flops", "bytes", "data", "model")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One batch shape and what is done with it."""

    name: str  # unique within a preset
    H: int  # 0 where hidden states are not the input
    V: int  # 0 where log-probs are the input
    B: int
    n: int
    T: int
    masked: float  # in [0, 1)
    dtype: str = "bf16"  # of hidden states, weight and logits: one of DTYPES
    kind: str = "linear"  # one of KINDS
    group: str = "head"  # section of the report
    only: tuple[str, ...] = ()  # providers ("ours" is what backend="auto" picks); empty for all
    memory: bool = False  # weigh it too
    repeats: int = 7  # rounds
    budget: int | None = None  # bytes given to ours, None for its default
    softcap: float | None = None
    data: str = ""  # entry of lists.json with its lengths and rewards; "": made up on average
    model: str = ""  # key of lists.MODELS, whose hidden states and head these are; "": random

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.kind not in KINDS or not 0 <= self.masked < 1:
            raise ValueError(f"not a case: {self}")

    @property
    def facts(self) -> dict:
        """What a results row says of it."""
        return {key: getattr(self, key) for key in _FACTS}

    @property
    def tokens(self) -> int:
        return self.B * self.n * self.T

    @property
    def scored_each(self) -> int:
        """Mean number of scored tokens a candidate."""
        return max(1, round((1 - self.masked) * self.T))

    @property
    def scored(self) -> int:
        """Scored tokens in all, N."""
        if self.data:
            return sum(map(sum, lists.load()[self.data].completions[: self.B]))
        return self.B * self.n * self.scored_each

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def flops(self) -> int | None:
        """Of the matmuls that no exact method avoids, 2 N H V each; None without a matmul."""
        return 2 * KINDS[self.kind] * self.scored * self.H * self.V or None

    @property
    def bytes(self) -> int | None:
        """That the maths has to move where no matmul is made; None with one.

        Logits: scored rows read twice, since the gradient of a row needs the loss of its prompt,
        and the whole gradient written. Ranking: log-probs read, their gradient written.
        """
        if self.kind == "logits":
            return (2 * self.scored + self.tokens) * self.V * self.torch_dtype.itemsize
        return 8 * self.scored if self.kind == "ranking" else None

    @property
    def input_bytes(self) -> int:
        """Of hidden states and weight, or of the logits."""
        if self.kind == "ranking":
            return 4 * self.tokens
        rows = self.tokens * (self.V if self.kind == "logits" else self.H)
        return (rows + self.V * self.H) * self.torch_dtype.itemsize

    @property
    def fits_cache(self) -> bool:
        """Whether inputs and logits are small enough that a warm cache can matter."""
        return 2 * self.input_bytes + 2 * self.scored * self.V < _WARM_BYTES


def native() -> str:
    """What a CPU multiplies fast: bf16, or fp32 where bf16 products are emulated; bf16 on a GPU."""
    return "fp32" if not torch.cuda.is_available() and upcasts(torch.bfloat16, "cpu") else "bf16"


def head_case(H: int, V: int, masked: float, n: int = 4, tokens: int = 2048, **more) -> Case:
    """Equal lists: ``tokens`` positions, 128 a candidate."""
    return _named(Case("", H, V, max(1, tokens // (128 * n)), n, 128, masked, **more))


def real_case(data: str, B: int, H: int, V: int, model: str = "", **more) -> Case:
    """The first ``B`` lists of an entry of ``lists.json``; hidden states of a model, or random."""
    found = lists.load()[data].head(B)
    n, T = len(found.completions[0]), found.longest
    case = Case("", H, V, B, n, T, 0.0, data=data, model=model, **more)
    return _named(replace(case, masked=1 - case.scored / case.tokens))


def _named(case: Case) -> Case:
    """Named by what it is made of."""
    what = "" if case.kind == "linear" else f"{case.kind} "
    size = f"V={case.V}" if case.kind == "logits" else f"H={case.H} V={case.V}"
    whose = f" of {lists.MODELS[case.model].label}" if case.model else ""
    name = f"{what}{size}{whose} {case.dtype}{case.data and f' {case.data}'} n={case.n}"
    end = "" if case.data else f" masked {case.masked:.0%}"
    return replace(case, name=f"{name} R={case.tokens}{end}")


def is_main(row: dict) -> bool:
    """Whether a results row belongs in the short table and the time plot."""
    return row["group"] == "head" and (
        bool(row.get("data")) or row["n"] == 4 and row["masked"] == 0.6
    )
