"""Vocabulary columns that leave the gradient matmuls (``grad_filter=tau``).

In a trained model most columns have next to no probability in a row, but which and how many differs
from row to row. With dZ0 of a chunk at hand (its entries are ``-p_v`` off the target, times the
slope of scale and softcap), rows are sorted by how many entries they have above a threshold and cut
into groups. Of all pairs (group, column) those leave that do the least harm, as long as

    mean over r of  m_r = sum_{v dropped} |dZ0_rv|   is at most  tau |logit_scale|

so that, without a softcap, a row loses on average no more than tau of its probability (with one,
probabilities count by the softcap's slope: where it is flat they do not reach the gradient). The
harm of a pair is ``sum_{r in group} |dZ0_rv| |W_v - u|``, and one limit of it holds for all pairs:
a Lagrange multiplier. So mass is spent on the rows where it buys most columns. Columns that are the
target of a row of the group stay. What is left is dense within each group, so the two gradient
matmuls cost ``4 kept / V`` instead of 4 (in units of ``N H V`` flops).

The rows of dZ0 W keep what the dropped columns have in common: ``u``, the mean of all W_v, stands
in for each of them, as ``-m_r u`` (any u is allowed; with none the sum over a row of dZ0 would no
longer be 0, and what all W_v share would not cancel). For row weights w and the stored dZ0, by the
triangle inequality, with s_r being m_r as it was summed (``_SUMS``) and then held by the matmul's
dtype:

    |error of dHidden_r|  <= |w_r| (sum_{v dropped} |dZ0_rv| |W_v - u| + |m_r - s_r| |u|)

Row v of dW is off by at most the sum over r of ``|w_r| y_rv``, where ``y_rv = |x_r| |dZ0_rv|`` if v
is dropped in r. With ``c_v = sum_r y_rv``, and ``2 |w_r w_q| <= w_r^2 + w_q^2``:

    |error of dW|_F^2     <= sum_v (sum_r |w_r| y_rv)^2 <= sum_r w_r^2 sum_v y_rv c_v

How many columns stay is known from data only: on a GPU the host waits once a chunk. Nothing else in
the package does, and nothing does without a filter.

Legend: ``N`` scored rows, ``R`` rows of a chunk, ``V`` vocabulary, ``H`` hidden, ``G`` groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pro_kernels import backends
from pro_kernels.fused import column_groups, matmul
from pro_kernels.fused.call import Call
from pro_kernels.fused.column_groups import Groups, split
from pro_kernels.fused.gather_scatter import Inputs

# Rows of a group: few, so that they need the same columns; enough for a matmul.
_ROWS = {"cpu": 72}
_GPU_ROWS = 256
# An entry above this part of tau counts as needed where rows are sorted. Of 1/64 to 1/4096 this one
# keeps fewest columns on SmolLM2, the worst 3 % more; on Gemma 3 all keep the same to 6 %.
_NEEDED = 2.0**-8
# "auto": rows that tell how large dHidden is; root mean square of what rows lose over its mean.
_SAMPLED, _SPREAD = 64, 1.4
# Leaving out fewer than a quarter of the columns is not tried: by the times of ``bench filter`` the
# passes then take about what the matmuls save.
_WORTH_KEEPING = 3 / 4
# Relative error of a sum over a row: of fp32, or of TF32, which a GPU may be told to multiply in.
_SUMS = 4 * 2.0**-11
_TINY = torch.finfo(torch.float32).tiny
# Harms are told apart by exponent and three bits of the mantissa; the bin of infinity.
_SHIFT, _INFINITE = 20, 0x7F8
# Masses are counted in parts of tau: sums of whole numbers do not depend on their order.
_PARTS = 2.0**32


@dataclass(frozen=True)
class Centre:
    """What stands in for dropped columns, and how far each column is from it."""

    u: Tensor  # (H,) in the weight's dtype
    distances: Tensor  # (V,) fp32, |W_v - u|
    size: Tensor  # () fp32, |u|

    @classmethod
    def of(cls, call: Call, weight: Tensor) -> Centre:
        """Of ``weight (V, H)``."""
        kernels, (vocab, width) = functions(call, weight.device), weight.shape
        u = kernels.row_sum(weight).div_(max(1, vocab)).to(weight.dtype)
        size = torch.linalg.vector_norm(u.to(torch.promote_types(u.dtype, torch.float32)))
        return cls(u, _roots(kernels.squared_distances(weight, u), width), size.float())


@dataclass
class Kept:
    """Which columns stay in the gradient matmuls of each chunk; filled by the forward."""

    tau: float | str | None  # None: no filter, and no room
    columns: Tensor  # (chunks, G V) int32: those of each group, one group behind the other
    counts: Tensor  # (chunks, G) int64, on the CPU: they size the matmuls
    order: Tensor  # (N,) int64, rows of each chunk from its own first one
    # (4, N) fp32 of each row: dropped mass, (sum_v y_rv c_v)^(1/2), bound of the error of dZ0 W,
    # and the share of columns that it keeps.
    dropped: Tensor
    centre: Centre | None = None

    @classmethod
    def empty(
        cls, tau: float | str | None, chunks: int, rows: int, vocab: int, n: int, like: Tensor
    ) -> Kept:
        """Room for ``chunks`` chunks of up to ``rows`` of the ``n`` rows; none without a filter."""
        groups = -(-rows // group_rows(like.device))
        if tau is None:
            chunks = groups = n = 0
        # Without a filter on the call's device: a CPU tensor would cost Inductor its graphs.
        place = like.device if tau is None else "cpu"
        return cls(
            tau,
            like.new_zeros((chunks, groups * vocab), dtype=torch.int32),
            torch.zeros((chunks, groups), dtype=torch.int64, device=place),
            like.new_zeros(n, dtype=torch.int64),
            like.new_zeros((4, n), dtype=torch.float32),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the forward leaves for the backward."""
        return self.columns, self.counts, self.order, self.dropped

    def choose(
        self,
        chunk: int,
        residual: Tensor,  # (R, V) dZ0
        x: Tensor,  # (R, H), what the head's rows of W multiply
        given: Inputs,  # R tokens
        at: slice,  # their places among all
    ) -> Tensor | None:
        """Choose a chunk's columns, and move them to the front of its dZ0, row by row.

        Returns what each row multiplies the centre with, (R,); None where all columns stay.
        """
        assert self.tau is not None and self.centre is not None
        call, targets, weight = given.call, given.targets, given.weight
        kernels, scale = functions(call, residual.device), call.logits.logit_scale
        distances = self.centre.distances
        if isinstance(self.tau, str):
            most = rounding(residual, weight)
            found = choose_by_error(kernels, residual, targets, most, self.centre)
        else:
            found = choose(kernels, residual, targets, self.tau * abs(scale), distances)
        if found is None:
            self.counts[chunk] = call.vocab
            self.dropped[3, at] = 1
            return None
        groups, left = found
        self.counts[chunk, : len(groups.starts) - 1] = groups.starts.diff()
        self.columns[chunk, : groups.columns.shape[0]] = groups.columns
        self.order[at] = groups.order
        sizes = _row_norms(x)
        longest = torch.stack([part.amax() for part in sizes[groups.order].split(groups.size)])
        total = torch.mv(left.t(), longest)
        largest = total.amax().clamp_min(_TINY)  # products with a part of it do not underflow
        lost = kernels.compact_(residual, groups, torch.stack([distances, total / largest]))
        # Roots one by one: the products may be below what fp32 holds.
        factors = (sizes * self.counts.shape[0]).sqrt() * largest.sqrt()
        self.dropped[:3, at] = bounds(lost, factors, residual.dtype, weight.dtype, self.centre)
        self.dropped[0, at] /= abs(scale)
        place = torch.arange(len(groups.order), device=lost.device) // groups.size
        shares = (left == 0).float().mean(1)[place]
        self.dropped[3, at] = torch.empty_like(lost[0]).index_copy_(0, groups.order, shares)
        if given.scale is not None:  # bounds are of gradients of the hidden states as they came
            self.dropped[2, at] *= given.scale.abs()
        if given.late is not None:
            self.dropped[1, at] *= given.late.abs()
        return -lost[0] if scale > 0 else lost[0]

    def hidden_grad(
        self,
        call: Call,
        groups: Groups,
        dz: Tensor,  # (R, V), compact
        weight: Tensor,  # (V, H)
        stand_ins: Tensor,  # (R,)
        out: Tensor,  # (R, H)
    ) -> None:
        """``out = dz0 weight``, the centre in place of what left."""
        assert self.centre is not None
        functions(call, dz.device).hidden_grad(dz, groups, weight, self.centre.u, stand_ins, out)

    def spread_dropped(self, live: Tensor) -> None:
        """Move ``dropped`` from compact order to the positions ``live``."""
        if self.dropped.shape[1]:
            values = self.dropped[:, : live.shape[0]].clone()
            self.dropped.zero_().index_copy_(1, live, values)

    def part(self, chunk: int, at: slice) -> Kept:
        """The same for one chunk and its rows."""
        one = slice(chunk, chunk + 1)
        return replace(
            self, columns=self.columns[one], counts=self.counts[one], order=self.order[at],
            dropped=self.dropped[:, at],
        )  # fmt: skip

    def of(self, chunk: int, at: slice) -> Groups | None:
        """The groups of a chunk with rows ``at``; None where all columns stay."""
        if self.tau is None:
            return None
        size = group_rows(self.columns.device)
        counts = self.counts[chunk, : -(-(at.stop - at.start) // size)]
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        vocab = self.columns.shape[1] // max(1, self.counts.shape[1])
        if int(starts[-1]) == vocab * counts.shape[0]:
            return None
        return Groups(self.order[at], size, starts, self.columns[chunk, : int(starts[-1])])


class Functions:
    """The functions of ``column_groups.py``, by ``own`` where it has them."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name, None) or getattr(column_groups, name)


def functions(call: Call, device: torch.device) -> Any:
    """As the call's backend has them; beside the CUDA kernels, as Triton has."""
    own = call.kernels.filtered
    if own is None and call.kernels.NAME == "cuda":
        triton = backends.get("triton")
        own = triton.filtered if triton.unusable(device) is None else None
    return Functions(own)


def group_rows(device: torch.device) -> int:
    """How many rows share a set of columns."""
    return _ROWS.get(device.type, _GPU_ROWS)


def rounding(residual: Tensor, weight: Tensor) -> float:
    """The error of ``residual weight`` that is like rounding it to the weight's dtype.

    As a root mean square over the rows, of which some tell their size, two standard errors less.
    """
    rows = residual.shape[0]
    some = torch.arange(0, rows, max(1, rows // _SAMPLED), device=residual.device)
    squares = matmul.hidden_grad(residual[some].to(weight.dtype), weight).float().square().sum(1)
    error = squares.std(correction=0) / max(1, len(some)) ** 0.5
    least = (squares.mean() - 2 * error).clamp_min(0)
    return float(least.sqrt()) * torch.finfo(weight.dtype).eps / 2


def choose_by_error(
    kernels: Any, residual: Tensor, targets: Tensor, most: float, centre: Centre
) -> tuple[Groups, Tensor] | None:
    """``choose`` such that the bound of the error of dZ0 W is at most ``most``, root mean square.

    What rows lose on average is known before, the root mean square after.
    """
    weights, limit = torch.stack([centre.distances] * 2), most / _SPREAD
    while limit > 0:
        distances = centre.distances
        found = choose(kernels, residual, targets, limit, distances, by=distances)
        if found is None:
            return None
        lost = kernels.compact_(residual, found[0], weights, move=False)
        reach = bounds(lost, lost[2], residual.dtype, residual.dtype, centre)[2]
        error = float(reach.square().mean().sqrt())
        if error <= most:
            return found
        limit *= 0.9 * most / error
    return None


def choose(
    kernels: Any,
    residual: Tensor,  # (R, V)
    targets: Tensor,  # (R,), whose columns are kept by the groups of their rows
    limit: float,  # what a row may lose on average
    distances: Tensor,  # (V,)
    by: Tensor | None = None,  # (V,) by what mass counts in that; None: 1
) -> tuple[Groups, Tensor] | None:
    """The groups of the rows, and the sums (G, V) of what leaves; None: all stay."""
    rows = residual.shape[0]
    if not rows:
        return None
    size = group_rows(residual.device)
    if not limit > 0:
        return None
    needed = limit if by is None else limit / float(by.mean())
    order = kernels.count_large(residual, needed * _NEEDED).argsort(stable=True)
    sums = kernels.sums(residual, order, size)
    harm = sums * distances
    parts = (sums if by is None else harm) / (limit / _PARTS)
    group = torch.arange(rows, device=order.device) // size
    harm[group, targets[order]] = torch.inf
    bins = harm.nan_to_num_(torch.inf, torch.inf).view(torch.int32) >> _SHIFT
    parts = parts.nan_to_num_(0.0).clamp_max_(2 * rows * _PARTS).long()
    lost = parts.new_zeros(_INFINITE + 1).scatter_add_(0, bins.view(-1).long(), parts.view(-1))
    fits = (lost[:_INFINITE].cumsum(0) <= rows * _PARTS).cumprod(0).sum()
    keep = bins >= fits
    starts = torch.nn.functional.pad(keep.sum(1).cpu().cumsum(0), (1, 0))  # here a GPU's host waits
    total = int(starts[-1])
    if total > _WORTH_KEEPING * keep.numel():
        return None
    columns = torch.nonzero_static(keep, size=total)[:, 1].to(torch.int32).contiguous()
    return Groups(order, size, starts, columns), sums.masked_fill_(keep, 0.0)


def bounds(
    lost: Tensor, factors: Tensor, dtype: torch.dtype, held: torch.dtype, centre: Centre
) -> Tensor:
    """``Kept.dropped`` of a chunk's rows, (3, R), rounded up.

    ``lost``: of ``compact_``, of entries of ``dtype``; ``factors``: of the root of its last sum;
    ``held``: dtype of the stand-ins.
    """
    up = 1 + max(4 * torch.finfo(dtype).eps, _SUMS)
    total, reach, overlap = lost
    tiny = centre.distances.shape[0] * _TINY  # what fp32 cannot hold of an entry is less
    mass = total * up + tiny
    rounded = (total - split(total, held).float().sum(1)).abs()
    reach = reach * up + tiny * centre.distances.amax()
    reach += (_SUMS * mass + rounded) * centre.size
    return torch.stack([mass, (overlap * up + tiny).sqrt() * factors * up, reach])


def _roots(squares: Tensor, width: int) -> Tensor:
    """Roots of sums of ``width`` squares, fp32, rounded up, past what fp32 cannot hold of them."""
    return (squares.sqrt() * (1 + _SUMS) + width**0.5 * 2.0**-63).float()


def _row_norms(x: Tensor) -> Tensor:
    """Norms of the rows, fp32; squares are of numbers near 1, which stay in range."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    limits = torch.finfo(torch.float32)
    largest = x.abs().amax(1).clamp(limits.tiny, limits.max)
    norms = torch.linalg.vector_norm(x / largest[:, None], dim=1)
    return (norms * largest * (1 + _SUMS)).float()
