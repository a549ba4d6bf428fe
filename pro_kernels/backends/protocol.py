"""What a backend is: everything that the package asks of one, and nothing else.

A backend is a module or any other object with these names. Those that may be None are optional;
``register`` sets what is missing of them. What each function computes is written in
``backends/torch.py``, the plain PyTorch backend, and is tested alike for all.

Legend: ``N`` rows, ``V`` vocabulary columns, ``R`` rows of the hidden states, ``H`` hidden, ``S``
sequences, ``B`` prompts, ``n`` candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pro_kernels.options import LogitOptions, RankingOptions


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

    def logp(
        self,
        logits: Tensor,  # (N, V), unit stride along V
        targets: Tensor,  # (N,) int64; negative = row not scored
        *,
        target_logits: Tensor | None = None,  # (N,) fp32, raw
        options: LogitOptions,
        entropy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-prob, log-sum-exp and, if asked for, entropy of each row, ``(N,)`` fp32 each."""

    def residual_(
        self,
        logits: Tensor,  # (N, V), overwritten
        targets: Tensor,  # (N,)
        *,
        target_logits: Tensor | None = None,
        options: LogitOptions,
    ) -> tuple[Tensor, Tensor]:
        """Overwrite ``logits`` with ``d logp / d raw`` (unweighted); ``(logp, lse)``."""

    def logits_grad(
        self,
        logits: Tensor,  # (N, V): columns first_column ... first_column + V of the vocabulary
        lse: Tensor,  # (N,) fp32, over the whole vocabulary
        targets: Tensor,  # (N,), in terms of the whole vocabulary
        weights: Tensor | None,  # (N,) fp32; None = 1
        *,
        target_logits: Tensor | None = None,
        first_column: int = 0,
        options: LogitOptions,
        out: Tensor | None = None,  # may be ``logits`` itself
        entropy: tuple[Tensor, Tensor] | None = None,  # (N,) fp32 each: entropy, its weights
    ) -> Tensor:
        """``weights * d logp / d raw``, plus the second weights times ``d entropy / d raw``."""

    def ranking(
        self,
        logps: Tensor,  # (N,) fp32; the tokens of a sequence are contiguous
        offsets: Tensor,  # (S + 1,) int64
        lengths: Tensor,  # (S,) int64
        order: Tensor,  # (B, n) int64; -1 after the last candidate
        rewards: Tensor | None,  # (B, n) fp32
        sft_rank: Tensor,  # (B,) int64; -1 for none
        prompt_weights: Tensor,  # (B,) fp32
        *,
        options: RankingOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss terms (B, n), sequence sums (S,) and ``d loss / d logps`` (N,)."""


OPTIONAL = (
    *("VERIFIED", "only_when_named"),
    *("gather_rows", "scatter_rows", "target_logits", "score", "scores_fused", "filtered"),
)
REQUIRED = (
    *("NAME", "DTYPES", "MAX_CANDIDATES"),
    *("unusable", "details", "logp", "residual_", "logits_grad", "ranking"),
)
