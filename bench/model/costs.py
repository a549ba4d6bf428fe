"""Bytes, flops and launches of each kernel and case, and the time they predict on a card.

Legend: ``R`` positions, ``N`` scored ones, ``H`` hidden, ``V`` vocabulary, ``b`` bytes of a logit,
``B`` prompts, ``n`` candidates. A matmul takes the longer of its flops at the card's matmul rate
and its bytes at its copy bandwidth; a kernel the longer of its bytes and its exponentials. Pieces
follow one another, nothing overlaps. Not counted: launch gaps, PyTorch's small operations on
``(B, n)`` and ``(N,)``, and tails of the last wave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.model.cards import Card
from pro_kernels.fused.planner import Plan, make_plan

_BF16 = 2
_BUDGET = 8 << 30  # what an 80 GB card's default gives; larger ones give more


@dataclass(frozen=True)
class Piece:
    """One launch, or a few of the same kind.

    Attributes:
        name: the kernel, or which matmul.
        flops: of a matmul; 0 for the package's kernels.
        read: bytes from device memory.
        written: bytes to it.
        exps: exponentials.
        launches: how many.
    """

    name: str
    flops: float = 0
    read: float = 0
    written: float = 0
    exps: float = 0
    launches: int = 1

    @property
    def is_matmul(self) -> bool:
        """Whether cuBLAS does it."""
        return self.flops > 0

    @property
    def moved(self) -> float:
        """Bytes read and written."""
        return self.read + self.written

    def seconds(self, card: Card) -> float:
        """Predicted."""
        return max(self.moved / card.copy, self.flops / card.matmul, self.exps / card.exps)

    def bound(self, card: Card) -> str:
        """What takes that time."""
        times = {
            "bandwidth": self.moved / card.copy,
            "matmul": self.flops / card.matmul,
            "exponentials": self.exps / card.exps,
        }
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Cost:
    """A whole case: its pieces in order."""

    name: str
    pieces: tuple[Piece, ...]
    plan: Plan | None = None

    @property
    def tier(self) -> str:
        """Of the plan; empty without one."""
        return "" if self.plan is None else self.plan.tier

    def seconds(self, card: Card) -> float:
        """Predicted, everything."""
        return sum(piece.seconds(card) for piece in self.pieces)

    def matmul_seconds(self, card: Card) -> float:
        """Predicted, its matmuls alone."""
        return sum(piece.seconds(card) for piece in self.pieces if piece.is_matmul)

    @property
    def flops(self) -> float:
        """Of the matmuls."""
        return sum(piece.flops for piece in self.pieces)

    @property
    def moved(self) -> float:
        """Bytes of all pieces."""
        return sum(piece.moved for piece in self.pieces)

    @property
    def launches(self) -> int:
        """Kernels of this package and matmuls."""
        return sum(piece.launches for piece in self.pieces)


def logp_kernel(N: int, V: int, b: int = _BF16, launches: int = 1) -> Piece:
    """Statistics: every scored logit read once."""
    return Piece("logp", read=N * V * b + 20 * N, written=8 * N, exps=N * V, launches=launches)


def residual_kernel(N: int, V: int, b: int = _BF16, launches: int = 1) -> Piece:
    """Each scored logit read once from memory and overwritten; two exponentials, two passes."""
    size = N * V * b
    return Piece("residual", 0, size + 20 * N, size + 8 * N, exps=2 * N * V, launches=launches)


def logits_grad_kernel(R: int, N: int, V: int, b: int = _BF16, launches: int = 1) -> Piece:
    """Scored rows read, all rows written."""
    size = N * V * b + 16 * R
    return Piece("logits_grad", 0, size, R * V * b, exps=N * V, launches=launches)


def ranking_kernel(B: int, n: int, tokens: int) -> Piece:
    """``tokens`` of each candidate read once and written once; the (k, i) plane is on the chip."""
    sequences, N = B * n, B * n * tokens
    read = 4 * N + sequences * (8 + 8 + 8 + 4) + 12 * B
    return Piece("ranking", 0, read, 4 * N + 8 * sequences, exps=B * n * n)


def gather_kernel(N: int, H: int, b: int = _BF16, launches: int = 1) -> Piece:
    """Rows of the hidden states, weighted or not, side by side."""
    return Piece("gather_rows", 0, N * (H * b + 12), N * H * b, launches=launches)


def scatter_kernel(R: int, N: int, H: int, b: int = _BF16) -> Piece:
    """The gradient's zeros written, then its scored rows."""
    return Piece("scatter_rows (and zeros)", 0, N * (H * b + 12), (R + N) * H * b, launches=2)


def target_logits_kernel(N: int, H: int, b: int = _BF16, launches: int = 1) -> Piece:
    """A row of X and a row of W for each scored token."""
    return Piece("target_logits", 0, N * (2 * H * b + 8), 4 * N, launches=launches)


def matmul(name: str, m: int, n: int, k: int, b: int = _BF16, launches: int = 1) -> Piece:
    """``(m, k) (k, n)``; in several launches, by rows, each reads the whole second operand."""
    read = (m * k + launches * k * n) * b
    return Piece(name, 2.0 * m * n * k, read, m * n * b, launches=launches)


def linear(
    R: int,
    N: int,
    H: int,
    V: int,
    B: int,
    n: int,
    kind: str = "trained",
    budget: int = _BUDGET,
    sharded: bool = False,
) -> Cost:
    """``linear_pro_loss`` in bf16: ``kind`` is "trained", "frozen" or "score".

    ``sharded``: V is one rank's share of the vocabulary (``process_group``). The residual can be
    made only when all ranks have told their log-sum-exps: one pass over the logits more.

    Raises:
        ValueError: an unknown kind, or a shape the planner puts into a tier that is not modelled.
    """
    if kind not in ("trained", "frozen", "score"):
        raise ValueError(f"kind must be trained, frozen or score, got {kind!r}")
    grad = kind != "score"
    plan = make_plan(
        N, (V, H, torch.bfloat16), torch.device("cuda"), need_hidden=grad,
        need_weight=kind == "trained", budget=budget, hidden_rows=R,
    )  # fmt: skip
    if plan.tier not in ("T0", "T1", "T1f"):
        raise ValueError(f"tier {plan.tier} is not modelled: N={N} H={H} V={V} budget={budget}")
    chunks = -(-N // plan.chunk)
    rows = [residual_kernel(N, V, launches=chunks) if grad else logp_kernel(N, V, launches=chunks)]
    if sharded and grad:
        rows = [
            logp_kernel(N, V, launches=chunks),
            logits_grad_kernel(N, N, V, launches=chunks),
        ]
    pieces = [
        gather_kernel(N, H, launches=chunks),
        target_logits_kernel(N, H, launches=chunks),
        matmul("logits = X W^T", N, V, H, launches=chunks),
        *rows,
    ]
    if grad:
        pieces.append(matmul("dHidden = dZ W", N, H, V, launches=chunks))
    pieces.append(ranking_kernel(B, n, N // (B * n)))
    if kind == "trained":
        pieces += [gather_kernel(N, H), matmul("dW = dZ^T X", V, H, N)]
    if grad:
        pieces.append(scatter_kernel(R, N, H))
    return Cost(f"linear_pro_loss, {kind}", tuple(pieces), plan)


def logits_in(R: int, N: int, V: int, B: int, n: int) -> Cost:
    """``pro_loss``: scored rows read in the forward, read again and all rows written after it."""
    pieces = (
        logp_kernel(N, V),
        ranking_kernel(B, n, N // (B * n)),
        logits_grad_kernel(R, N, V),
    )
    return Cost("pro_loss (logits in)", pieces)
