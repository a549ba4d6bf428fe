"""The gradient's entries at targets, apart from all others: what log-sum-exps need.

Of upstream gradients a of log-probs, b of entropies and c of log-sum-exps, and p = softmax,

    d raw_v = ((c - a) p_v - b p_v (log p_v + entropy)) dz_v/draw_v    off the target
    d raw_t = (a (1 - p_t) + c p_t - b p_t (log p_t + entropy)) dz_t/draw_t

So off the target it is ``(a - c) dZ0``, which the head's backward serves. At the target it is not;
and made of ``(a - c) dZ0_t`` and a correction it would lose what p_t is smaller than 1, in 16 bits
all of it. Therefore dZ0 (dZ) is 0 there, and the entry goes another way: of each token one row of
the weight and one of the hidden states, no matmul.

Legend: ``N`` scored rows, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pro_kernels.fused.gather_scatter import Inputs, add_rows
from pro_kernels.fused.head import Saved, own_columns


class TargetColumns(NamedTuple):
    """The entries of some rows, and what they multiply."""

    columns: Tensor  # (N,) of this rank's weight
    entries: Tensor  # (N,) d raw_t; 0 where another rank has the column
    scaled: Tensor  # (N,) the same times the scale of each row, which x is without
    x: Tensor  # (N, H)
    w: Tensor  # (N, H)

    @classmethod
    def of(
        cls,
        given: Inputs,
        weight: Tensor,  # (V, H), as the caller has it
        saved: Saved,
        upstream: Sequence[Tensor | None],  # a, b and c, (N,) each
    ) -> TargetColumns:
        """Those of this rank."""
        call = given.call
        a, b, c = upstream
        assert a is not None
        lse, logp = saved.stats[0], saved.logp(call)
        p = torch.exp(logp)
        entries = -torch.expm1(logp) * a
        if c is not None:
            entries += p * c
        if b is not None:  # where p is 0 it adds nothing: 0 * -inf would be NaN
            entries -= b * torch.where(p == 0, 0.0, p * (logp + saved.stats[1]))
        entries *= call.logits.logit_scale
        if call.logits.softcap is not None:
            entries *= 1 - ((logp + lse) / call.logits.softcap).square()
        columns, here = own_columns(call, given.targets, call.vocab)
        entries = torch.where(here, entries, 0.0)
        w = weight.index_select(0, columns).to(call.compute_dtype)
        x = given._replace(scale=None).x()
        return cls(columns, entries, given.times(entries), x, w)

    def hidden_side(self, side: Tensor, weights: Tensor) -> Tensor:
        """``weights * side`` (N, H) and this rank's share of dHidden, unrounded."""
        return (weights[:, None] * side).addcmul_(self.entries[:, None], self.w.to(weights.dtype))

    def add_to(self, d_weight: Tensor | None, d_bias: Tensor | None) -> None:
        """Add dW (V, H) and dbias (V,)."""
        if d_weight is not None:
            add_rows(d_weight, self.columns, self.scaled, self.x)
        if d_bias is not None:
            one = torch.ones_like(self.entries)[:, None]
            add_rows(d_bias[:, None], self.columns, self.entries, one)
