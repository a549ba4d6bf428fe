"""Row kernels: a program reads a row of logits at a time, in tiles of BLOCK_V columns.

The launch is persistent: program p takes the rows p, p + G, p + 2 G, ... of a grid of G programs.
How a row is added up depends on V and the dtype only, so neither N nor G changes a bit of it.

The compiler is told to hoist nothing out of that loop: a tile's offsets and masks, kept in
registers from row to row, spill.

Legend: ``N`` rows, ``V`` columns, ``TILE`` lanes x group = BLOCK_V: a group of columns side by
side is one 16-byte vector, held by one thread. Bytes moved, logits of ``b`` bytes each:

    logp           N V b          one read
    residual       2 N V b        one read and one write; the second read is meant to hit L2
    logits_grad    2 N V b        one read and one write

With ``z`` the logits after scale and softcap, ``M = max_v z_v`` and ``s = sum_v exp(z_v - M)``:

    logp = (z_t - M) - log s        entropy = log s - sum_v exp(z_v - M) (z_v - M) / s
    lse = M + log s                 p_v = exp(z_v - M) / s        1 - p_t = -expm1(logp)
    d logp / d raw_v = (1{v=t} - p_v) dz_v/draw_v
    d entropy / d raw_v = -p_v (log p_v + entropy) dz_v/draw_v

The maximum and the sums are running ones, kept per lane and combined once at the end of the row.
A scalar maximum per tile would take a trip through shared memory and a barrier in every iteration.
A maximum per element would double the exponentials: of the 16 an SM does in a cycle, bf16 logits
read at 3.35 TB/s already take 8. Per lane it is one more exponential per vector and no
exchange between threads. Its sums are accurate too: short chains, then a tree.

Each lane's maximum is kept inside the finite range, so that ``(-inf) - (-inf)`` never occurs: a row
of -inf gives lse = -inf, a +inf gives lse = +inf, as ``torch.logsumexp`` does. NaN reaches the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pro_kernels.backends.triton.elementwise import (
    FLOAT_MAX,
    at_most_zero,
    exp,
    one_minus_exp,
    rounded,
    transform,
)

# Numbers that differ from call to call without being worth a compilation. ``V``, the matrices and
# their strides keep their specialisation (a multiple of 16 or not): vector loads need it. What a
# tuple holds always has it, so the pointers to one number a row, which need no alignment, stay
# outside. An option, fp32, has none.
_VARYING = ["N", "first_column"]
_UNALIGNED = ["targets_ptr", "exact_ptr", "weights_ptr", "lse_ptr", "logp_ptr", "entropy_ptr"]
_UNALIGNED += ["by_ptr"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def logp_kernel(
    logits,  # pointer to (N, V) and its row stride
    targets_ptr,  # (N,) int64
    exact_ptr,  # (N,) fp32 or None
    logp_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32 or None
    N,
    V,
    option,  # LogitOptions, see ``elementwise.transform``
    TILE: tl.constexpr,
):
    """Write logp, lse and, if asked for, the entropy of each row."""
    logits_ptr, stride = logits
    step = tl.num_programs(0)
    first = tl.program_id(0).to(tl.int64)  # row * stride may pass 2**31
    target = tl.load(targets_ptr + first)
    for row in tl.range(first, N, step, disable_licm=True):
        # Asked for a row ahead: all that follows waits for it.
        following = tl.load(targets_ptr + row + step, mask=row + step < N, other=-1)
        logp = 0.0
        lse = 0.0
        entropy = 0.0
        if target >= 0:
            row_ptr = logits_ptr + row * stride
            raw_t = _target_logit(row_ptr, exact_ptr, row, target, V)
            z_t, _ = transform(raw_t, option)
            top, total, moment = _row_sums(
                row_ptr, V, target.to(tl.int32), raw_t, option,
                exact_ptr is not None, entropy_ptr is not None, "evict_first", TILE,
            )  # fmt: skip
            log_total = tl.log(total)
            logp = at_most_zero((z_t - top) - log_total)
            lse = top + log_total
            finite = tl.abs(lse) < float("inf")
            entropy = tl.where(finite, log_total - moment / total, lse)  # as the C++ kernels
        tl.store(logp_ptr + row, logp)
        tl.store(lse_ptr + row, lse)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy)
        target = following


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def residual_kernel(
    logits,  # pointer to (N, V), overwritten, and its row stride
    targets_ptr,  # (N,) int64
    exact_ptr,  # (N,) fp32 or None
    logp_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp32
    N,
    V,
    option,  # LogitOptions, see ``elementwise.transform``
    TILE: tl.constexpr,
):
    """Overwrite each row with d logp / d raw; write logp and lse."""
    logits_ptr, stride = logits
    step = tl.num_programs(0)
    first = tl.program_id(0).to(tl.int64)  # row * stride may pass 2**31
    target = tl.load(targets_ptr + first)
    for row in tl.range(first, N, step, disable_licm=True):
        # Asked for a row ahead: all that follows waits for it.
        following = tl.load(targets_ptr + row + step, mask=row + step < N, other=-1)
        row_ptr = logits_ptr + row * stride
        logp = 0.0
        lse = 0.0
        if target < 0:
            _write_zeros(row_ptr, V, TILE)
        else:
            column = target.to(tl.int32)
            raw_t = _target_logit(row_ptr, exact_ptr, row, target, V)
            z_t, slope_t = transform(raw_t, option)
            top, total, _ = _row_sums(
                row_ptr, V, column, raw_t, option, exact_ptr is not None, False, "evict_last", TILE
            )
            log_total = tl.log(total)
            logp = at_most_zero((z_t - top) - log_total)
            lse = top + log_total
            _write_gradient(
                row_ptr, row_ptr, V, column, top, -1.0 / total, 0.0, one_minus_exp(logp) * slope_t,
                option, False, TILE,
            )  # fmt: skip
        tl.store(logp_ptr + row, logp)
        tl.store(lse_ptr + row, lse)
        target = following


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def logits_grad_kernel(
    logits,  # pointer to (N, V) and its row stride
    out,  # the same of the result, may be ``logits``
    lse_ptr,  # (N,) fp32
    targets_ptr,  # (N,) int64, in terms of the whole vocabulary
    weights_ptr,  # (N,) fp32 or None
    exact_ptr,  # (N,) fp32 or None
    entropy_ptr,  # (N,) fp32 or None
    by_ptr,  # (N,) fp32 or None: upstream gradient of the entropy
    first_column,
    N,
    V,
    option,  # LogitOptions, see ``elementwise.transform``
    TILE: tl.constexpr,
):
    """Write weights * d logp / d raw for columns first_column ... first_column + V.

    With an entropy, plus ``by`` times ``d entropy / d raw``.
    """
    logits_ptr, stride = logits
    out_ptr, out_stride = out
    step = tl.num_programs(0)
    first = tl.program_id(0).to(tl.int64)  # row * stride may pass 2**31
    target = tl.load(targets_ptr + first)
    for row in tl.range(first, N, step, disable_licm=True):
        # Asked for a row ahead: all that follows waits for it.
        following = tl.load(targets_ptr + row + step, mask=row + step < N, other=-1)
        out_row_ptr = out_ptr + row * out_stride
        if target < 0:
            _write_zeros(out_row_ptr, V, TILE)
        else:
            row_ptr = logits_ptr + row * stride
            lse = tl.load(lse_ptr + row)
            weight = 1.0
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + row)
            local = target - first_column
            column = tl.where((local >= 0) & (local < V), local, -1).to(tl.int32)
            raw_t = 0.0
            if column >= 0:
                raw_t = _target_logit(row_ptr, exact_ptr, row, local, V)
            # In place, a slow warp must not read the target's logit after a fast one overwrote it.
            tl.debug_barrier()
            z_t, slope_t = transform(raw_t, option)
            log_p = at_most_zero(z_t - lse)
            grad_t = one_minus_exp(log_p) * slope_t * weight
            factor = -weight
            tilt = 0.0
            if entropy_ptr is not None:
                entropy = tl.load(entropy_ptr + row)
                by = tl.load(by_ptr + row)
                factor -= by * entropy
                tilt = -by
                grad_t += tilt * exp(log_p) * (tl.maximum(log_p, -1e4) + entropy) * slope_t
            _write_gradient(
                row_ptr, out_row_ptr, V, column, lse, factor, tilt, grad_t,
                option, entropy_ptr is not None, TILE,
            )  # fmt: skip
        target = following


@triton.jit
def _row_sums(
    row_ptr, V, column, raw_t, option,
    EXACT: tl.constexpr, ENTROPY: tl.constexpr, POLICY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``M``, ``s = sum exp(z - M)`` and, with ENTROPY, ``sum exp(z - M)(z - M)``."""
    LANES: tl.constexpr = TILE.lanes
    GROUP: tl.constexpr = TILE.group
    top = tl.full((LANES,), -FLOAT_MAX, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES * GROUP):
        cols = start + _tile(TILE)
        inside = cols < V
        raw = tl.load(row_ptr + cols, mask=inside, other=-float("inf"), eviction_policy=POLICY).to(
            tl.float32
        )
        if EXACT:
            raw = tl.where(cols == column, raw_t, raw)
        z, _ = transform(raw, option)
        if option.softcap is not None or option.logit_scale is not None:
            z = tl.where(inside, z, -float("inf"))
        new_top = tl.minimum(tl.maximum(top, tl.max(z, axis=1)), FLOAT_MAX)
        below = z - new_top[:, None]
        e = exp(below)
        # Bounded so that 0 * shift stays 0 in a lane with no finite column yet: exp(-1e4) is 0.
        shift = tl.maximum(top - new_top, -1e4)
        rescale = exp(shift)
        if ENTROPY:
            moment = (moment + total * shift) * rescale
            moment += tl.sum(e * tl.maximum(below, -1e4), axis=1)
        total = total * rescale + tl.sum(e, axis=1)
        top = new_top
    row_top = tl.max(top, axis=0)
    shift = tl.maximum(top - row_top, -1e4)
    rescale = exp(shift)
    if ENTROPY:
        moment = (moment + total * shift) * rescale
    return row_top, tl.sum(total * rescale, axis=0), tl.sum(moment, axis=0)


@triton.jit
def _write_gradient(
    row_ptr, out_ptr, V, column, reference, factor, tilt, grad_t, option,
    TILT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write ``factor * exp(z - reference) * dz/draw``, and ``grad_t`` in the target's column.

    With TILT the factor is ``factor + tilt * (z - reference)``.
    """
    LANES: tl.constexpr = TILE.lanes
    GROUP: tl.constexpr = TILE.group
    last = (V - 1) // (LANES * GROUP) * (LANES * GROUP)
    # Backwards: what was read last is the likeliest to be in the L2 cache still.
    for back in range(0, V, LANES * GROUP):
        cols = last - back + _tile(TILE)
        inside = cols < V
        raw = tl.load(row_ptr + cols, mask=inside, other=0.0, eviction_policy="evict_first")
        z, slope = transform(raw.to(tl.float32), option)
        below = z - reference
        if TILT:  # bounded so that -inf columns are 0 * finite
            grad = exp(below) * (factor + tilt * tl.maximum(below, -1e4))
        else:
            grad = exp(below) * factor
        grad = tl.where(cols == column, grad_t, grad * slope)
        tl.store(out_ptr + cols, rounded(grad, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _write_zeros(out_ptr, V, TILE: tl.constexpr):
    LANES: tl.constexpr = TILE.lanes
    GROUP: tl.constexpr = TILE.group
    zeros = tl.zeros((LANES, GROUP), out_ptr.dtype.element_ty)
    for start in range(0, V, LANES * GROUP):
        cols = start + _tile(TILE)
        tl.store(out_ptr + cols, zeros, mask=cols < V)


@triton.jit
def _tile(TILE: tl.constexpr):
    return tl.arange(0, TILE.lanes)[:, None] * TILE.group + tl.arange(0, TILE.group)[None, :]


@triton.jit
def _target_logit(row_ptr, exact_ptr, row, target, V):
    """Raw logit of the target, the exact one where given. NaN, not a stray read, beyond V."""
    if exact_ptr is None:
        return tl.load(row_ptr + target, mask=target < V, other=float("nan")).to(tl.float32)
    else:
        return tl.load(exact_ptr + row, mask=target < V, other=float("nan")).to(tl.float32)
