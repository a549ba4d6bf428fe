"""Every operation as a ``torch.library`` op: schema, fake implementation, lazily loaded backend.

The ops take and return plain tensors and numbers, so ``torch.compile`` sees one opaque node each
and ``opcheck`` can test them. Sizes of outputs never depend on data: a call without a compact
layout (``rows=None``) gets outputs for all N tokens and drops the unscored ones inside. Gradients
are wired in ``autograd.py``.

Legend: ``R`` rows of the hidden states, ``N`` tokens, ``H`` hidden, ``V`` vocabulary, ``S``
sequences, ``B`` prompts, ``n`` candidates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pro_kernels import backends, head, token_stats
from pro_kernels.layout import raise_bad_target
from pro_kernels.options import IGNORE_INDEX, LogitOptions, RankingOptions
from pro_kernels.shards import Shard

# Not ``torch.library.custom_op``: its Python wrappers cost more than a small batch's arithmetic.
_LIBRARY = torch.library.Library("pro_kernels", "DEF")
# What is inside each op.
BODIES: dict[torch._ops.OpOverload, Callable] = {}
# How allocators say that there is no memory: PyTorch's on a CPU, C++, CUDA, Triton, cuBLAS.
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|out of memory|ALLOC_FAILED", re.IGNORECASE
)

_PLAIN = {Tensor, torch.nn.Parameter}


def _op(mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], torch._ops.OpOverload]:
    """Register a function as the op of its name, on every device; the op stands in its place."""

    def register(function: Callable) -> torch._ops.OpOverload:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        body = _naming_the_budget(function)
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        op = getattr(torch.ops.pro_kernels, name).default
        BODIES[op] = body
        return op

    return register


def _fake(op: torch._ops.OpOverload) -> Callable[[Callable], Callable]:
    """Register a function as the fake implementation of ``op``: shapes and dtypes only."""
    return torch.library.register_fake(op.name(), lib=_LIBRARY)


def _naming_the_budget(function: Callable) -> Callable:
    """``function`` whose out-of-memory error says which budget to lower.

    An op that takes a budget writes to nothing but its own outputs: an error drops them.
    """
    # Where Dynamo is on and an op runs between graphs, it would trace into the body.
    untraced = torch._disable_dynamo(function)

    @functools.wraps(function)
    def run(*args, **kwargs):
        # ``untraced`` imports Dynamo, a second of work: not for those who do not compile.
        body = untraced if "torch._dynamo" in sys.modules else function
        try:
            return body(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            text = str(error)
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if (known or _NO_MEMORY.search(text)) and kwargs.get("budget"):
                error.args = (
                    f"{text}\npro_kernels::{function.__name__} ran with a budget of "
                    f"{kwargs['budget']} bytes: lower it by budget= or PRO_KERNELS_BUDGET",
                )
            raise

    return run


def direct(op: torch._ops.OpOverload, *tensors: Tensor) -> Callable:
    """What to call for an op on these tensors, below autograd: its body if nothing would notice.

    The way through the dispatcher takes some 20 us of the host for the ops of the head, together a
    tenth of a batch of two prompts. It is needed where a compiler, a mode, a profiler or a kind of
    tensor wants to see the op.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch.autograd.profiler._is_profiler_enabled
        or tensors[0].is_meta
        or not _PLAIN.issuperset(map(type, tensors))
    )
    return op if watched else BODIES[op]


@_op()
def logps(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,), IGNORE_INDEX where not scored
    softcap: float | None,
    logit_scale: float,
    backend: str,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each target, log-sum-exp and entropy (or nothing) of each row, ``(N,)`` fp32."""
    check_range(targets, logits.shape[1])
    options = LogitOptions(softcap, logit_scale)
    logp, lse, third = backends.get(backend).logp(logits, targets, options=options, entropy=entropy)
    return logp, lse, lse.new_empty(0) if third is None else third


@_fake(logps)
def _(logits, targets, softcap, logit_scale, backend, entropy):
    out = logits.new_empty(targets.shape, dtype=head.acc_dtype(logits.dtype))
    return out, torch.empty_like(out), out.new_empty(out.shape if entropy else 0)


def _logits_grad(logits, lse, targets, weights, entropy, by, softcap, logit_scale, backend, out):
    return backends.get(backend).logits_grad(
        logits,
        lse,
        targets,
        weights,
        options=LogitOptions(softcap, logit_scale),
        out=out,
        entropy=None if entropy is None else (entropy, by),
    )


@_op()
def logits_grad(
    logits: Tensor,  # (N, V)
    lse: Tensor,  # (N,)
    targets: Tensor,  # (N,)
    weights: Tensor,  # (N,) upstream gradient of each log-prob
    entropy: Tensor | None,  # (N,)
    entropy_weights: Tensor | None,  # (N,) upstream gradient of each entropy
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> Tensor:
    """Gradient with respect to the logits; rows that are not scored become 0 without being read."""
    rows = (lse, targets, weights, entropy, entropy_weights)
    return _logits_grad(logits, *rows, softcap, logit_scale, backend, None)


@_fake(logits_grad)
def _(logits, lse, targets, weights, entropy, entropy_weights, softcap, logit_scale, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_op(mutates_args=("logits",))
def logits_grad_(
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    weights: Tensor,
    entropy: Tensor | None,
    entropy_weights: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> None:
    """``logits_grad`` written over the logits."""
    rows = (lse, targets, weights, entropy, entropy_weights)
    _logits_grad(logits, *rows, softcap, logit_scale, backend, logits)
    # Kernels write through pointers, which autograd does not see; it must find logits that another
    # node saved, or a second backward of this one, changed.
    if not logits.is_inference():
        torch.autograd.graph.increment_version(logits)


@_fake(logits_grad_)
def _(logits, lse, targets, weights, entropy, entropy_weights, softcap, logit_scale, backend):
    return None


@_op()
def ranking(
    logps: Tensor,  # (N,) fp32
    offsets: Tensor,  # (S + 1,)
    lengths: Tensor,  # (S,)
    order: Tensor,  # (B, n)
    rewards: Tensor | None,  # (B, n)
    sft_rank: Tensor,  # (B,)
    prompt_weights: Tensor,  # (B,)
    length_normalize: bool,
    tau: float,
    skip_ties: bool,
    eps: float,
    sft_weight: float,
    sft_mean: bool,
    top_k: int | None,
    single_sft: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss terms (B, n), sequence sums (S,) and ``d loss / d logps`` (N,); see the backends."""
    options = RankingOptions(
        length_normalize, tau, skip_ties, eps, sft_weight, sft_mean, top_k, single_sft
    )
    args = head.RankingArgs(offsets, lengths, order, rewards, sft_rank, prompt_weights, options)
    return args.run(backends.get(backend), logps)


@_fake(ranking)
def _(logps, offsets, lengths, order, rewards, sft_rank, prompt_weights, *options):
    return (
        logps.new_empty(order.shape),
        logps.new_empty(lengths.shape),
        logps.new_empty(logps.shape),
    )


@_op()
def head_logps(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,); None: token i is row i, unscored ones are dropped here
    targets: Tensor,  # (N,)
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    chunk: int,
    retained: int,
    need_hidden: bool,
    grad_filter: float | None,
    *,
    budget: int = 0,  # that of the plan, for its error message
    score_only: bool = False,
    group: str | None = None,  # of ``shards.Shard``, with the next two
    first: int = 0,
    vocab: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of the scored rows, and what the backward needs.

    Returns ``logps`` (N,); ``stats``, the log-sum-exp of each row and, where logits are rounded,
    the raw target logit, in compact order; ``residual`` (retained, V); ``side`` (N or 0, H), dZ0 W;
    with a filter the ``columns``, ``counts`` and ``dropped`` of ``head.Kept``, else empty ones.
    """
    with _autocast_off(hidden):
        check_range(targets, vocab if group else weight.shape[0])
        options = LogitOptions(softcap, logit_scale)
        h = _head(hidden, weight, bias, compute_dtype, logits_dtype, options, backend)
        h = _sharded(h, group, first, vocab)
        logps, stats, residual, side, *buffers = _head_buffers(
            h, targets, chunk, retained, need_hidden, grad_filter
        )
        kept = _kept(grad_filter, buffers)
        live, rows, kept_targets = _compact(rows, targets)
        n = rows.shape[0]
        compact = logps if live is None else logps.new_empty(n)
        head.forward(
            h,
            rows,
            kept_targets,
            chunk=chunk,
            need_hidden=need_hidden,
            residual=residual,
            side=side,
            logps=compact,
            stats=stats[:, :n],
            kept=kept,
            score_only=score_only,
        )
        if live is not None:
            logps.zero_().index_copy_(0, live, compact)
            if kept is not None:
                kept.spread_dropped(live)
        columns, counts, dropped = buffers
        return logps, stats, residual, side, columns, counts, dropped


@_fake(head_logps)
def _(
    hidden,
    weight,
    bias,
    rows,
    targets,
    compute_dtype,
    logits_dtype,
    softcap,
    logit_scale,
    backend,
    chunk,
    retained,
    need_hidden,
    grad_filter,
    *,
    budget=0,
    score_only=False,
    group=None,
    first=0,
    vocab=0,
):
    h = head.Head(hidden, weight, bias, None, None, compute_dtype, logits_dtype)
    return _head_buffers(h, targets, chunk, retained, need_hidden, grad_filter)


@_op()
def head_backward(
    grad: Tensor,  # (N,) upstream gradient of each log-prob
    hidden: Tensor,  # (R, H)
    weight: Tensor | None,  # (V, H); None where all of dZ0 was retained
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,)
    targets: Tensor,  # (N,)
    stats: Tensor,  # (1 or 2, N)
    residual: Tensor,  # (retained, V)
    side: Tensor,  # (N or 0, H)
    columns: Tensor,  # of head.Kept
    counts: Tensor,
    dropped: Tensor,
    grad_filter: float | None,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    chunk: int,
    vocab: int,
    weight_dtype: torch.dtype,
    shared_rows: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    budget: int = 0,
    group: str | None = None,  # of ``shards.Shard``, with the next
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """DHidden (R, H), dW (V, H) and dbias (V,); those not needed are empty."""
    with _autocast_off(hidden):
        options = LogitOptions(softcap, logit_scale)
        h = _head(hidden, weight, bias, compute_dtype, logits_dtype, options, backend)
        h = _sharded(h, group, first)
        d_hidden, d_weight, d_bias = _grad_buffers(
            hidden, vocab, weight_dtype, need_hidden, need_weight, need_bias
        )
        live, rows, targets = _compact(rows, targets)
        n = rows.shape[0]
        w = grad.to(stats.dtype) if live is None else grad.to(stats.dtype)[live]
        if need_hidden:
            head.scatter_rows(side[:n], w, rows, d_hidden.zero_(), shared_rows, h.backend)
            if h.shard is not None:
                h.shard.sum_(d_hidden)
        if need_weight or need_bias:
            head.weight_backward(
                h,
                rows,
                targets,
                w,
                chunk=chunk,
                residual=residual,
                stats=stats[:, :n],
                out=d_weight if need_weight else None,
                bias_out=d_bias if need_bias else None,
                kept=_kept(grad_filter, (columns, counts, dropped)),
            )
        return d_hidden, d_weight, d_bias


@_fake(head_backward)
def _(grad, hidden, weight, *config, budget=0, group=None, first=0):
    vocab, weight_dtype, _shared, need_hidden, need_weight, need_bias = config[-6:]
    return _grad_buffers(hidden, vocab, weight_dtype, need_hidden, need_weight, need_bias)


@_op()
def head_stats(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,); None: token i is row i, unscored ones are dropped here
    targets: Tensor,  # (N,)
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    chunk: int,
    retained: int,
    extra: bool,
    *,
    budget: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and more of the scored rows, and what the backward needs.

    Returns ``values`` (2 or 5, N): log-prob, entropy and, with ``extra``, ``log sum p^2``, the mean
    logit and whether the target is the largest; ``stats`` (2 or 3, N), in compact order, and
    ``logits`` (retained, V) as of ``token_stats``.
    """
    with _autocast_off(hidden):
        check_range(targets, weight.shape[0])
        options = LogitOptions(softcap, logit_scale)
        h = _head(hidden, weight, bias, compute_dtype, logits_dtype, options, backend)
        values, stats, logits = _stats_buffers(h, targets, retained, extra)
        live, rows, kept_targets = _compact(rows, targets)
        n = rows.shape[0]
        compact = values if live is None else values.new_empty(values.shape[0], n)
        token_stats.forward(
            h,
            rows,
            kept_targets,
            chunk=chunk,
            logits=logits,
            logps=compact[0],
            stats=stats[:, :n],
            extra=compact[2:],
        )
        compact[1] = stats[1, :n]
        if live is not None:
            values.zero_().index_copy_(1, live, compact)
        return values, stats, logits


@_fake(head_stats)
def _(
    hidden,
    weight,
    bias,
    rows,
    targets,
    compute_dtype,
    logits_dtype,
    softcap,
    logit_scale,
    backend,
    chunk,
    retained,
    extra,
    *,
    budget=0,
):
    h = head.Head(hidden, weight, bias, None, None, compute_dtype, logits_dtype)
    return _stats_buffers(h, targets, retained, extra)


@_op()
def head_stats_backward(
    grad: Tensor,  # (N,) upstream gradient of each log-prob
    entropy_grad: Tensor | None,  # (N,) of each entropy
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,)
    targets: Tensor,  # (N,)
    stats: Tensor,  # (2 or 3, N)
    logits: Tensor,  # (retained, V)
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    chunk: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    budget: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """DHidden (R, H), dW (V, H) and dbias (V,); those not needed are empty."""
    with _autocast_off(hidden):
        options = LogitOptions(softcap, logit_scale)
        h = _head(hidden, weight, bias, compute_dtype, logits_dtype, options, backend)
        d_hidden, d_weight, d_bias = _grad_buffers(
            hidden, weight.shape[0], weight.dtype, need_hidden, need_weight, need_bias
        )
        live, rows, targets = _compact(rows, targets)
        w = grad.to(stats.dtype)
        by = None if entropy_grad is None else entropy_grad.to(stats.dtype)
        if live is not None:
            w, by = w[live], None if by is None else by[live]
        token_stats.backward(
            h,
            rows,
            targets,
            w,
            by,
            chunk=chunk,
            logits=logits,
            stats=stats[:, : rows.shape[0]],
            hidden_out=d_hidden.zero_() if need_hidden else None,
            out=d_weight if need_weight else None,
            bias_out=d_bias if need_bias else None,
        )
        return d_hidden, d_weight, d_bias


@_fake(head_stats_backward)
def _(grad, entropy_grad, hidden, weight, *config, budget=0):
    return _grad_buffers(hidden, weight.shape[0], weight.dtype, *config[-3:])


@_op()
def linear_pro(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,)
    targets: Tensor,  # (N,)
    offsets: Tensor,  # (S + 1,)
    lengths: Tensor,  # (S,)
    order: Tensor,  # (B, n)
    rewards: Tensor | None,  # (B, n)
    sft_rank: Tensor,  # (B,)
    prompt_weights: Tensor,  # (B,)
    prompt_tokens: Sequence[int],
    prompt_chunks: Sequence[int],
    compute_dtype: torch.dtype,
    softcap: float | None,
    logit_scale: float,
    length_normalize: bool,
    tau: float,
    skip_ties: bool,
    eps: float,
    sft_weight: float,
    sft_mean: bool,
    top_k: int | None,
    single_sft: bool,
    backend: str,
    shared_rows: bool,
    need_hidden: bool,
    need_bias: bool,
    grad_filter: float | None,
    *,
    budget: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tier T2: loss terms (B, n), sequence sums (S,), and dHidden, dW, dbias of the loss.

    Then the row weights (N,) and, with a filter, ``dropped`` of ``head.Kept``.
    """
    with _autocast_off(hidden):
        check_range(targets, weight.shape[0])
        logit_options = LogitOptions(softcap, logit_scale)
        h = _head(hidden, weight, bias, compute_dtype, compute_dtype, logit_options, backend)
        d_hidden, d_weight, d_bias = _grad_buffers(
            hidden, weight.shape[0], head.acc_dtype(compute_dtype), need_hidden, True, need_bias
        )
        live, rows, kept_targets = _compact(rows, targets)
        if live is not None:  # dense: the token list shrinks, and the offsets with it
            before = torch.nn.functional.pad((targets >= 0).cumsum(0), (1, 0))
            ends = torch.tensor([0, *prompt_tokens], device=before.device).cumsum(0)
            offsets, prompt_tokens = before[offsets], before[ends].diff().tolist()
        options = RankingOptions(
            length_normalize, tau, skip_ties, eps, sft_weight, sft_mean, top_k, single_sft
        )
        kept = head.Kept.empty(
            grad_filter, len(prompt_chunks), weight.shape[0], targets.shape[0], hidden
        )
        terms, sums, row_weights = head.pro_forward(
            h,
            rows,
            kept_targets,
            head.RankingArgs(offsets, lengths, order, rewards, sft_rank, prompt_weights, options),
            prompt_tokens=prompt_tokens,
            prompt_chunks=prompt_chunks,
            shared=shared_rows,
            d_hidden=d_hidden.zero_() if need_hidden else None,
            d_weight=d_weight.zero_(),
            d_bias=d_bias.zero_() if need_bias else None,
            kept=None if grad_filter is None else kept,
        )
        if live is not None:
            compact, row_weights = row_weights, row_weights.new_zeros(targets.shape[0])
            row_weights.index_copy_(0, live, compact)
            kept.spread_dropped(live)
        # dbias is small: it stays in fp32 until it is scaled, and is rounded once.
        grads = (d_hidden, d_weight.to(weight.dtype), d_bias)
        return terms, sums, *grads, row_weights, kept.dropped


@_fake(linear_pro)
def _(hidden, weight, bias, rows, targets, offsets, lengths, order, *config, budget=0):
    compute_dtype, (need_hidden, need_bias, grad_filter) = config[5], config[-3:]
    acc = head.acc_dtype(compute_dtype)
    *grads, d_bias = _grad_buffers(
        hidden, weight.shape[0], weight.dtype, need_hidden, True, need_bias
    )
    grads.append(d_bias.to(acc))
    terms = hidden.new_empty(order.shape, dtype=acc)
    n = targets.shape[0]
    dropped = hidden.new_empty((3, 0 if grad_filter is None else n), dtype=torch.float32)
    row_weights = hidden.new_empty(n, dtype=acc)
    return (terms, hidden.new_empty(lengths.shape, dtype=acc), *grads, row_weights, dropped)


@_op()
def scaled(x: Tensor, by: Tensor, *, budget: int) -> Tensor:
    """``by * x`` in x's dtype, multiplied in fp32 (fp64): neither factor is rounded before.

    ``budget``: of the forward, which an error names.
    """
    acc = head.acc_dtype(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat, source = out.view(-1), x.reshape(-1)
    for i in range(0, flat.numel(), 1 << 22):
        at = slice(i, i + (1 << 22))
        flat[at] = source[at].to(acc) * by.to(acc)
    return out


@_fake(scaled)
def _(x, by, *, budget):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check_range(targets: Tensor, vocab: int) -> None:
    """Raise ValueError for a target outside [0, V) that is not IGNORE_INDEX.

    On a GPU the check is queued with ``torch._assert_async`` (as ``cross_entropy`` does with its
    device-side assertion): nothing waits, and the error surfaces at the next synchronisation.
    """
    on_cpu = targets.device.type == "cpu"
    if on_cpu and targets.numel():
        low, high = map(int, targets.aminmax())
        if low >= 0 and high < vocab:
            return
    bad = (targets >= vocab) | ((targets < 0) & (targets != IGNORE_INDEX))
    if on_cpu:
        if bad.any():
            raise_bad_target(targets, int(bad.nonzero()[0]), vocab, IGNORE_INDEX)
    elif targets.device.type != "meta":
        torch._assert_async(~bad.any(), f"targets must lie in [0, {vocab})")


def _head(hidden, weight, bias, compute_dtype, logits_dtype, options, backend) -> head.Head:
    return head.Head(
        hidden,
        hidden.new_empty(0, hidden.shape[1]) if weight is None else weight.to(compute_dtype),
        None if bias is None else bias.to(compute_dtype),
        backends.get(backend),
        options,
        compute_dtype,
        logits_dtype,
    )


def _sharded(h: head.Head, group: str | None, first: int, vocab: int = 0) -> head.Head:
    if not group:
        return h
    return dataclasses.replace(h, shard=Shard(group, first, vocab, most=0, budget=0))


def _kept(tau: float | None, buffers: Sequence[Tensor]) -> head.Kept | None:
    return None if tau is None else head.Kept(tau, *buffers)


def _head_buffers(
    h: head.Head,
    targets: Tensor,
    chunk: int,
    retained: int,
    need_hidden: bool,
    grad_filter: float | None,
) -> tuple[Tensor, ...]:
    n, hidden = targets.shape[0], h.hidden
    acc = head.acc_dtype(h.compute_dtype)
    chunks = -(-retained // chunk) - (-n // chunk) + 1
    kept = head.Kept.empty(grad_filter, chunks, h.weight.shape[0], n, hidden)
    return (
        hidden.new_empty(n, dtype=acc),
        hidden.new_empty((2 if h.logits_dtype.itemsize < 4 else 1, n), dtype=acc),
        head.empty_rows(hidden, retained, h.weight.shape[0], h.compute_dtype),
        hidden.new_empty((n if need_hidden else 0, hidden.shape[1]), dtype=h.side_dtype),
        kept.columns,
        kept.counts,
        kept.dropped,
    )


def _stats_buffers(
    h: head.Head, targets: Tensor, retained: int, extra: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, like = targets.shape[0], h.hidden
    acc = head.acc_dtype(h.compute_dtype)
    return (
        like.new_empty((5 if extra else 2, n), dtype=acc),
        like.new_empty((3 if h.logits_dtype.itemsize < 4 else 2, n), dtype=acc),
        head.empty_rows(like, retained, h.weight.shape[0], h.logits_dtype),
    )


def _grad_buffers(
    hidden: Tensor,
    vocab: int,
    weight_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = hidden.shape[1]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0, width)),
        hidden.new_empty((vocab if need_weight else 0, width), dtype=weight_dtype),
        hidden.new_empty(vocab if need_bias else 0, dtype=weight_dtype),
    )


def _compact(rows: Tensor | None, targets: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Positions of live tokens (None: all of them), their rows and their targets."""
    if rows is not None:
        return None, rows, targets
    live = (targets >= 0).nonzero()[:, 0]
    return live, live, targets[live]


def _autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    """Dtypes are chosen before the op; autocast must not change them again inside."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
