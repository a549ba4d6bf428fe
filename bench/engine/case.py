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
# Head matmuls on the scored rows that no exact method avoids, by kind.
MATMULS = {"linear": 3, "memory": 3, "ce": 3, "frozen": 2, "score": 1}
KINDS = (*MATMULS, "logits", "ranking")
# Below this many bytes a case is measured warm too: larger ones never fit a cache.
_WARM_BYTES = 128 << 20


@dataclass(frozen=True)
class Case:
    """One batch shape and what is done with it.

    Attributes:
        name: unique within a preset.
        H: hidden size; 0 where hidden states are not the input.
        V: vocabulary; 0 where log-probs are the input.
        B: prompts.
        n: candidates a prompt.
        T: positions a candidate.
        masked: share of positions that are not scored, in [0, 1).
        dtype: "bf16", "fp16" or "fp32", of hidden states, weight and logits.
        kind: "linear" (hidden and head trained), "frozen" (head frozen), "score" (no gradient),
            "logits" (the logits are the input), "ce" (mean cross-entropy of the scored tokens
            instead of PRO), "ranking" (log-probs are the input), "memory" (linear, weighed only,
            never interleaved).
        group: section of the report.
        only: provider names measured here ("ours" is what backend="auto" picks); empty for all.
        memory: weigh it too.
        repeats: rounds.
        budget: bytes given to ours, None for its default.
        softcap: cap of the logits, None for none.
        data: entry of ``lists.json`` that lengths and rewards are from; "": made up, T and masked
            hold on average.
        model: key of ``lists.MODELS``, whose hidden states and head these are; "": random.
    """

    name: str
    H: int
    V: int
    B: int
    n: int
    T: int
    masked: float
    dtype: str = "bf16"
    kind: str = "linear"
    group: str = "head"
    only: tuple[str, ...] = ()
    memory: bool = False
    repeats: int = 7
    budget: int | None = None
    softcap: float | None = None
    data: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.kind not in KINDS or not 0 <= self.masked < 1:
            raise ValueError(f"not a case: {self}")

    @property
    def tokens(self) -> int:
        """All positions, R."""
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
        """The dtype as torch has it."""
        return DTYPES[self.dtype]

    @property
    def flops(self) -> int | None:
        """Of the matmuls that no exact method avoids, 2 N H V each; None without a matmul."""
        count = MATMULS.get(self.kind)
        return None if count is None else 2 * count * self.scored * self.H * self.V

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
    case = Case("", H, V, max(1, tokens // (128 * n)), n, 128, masked, **more)
    what = "" if case.kind == "linear" else f"{case.kind} "
    size = f"V={V}" if case.kind == "logits" else f"H={H} V={V}"
    return replace(
        case, name=f"{what}{size} {case.dtype} n={n} R={case.tokens} masked {masked:.0%}"
    )


def real_case(data: str, B: int, H: int, V: int, model: str = "", **more) -> Case:
    """The first ``B`` lists of an entry of ``lists.json``; hidden states of a model, or random."""
    found = lists.load()[data].head(B)
    n, T = len(found.completions[0]), found.longest
    case = Case("", H, V, B, n, T, 0.0, data=data, model=model, **more)
    what = "" if case.kind == "linear" else f"{case.kind} "
    size = f"V={V}" if case.kind == "logits" else f"H={H} V={V}"
    whose = f" of {lists.MODELS[model].label}" if model else ""
    return replace(
        case, masked=1 - case.scored / case.tokens,
        name=f"{what}{size}{whose} {case.dtype} {data} n={n} R={case.tokens}",
    )  # fmt: skip


def is_main(row: dict) -> bool:
    """Whether a results row belongs in the short table and the time plot."""
    return row["group"] == "head" and (
        bool(row.get("data")) or row["n"] == 4 and row["masked"] == 0.6
    )
