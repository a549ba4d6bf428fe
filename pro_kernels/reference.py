"""The specification: PRO in plain PyTorch, written to be read, differentiated by autograd.

Every fast path is tested against this file, and this file against the authors' code. Notation of
the paper (Song et al., "Preference Ranking Optimization for Human Alignment", arXiv 2306.17492):
for one prompt, candidates i = 1 ... n from best to worst, S_i the summed log-probs of the
completion, m_i its scored tokens, s_i = S_i / m_i, rewards r_1 >= ... >= r_n:

    tau_ki = r_k - r_i   (i > k)      the paper's 1 / T_k^i
    tau_kk = max_{i>k} tau_ki         the paper's T_k^k = min_{i>k} T_k^i
    L_rank = sum_{k=1}^{n-1} [ logsumexp({s_i tau_ki}_{i>=k}, log eps) - s_k tau_kk ]
    L      = mean over prompts of L_rank + w (n-1)^2 (-S_best)

Without rewards every tau is 1: Plackett-Luce, that is ListMLE. Works in any float dtype; arithmetic
is fp32 from the logits onward (fp64 for fp64).

Legend: ``B`` prompts, ``n`` candidates, ``T`` positions, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from pro_kernels.layout import Layout, shift_targets
from pro_kernels.options import IGNORE_INDEX, LogitOptions, PROOptions
from pro_kernels.output import PROOutput, TopK


def token_logps(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    *,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_topk: int | None = None,
) -> Tensor | tuple[Any, ...]:
    """Log-probability of each target, ``(...)`` fp32 (fp64 for fp64), 0 where not scored.

    Arguments as in ``pro_kernels.linear_token_logps``.
    """
    logits, targets = _tokens(logits, targets, ignore_index, shift)
    scored = targets != IGNORE_INDEX
    raw, scale = _scaled(logits, logit_scale, scored)
    z = LogitOptions(softcap, scale).transform(raw)
    index = torch.where(scored, targets, 0).long().unsqueeze(-1)
    log_p = torch.log_softmax(z, dim=-1)
    found = [log_p.gather(-1, index).squeeze(-1)]
    if return_lse:
        found.append(torch.logsumexp(z, dim=-1))
    if return_entropy:  # Where p is 0 it adds nothing, and no gradient passes: 0 * -inf is NaN.
        found.append(-(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1))
    values: list[Any] = [torch.where(scored, x, 0.0) for x in found]
    if return_topk is not None:
        top, live = log_p.detach().topk(return_topk), scored[..., None]
        values.append(TopK(top.values.where(live, 0.0), top.indices.where(live, -1)))
    return tuple(values) if len(values) > 1 else values[0]


def linear_token_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    head_dtype: str | None = None,
    **options,
) -> Tensor | tuple[Tensor, ...]:
    """``token_logps`` of ``hidden weight^T + bias``; options as there."""
    hidden, targets = _tokens(hidden, targets, ignore_index, shift)
    return token_logps(_logits(hidden, weight, bias, head_dtype), targets, **options)


def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    head_dtype: str | None = None,
) -> Tensor:
    """PyTorch's cross-entropy of ``hidden weight^T + bias``, and ``z_loss * lse^2`` of each token.

    Arguments as in ``pro_kernels.linear_cross_entropy``.
    """
    hidden, targets = _tokens(hidden, targets, ignore_index, shift)
    scored = targets != IGNORE_INDEX
    raw, scale = _scaled(_logits(hidden, weight, bias, head_dtype), logit_scale, scored)
    z = LogitOptions(softcap, scale).transform(raw)
    classes = z.new_ones(z.shape[-1]) if class_weight is None else class_weight.to(z.dtype)
    losses = torch.nn.functional.cross_entropy(
        z.flatten(0, -2), targets.flatten().long(), classes, ignore_index=IGNORE_INDEX,
        reduction="none", label_smoothing=label_smoothing,
    ).view(targets.shape)  # fmt: skip
    z_losses = torch.where(scored, z_loss * torch.logsumexp(z, dim=-1).square(), 0.0)
    if reduction == "none":
        return losses + z_losses
    if reduction == "sum" or not scored.any():
        return (losses + z_losses).sum()
    return losses.sum() / classes[targets[scored]].sum() + z_losses.sum() / scored.sum()


def rank_terms(
    scores: Tensor,  # (n,) best first
    rewards: Tensor | None,  # (n,) descending; None: every tau is ``tau``
    *,
    tau: float = 1.0,
    ties: str = "zero",
    eps: float = 0.0,
) -> list[Tensor]:
    """The n - 1 terms of ``L_rank`` for one prompt."""
    terms = []
    for k in range(len(scores) - 1):
        later = scores[k + 1 :]
        if rewards is None:
            own, taus = scores.new_tensor(tau), torch.full_like(later, tau)
        else:
            taus = rewards[k] - rewards[k + 1 :]
            own = taus.max().to(scores.dtype)
            if ties == "skip":
                later, taus = later[taus != 0], taus[taus != 0]
            taus = taus.to(scores.dtype)
        entries = [scores[k] * own, *(later * taus)]
        if eps > 0:
            entries.append(scores.new_tensor(math.log(eps)))
        terms.append(torch.logsumexp(torch.stack(entries), dim=0) - scores[k] * own)
    return terms


def pro_loss(
    logits: Tensor,  # (B, n, T, V), or (R, V) with a layout
    targets: Tensor | None,  # (B, n, T); None with a layout
    rewards: Tensor | None,  # (B, n)
    *,
    candidate_mask: Tensor | None = None,
    prompt_weights: Tensor | None = None,
    sft_index: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    layout: Layout | None = None,
    **options,
) -> PROOutput:
    """The PRO loss from logits; arguments and result as ``pro_kernels.linear_pro_loss``."""
    opts = PROOptions(**options)
    logits, targets = _tokens(logits, targets, ignore_index, shift, candidate_mask, layout)
    if layout is not None and isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.flatten()
        logit_scale = logit_scale if layout.rows is None else logit_scale[layout.rows]
    logps: Any = token_logps(logits, targets, softcap=softcap, logit_scale=logit_scale)
    if layout is None:
        sums, lengths = logps.sum(-1), targets.ne(IGNORE_INDEX).sum(-1)
    else:
        sums, lengths = _layout_sums(logps, layout)
        if candidate_mask is not None:
            lengths = torch.where(candidate_mask.to(lengths.device), lengths, 0)
    b, n = lengths.shape
    valid = lengths > 0
    scores = sums / lengths.clamp_min(1) if opts.length_normalize else sums

    per_rank = [scores.new_zeros(()) for _ in range(n)]  # the SFT term last
    weights = _prompt_weights(valid, prompt_weights, scores.dtype)
    for p in range(b):
        given = None if rewards is None else rewards[p]
        column = None if sft_index is None else int(sft_index[p])
        terms, sft = _prompt_loss(scores[p], sums[p], lengths[p], given, column, opts)
        for k, term in enumerate(terms[: opts.top_k]):
            per_rank[k] = per_rank[k] + weights[p] * term
        per_rank[-1] = per_rank[-1] + weights[p] * sft
    losses = torch.stack(per_rank).to(opts.final_dtype or scores.dtype)
    rank_losses, sft_loss = losses[:-1], losses[-1]
    loss = rank_losses.sum() + sft_loss
    detached = (x.detach() for x in (rank_losses, sft_loss, scores, sums))
    return PROOutput._make((loss, *detached, lengths, None))


def linear_pro_loss(
    hidden: Tensor,  # (B, n, T, H), or (R, H) with a layout
    weight: Tensor,  # (V, H)
    targets: Tensor | None,
    rewards: Tensor | None,
    *,
    bias: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    layout: Layout | None = None,
    head_dtype: str | None = None,
    **options,
) -> PROOutput:
    """``pro_loss`` of ``hidden weight^T + bias``; all logits are built."""
    hidden, targets = _tokens(hidden, targets, ignore_index, shift, candidate_mask, layout)
    if layout is not None:
        if isinstance(scale := options.get("logit_scale"), Tensor) and layout.rows is not None:
            options["logit_scale"] = scale.flatten()[layout.rows]
        layout = dataclasses.replace(layout, rows=None, targets=targets)
    logits = _logits(hidden, weight, bias, head_dtype)
    masked: Any = {"candidate_mask": candidate_mask, "layout": layout}
    return pro_loss(logits, targets, rewards, **masked, **options)


def official_targets(
    input_ids: Tensor,  # (B, n, T)
    attention_mask: Tensor,  # (B, n, T)
    prefix_mask: Tensor,  # (B, n, T), 1 on the prompt
) -> Tensor:
    """Targets as the official code scores them, its off-by-one kept.

    Position t counts when ``attention_mask[t]`` and not ``prefix_mask[t]``, for t <= T - 2, with
    label ``input_ids[t + 1]``: the position of the last token is scored too, with the padding that
    follows it as its label, exactly where its row is padded. With a mask that is 1 on the whole
    prompt the first completion token is not scored; the authors' collator leaves the prompt's last
    token 0, so that it is.
    """
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    scored = (attention_mask != 0) & (prefix_mask == 0)
    targets[..., :-1] = torch.where(scored[..., :-1], input_ids[..., 1:], IGNORE_INDEX)
    return targets


def _tokens(
    x: Tensor,  # (..., D), or (R, D) with a layout
    targets: Tensor | None,  # (...)
    ignore_index: int,
    shift: bool,
    candidate_mask: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """``x`` at each token and its target, 0 and IGNORE_INDEX where no candidate is scored.

    By ``where``, in the gradient too: 0 * NaN is NaN.
    """
    if layout is None:
        assert targets is not None
        if shift:
            targets = shift_targets(targets, ignore_index)
        live = targets != ignore_index
        if candidate_mask is not None:
            live = live & candidate_mask.to(live.device)[..., None]
    else:
        x = x.flatten(0, -2) if layout.rows is None else x.flatten(0, -2)[layout.rows]
        targets, live = layout.targets, layout.targets >= 0
        absent = [] if candidate_mask is None else layout.sequences[~candidate_mask].tolist()
        for s in absent:
            if s >= 0:
                live[layout.offsets[s] : layout.offsets[s + 1]] = False
    return torch.where(live.unsqueeze(-1), x, 0.0), torch.where(live, targets, IGNORE_INDEX)


def _prompt_loss(
    scores: Tensor,
    sums: Tensor,
    lengths: Tensor,
    rewards: Tensor | None,
    sft_index: int | None,
    opts: PROOptions,
) -> tuple[list[Tensor], Tensor]:
    """Rank terms and weighted SFT term of one prompt, candidates in column order."""
    columns = [i for i in range(len(scores)) if lengths[i]]
    if rewards is not None and not opts.official:
        columns.sort(key=lambda i: -rewards[i].item())  # stable: ties keep their columns' order
    if not columns:
        return [], scores.new_zeros(())
    kernel = opts.ranking()
    at_rank = None
    if rewards is not None and opts.temperature == "reward":
        at_rank = rewards[columns]
        if at_rank.dtype != torch.float32 or opts.reward_scale != 1:
            at_rank = at_rank.double() if at_rank.is_floating_point() else at_rank.long()
            at_rank = (at_rank - at_rank.max()).double() * opts.reward_scale
    tau = 1.0 if isinstance(opts.temperature, str) else 1.0 / opts.temperature
    terms = rank_terms(scores[columns], at_rank, tau=tau, ties=opts.ties, eps=kernel.eps)
    best = columns[0] if sft_index is None else sft_index
    factor = opts.sft_weight * (len(columns) - 1) ** 2
    if len(columns) == 1 and not opts.official:
        factor = opts.sft_weight
    if best not in columns:
        factor = 0.0
    best_sum = sums[best] / lengths[best] if opts.sft_reduction == "mean" else sums[best]
    return terms, -factor * best_sum if factor else scores.new_zeros(())


def _layout_sums(logps: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """``S`` and ``m``, ``(B, n)``, of the sequences a layout describes."""
    pieces = torch.split(logps, layout.offsets.diff().tolist())
    sums = torch.stack([piece.sum() for piece in pieces])
    at = layout.sequences.clamp_min(0)
    exists = layout.sequences >= 0
    return torch.where(exists, sums[at], 0.0), torch.where(exists, layout.lengths[at], 0)


def _prompt_weights(valid: Tensor, prompt_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    weights = valid.any(1).double()
    if prompt_weights is not None:
        weights = weights * prompt_weights.to(weights)
    return (weights / weights.sum()).to(dtype) if weights.any() else weights.to(dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head_dtype: str | None) -> Tensor:
    """``hidden weight^T + bias``; of an fp32 head in fp32 (fp64 for fp64), autocast or not."""
    if head_dtype is None:
        return torch.nn.functional.linear(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        wide = None if bias is None else _wide(bias)
        return torch.nn.functional.linear(_wide(hidden), _wide(weight), wide)


def _scaled(logits: Tensor, scale: float | Tensor, scored: Tensor) -> tuple[Tensor, float]:
    """Wide logits times a scale of each row, and what number is left of it."""
    if not isinstance(scale, Tensor):
        return _wide(logits), scale
    by_row = torch.where(scored, scale, 1.0).to(_wide(logits).dtype)
    return _wide(logits) * by_row[..., None], 1.0


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
