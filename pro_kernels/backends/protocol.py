"""What a backend is: everything that the package asks of one, and nothing else.

A backend is a module or any other object with these names. Those that may be None are optional;
``register`` sets what is missing of them. What each function computes is written in
``backends/torch.py``, the plain PyTorch backend, and is tested alike for all.

Legend: ``N`` rows, ``V`` vocabulary columns, ``R`` rows of the hidden states, ``H`` hidden, ``S``
sequences, ``B`` prompts, ``n`` candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pro_kernels.options import LogitOptions, RankingOptions


class Rows(NamedTuple):
    """Rows of logits and their targets.

    A negative target marks a row that is not scored: it is never read, and its results are 0. The
    ``exact`` logit of a target stands in for the rounded one everywhere, also inside the sum.
    """

    logits: Tensor  # (N, V), unit stride along V
    targets: Tensor  # (N,) int64
    options: LogitOptions
    exact: Tensor | None = None  # (N,) fp32, raw


class Candidates(NamedTuple):
    """The candidates of each prompt in rank order."""

    offsets: Tensor  # (S + 1,) int64: sequence s is tokens offsets[s] : offsets[s + 1]
    lengths: Tensor  # (S,) int64: scored tokens m_s
    order: Tensor  # (B, n) int64: the sequence at each rank; -1 after the last one
    rewards: Tensor | None  # (B, n) fp32 (fp64) at those ranks, scaled; None: all tau equal
    sft_rank: Tensor  # (B,) int64: the rank that carries the SFT term; -1 for none
    weights: Tensor  # (B,) fp32, of each prompt in the loss

    def part(self, prompts: slice) -> Candidates:
        """The same for these prompts."""
        here = [None if x is None else x[prompts] for x in self[2:]]
        return Candidates(self.offsets, self.lengths, *here)  # type: ignore[arg-type]


# Log-prob, log-sum-exp and, if asked for, entropy of each row, (N,) fp32 each.
Statistics = tuple[Tensor, Tensor, Tensor | None]


class Backend(Protocol):
    """The attributes, limits and functions of a backend.

    Attributes:
        NAME: what callers name it by.
        DTYPES: of logits that it takes.
        MAX_CANDIDATES: longest list of a prompt; None: any.
        VERIFIED: for kernels of its own on GPUs: architecture ("sm_90") -> the card that its tests
            passed on. On another card ``auto`` does not pick it. None: nothing to verify.
        only_when_named: ``(device) -> str | None``: why ``auto`` does not pick it there although it
            could serve. None: it does.
        gather_rows: ``(source (R, H), rows (N,), weights (N,) or None, dtype) -> (N, H)``: weights
            times these rows, in fp32, rounded once to dtype. None: plain PyTorch does it.
        scatter_rows: ``(side (N, H), weights (N,), rows (N,), out (R, H), shared)``: adds weights
            times side to the rows of out, zeros on entry, in fp32 and in the order of the tokens;
            ``shared``: rows may repeat. None: plain PyTorch does it.
        target_logits: ``(x (N, H), weight (V, H), bias (V,) or None, targets (N,)) -> (N,)`` fp32,
            the raw logit of each target as an exact dot product. None: plain PyTorch does it.
        score: ``(x (N, H), weight (V, H), bias or None, targets (N,), *, options) -> (logp, lse)``,
            with no logit written. None: a matmul and ``logp``.
        filtered: the functions of ``fused/column_groups.py``, for ``grad_filter``. None: plain
            PyTorch has them.
        scores_fused: ``(N, H, V, dtype, device) -> bool``: whether ``score`` is the faster there.
    """

    NAME: str
    DTYPES: tuple[torch.dtype, ...]
    MAX_CANDIDATES: int | None
    VERIFIED: Mapping[str, str] | None
    only_when_named: Callable[[torch.device], str | None] | None
    gather_rows: Callable[..., Tensor] | None
    scatter_rows: Callable[..., None] | None
    target_logits: Callable[..., Tensor] | None
    score: Callable[..., tuple[Tensor, Tensor]] | None
    scores_fused: Callable[..., bool] | None
    filtered: Any

    def unusable(self, device: torch.device) -> str | None:
        """Why this backend cannot serve ``device``; None: it can. Asked at every call: cheap."""

    def details(self) -> dict[str, str]:
        """What ``pro-kernels env`` shows of it."""

    def logp(self, rows: Rows, entropy: bool = False) -> Statistics:
        """Statistics of each row, which is only read."""

    def residual_(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Overwrite the logits with ``d logp / d raw`` (unweighted); ``(logp, lse)``."""

    def logits_grad(
        self,
        rows: Rows,  # columns first_column ... first_column + V; targets of the whole vocabulary
        lse: Tensor,  # (N,) fp32, over the whole vocabulary
        weights: Tensor | None,  # (N,) fp32; None = 1
        *,
        first_column: int = 0,
        out: Tensor | None = None,  # may be the logits themselves
        entropy: tuple[Tensor, Tensor] | None = None,  # (N,) fp32 each: entropy, its weights
    ) -> Tensor:
        """``weights * d logp / d raw``, plus the second weights times ``d entropy / d raw``."""

    def ranking(
        self,
        logps: Tensor,  # (N,) fp32; the tokens of a sequence are contiguous, unscored ones hold 0
        candidates: Candidates,
        options: RankingOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ranking loss and its closed-form gradient (docs/loss.md).

        A token may stand for several, their sum, with their number in ``lengths``. Without prompts
        (B = 0) the sums alone are made.

        Returns:
            ``terms`` (B, n): columns 0 ... n-2 are the rank terms, column n-1 the weighted SFT
            term, before the weights of prompts; ``sums`` (S,); ``d loss / d logps`` (N,).
        """


OPTIONAL = (
    *("VERIFIED", "only_when_named"),
    *("gather_rows", "scatter_rows", "target_logits", "score", "scores_fused", "filtered"),
)
REQUIRED = (
    *("NAME", "DTYPES", "MAX_CANDIDATES"),
    *("unusable", "details", "logp", "residual_", "logits_grad", "ranking"),
)
