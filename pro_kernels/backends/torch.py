"""The plain PyTorch backend: every device, every float dtype; the fallback and the contract.

Legend: ``N`` token rows, ``V`` vocabulary columns, ``S`` sequences, ``B`` prompts, ``n``
candidates. The other backends have these functions, with these arguments, and nothing else.
Arithmetic is fp32 from the logits onward (fp64 for fp64 logits). With ``z`` the logits after scale
and softcap:

    lse = log sum_v exp(z_v)                       logp = z_t - lse
    d logp / d raw_v = (1{v=t} - p_v) dz_v/draw_v
    d entropy / d raw_v = -p_v (log p_v + entropy) dz_v/draw_v

``target_logits`` holds the raw logit of each row's target as an exact fp32 dot product; where given
it stands in for the rounded one everywhere (also inside the sum, so ``logp <= 0`` holds exactly).
A negative target marks a row that is not scored: it is never read; its outputs are 0.

A log-prob that is NaN or infinite reaches its own prompt only. Where it makes a term NaN, which of
that prompt's gradients are NaN with it is not specified.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pro_kernels.options import LogitOptions, RankingOptions

NAME = "torch"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_CANDIDATES = None  # any n

# Rows of logits that are upcast at a time: bounds the fp32 temporaries to this many bytes each. On
# a GPU small blocks are all launches: 16 MB took 12 times plain PyTorch's time on an H200.
_BLOCK_BYTES, _GPU_BLOCK_BYTES = 1 << 24, 1 << 26


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device`` (None: it can)."""
    return None


def details() -> dict[str, str]:
    """Nothing to tell: it is PyTorch."""
    return {}


def logp(
    logits: Tensor,  # (N, V), unit stride along V
    targets: Tensor,  # (N,) int64; negative = row not scored
    *,
    target_logits: Tensor | None = None,  # (N,) fp32, raw
    options: LogitOptions,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read-only statistics of each row: ``(logp, lse, entropy or None)``, each ``(N,)`` fp32."""
    n = logits.shape[0]
    out = [logits.new_empty(n, dtype=_acc(logits)) for _ in range(3 if entropy else 2)]
    for rows in _row_blocks(logits):
        exact = _at(target_logits, rows)
        parts = _stats(logits[rows], targets[rows], exact, options, entropy)
        for whole, part in zip(out, parts, strict=True):
            whole[rows] = part
    return out[0], out[1], out[2] if entropy else None


def residual_(
    logits: Tensor,  # (N, V), overwritten
    targets: Tensor,  # (N,)
    *,
    target_logits: Tensor | None = None,
    options: LogitOptions,
) -> tuple[Tensor, Tensor]:
    """Overwrite ``logits`` with ``d logp / d raw`` (unweighted); return ``(logp, lse)``."""
    logps, lse, _ = logp(logits, targets, target_logits=target_logits, options=options)
    logits_grad(
        logits, lse, targets, None, target_logits=target_logits, options=options, out=logits
    )
    return logps, lse


def logits_grad(
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
    """``weights * d logp / d raw`` for these columns; rows with a negative target become 0.

    With ``entropy``, plus the second weights times ``d entropy / d raw``.
    """
    if out is None:
        out = torch.empty_like(logits)
    for rows in _row_blocks(logits):
        raw, t = logits[rows].to(_acc(logits)), targets[rows]
        live = t >= 0
        local = t - first_column
        hit = live & (local >= 0) & (local < logits.shape[1])
        index = local.clamp(0, max(logits.shape[1] - 1, 0))[:, None]
        raw = _put_target(raw, index, hit, _at(target_logits, rows))
        z, slope = _transform(raw, options)
        grad = -torch.exp(z - lse[rows, None])
        # 1 - p as -expm1(log p): exact where p is close to 1.
        one_minus_p = -torch.expm1((z.gather(1, index) - lse[rows, None]).clamp_max(0))
        grad.scatter_(1, index, torch.where(hit[:, None], one_minus_p, grad.gather(1, index)))
        if weights is not None:
            grad = grad * weights[rows, None]
        if entropy is not None:
            value, by = (x[rows, None] for x in entropy)
            log_p = z - lse[rows, None]
            p = torch.exp(log_p)
            # -inf columns: 0 * -inf is 0 here
            grad = grad - by * torch.where(p == 0, 0.0, p * (log_p + value))
        grad = grad * slope
        out[rows] = torch.where(live[:, None], grad, torch.zeros_like(grad)).to(out.dtype)
    return out


def ranking(
    logps: Tensor,  # (N,) fp32; the tokens of a sequence are contiguous, unscored ones hold 0
    offsets: Tensor,  # (S + 1,) int64: sequence s is tokens offsets[s] : offsets[s + 1]
    lengths: Tensor,  # (S,) int64: scored tokens m_s
    order: Tensor,  # (B, n) int64: the sequence at rank k of prompt b; -1 after the last one
    rewards: Tensor | None,  # (B, n) fp32 (fp64) at those ranks; None = all tau equal
    sft_rank: Tensor,  # (B,) int64: the rank that carries the SFT term; -1 for none
    prompt_weights: Tensor,  # (B,) fp32: weight of each prompt in the loss
    *,
    options: RankingOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ranking loss and its closed-form gradient (DESIGN: docs/design.md, "The loss").

    A token may stand for several, their sum, with their number in ``lengths``. Without prompts
    (B = 0) the sums alone are made.

    Returns:
        ``terms`` (B, n): columns 0 ... n-2 are the rank terms, column n-1 the weighted SFT term,
        before ``prompt_weights``; ``sums`` (S,): S_i; ``row_weights`` (N,): d loss / d logps.
    """
    acc = _acc(logps)
    n = order.shape[1]
    lengths_f = lengths.to(acc)
    sums = _segment_sums(logps.to(acc), offsets)
    valid = order >= 0
    seq = order.clamp_min(0)
    norm = lengths_f[seq].clamp_min(1)
    total = torch.where(valid, sums[seq], 0.0)
    scores = total / norm if options.length_normalize else total

    tau, keep = _temperatures(scores, rewards, valid, options)  # (B, k, i)
    own = tau.diagonal(dim1=1, dim2=2)
    z = (scores[:, None, :] * tau).masked_fill(~keep, -math.inf)
    rank = torch.arange(n, device=order.device)
    live = keep.diagonal(dim1=1, dim2=2) & (rank < valid.sum(1, keepdim=True) - 1)
    if options.top_k is not None:
        live = live & (rank < options.top_k)
    log_z = z.masked_fill(~live[:, :, None], 0.0).logsumexp(2)
    if options.eps > 0:
        log_z = torch.logaddexp(log_z, torch.full_like(log_z, math.log(options.eps)))
    rank_terms = torch.where(live, log_z - scores * own, 0.0)
    taken = live[:, :, None] & keep  # nothing else: a NaN or an infinite log_z stays in its term
    prob = torch.where(taken, torch.exp(z - log_z[:, :, None]), 0.0)
    d_scores = (tau * prob).sum(1) - torch.where(live, own, 0.0)

    count = valid.sum(1).to(acc)
    factor = options.sft_weight * (count - 1) ** 2
    if options.single_sft:
        factor = torch.where(count == 1, torch.full_like(factor, options.sft_weight), factor)
    is_sft = (rank == sft_rank[:, None]) & valid
    sft_scale = factor[:, None] * is_sft / (norm if options.sft_mean else 1.0)
    terms = rank_terms.clone()
    # where, not a product: a sum of -inf elsewhere must not turn 0 * inf into NaN.
    terms[:, n - 1] = -torch.where(is_sft, sft_scale * total, 0.0).sum(1)

    d_sums = d_scores / norm if options.length_normalize else d_scores
    d_sums = (d_sums - sft_scale) * prompt_weights[:, None]
    # Absent candidates write to one slot past the end: no boolean index, hence no device sync.
    slot = torch.where(valid, seq, sums.shape[0]).flatten()
    per_sequence = sums.new_zeros(sums.shape[0] + 1).scatter_(0, slot, d_sums.flatten())[:-1]
    row_weights = torch.repeat_interleave(per_sequence, offsets.diff(), output_size=logps.shape[0])
    return terms, sums, row_weights


def _temperatures(
    scores: Tensor, rewards: Tensor | None, valid: Tensor, options: RankingOptions
) -> tuple[Tensor, Tensor]:
    """Inverse temperatures ``tau[b, k, i]`` and which entries (i >= k, both valid) take part."""
    n = scores.shape[1]
    upper = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu()
    keep = upper & valid[:, :, None] & valid[:, None, :]
    if rewards is None:
        return torch.full_like(keep, options.tau, dtype=scores.dtype), keep
    # In the rewards' own dtype, as the official code subtracts them.
    tau = (rewards[:, :, None] - rewards[:, None, :]).to(scores.dtype)
    later = keep & ~torch.eye(n, dtype=torch.bool, device=scores.device)
    own = tau.masked_fill(~later, -math.inf).amax(2)
    own = torch.where(later.any(2), own, 0.0)
    if options.skip_ties:
        keep = keep & ~(later & (tau == 0))
    tau = torch.where(later, tau, 0.0) + torch.diag_embed(own)
    return tau, keep


def _segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    # segment_reduce adds in index order inside a segment: repeatable, unlike atomics.
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, initial=0, unsafe=True)


def _stats(
    logits: Tensor,
    targets: Tensor,
    target_logits: Tensor | None,
    options: LogitOptions,
    entropy: bool,
) -> list[Tensor]:
    live = targets >= 0
    index = targets.clamp_min(0)[:, None]
    raw = torch.where(live[:, None], logits.to(_acc(logits)), 0.0)
    z, _ = _transform(_put_target(raw, index, live, target_logits), options)
    lse = torch.logsumexp(z, 1)
    logps = (z.gather(1, index)[:, 0] - lse).clamp_max(0)
    out = [torch.where(live, logps, 0.0), torch.where(live, lse, 0.0)]
    if entropy:
        log_p = z - lse[:, None]
        p = torch.exp(log_p)
        terms = torch.where(p == 0, 0.0, p * log_p)  # -inf columns: 0 * -inf is 0 here
        value = torch.where(lse.isfinite(), -terms.sum(1), lse)  # as the kernels have it
        out.append(torch.where(live, value, 0.0))
    return out


def _put_target(raw: Tensor, index: Tensor, hit: Tensor, exact: Tensor | None) -> Tensor:
    if exact is None:
        return raw
    value = torch.where(hit[:, None], exact[:, None].to(raw.dtype), raw.gather(1, index))
    return raw.scatter(1, index, value)


def _transform(raw: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor | float]:
    """Logits after scale and softcap, and their derivative with respect to the raw ones."""
    z = raw * options.logit_scale if options.logit_scale != 1.0 else raw
    if options.softcap is None:
        return z, options.logit_scale
    t = torch.tanh(z / options.softcap)
    return options.softcap * t, options.logit_scale * (1 - t * t)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _at(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _row_blocks(logits: Tensor) -> list[slice]:
    limit = _BLOCK_BYTES if logits.device.type == "cpu" else _GPU_BLOCK_BYTES
    size = max(1, limit // max(1, 4 * logits.shape[1]))
    return [slice(i, i + size) for i in range(0, logits.shape[0], size)]
