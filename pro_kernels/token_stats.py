"""The chunk loops around the head matmuls where the entropy of each row is wanted too.

    d entropy / d raw_v = -p_v (log p_v + entropy) dz_v/draw_v

is no multiple of dZ0, so the forward keeps logits instead of dZ0, and the backward makes one
weighted dZ of both upstream gradients: still three head matmuls for rows whose logits were kept,
and a fourth, which computes them again, for the others.

Legend: ``N`` scored rows, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pro_kernels import matmul
from pro_kernels.head import Head, acc_dtype, chunks_of, empty_rows
from pro_kernels.options import LogitOptions

# fp32 temporaries of a block of rows.
_BLOCK_BYTES = 1 << 24


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
    side: Tensor | None,  # (N, H) to fill with dZ W
    out: Tensor | None,  # (V, H) to fill
    bias_out: Tensor | None,  # (V,) to fill
) -> None:
    """``dZ W`` of each row, dW and dbias. The kept logits stay as they are, for a second one."""
    n, retained = rows.shape[0], min(logits.shape[0], rows.shape[0])
    chunks = chunks_of(n, chunk, retained)
    acc = acc_dtype(head.logits_dtype)
    total = out
    if out is not None and len(chunks) != 1:  # several terms are summed in fp32
        total = torch.zeros_like(out, dtype=acc)
    bias_total = None if bias_out is None else torch.zeros_like(bias_out, dtype=acc)
    shape = (max((b - a for a, b in chunks), default=0), head.weight.shape[0])
    buffer = empty_rows(logits, *shape, head.logits_dtype)
    for start, stop in chunks:
        at = slice(start, stop)
        x, dz = head.rows_of(rows[at]), buffer[: stop - start]
        z = logits[at]
        if start >= retained:
            z = matmul.logits_into(dz, x, head.weight, head.bias)
        by = None if entropy_weights is None else (stats[1, at], entropy_weights[at])
        head.backend.logits_grad(
            z,
            stats[0, at],
            targets[at],
            weights[at],
            target_logits=stats[2, at] if stats.shape[0] > 2 else None,
            options=head.options,
            out=dz,
            entropy=by,
        )
        if bias_total is not None:
            bias_total += _column_sums(dz, acc)
        dz = dz.to(head.compute_dtype)
        if side is not None:
            matmul.hidden_grad(dz, head.weight, side[at])
        if total is not None:
            matmul.weight_grad(dz, x.to(head.operand_dtype), total, accumulate=total is not out)
    for whole, sums in ((out, total), (bias_out, bias_total)):
        if whole is not None and sums is not None and sums is not whole:
            whole.copy_(sums)


def _extra(
    logits: Tensor, targets: Tensor, exact: Tensor | None, lse: Tensor, options: LogitOptions
) -> Tensor:
    """``log sum_v p_v^2``, the mean of z, and 1 where no logit reaches the target's; (3, rows)."""
    out = lse.new_empty((3, logits.shape[0]))
    step = max(1, _BLOCK_BYTES // (4 * max(1, logits.shape[1])))
    for i in range(0, logits.shape[0], step):
        at = slice(i, i + step)
        z = logits[at].to(lse.dtype)
        index = targets[at, None]
        if exact is not None:
            z.scatter_(1, index, exact[at, None].to(z.dtype))
        z = z * options.logit_scale
        if options.softcap is not None:
            z = options.softcap * torch.tanh(z / options.softcap)
        out[0, at] = torch.logsumexp(2 * z, 1) - 2 * lse[at]
        out[1, at] = z.mean(1)
        # On a tie the first of the largest is the top.
        out[2, at] = (z.argmax(1, keepdim=True) == index)[:, 0].to(out.dtype)
    return out


def _column_sums(dz: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over rows in fp32, by blocks of rows."""
    total = dz.new_zeros(dz.shape[1], dtype=dtype)
    step = max(1, _BLOCK_BYTES // (4 * max(1, dz.shape[1])))
    for i in range(0, dz.shape[0], step):
        total += dz[i : i + step].sum(0, dtype=dtype)
    return total
