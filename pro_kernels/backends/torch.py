"""The plain PyTorch backend: every device, every float dtype; the fallback and the contract.

Arguments and results are those of ``protocol.py``, and so is the legend.
Arithmetic is fp32 from the logits onward (fp64 for fp64 logits). With ``z`` the logits after scale
and softcap:

    lse = log sum_v exp(z_v)                       logp = z_t - lse
    d logp / d raw_v = (1{v=t} - p_v) dz_v/draw_v
    d entropy / d raw_v = -p_v (log p_v + entropy) dz_v/draw_v

``exact`` logits stand in for the rounded ones inside the sum too, so ``logp <= 0`` holds exactly.

A log-prob that is NaN or infinite reaches its own prompt only. Where it makes a term NaN, which of
that prompt's gradients are NaN with it is not specified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pro_kernels.backends.protocol import Candidates, Rows, Statistics
from pro_kernels.options import RankingOptions
from pro_kernels.ranking import rank_terms, temperatures

NAME = "torch"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_CANDIDATES = None  # any n
VERIFIED = only_when_named = gather_rows = scatter_rows = target_logits = None
score = scores_fused = filtered = None

# Bytes of fp32 (fp64) copies of logits at a time: few enough for a processor's cache, in which all
# passes over them then stay. On a GPU small blocks are all launches: 16 MB took 12 times plain
# PyTorch's time on an H200.
_BLOCK_BYTES, _GPU_BLOCK_BYTES = 1 << 23, 1 << 26
# Stands for a log p of -inf in p log p, which is 0 there: exp of it is 0 too.
_FLOOR = -1e4


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device`` (None: it can)."""
    return None


def details() -> dict[str, str]:
    """Nothing to tell: it is PyTorch."""
    return {}


def logp(rows: Rows, entropy: bool = False) -> Statistics:
    """Read-only statistics of each row."""
    # Tensors of their own, not views of one: an op's outputs may not alias each other.
    n, acc = rows.logits.shape[0], _acc(rows.logits)
    out = [rows.logits.new_empty(n, dtype=acc) for _ in range(3 if entropy else 2)]
    for block in _blocks(rows, spare=entropy):
        for whole, part in zip(out, _stats_(block), strict=False):
            whole[block.rows] = part
    logps, lse, *value = (x.masked_fill_(rows.targets < 0, 0.0) for x in out)
    return logps, lse, value[0] if entropy else None


def residual_(rows: Rows) -> tuple[Tensor, Tensor]:
    """Statistics, and the gradient over the logits."""
    logits, dead = rows.logits, rows.targets < 0
    stats = logits.new_empty((2, logits.shape[0]), dtype=_acc(logits))
    for block in _blocks(rows, out=logits):
        logp, lse, total = _stats_(block)
        stats[0, block.rows], stats[1, block.rows] = logp, lse
        _store(block, -1 / total, -torch.expm1(logp))
    _blank(logits, dead)
    logps, lse = stats.masked_fill_(dead, 0.0)
    return logps, lse


def logits_grad(
    rows: Rows,
    lse: Tensor,
    weights: Tensor | None,
    *,
    first_column: int = 0,
    out: Tensor | None = None,
    entropy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient for these columns; rows that are not scored become 0."""
    if out is None:
        out = torch.empty_like(rows.logits)
    if weights is None:
        weights = torch.ones_like(lse)
    spare = entropy is not None
    for block in _blocks(rows, first_column, out, spare):
        at = block.rows
        w, log_p = weights[at], block.z.sub_(lse[at, None])
        at_target = log_p.gather(1, block.index)[:, 0].clamp(_FLOOR, 0)
        # 1 - p as -expm1(log p): exact where p is close to 1.
        target_grad = -w * torch.expm1(at_target)
        if entropy is None:
            log_p.exp_()
            _store(block, -w, target_grad)
            continue
        value, by = (x[at] for x in entropy)
        p = torch.exp(log_p.clamp_min_(_FLOOR), out=block.spare)
        log_p.add_(value[:, None]).mul_(by[:, None]).add_(w[:, None]).mul_(p)
        target_grad -= by * at_target.exp() * (at_target + value)
        _store(block, torch.full_like(w, -1), target_grad)
    _blank(out, rows.targets < 0)
    return out


def ranking(
    logps: Tensor, candidates: Candidates, options: RankingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The ranking loss and its gradient, for all prompts at once."""
    offsets, lengths, order, rewards, sft_rank, weights = candidates
    acc = _acc(logps)
    n = order.shape[1]
    lengths_f = lengths.to(acc)
    sums = _segment_sums(logps.to(acc), offsets)
    valid = order >= 0
    seq = order.clamp_min(0)
    norm = lengths_f[seq].clamp_min(1)
    total = torch.where(valid, sums[seq], 0.0)
    scores = total / norm if options.length_normalize else total

    tau, tied = scores.new_full((1, 1, 1), options.tau), None
    if rewards is not None:
        tau, tied = temperatures(rewards, valid, acc)
    terms, log_p, live = rank_terms(
        scores,
        valid,
        tau,
        left_out=tied if options.skip_ties else None,
        eps=options.eps,
        top_k=options.top_k,
    )
    own = torch.where(live, tau.diagonal(dim1=1, dim2=2), 0.0)
    d_scores = (tau * log_p.exp()).sum(1) - own

    count = valid.sum(1).to(acc)
    factor = options.sft_weight * (count - 1) ** 2
    if options.single_sft:
        factor = torch.where(count == 1, torch.full_like(factor, options.sft_weight), factor)
    is_sft = (torch.arange(n, device=order.device) == sft_rank[:, None]) & valid
    sft_scale = factor[:, None] * is_sft / (norm if options.sft_mean else 1.0)
    # where, not a product: a sum of -inf elsewhere must not turn 0 * inf into NaN.
    terms[:, n - 1] = -torch.where(is_sft, sft_scale * total, 0.0).sum(1)

    d_sums = d_scores / norm if options.length_normalize else d_scores
    d_sums = (d_sums - sft_scale) * weights[:, None]
    # Absent candidates write to one slot past the end: no boolean index, hence no device sync.
    slot = torch.where(valid, seq, sums.shape[0]).flatten()
    per_sequence = sums.new_zeros(sums.shape[0] + 1).scatter_(0, slot, d_sums.flatten())[:-1]
    row_weights = torch.repeat_interleave(per_sequence, offsets.diff(), output_size=logps.shape[0])
    return terms, sums, row_weights


def _segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    # segment_reduce adds in index order inside a segment: repeatable, unlike atomics.
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, initial=0, unsafe=True)


@dataclass
class _Block:
    """Some rows of the logits in fp32 (fp64), after scale and softcap; free to be overwritten."""

    rows: slice
    z: Tensor  # (R, V)
    slope: Tensor | float  # (R, V): dz/draw
    index: Tensor  # (R, 1): column of the target; 0 where it is not among these
    hit: Tensor  # (R,): whether it is
    spare: Tensor | None  # (R, V), uninitialised
    out: Tensor | None  # (R, V): where the gradient goes; may be z


def _blocks(
    given: Rows, first_column: int = 0, out: Tensor | None = None, spare: bool = False
) -> Iterator[_Block]:
    """All rows, upcast block by block into the same memory; into ``out`` where that is as wide."""
    logits, targets, options, exact = given
    n, vocab = logits.shape
    acc = _acc(logits)
    local = targets - first_column
    hit = (local >= 0) & (local < vocab)
    index = local.clamp(0, max(vocab - 1, 0))[:, None]
    in_place = out is not None and out.dtype == acc
    count = (not in_place) + (options.softcap is not None) + spare
    limit = _BLOCK_BYTES if logits.device.type == "cpu" else _GPU_BLOCK_BYTES
    size = max(1, limit // max(1, acc.itemsize * vocab * count))
    memory = logits.new_empty((count, min(size, n), vocab), dtype=acc)
    for i in range(0, n, size):
        rows = slice(i, min(i + size, n))
        free = [x[: rows.stop - i] for x in memory]
        to = None if out is None else out[rows]
        z = to if to is not None and in_place else free.pop()
        if not (in_place and out is logits):
            z.copy_(logits[rows])
        _put_target(z, index[rows], hit[rows], None if exact is None else exact[rows])
        slope = options.logit_scale if options.softcap is None else free.pop()
        z = options.transform(z, z, slope if isinstance(slope, Tensor) else None)
        yield _Block(rows, z, slope, index[rows], hit[rows], free.pop() if spare else None, to)


def _stats_(block: _Block) -> tuple[Tensor, ...]:
    """Log-prob, log-sum-exp and, with room to spare, entropy; then ``sum exp(z - max z)``.

    Without a spare z becomes ``exp(z - max z)``.
    """
    z = block.z
    top = z.amax(1)
    top.masked_fill_(top.isinf(), 0.0)  # -inf - -inf is no number
    z.sub_(top[:, None])
    at_target = z.gather(1, block.index)[:, 0]
    p = z.exp_() if block.spare is None else torch.exp(z.clamp_min_(_FLOOR), out=block.spare)
    total = _sums(p)
    log_total = total.log()
    logp, lse = (at_target - log_total).clamp_max(0), top + log_total
    if block.spare is None:
        return logp, lse, total
    entropy = log_total - _sums(z.mul_(p)) / total
    return logp, lse, torch.where(lse.isfinite(), entropy, lse)  # as the kernels have it


def _sums(x: Tensor) -> Tensor:
    """Sums of rows, a single one in the same order as of many: threads would share its columns."""
    return x.sum(1) if x.shape[0] != 1 else x.expand(2, -1).sum(1)[:1]


def _store(block: _Block, factor: Tensor, target_grad: Tensor) -> None:
    """Write ``factor * z``, the target's entry apart, times dz/draw."""
    z, slope = block.z, block.slope
    if not isinstance(slope, Tensor):
        factor, target_grad = factor * slope, target_grad * slope
    z.mul_(factor[:, None])
    _put_target(z, block.index, block.hit, target_grad)
    if isinstance(slope, Tensor):
        z.mul_(slope)
    if block.out is not None and block.out is not z:
        block.out.copy_(z)


def _blank(out: Tensor, dead: Tensor) -> None:
    """Zeros in rows that are not scored."""
    if out.device.type == "cpu":
        out.index_fill_(0, dead.nonzero()[:, 0], 0)
    else:  # counting them would wait for the device
        out.masked_fill_(dead[:, None], 0)


def _put_target(z: Tensor, index: Tensor, hit: Tensor, value: Tensor | None) -> Tensor:
    """Overwrite the target's entry where it is among these columns; returns ``z``."""
    if value is None:
        return z
    there = torch.where(hit[:, None], value[:, None].to(z.dtype), z.gather(1, index))
    return z.scatter_(1, index, there)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
