"""The chunk loops around the head matmuls where the entropy of each row is wanted too.

    d entropy / d raw_v = -p_v (log p_v + entropy) dz_v/draw_v

is no multiple of dZ0, so the forward keeps logits instead of dZ0, and the backward makes one dZ of
both upstream gradients: still three head matmuls for rows whose logits were kept, and a fourth,
which computes them again, for the others. ``dZ W`` cannot be made in the forward, so the backward
needs the weight.

Legend: ``N`` scored rows, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pro_kernels import matmul
from pro_kernels.head import Head, acc_dtype, bias_grad, chunks_of, empty_rows, scatter_rows
from pro_kernels.options import LogitOptions


def forward(
    head: Head,
    rows: Tensor,  # (N,)
    targets: Tensor,  # (N,)
    *,
    chunk: int,
    logits: Tensor,  # (retained, V) in the logits' dtype, to fill; retained may be 0
    logps: Tensor,  # (N,) to fill
    stats: Tensor,  # (2 or 3, N) to fill: log-sum-exp, entropy; raw target logit if rounded
    extra: Tensor,  # (3 or 0, N) to fill: log sum p^2, mean logit, whether the target is the top
) -> None:
    """Log-probs and entropies of all rows, chunk by chunk."""
    n, retained = rows.shape[0], min(logits.shape[0], rows.shape[0])
    scratch = None
    for start, stop in chunks_of(n, chunk, retained):
        at = slice(start, stop)
        x, t = head.rows_of(rows[at]), targets[at]
        exact = head.target_logits(x, t)
        z = logits[at]
        if start >= retained:
            if scratch is None:
                shape = (min(chunk, n), head.weight.shape[0])
                scratch = empty_rows(logits, *shape, head.logits_dtype)
            z = scratch[: stop - start]
        matmul.logits_into(z, x, head.weight, head.bias)
        logps[at], stats[0, at], stats[1, at] = head.backend.logp(
            z, t, target_logits=exact, options=head.options, entropy=True
        )
        if exact is not None:
            stats[2, at] = exact
        if extra.shape[0]:
            extra[:, at] = _extra(z, t, exact, stats[0, at], head.options)


def backward(
    head: Head,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,  # (N,) upstream gradient of each log-prob
    entropy_weights: Tensor | None,  # (N,) upstream gradient of each entropy
    *,
    chunk: int,
    logits: Tensor,  # (retained, V)
    stats: Tensor,  # (2 or 3, N)
    hidden_out: Tensor | None,  # (R, H), zeros
    out: Tensor | None,  # (V, H) to fill
    bias_out: Tensor | None,  # (V,) to fill
) -> None:
    """DHidden, dW and dbias, by blocks of columns as in ``head.weight_backward``.

    dZ is divided by a power of two of each row, which the sides get back: so it keeps the range of
    probabilities whatever the upstream gradient is, and fp16 does not underflow. The kept logits
    stay as they are, for a second backward.
    """
    n, vocab = rows.shape[0], head.weight.shape[0]
    retained = min(logits.shape[0], n)
    scale = _powers_of_two(weights, entropy_weights)
    weights = weights / scale
    by = None if entropy_weights is None else entropy_weights / scale
    exact = stats[2] if stats.shape[0] > 2 else None
    block = vocab
    if chunk < n:
        block = max(64, chunk * vocab // n // 64 * 64)
    x = head.rows_of(rows[retained:]).to(head.operand_dtype) if retained < n else None
    xw: Any = None if out is None else head.weighted_rows(rows, scale)
    side: Any = None
    if hidden_out is not None and block < vocab:  # a sum over blocks
        shape = n, head.hidden.shape[1]
        side = head.hidden.new_zeros(shape, dtype=acc_dtype(head.logits_dtype))
    buffer = empty_rows(logits, n, min(block, vocab), head.logits_dtype)
    for first in range(0, vocab, block):
        cols = slice(first, min(first + block, vocab))
        dz = buffer[:, : cols.stop - first]
        sources = [(slice(0, retained), logits[:retained, cols])]
        if x is not None:
            bias = None if head.bias is None else head.bias[cols]
            z = matmul.logits_into(dz[retained:], x, head.weight[cols], bias)
            sources.append((slice(retained, n), z))
        for at, z in sources:
            head.backend.logits_grad(
                z,
                stats[0, at],
                targets[at],
                weights[at],
                target_logits=None if exact is None else exact[at],
                first_column=first,
                options=head.options,
                out=dz[at],
                entropy=None if by is None else (stats[1, at], by[at]),
            )
        dz = dz.to(head.compute_dtype)
        if hidden_out is not None:
            part = matmul.hidden_grad(dz, head.weight[cols])
            side = part if side is None else side.add_(part)
        if out is not None:
            matmul.weight_grad(dz, xw, out[cols], accumulate=False)
        if bias_out is not None:
            bias_out[cols] = bias_grad(dz, scale)
    if hidden_out is not None:
        scatter_rows(side, scale, rows, hidden_out, False, head.backend)


def _powers_of_two(*weights: Tensor | None) -> Tensor:
    """The power of two at or above the larger of each row's upstream gradients; 1 where all are 0.

    Dividing by it rounds nothing.
    """
    given = [x.abs() for x in weights if x is not None]
    largest = functools.reduce(torch.maximum, given)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


def _extra(
    logits: Tensor, targets: Tensor, exact: Tensor | None, lse: Tensor, options: LogitOptions
) -> Tensor:
    """``log sum_v p_v^2``, mean z, and 1 where the target is the first of the largest; (3, N)."""
    out = lse.new_empty((3, logits.shape[0]))
    step = max(1, matmul.workspace(logits.device.type) // (4 * logits.shape[1]))
    for i in range(0, logits.shape[0], step):
        at = slice(i, i + step)
        z = logits[at].to(lse.dtype)
        index = targets[at, None]
        # All of them rounded alike, or the target would win what rounds to a tie.
        top = (z if options.logit_scale > 0 else -z).argmax(1, keepdim=True)
        if exact is not None:
            z.scatter_(1, index, exact[at, None].to(z.dtype))
        z = z * options.logit_scale
        if options.softcap is not None:
            z = options.softcap * torch.tanh(z / options.softcap)
        out[0, at] = torch.logsumexp(2 * z, 1) - 2 * lse[at]
        out[1, at] = z.mean(1)
        out[2, at] = (top == index)[:, 0].to(out.dtype)
    return out
