"""Vocabulary columns that leave the gradient matmuls (``grad_filter=tau``).

In a trained model most columns have next to no probability in any row of a chunk. With dZ0 at hand
(its entries are ``-p_v`` off the target, times the slope of scale and softcap), the columns with
the smallest largest entry are dropped as long as, in every row r,

    m_r = sum_{v dropped} |dZ0_rv| <= tau |logit_scale|

so that, without a softcap, no row loses more than tau of its probability (with one, probabilities
count by the softcap's slope: where it is flat they do not reach the gradient). Columns that are a
row's target stay. What is left is dense, ``(rows, kept)``, so the two gradient matmuls cost
``4 kept / V`` instead of 4 (in units of ``N H V`` flops).

The rows of dZ0 W keep what the dropped columns have in common: a vector ``u``, the mean of their
W_v weighted by their largest entries, stands in for each W_v, as ``-m_r u`` (any u is allowed; with
none the sum over a row of dZ0 would no longer be 0, and what all W_v share would not cancel). It
goes through the same matmul, in columns behind the kept ones: what cancels does so before a result
is rounded to 16 bits. For row weights w and the stored dZ0, by the triangle inequality and
Cauchy-Schwarz:

    |error of dHidden_r|  <= |w_r| (m_r max_{v dropped} |W_v - u| + |m_r - s_r| |u|)
    |error of dW|_F       <= sum_r |w_r| |x_r| (sum_{v dropped} dZ0_rv^2)^(1/2)

where s_r is m_r as it was summed, which ``_SUMS`` bounds, and then held by the matmul's dtype.

How many columns stay is known from data only: on a GPU the host waits once a chunk. Nothing else in
the package does, and nothing does without a filter.

Legend: ``R`` rows of a chunk, ``V`` vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

# Kept counts tried: V, V / 2^(1/8), ... V / 2^7.
_STEPS = 56
# Leaving out fewer than an eighth of the columns costs more than it saves (measured on a CPU).
_WORTH_DROPPING = 1 / 8
# Relative error of a sum over a row: of fp32, or of TF32, which a GPU may be told to multiply in.
_SUMS = 4 * 2.0**-11
_TINY = torch.finfo(torch.float32).tiny
# Columns that the stand-in for the dropped ones takes: the parts of ``split``.
STAND_INS = 2
# Rows are taken in blocks: ones that fit a processor's cache, or few of them where launches cost.
_BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}


@dataclass(frozen=True)
class Selection:
    """The columns kept for a chunk of rows."""

    columns: Tensor  # (kept,) int64, ascending
    total: Tensor  # (R,) fp32, the dropped ``sum |dZ0|`` of each row
    mass: Tensor  # (R,) fp32, the same rounded up, past the roundings of the entries too
    norm: Tensor  # (R,) fp32, the dropped ``(sum dZ0^2)^(1/2)`` of each row, rounded up
    shares: Tensor  # (V,) fp32, weights of the dropped columns in ``u``, 0 for the others
    dropped: Tensor  # (V,) bool, whether a column is left out; its share may still be 0


@dataclass(frozen=True)
class Kept:
    """Which columns stay in the gradient matmuls of each chunk; filled by the forward."""

    tau: float | None  # None: no filter, and no room
    columns: Tensor  # (chunks, V) int32; row c holds counts[c] columns
    counts: Tensor  # (chunks,) int64, on the CPU: they size the matmuls
    dropped: Tensor  # (3, N) fp32: dropped mass, norm, bound of the error of dZ0 W

    @classmethod
    def empty(cls, tau: float | None, chunks: int, vocab: int, n: int, like: Tensor) -> Kept:
        """Room for ``chunks`` chunks of ``n`` rows in all; no room without a filter."""
        if tau is None:
            return cls(
                None,
                like.new_empty((0, vocab), dtype=torch.int32),
                # On the call's device: a CPU tensor would cost Inductor its graphs.
                like.new_empty(0, dtype=torch.int64),
                like.new_empty((3, 0), dtype=torch.float32),
            )
        return cls(
            tau,
            like.new_zeros((chunks, vocab), dtype=torch.int32),
            torch.zeros(chunks, dtype=torch.int64, device="cpu"),
            like.new_zeros((3, n), dtype=torch.float32),
        )

    def choose(
        self, chunk: int, residual: Tensor, targets: Tensor, weight: Tensor, scale: float, at: slice
    ) -> tuple[Tensor, Tensor]:
        """Choose a chunk's columns: its dZ0, compacted in place, and the weight that fits.

        Behind the kept columns of both is the stand-in for the others. ``scale`` is that of dZ0
        over minus the probabilities, off the target.
        """
        assert self.tau is not None
        chosen = select(residual, targets, self.tau * abs(scale))
        if chosen is None:
            self.counts[chunk] = residual.shape[1]
            return residual, weight
        count = chosen.columns.shape[0]
        self.columns[chunk, :count] = chosen.columns
        self.counts[chunk] = count
        u, radius = center(weight, chosen)
        parts = split(chosen.total, weight.dtype)
        bound = reach(chosen, parts, u, radius)
        self.dropped[:, at] = torch.stack([chosen.mass / abs(scale), chosen.norm, bound])
        parts = -parts if scale > 0 else parts
        rows = weight.new_empty(count + STAND_INS, weight.shape[1])
        torch.index_select(weight, 0, self.columns[chunk, :count], out=rows[:count])
        rows[count:] = u
        return compact_(residual, chosen.columns, parts), rows

    def spread_dropped(self, live: Tensor) -> None:
        """Move ``dropped`` from compact order to the positions ``live``."""
        if self.dropped.shape[1]:
            values = self.dropped[:, : live.shape[0]].clone()
            self.dropped.zero_().index_copy_(1, live, values)

    def part(self, chunk: int, at: slice) -> Kept:
        """The same for one chunk and its rows."""
        one = slice(chunk, chunk + 1)
        return Kept(self.tau, self.columns[one], self.counts[one], self.dropped[:, at])

    def count(self, chunk: int) -> int:
        """How many columns of a chunk stay."""
        return int(self.counts[chunk]) if self.tau is not None else self.columns.shape[1]

    def of(self, chunk: int) -> Tensor | None:
        """The columns of a chunk, (kept,); None where all stay."""
        count = self.count(chunk)
        return None if count == self.columns.shape[1] else self.columns[chunk, :count]


def select(residual: Tensor, targets: Tensor, tau: float) -> Selection | None:
    """The columns of ``residual (R, V)`` that stay; those of ``targets (R,)`` are among them.

    None where all stay.
    """
    vocab = residual.shape[1]
    largest = torch.maximum(residual.amax(0), -residual.amin(0)).float()
    largest[targets] = torch.inf
    edges, order = largest.sort()  # NaN comes last: never dropped
    kept = sorted({round(vocab * 2 ** (-j / 8)) for j in range(_STEPS + 1)} - {0}, reverse=True)
    # Step j drops order[: vocab - kept[j]]: column j marks what step j - 1 still kept of those.
    step = largest.new_zeros(vocab, len(kept))
    for j, (more, fewer) in enumerate(itertools.pairwise(kept), start=1):
        step[order[vocab - more : vocab - fewer], j] = 1
    up = 1 + max(4 * torch.finfo(residual.dtype).eps, _SUMS)
    totals = _sums(residual, step).cumsum_(1)
    edge = torch.stack([edges.new_zeros(()), *(edges[vocab - k - 1] for k in kept[1:])])
    fits = (totals.amax(0) * up <= tau) & edge.isfinite()  # False for NaN
    fits[0] = True  # nothing dropped
    best = int(fits.cumprod(0).sum()) - 1
    if vocab - kept[best] < max(STAND_INS, _WORTH_DROPPING * vocab):
        return None
    left = order[vocab - kept[best] :]
    dropped = torch.ones_like(largest).index_fill_(0, left, 0.0)
    total = totals[:, best]
    # What fp32 cannot hold of an entry is less than tiny.
    tiny = (vocab - kept[best]) * _TINY
    mass = total * up + tiny
    top = edge[best].clamp_min(_TINY)
    squares = _sums(residual, dropped[:, None], top)[:, 0]
    # Entries below 2^-63 top have no square: their sum is at most 2^-63 top m.
    norm = top * (squares * up).sqrt() + 2.0**-31 * top.sqrt() * mass.sqrt() + tiny
    shares = largest.index_fill_(0, left, 0.0)
    shares /= shares.sum().clamp_min(_TINY)  # all may be 0
    return Selection(left.sort().values, total, mass, norm, shares, dropped > 0)


def center(weight: Tensor, chosen: Selection) -> tuple[Tensor, Tensor]:
    """``u (H,)`` in the weight's dtype, and ``max |W_v - u|`` over the dropped columns in fp32."""
    blocks = _row_blocks(weight, 4)
    mean = chosen.shares.new_zeros(weight.shape[1])
    for at in blocks:
        mean.addmv_(weight[at].float().t(), chosen.shares[at])
    u = mean.to(weight.dtype)  # as it stands in
    far = [_norms(_wide(weight[at]) - _wide(u)) for at in blocks]
    return u, torch.cat(far).masked_fill_(~chosen.dropped, 0.0).amax()


def split(total: Tensor, dtype: torch.dtype) -> Tensor:
    """``total (R,)`` as a sum of ``STAND_INS`` numbers of ``dtype``, (R, 2)."""
    high = total.to(dtype)
    return torch.stack([high, (total - high).to(dtype)], 1)


def reach(chosen: Selection, parts: Tensor, u: Tensor, radius: Tensor) -> Tensor:
    """Bound of the norm of what each row of dZ0 W lost, ``parts`` standing in; (R,) fp32."""
    rounded = (chosen.total - parts.float().sum(1)).abs()
    return chosen.mass * radius + (_SUMS * chosen.mass + rounded) * _norms(_wide(u))


def compact_(residual: Tensor, columns: Tensor, behind: Tensor) -> Tensor:
    """Move these columns of ``residual (R, V)`` to its front in place, and ``behind`` after them.

    Returns a view ``(R, kept + columns of behind)``.
    """
    kept = columns.shape[0]
    front = residual[:, : kept + behind.shape[1]]
    for at in _row_blocks(residual, residual.itemsize):
        front[at, :kept] = residual[at].index_select(1, columns)
    front[:, kept:] = behind
    return front


def _wide(x: Tensor) -> Tensor:
    """16-bit numbers in fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norms(x: Tensor) -> Tensor:
    """Norms along the last dimension, fp32, rounded up by what squares below fp32's range lose."""
    return (x.square().sum(-1).sqrt() + x.shape[-1] ** 0.5 * 2.0**-63).float()


def _sums(residual: Tensor, step: Tensor, top: Tensor | None = None) -> Tensor:
    """``|residual| step``, or ``(residual / top)^2 step`` of entries up to top; (R, steps) fp32."""
    out = step.new_empty(residual.shape[0], step.shape[1])
    for at in _row_blocks(residual, 4):
        entries = residual[at].abs().float()
        if top is not None:
            entries.clamp_max_(top).div_(top).square_()  # else a kept one's square may be inf
        torch.mm(entries, step, out=out[at])
    return out


def _row_blocks(x: Tensor, itemsize: int) -> list[slice]:
    """Slices of the rows of ``x`` such that a block at ``itemsize`` bytes an entry is small."""
    rows, columns = x.shape
    size = max(1, _BLOCK_BYTES.get(x.device.type, 1 << 24) // max(1, columns * itemsize))
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
