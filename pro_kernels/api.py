"""The public functions.

Legend: ``B`` prompts, ``n`` candidates, ``T`` positions, ``H`` hidden, ``V`` vocabulary. Targets
say what each position predicts, ``ignore_index`` where nothing is scored; with ``shift=True`` they
are unshifted labels, as transformers has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pro_kernels import validate
from pro_kernels.backends import resolve
from pro_kernels.backends.protocol import Candidates
from pro_kernels.fused import autograd, ranks, shards
from pro_kernels.fused.call import Call, planned
from pro_kernels.fused.planner import Plan
from pro_kernels.fused.rank_order import make_output, rank_candidates
from pro_kernels.layout import Layout, mark_unscored, shift_targets
from pro_kernels.options import CallOptions, LogitOptions, Options, PROOptions, row_scale
from pro_kernels.output import GradFilter, PROOutput, TokenStats, TopK

_NOT_OF_LOGITS = ("head_dtype", "batch_invariant", "grad_filter", "budget", "process_group")
_TOKENS = Options(LogitOptions, CallOptions, without=("inplace_backward", "sequence_group"))
_STATS = Options(
    LogitOptions,
    CallOptions,
    without=("inplace_backward", "sequence_group", "grad_filter", "process_group"),
)
_LOGITS = Options(LogitOptions, CallOptions, without=(*_NOT_OF_LOGITS, "sequence_group"))
_PRO = Options(PROOptions, LogitOptions, CallOptions, without=("inplace_backward",))
_PRO_OF_LOGITS = Options(PROOptions, LogitOptions, CallOptions, without=_NOT_OF_LOGITS)


# For type checkers: one tensor unless more is asked for.
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    return_lse: Literal[False] = False,
    return_dropped: Literal[False] = False,
    return_entropy: Literal[False] = False,
    return_topk: None = None,
    **options: Any,
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    return_lse: bool = False,
    return_dropped: bool = False,
    return_entropy: bool = False,
    return_topk: int | None = None,
    **options: Any,
) -> Any: ...
@_TOKENS
def linear_token_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    return_lse: bool = False,
    return_dropped: bool = False,
    return_entropy: bool = False,
    return_topk: int | None = None,
    **options: Any,
) -> Tensor | tuple[Any, ...]:
    """Log-probability of each target under ``softmax(head(hidden))``, without holding all logits.

    Rows whose target is ``ignore_index`` never reach the head. Any upstream gradient is served at
    three head matmuls in all.

    Args:
        hidden: (..., H), float64/32/16 or bfloat16.
        weight: (V, H), the dtype of hidden (under autocast both are cast; an fp32 head takes any
            two). A DTensor (FSDP2, HSDP), sharded or replicated, is gathered in the forward and its
            gradient averaged over the mesh, as that of every other parameter is.
        targets: (...), integer.
        bias: (V,) or None, possibly a DTensor.
        return_lse: also return the log-sum-exp of each row's logits, (...) fp32, 0 where nothing is
            scored; differentiable, with no matmul more. Its backward needs the weight. For a
            z-loss (PaLM, arXiv 2204.02311, section 5) add ``1e-4 * lse.square().sum() / n``.
        return_dropped: also return what each row's gradient lost to ``grad_filter``, as (4, ...)
            fp32: the probability, the norm of its dropped ``dZ0``, and a bound of the norm of its
            share of dHidden, for an upstream gradient of 1.
        return_entropy: also return the entropy of each row's distribution in nats, (...) fp32, 0
            where nothing is scored; differentiable. No matmul more where logits and a gradient as
            large fit the budget; rows that do not fit are computed again. The backward needs the
            weight. Not with ``grad_filter``.
        return_topk: k: also return the log-probs and ids of the k most likely tokens of each row,
            (..., k) each, as ``TopK``; without gradient. 0 and -1 where nothing is scored.
        **options: of the call.

    Returns:
        (...) fp32 (fp64 for fp64 inputs); 0 where the target is ``ignore_index``. With
        ``return_lse``, ``return_entropy``, ``return_topk`` or ``return_dropped`` a tuple, in that
        order.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices, dtypes or values that do not fit, a target outside [0, V).
    """
    tau = options.get("grad_filter")
    alone = {"return_entropy": return_entropy, "return_topk": return_topk}
    for name, on in alone.items():
        if on and options.get("process_group") is not None:
            raise ValueError(f"{name} cannot be had with a process_group, got {on}")
    if return_entropy and (tau is not None or return_dropped):
        raise ValueError(
            "return_entropy=True needs grad_filter=None and return_dropped=False (every column "
            f"counts in an entropy), got grad_filter={tau}, return_dropped={return_dropped}"
        )
    wanted = [name for name, on in (("lse", return_lse), ("entropy", return_entropy)) if on]
    if return_topk is not None:
        wanted += ["top_logps", "top_ids"]
    given, outputs = (_TOKENS, options), ("logps", *wanted)
    stats, dropped = token_stats(hidden, weight, targets, bias, given, outputs, return_topk)
    found: list[Any] = list(stats.values())
    if return_topk is not None:
        found[-2:] = [TopK(*found[-2:])]
    if return_dropped:
        none = torch.zeros(4, *targets.shape, dtype=torch.float32, device=targets.device)
        found.append(dropped if dropped.numel() else none)
    return tuple(found) if len(found) > 1 else found[0]


@_STATS
def linear_token_stats(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    extra: bool = False,
    **options: Any,
) -> TokenStats:
    """Log-probability of each target and entropy of each row, both differentiable.

    What ``linear_token_logps(..., return_entropy=True)`` returns, and with ``extra`` three numbers
    more without gradient, in plain PyTorch a block of rows at a time: what policy-gradient trainers
    log.

    Args and errors as there.
    """
    names = ("log_sum_sq_probs", "mean_logits", "top_ids") if extra else ()
    outputs = ("logps", "entropy", *names)
    stats, _ = token_stats(hidden, weight, targets, bias, (_STATS, options), outputs)
    if not extra:
        return TokenStats(**stats)
    logps, entropy, square, mean, ids = stats.values()
    *_, how = _STATS.split(options)
    targets = scored_targets(targets, how)
    top = (ids[..., 0] == targets) & (targets != how.ignore_index)
    return TokenStats(logps, entropy, square, mean, top)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    given: tuple[Options, dict[str, Any]],  # what options there are, and those of the call
    outputs: tuple[str, ...],  # of ``Call``
    top: int | None = None,  # k; None: 1
) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs by name, and what a filter dropped, in the shape of targets; (..., k) of the top.

    Ids are -1 where nothing is scored.
    """
    taken, options = given
    scale = row_scale(options)
    weight, bias, group = shards.head_here(weight, bias, options.get("process_group"))

    def check() -> ranks.Door:
        """This rank's arguments."""
        *terms, logits, how = taken.split(options)
        dtypes = validate.check_head(hidden, weight, bias, how.head_dtype)
        validate.check_targets_of(targets, "hidden", hidden, "hidden.shape[:-1]")
        validate.check_top(top, weight.shape[0])
        vocab = weight.shape[0] if group is None else None
        scored = scored_targets(targets, how).reshape(1, 1, -1)
        layout = Layout.of_targets(scored, how.ignore_index, vocab)
        validate.check_row_scale(scale, "hidden", hidden, bias, layout.rows, layout.targets)
        call = _call(hidden, dtypes, logits, how, weight).but(outputs=outputs, top=top or 1)
        return call, layout, how, terms

    call, layout, how, _ = ranks.agreed(check, (group, None), (hidden, weight, bias, scale))
    call = planned(call, hidden, weight, bias, layout, how.budget)
    rows, by_row = hidden.reshape(-1, hidden.shape[-1]), _flat(scale, call)
    logps, dropped, *more = autograd.Head.apply(
        rows, weight, bias, layout.rows, layout.targets, by_row, call
    )
    stats = {}
    for name, x in zip(outputs, (logps, *more), strict=True):
        x = layout.by_position(x).view(*x.shape[:-1], *targets.shape)
        stats[name] = x.movedim(0, -1).contiguous() if name.startswith("top_") else x
    if "top_ids" in stats:
        stats["top_ids"] = stats["top_ids"].long() - 1
    if dropped.numel():
        dropped = layout.by_position(dropped).view(4, *targets.shape)
    return stats, dropped


@overload
def token_logps(
    logits: Tensor, targets: Tensor, *, return_entropy: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor, targets: Tensor, *, return_entropy: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
@_LOGITS
def token_logps(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    *,
    return_entropy: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under ``softmax(logits)``; unscored rows are never read.

    Args:
        logits: (..., V), float64/32/16 or bfloat16.
        targets: (...), integer.
        return_entropy: also return the entropy of each row in nats, (...) fp32, differentiable; 0
            where nothing is scored.
        **options: of the call.

    Returns:
        (...) fp32 (fp64 for fp64 logits); 0 where the target is ``ignore_index``. With
        ``return_entropy`` a pair.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, a target outside [0, V).
    """
    scale = row_scale(options)
    transform, how = _LOGITS.split(options)
    _check_logits(logits, targets)
    flat = mark_unscored(scored_targets(targets, how), how.ignore_index).reshape(-1)
    validate.check_row_scale(scale, "logits", logits, None, None, flat)
    outputs = ("logps", "entropy") if return_entropy else ("logps",)
    call = _call(logits, (logits.dtype,) * 2, transform, how).but(outputs=outputs)
    args = (_rows(logits), flat, _flat(scale, call), how.inplace_backward, call)
    logps, entropy = autograd.Logps.apply(*args)
    logps = logps.view(targets.shape)
    return (logps, entropy.view(targets.shape)) if return_entropy else logps


@_PRO
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
    layout: Layout | None = None,
    **options: Any,
) -> PROOutput:
    """PRO loss (arXiv 2306.17492) from hidden states and LM-head weight, logits never all held.

    ``L = mean over prompts of sum_k [ logsumexp_{i>=k}(s_i tau_ki) - s_k tau_kk ] - w (n-1)^2
    s_best`` with ``s_i = S_i / m_i``, ``tau_ki = r_k - r_i``, ``tau_kk = max_i tau_ki``; without
    rewards every tau is 1 (Plackett-Luce over the columns, best first).

    Args:
        hidden: (B, n, T, H), or (R, H) when ``layout`` is given.
        weight: (V, H), the dtype of hidden, possibly a DTensor, as in ``linear_token_logps``.
        targets: (B, n, T) integer; None when ``layout`` is given.
        rewards: (B, n), higher is better; candidates are stable-sorted by them. Best kept on the
            CPU, where they are checked without waiting for a device. None: columns are the order.
        bias: (V,) or None, possibly a DTensor.
        candidate_mask: (B, n) bool, candidates that exist: what stands in place of others is not
            read. One without a scored token leaves the ranking too: n shrinks.
        prompt_weights: (B,), >= 0; the mean over prompts is weighted by them.
        sft_index: (B,) column of the candidate that carries the SFT term; None: the best one.
        layout: which rows are scored, made with the batch (``Layout.from_padded`` and others).
        **options: of the call.

    Returns:
        ``PROOutput``; only ``loss`` carries a gradient. No scored candidate at all: loss 0. Its
        ``grad_filter`` tells what that option lost.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; rewards not finite, or all equal
            within a prompt (with ``temperature="reward"``); a target outside [0, V).
    """
    scale = row_scale(options)
    weight, bias, group = shards.head_here(weight, bias, options.get("process_group"))
    by_candidate = {
        "rewards": rewards,
        "candidate_mask": candidate_mask,
        "prompt_weights": prompt_weights,
        "sft_index": sft_index,
    }

    def check() -> ranks.Door:
        """This rank's arguments."""
        loss, logits, how = _PRO.split(options)
        dtypes = validate.check_head(hidden, weight, bias, how.head_dtype)
        vocab = weight.shape[0] if group is None else None
        found = _lists(hidden, targets, layout, candidate_mask, how, vocab)
        validate.check_row_scale(scale, "hidden", hidden, bias, found.rows, found.targets)
        return _call(hidden, dtypes, logits, how, weight, loss, found), found, how, loss

    def source(call: Call, scored: Layout, how: CallOptions, scalar_loss: bool) -> tuple:
        """As ``ranks.Source``."""
        call = planned(call, hidden, weight, bias, scored, how.budget, scalar_loss)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if layout is not None and candidate_mask is not None and scored.candidate_tokens is None:
            rows = scored.blanked(rows)
        head = (rows, weight, bias, scored.rows, scored.targets, _flat(scale, call))
        return (
            call,
            lambda: autograd.Head.apply(*head, call)[:2],
            lambda candidates: autograd.LinearPRO.apply(*head, *candidates, call),
        )

    return _pro(check, source, (hidden, weight, bias, scale), (group, options), by_candidate)


@_PRO_OF_LOGITS
def pro_loss(
    logits: Tensor,  # (B, n, T, V)
    targets: Tensor,  # (B, n, T)
    rewards: Tensor | None,  # (B, n)
    *,
    candidate_mask: Tensor | None = None,
    prompt_weights: Tensor | None = None,
    sft_index: Tensor | None = None,
    **options: Any,
) -> PROOutput:
    """PRO loss from logits; extra memory is the logits' gradient.

    Args:
        logits: (B, n, T, V).
        targets: (B, n, T) integer.
        rewards: (B, n); this and the following as in ``linear_pro_loss``.
        candidate_mask: (B, n) bool.
        prompt_weights: (B,).
        sft_index: (B,).
        **options: of the call.

    Returns, raises: as ``linear_pro_loss``.
    """
    scale = row_scale(options)
    by_candidate = {
        "rewards": rewards,
        "candidate_mask": candidate_mask,
        "prompt_weights": prompt_weights,
        "sft_index": sft_index,
    }

    def check() -> ranks.Door:
        """This rank's arguments."""
        loss, transform, how = _PRO_OF_LOGITS.split(options)
        _check_logits(logits, targets, lists=True)
        found = Layout.dense(scored_targets(targets, how, candidate_mask), how.ignore_index)
        validate.check_row_scale(scale, "logits", logits, None, None, found.targets)
        dtypes = (logits.dtype,) * 2
        return _call(logits, dtypes, transform, how, None, loss, found), found, how, loss

    def source(call: Call, layout: Layout, how: CallOptions, _: bool) -> tuple:
        """As ``ranks.Source``."""
        args = _rows(logits), layout.targets, _flat(scale, call), how.inplace_backward, call

        def logps() -> tuple[Tensor, None]:
            return autograd.Logps.apply(*args)[0], None

        def loss(candidates: Candidates) -> tuple:
            return *autograd.Ranking.apply(logps()[0], *candidates, call), None

        return call, logps, loss

    return _pro(check, source, (logits, None, None, scale), (None, options), by_candidate)


def _pro(
    check: Callable[[], ranks.Door],
    source: ranks.Source,
    tensors: ranks.Tensors,
    given: tuple[Any, dict[str, Any]],  # process group, options
    by_candidate: dict[str, Any],
) -> PROOutput:
    """The loss of candidates, whatever their log-probs come from, and on however many ranks."""
    group, options = given
    tokens_of = shards.group_of("sequence_group", options.get("sequence_group"))
    call, layout, how, loss = ranks.agreed(check, (group, tokens_of), tensors, by_candidate)
    call, logps, pro = source(call, layout, how, tokens_of is None)
    lists = layout
    if tokens_of is not None:
        lists, pro = ranks.across(tokens_of, layout, call, logps)
    scored = ranks.by_score(by_candidate)
    candidates = rank_candidates(lists, **scored, options=loss, dtype=call.acc_dtype)
    value, per_rank, sums, row_weights, dropped = pro(candidates)
    out = make_output(value, per_rank, sums, lists, loss)
    if call.grad_filter is None or dropped is None:
        return out
    mass, of_weight, of_hidden, kept = dropped
    lost = GradFilter(call.grad_filter, mass, of_weight, of_hidden, kept, layout.rows, row_weights)
    return out._replace(grad_filter=lost)


def _call(
    x: Tensor,  # hidden states or logits
    dtypes: tuple[torch.dtype, torch.dtype],  # of matmuls and logits
    logits: LogitOptions,
    how: CallOptions,
    weight: Tensor | None = None,
    loss: PROOptions | None = None,
    layout: Layout | None = None,
) -> Call:
    """The description of a call but for its plan."""
    validate.check_grad_filter(how.grad_filter)
    compute, dtype = dtypes
    ranking: dict[str, Any] = {}
    if loss is not None and layout is not None:
        ranks_with = resolve(how.backend, x.device, dtype, layout.shape[1])
        ranking = {"ranking": loss.ranking(), "ranks_with": ranks_with}
        ranking["final_dtype"] = loss.final_dtype
    return Call(
        backend=resolve(how.backend, x.device, dtype),
        logits=logits,
        plan=Plan("T0", 1),
        compute_dtype=compute,
        logits_dtype=dtype,
        weight_dtype=compute if weight is None else weight.dtype,
        vocab=x.shape[-1] if weight is None else weight.shape[0],
        **ranking,
        batch_invariant=how.batch_invariant,
        grad_filter=None if how.grad_filter == "auto" and compute.itemsize > 2 else how.grad_filter,
    )


def _flat(scale: Tensor | None, call: Call) -> Tensor | None:
    """(R,), in the dtype of log-probs."""
    return None if scale is None else scale.detach().reshape(-1).to(call.acc_dtype)


def _check_logits(logits: Tensor, targets: Tensor, lists: bool = False) -> None:
    """Logits (..., V) of at least two dimensions; of lists (B, n, T, V)."""
    validate.check_float("logits", logits)
    fits = logits.dim() == 4 and logits.shape[1] > 0 if lists else logits.dim() >= 2
    shape, legend = ("B, n, T", "(B, n, T)") if lists else ("...", "logits.shape[:-1]")
    if not fits or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape ({shape}, V), got {tuple(logits.shape)}")
    validate.check_targets_of(targets, "logits", logits, legend)


def _rows(logits: Tensor) -> Tensor:
    """(N, V), unit stride along V."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _lists(
    hidden: Tensor,
    targets: Tensor | None,
    layout: Layout | None,
    candidate_mask: Tensor | None,
    how: CallOptions,
    vocab: int | None,
) -> Layout:
    """The layout given, or one made from targets, both checked, less what the mask leaves out."""
    if layout is not None:
        if not isinstance(layout, Layout):
            raise TypeError(f"layout must be a Layout or None, got {type(layout).__name__}")
        if targets is not None:
            raise ValueError("targets must be None when layout is given (it holds them)")
        if how.shift:
            raise ValueError("shift must be False when layout is given (shift when making it)")
        rows = hidden.numel() // hidden.shape[-1]
        if rows != layout.num_rows:
            raise ValueError(
                f"hidden must have {layout.num_rows} rows as the layout says, got {rows} in shape "
                f"{tuple(hidden.shape)}"
            )
        validate.check_device("layout", layout.targets, "hidden", hidden)
        return layout.present(candidate_mask)
    if targets is None:
        raise TypeError("targets must be an integer tensor when no layout is given, got None")
    if hidden.dim() != 4 or hidden.shape[1] == 0:
        raise ValueError(
            f"hidden must have shape (B, n, T, H) without a layout, got {tuple(hidden.shape)}"
        )
    validate.check_targets_of(targets, "hidden", hidden, "(B, n, T)")
    targets = scored_targets(targets, how, candidate_mask)
    return Layout.of_targets(targets, how.ignore_index, vocab)


def scored_targets(
    targets: Tensor, how: CallOptions, candidate_mask: Tensor | None = None
) -> Tensor:
    """Targets, shifted if asked for, nothing scored of candidates outside the mask (B, n)."""
    if how.shift:
        targets = shift_targets(targets, how.ignore_index)
    if candidate_mask is None:
        return targets
    validate.check_candidate_mask(candidate_mask, tuple(targets.shape[:2]))
    there = candidate_mask.to(targets.device, non_blocking=True)[..., None]
    return torch.where(there, targets, how.ignore_index)
