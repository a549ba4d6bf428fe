"""The public functions.

Legend: ``B`` prompts, ``n`` candidates, ``T`` positions, ``H`` hidden, ``V`` vocabulary. Targets
say what each position predicts, ``ignore_index`` where nothing is scored; with ``shift=True`` they
are unshifted labels, as transformers has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pro_kernels import autograd, checks
from pro_kernels.backends import resolve
from pro_kernels.calls import (
    Checked,
    agreed,
    by_score,
    head_call,
    head_here,
    layout_of,
    of_present,
    pro_across_ranks,
    pro_layout,
    rank,
    rows_of_present,
)
from pro_kernels.column_filter import check_grad_filter
from pro_kernels.head import acc_dtype
from pro_kernels.layout import Layout, check_targets, mark_unscored, shift_targets
from pro_kernels.options import IGNORE_INDEX, LogitOptions, PROOptions
from pro_kernels.output import GradFilter, PROOutput, TokenStats
from pro_kernels.pro import make_output, rank_candidates
from pro_kernels.shards import group_of


def linear_token_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    grad_filter: float | None = None,
    return_dropped: bool = False,
    return_entropy: bool = False,
    backend: str = "auto",
    budget: int | None = None,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under ``softmax(head(hidden))``, without holding all logits.

    Rows whose target is ``ignore_index`` never reach the head. Any upstream gradient is served at
    three head matmuls in all.

    Args:
        hidden: (..., H), float64/32/16 or bfloat16.
        weight: (V, H), the dtype of hidden (under autocast both are cast). A DTensor (FSDP2, HSDP),
            sharded or replicated, is gathered in the forward and its gradient averaged over the
            mesh, as that of every other parameter is.
        targets: (...), integer.
        bias: (V,) or None, possibly a DTensor.
        ignore_index: target value of positions that are not scored.
        shift: targets are unshifted labels.
        softcap: ``c * tanh(z / c)`` on the logits, or None.
        logit_scale: factor on the logits, before the softcap.
        logits_dtype: ``torch.float32`` keeps logits of lower-precision inputs unrounded.
        grad_filter: None, or a probability mass tau in (0, 1): vocabulary columns that hold at most
            tau of each row's probability together (under a softcap: probability times the
            softcap's slope) leave the gradient matmuls; ``return_dropped`` tells what was lost. On
            a GPU the host then waits once a chunk.
        return_dropped: also return what each row's gradient lost, as (3, ...) fp32: that
            probability, the norm of its dropped ``dZ0``, and a bound of the norm of its share of
            dHidden, for an upstream gradient of 1.
        return_entropy: also return the entropy of each row's distribution in nats, (...) fp32, 0
            where nothing is scored; differentiable. No matmul more where logits and a gradient as
            large fit the budget; rows that do not fit are computed again. The backward needs the
            weight. Not with ``grad_filter``.
        backend: "auto" or a backend's name; a named one never falls back.
        budget: bytes this call may take beyond the inputs' gradients; None for a default.
        process_group: the ranks that hold the head together (tensor parallel), or that dimension of
            a DeviceMesh (``mesh["tp"]``). ``weight`` and ``bias`` are this rank's rows, in the
            order of the group, in any sizes, or DTensors that are Shard(0) there (and gathered over
            the other dimensions of their mesh); hidden, targets and all options are the same on
            every rank, which is checked at each call (on a GPU the host waits for that, and of
            tensors only shapes and how much is scored are compared; hidden's values never are). So
            is the result; dHidden is summed over ranks. Not compiled, not with ``grad_filter`` or
            ``return_entropy``.

    Returns:
        (...) fp32 (fp64 for fp64 inputs); 0 where the target is ``ignore_index``. With
        ``return_dropped`` or ``return_entropy`` a pair.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices, dtypes or values that do not fit, a target outside [0, V).
    """
    if return_entropy:
        if process_group is not None:
            raise ValueError("return_entropy cannot be had with a process_group, got True")
        if grad_filter is not None or return_dropped:
            raise ValueError(
                "return_entropy=True needs grad_filter=None and return_dropped=False (every column "
                f"counts in an entropy), got grad_filter={grad_filter}, "
                f"return_dropped={return_dropped}"
            )
        stats = linear_token_stats(
            hidden,
            weight,
            targets,
            bias=bias,
            ignore_index=ignore_index,
            shift=shift,
            softcap=softcap,
            logit_scale=logit_scale,
            logits_dtype=logits_dtype,
            backend=backend,
            budget=budget,
        )
        return stats.logps, stats.entropy
    weight, bias, process_group = head_here(weight, bias, process_group)
    call, layout = _token_call(
        hidden, weight, targets, bias, ignore_index, shift, softcap, logit_scale, logits_dtype,
        backend, budget, grad_filter=grad_filter, process_group=process_group,
    )  # fmt: skip
    logps, dropped = autograd.HeadLogps.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, layout.rows, layout.targets, call
    )
    logps = _by_position(logps, layout).view(targets.shape)
    if not return_dropped:
        return logps
    if not dropped.numel():
        dropped = logps.new_zeros((3, layout.num_tokens), dtype=torch.float32)
    return logps, _by_position(dropped, layout).view(3, *targets.shape)


def linear_token_stats(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    extra: bool = False,
    backend: str = "auto",
    budget: int | None = None,
) -> TokenStats:
    """Log-probability of each target and entropy of each row, both differentiable.

    What ``linear_token_logps(..., return_entropy=True)`` returns, and with ``extra`` three numbers
    more without gradient, in plain PyTorch a block of rows at a time: what policy-gradient trainers
    log.

    Args and errors as there.
    """
    weight, bias, _ = head_here(weight, bias, None)
    call, layout = _token_call(
        hidden, weight, targets, bias, ignore_index, shift, softcap, logit_scale, logits_dtype,
        backend, budget, entropy=True,
    )  # fmt: skip
    rows = hidden.reshape(-1, hidden.shape[-1])
    logps, entropy, more = autograd.HeadStats.apply(
        rows, weight, bias, layout.rows, layout.targets, call, extra
    )
    logps, entropy = (_by_position(x, layout).view(targets.shape) for x in (logps, entropy))
    if not extra:
        return TokenStats(logps, entropy)
    square, mean, top = _by_position(more, layout).view(3, *targets.shape)
    return TokenStats(logps, entropy, square, mean, top > 0)


def _token_call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    shift: bool,
    softcap: float | None,
    logit_scale: float,
    logits_dtype: torch.dtype | None,
    backend: str,
    budget: int | None,
    *,
    grad_filter: float | None = None,
    entropy: bool = False,
    process_group: Any = None,
) -> tuple[autograd.HeadCall, Layout]:
    """A token-level call, checked: its plan and its layout."""

    def check() -> Checked:
        """This rank's arguments."""
        compute = checks.check_head(hidden, weight, bias)
        wide = checks.check_logits_dtype(logits_dtype, compute)
        check_grad_filter(grad_filter)
        check_targets(targets)
        checks.check_same_shape("targets", targets, tuple(hidden.shape[:-1]), "hidden.shape[:-1]")
        checks.check_device("targets", targets, "hidden", hidden)
        scored = shift_targets(targets, ignore_index) if shift else targets
        vocab = weight.shape[0] if process_group is None else None
        return Checked(compute, wide, layout_of(scored.reshape(1, 1, -1), ignore_index, vocab))

    checked, shard = agreed(
        check, {"process_group": process_group}, hidden, weight, bias, backend, budget,
        grad_filter=grad_filter, softcap=softcap, logit_scale=logit_scale, shift=shift,
        ignore_index=ignore_index, logits_dtype=logits_dtype,
    )  # fmt: skip
    call = head_call(
        hidden,
        weight,
        bias,
        checked.layout,
        checked.compute,
        checked.logits_dtype,
        LogitOptions(softcap, logit_scale),
        backend,
        budget,
        scalar_loss=False,
        grad_filter=grad_filter,
        entropy=entropy,
        shard=shard,
    )
    return call, checked.layout


def _by_position(values: Tensor, layout: Layout) -> Tensor:
    """Values (..., N) of the scored rows as (..., R), 0 elsewhere."""
    if layout.rows is None:
        return values
    whole = values.new_zeros((*values.shape[:-1], layout.num_rows))
    return whole.index_copy(-1, layout.rows, values)


def token_logps(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    *,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under ``softmax(logits)``; unscored rows are never read.

    Args:
        logits: (..., V), float64/32/16 or bfloat16.
        targets: (...), integer.
        ignore_index: target value of positions that are not scored.
        shift: targets are unshifted labels.
        softcap: ``c * tanh(z / c)`` on the logits, or None.
        logit_scale: factor on the logits, before the softcap.
        inplace_backward: write the gradient over the logits; nothing else may use them afterwards.
        return_entropy: also return the entropy of each row in nats, (...) fp32, differentiable; 0
            where nothing is scored.
        backend: "auto" or a backend's name; a named one never falls back.

    Returns:
        (...) fp32 (fp64 for fp64 logits); 0 where the target is ``ignore_index``. With
        ``return_entropy`` a pair.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, a target outside [0, V).
    """
    checks.check_float("logits", logits)
    check_targets(targets)
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape (..., V), got {tuple(logits.shape)}")
    checks.check_same_shape("targets", targets, tuple(logits.shape[:-1]), "logits.shape[:-1]")
    checks.check_device("targets", targets, "logits", logits)
    if shift:
        targets = shift_targets(targets, ignore_index)
    flat = mark_unscored(targets, ignore_index).reshape(-1)
    backend = resolve(backend, logits.device, logits.dtype)
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    options = LogitOptions(softcap, logit_scale)
    logps, entropy = autograd.Logps.apply(
        rows, flat, options, backend, inplace_backward, return_entropy
    )
    logps = logps.view(targets.shape)
    return (logps, entropy.view(targets.shape)) if return_entropy else logps


def linear_pro_loss(
    hidden: Tensor,  # (B, n, T, H), or (R, H) with a layout
    weight: Tensor,  # (V, H)
    targets: Tensor | None,  # (B, n, T); None with a layout
    rewards: Tensor | None,  # (B, n)
    *,
    bias: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    prompt_weights: Tensor | None = None,
    sft_index: Tensor | None = None,
    sft_weight: float = 0.05,
    sft_reduction: str | None = None,
    length_normalize: bool = True,
    temperature: str | float = "reward",
    reward_scale: float = 1.0,
    ties: str = "zero",
    eps: float = 0.0,
    top_k: int | None = None,
    compat: str | None = None,
    final_dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    grad_filter: float | None = None,
    layout: Layout | None = None,
    backend: str = "auto",
    budget: int | None = None,
    process_group: Any = None,
    sequence_group: Any = None,
) -> PROOutput:
    """PRO loss (arXiv 2306.17492) from hidden states and LM-head weight, logits never all held.

    ``L = mean over prompts of sum_k [ logsumexp_{i>=k}(s_i tau_ki) - s_k tau_kk ] - w (n-1)^2
    s_best`` with ``s_i = S_i / m_i``, ``tau_ki = r_k - r_i``, ``tau_kk = max_i tau_ki``; without
    rewards every tau is 1 (Plackett-Luce over the columns, best first).

    Args:
        hidden: (B, n, T, H), or (R, H) when ``layout`` is given.
        weight: (V, H), the dtype of hidden (under autocast both are cast). A DTensor (FSDP2, HSDP),
            sharded or replicated, is gathered in the forward and its gradient averaged over the
            mesh, as that of every other parameter is.
        targets: (B, n, T) integer; None when ``layout`` is given.
        rewards: (B, n), higher is better; candidates are stable-sorted by them. Best kept on the
            CPU, where they are checked without waiting for a device. None: columns are the order.
        bias: (V,) or None, possibly a DTensor.
        candidate_mask: (B, n) bool, candidates that exist: what stands in place of others is not
            read. One without a scored token leaves the ranking too: n shrinks.
        prompt_weights: (B,), >= 0; the mean over prompts is weighted by them.
        sft_index: (B,) column of the candidate that carries the SFT term; None: the best one.
        sft_weight: w; the SFT term's factor is ``w (n-1)^2``, or w for a single candidate.
        sft_reduction: "mean" (per token) or "sum" (the paper) of the SFT log-probs. None: "mean",
            and "sum" under ``compat="official"``. As a sum the term is most of the loss of long
            completions, and the ranking hardly counts (docs/loss.md).
        length_normalize: rank by ``S / m`` (the paper) or by ``S``.
        temperature: "reward", or a number T: every ``tau = 1 / T``, rewards only order.
        reward_scale: factor on the rewards.
        ties: "zero": a tied candidate adds exp(0) to the denominator, without gradient;
            "skip": it leaves it.
        eps: constant inside the log.
        top_k: only the first k rank terms.
        compat: "official" for the meaning of the authors' code: no sorting, eps = 1e-10, all-equal
            rewards kept, one candidate gives 0. Make targets with ``reference.official_targets``.
        final_dtype: cast each rank term and the SFT term to this dtype, as the official code does.
        ignore_index: target value of positions that are not scored.
        shift: targets are unshifted labels.
        softcap: ``c * tanh(z / c)`` on the logits, or None.
        logit_scale: factor on the logits, before the softcap.
        logits_dtype: ``torch.float32`` keeps logits of lower-precision inputs unrounded.
        grad_filter: None, or a probability mass tau in (0, 1): vocabulary columns that hold at most
            tau of each row's probability together (under a softcap: probability times the
            softcap's slope) leave the gradient matmuls; ``PROOutput.grad_filter`` tells what was
            lost. On a GPU the host waits once a chunk.
        layout: which rows are scored, made with the batch (``Layout.from_padded`` and others).
        backend: "auto" or a backend's name; a named one never falls back.
        budget: bytes this call may take beyond the inputs' gradients; None for a default.
        process_group: the ranks that hold the head together (tensor parallel), or that dimension of
            a DeviceMesh (``mesh["tp"]``). ``weight`` and ``bias`` are this rank's rows, in the
            order of the group, in any sizes, or DTensors that are Shard(0) there (and gathered over
            the other dimensions of their mesh); hidden, targets and all options are the same on
            every rank, which is checked at each call (on a GPU the host waits for that, and of
            tensors only shapes and how much is scored are compared; hidden's values never are). So
            is the result; dHidden is summed over ranks. Not compiled, not with ``grad_filter``.
        sequence_group: the ranks that hold the tokens together (context parallel, or candidates on
            other ranks). Each describes all candidates of all prompts, in targets or layout, and
            scores its own tokens of them, with ``ignore_index`` or empty sequences where it has
            none; shift labels before they are split. Rewards, weight and all options are the same
            on every rank, which is checked at each call (on a GPU the host waits for that, and only
            the shapes of its rewards are compared). So is the result: scores, log-probs and lengths
            of whole candidates. 8 bytes a candidate are summed over ranks in the forward (16 in
            fp64; lengths are exact to 2**24), nothing in the backward: gradients are of this rank's
            tokens only, so those of weights must be summed over the group, not averaged. Not
            compiled; ``PROOutput.grad_filter`` tells of this rank's tokens.

    Returns:
        ``PROOutput``; only ``loss`` carries a gradient. No scored candidate at all: loss 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; rewards not finite, or all equal
            within a prompt (with ``temperature="reward"``); a target outside [0, V).
    """
    weight, bias, process_group = head_here(weight, bias, process_group)
    sequence_group = group_of("sequence_group", sequence_group)

    def check() -> Checked:
        """This rank's arguments."""
        options = PROOptions(
            sft_weight=sft_weight,
            sft_reduction=sft_reduction,
            length_normalize=length_normalize,
            temperature=temperature,
            reward_scale=reward_scale,
            ties=ties,
            eps=eps,
            top_k=top_k,
            compat=compat,
            final_dtype=final_dtype,
        )
        compute = checks.check_head(hidden, weight, bias)
        wide = checks.check_logits_dtype(logits_dtype, compute)
        check_grad_filter(grad_filter)
        vocab = weight.shape[0] if process_group is None else None
        found = pro_layout(hidden, targets, layout, ignore_index, shift, vocab, candidate_mask)
        return Checked(compute, wide, found, options)

    by_candidate = {
        "rewards": rewards,
        "candidate_mask": candidate_mask,
        "prompt_weights": prompt_weights,
        "sft_index": sft_index,
    }
    checked, shard = agreed(
        check, {"process_group": process_group, "sequence_group": sequence_group},
        hidden, weight, bias, backend, budget, by_candidate, grad_filter=grad_filter,
        softcap=softcap, logit_scale=logit_scale, shift=shift, ignore_index=ignore_index,
        logits_dtype=logits_dtype,
    )  # fmt: skip
    scored = checked.layout
    if sequence_group is None:
        ranked = rank_candidates(
            scored, **by_score(by_candidate), options=checked.loss, dtype=acc_dtype(checked.compute)
        )
    call = head_call(
        hidden,
        weight,
        bias,
        scored,
        checked.compute,
        checked.logits_dtype,
        LogitOptions(softcap, logit_scale),
        backend,
        budget,
        scalar_loss=sequence_group is None,
        grad_filter=grad_filter,
        shard=shard,
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    if layout is not None and candidate_mask is not None and scored.candidate_tokens is None:
        rows = rows_of_present(rows, scored)
    if sequence_group is None:
        loss, per_rank, sums, row_weights, dropped = autograd.LinearPRO.apply(
            rows,
            weight,
            bias,
            scored.rows,
            scored.targets,
            scored.offsets,
            scored.lengths,
            *ranked.tensors,
            list(scored.prompt_tokens),
            ranked.options,
            final_dtype,
            call,
        )
        out = make_output(loss, per_rank, sums, scored, checked.loss)
    else:
        logps, dropped = autograd.HeadLogps.apply(
            rows, weight, bias, scored.rows, scored.targets, call
        )
        out, weights = pro_across_ranks(
            logps, scored, sequence_group, by_candidate, checked.loss, backend
        )
    if call.grad_filter is None:
        return out
    if sequence_group is not None:
        row_weights = autograd.by_token(
            weights, scored.offsets, scored.sequences, scored.num_tokens
        )
    mass, square, reach = dropped
    return out._replace(
        grad_filter=GradFilter(call.grad_filter, mass, square, reach, scored.rows, row_weights)
    )


def pro_loss(
    logits: Tensor,  # (B, n, T, V)
    targets: Tensor,  # (B, n, T)
    rewards: Tensor | None,  # (B, n)
    *,
    candidate_mask: Tensor | None = None,
    prompt_weights: Tensor | None = None,
    sft_index: Tensor | None = None,
    sft_weight: float = 0.05,
    sft_reduction: str | None = None,
    length_normalize: bool = True,
    temperature: str | float = "reward",
    reward_scale: float = 1.0,
    ties: str = "zero",
    eps: float = 0.0,
    top_k: int | None = None,
    compat: str | None = None,
    final_dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
    sequence_group: Any = None,
) -> PROOutput:
    """PRO loss from logits; the arguments of ``linear_pro_loss``, with ``logits`` (B, n, T, V).

    Args and errors are as there; ``inplace_backward`` writes the gradient over the logits (nothing
    else may use them afterwards). Extra memory is the logits' gradient.
    """

    def check() -> Checked:
        """This rank's arguments."""
        options = PROOptions(
            sft_weight=sft_weight,
            sft_reduction=sft_reduction,
            length_normalize=length_normalize,
            temperature=temperature,
            reward_scale=reward_scale,
            ties=ties,
            eps=eps,
            top_k=top_k,
            compat=compat,
            final_dtype=final_dtype,
        )
        checks.check_float("logits", logits)
        check_targets(targets)
        if logits.dim() != 4 or logits.shape[1] == 0:
            raise ValueError(f"logits must have shape (B, n, T, V), got {tuple(logits.shape)}")
        checks.check_same_shape("targets", targets, tuple(logits.shape[:-1]), "(B, n, T)")
        checks.check_device("targets", targets, "logits", logits)
        scored = shift_targets(targets, ignore_index) if shift else targets
        dense = Layout.dense(of_present(scored, candidate_mask, ignore_index), ignore_index)
        return Checked(logits.dtype, logits.dtype, dense, options)

    by_candidate = {
        "rewards": rewards,
        "candidate_mask": candidate_mask,
        "prompt_weights": prompt_weights,
        "sft_index": sft_index,
    }
    sequence_group = group_of("sequence_group", sequence_group)
    checked, _ = agreed(
        check, {"sequence_group": sequence_group}, logits, None, None, backend, None, by_candidate,
        softcap=softcap, logit_scale=logit_scale, shift=shift, ignore_index=ignore_index,
    )  # fmt: skip
    layout = checked.layout
    if sequence_group is None:
        ranked = rank_candidates(
            layout, **by_score(by_candidate), options=checked.loss, dtype=acc_dtype(logits.dtype)
        )
        resolve(backend, logits.device, logits.dtype, layout.shape[1])
    logps: Any = token_logps(
        logits,
        layout.targets.view(targets.shape),
        softcap=softcap,
        logit_scale=logit_scale,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    logps = logps.view(-1)
    if sequence_group is not None:
        out, _ = pro_across_ranks(
            logps, layout, sequence_group, by_candidate, checked.loss, backend
        )
        return out
    loss, per_rank, sums, _ = rank(logps, layout, ranked, backend, final_dtype)
    return make_output(loss, per_rank, sums, layout, checked.loss)
