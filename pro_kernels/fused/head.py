"""The chunk loop around the head matmul: log-probs, and what the backward will need.

For scored row r with upstream weight w_r (any sign), target t and ``dZ0 = onehot - softmax``:

    logp_r   = z_t - lse
    dHidden  = w * (dZ0 W)        dW = dZ0^T (w * X)        dbias = dZ0^T w

dZ0 stays unweighted, in the logits' own memory and dtype; the signed scalar goes into the thin
(N, H) sides, so one dZ0 serves every upstream gradient and loses nothing to rounding w into it.
``dZ0 W`` is made in the forward, with W at hand: a backward with dZ0 retained needs X, not W.

Where the entropy of each row is wanted too,

    d entropy / d raw_v = -p_v (log p_v + entropy) dz_v/draw_v

is no multiple of dZ0. Then the forward keeps logits, and the backward makes one dZ of both upstream
gradients: still three head matmuls for rows whose logits were kept, and a fourth, which computes
them again, for the others. ``dZ W`` is made there, so it needs the weight.

Where the log-sum-exp of each row is wanted too, dZ0 and dZ are 0 at targets, whose entries go
another way (``target_columns.py``).

Legend: ``N`` scored rows, ``R`` rows of the hidden states, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pro_kernels.fused import matmul
from pro_kernels.fused.call import Call, acc_dtype
from pro_kernels.fused.columns import Centre, Kept
from pro_kernels.fused.gather_scatter import Rows, clear_behind, empty_rows, rows_of, target_logits


class Saved(NamedTuple):
    """What the forward leaves for the backward."""

    # (1 to 4, N): log-sum-exp, entropy if wanted, log-prob if log-sum-exps are, and the raw target
    # logit if logits are rounded.
    stats: Tensor
    kept: Tensor  # (retained, V): dZ0, or logits where the entropy is wanted
    side: Tensor  # (N or 0, H): dZ0 W
    filter: Kept

    @classmethod
    def of(cls, tensors: Sequence[Tensor], call: Call) -> Saved:
        """What ``tensors`` were made of."""
        stats, kept, side, columns, counts, order, dropped = tensors
        return cls(stats, kept, side, Kept(call.grad_filter, columns, counts, order, dropped))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All of it, in the order of the ops."""
        return self.stats, self.kept, self.side, *self.filter.tensors

    def logp(self, call: Call) -> Tensor:
        """Log-probs, where log-sum-exps are wanted."""
        return self.stats[1 + call.entropy]

    def exact(self, call: Call, at: slice) -> Tensor | None:
        """Raw target logits of these rows, where the logits themselves are rounded."""
        return self.stats[-1, at] if call.rounds_logits else None


def forward(
    call: Call,
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H) in compute_dtype
    bias: Tensor | None,  # (V,) in compute_dtype
    rows: Rows,
    targets: Tensor,  # (N,)
    values: Tensor,  # (outputs, N) fp32 to fill
    saved: Saved,  # to fill
) -> None:
    """Log-probs of all rows, chunk by chunk, and what the backward will need."""
    n, plan, out = len(rows), call.plan, call.named(values)
    if plan.tier == "T0" and _score(call, hidden, weight, bias, rows, targets, out, saved):
        return
    retained = min(saved.kept.shape[0], n)
    scratch = None
    if call.grad_filter is not None and saved.filter.centre is None:
        saved.filter.centre = Centre.of(call, weight)
    for i, (start, stop) in enumerate(chunks_of(n, plan.chunk, retained)):
        keep, at = start < retained, slice(start, stop)
        here, t = rows[at], _part(targets, at)
        x = rows_of(call, hidden, here)
        exact = None if call.shard else target_logits(call, x, weight, bias, t)
        if keep and saved.kept.dtype == call.logits_dtype:
            logits = _part(saved.kept, at)
        else:
            if scratch is None:
                shape = min(plan.chunk, n), call.vocab
                scratch = empty_rows(saved.kept, *shape, call.logits_dtype)
            logits = scratch[: stop - start]
        into = matmul.logits_by_tiles if call.batch_invariant else matmul.logits_into
        into(logits, x, weight, bias, here.late(call))
        top = _top(call, logits, t, exact) if "top_ids" in out else None
        if call.entropy:
            logp, lse, entropy = call.kernels.logp(
                logits, t, target_logits=exact, options=call.logits, entropy=True
            )
            assert entropy is not None
            out["entropy"][at] = saved.stats[1, at] = entropy
            if "mean_logits" in out:
                extra = _extra(call, logits, t, exact, lse)
                out["log_sum_sq_probs"][at], out["mean_logits"][at] = extra
        elif call.shard:
            write = plan.need_hidden or keep
            logp, lse, exact = _across_ranks(call, x, weight, bias, t, logits, write)
        elif plan.need_hidden or keep or call.grad_filter is not None:
            logp, lse = call.kernels.residual_(logits, t, target_logits=exact, options=call.logits)
        else:
            logp, lse, _ = call.kernels.logp(logits, t, target_logits=exact, options=call.logits)
        out["logps"][at], saved.stats[0, at] = logp, lse
        if top is not None:  # plus 1, so that 0 is nobody's
            out["top_ids"][:, at] = top[1] + 1
            if "top_logps" in out:
                out["top_logps"][:, at] = (call.logits.transform(top[0]) - lse).clamp_max(0)
        if call.lse:
            out["lse"][at], saved.logp(call)[at] = lse, logp
        if exact is not None:
            saved.stats[-1, at] = exact
        if call.entropy:
            continue
        if call.lse:
            clear_targets(call, logits, t)
        dz, groups, stand_ins = logits, None, None
        if call.grad_filter is not None:
            stand_ins = saved.filter.choose(call, i, logits, x, t, weight, at)
            groups = saved.filter.of(i, at)
            if here.scale is not None:  # bounds are of gradients of the hidden states as they came
                saved.filter.dropped[2, at] *= here.scale.abs()
            if (late := here.late(call)) is not None:
                saved.filter.dropped[1, at] *= late.abs()
        if keep and saved.kept.dtype != call.logits_dtype:
            width = call.vocab if groups is None else groups.widest
            clear_behind(saved.kept[at], width)
            dz = saved.kept[at]
            dz[:, :width] = logits[:, :width]
        if plan.need_hidden and groups is not None and stand_ins is not None:
            side = _part(saved.side, at)
            saved.filter.hidden_grad(call, groups, dz, weight, stand_ins, side)
        elif plan.need_hidden:
            matmul.hidden_grad(dz.to(call.compute_dtype), weight, _part(saved.side, at))


def _score(call, hidden, weight, bias, rows, targets, out, saved) -> bool:
    """``forward`` without a backward by the backend's fused kernel; False where that is slower."""
    fused, n = call.kernels.scores_fused, len(rows)
    if not fused or call.shard or not {"logps", "lse"}.issuperset(out):
        return False
    if call.batch_invariant or rows.late(call) is not None:
        return False
    if not fused(n, hidden.shape[1], call.vocab, call.compute_dtype, hidden.device):
        return False
    for i in range(0, n, call.plan.chunk):
        at = slice(i, i + call.plan.chunk)
        out["logps"][at], out.get("lse", saved.stats[0])[at] = call.kernels.score(
            rows_of(call, hidden, rows[at]), weight, bias, targets[at], options=call.logits
        )
    return True


def _across_ranks(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logits: Tensor,
    write: bool,  # dZ0 over the logits
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob and log-sum-exp of each row over the columns of all ranks.

    Then the raw logits of the targets where logits are rounded, exact as of ``target_logits``.
    """
    shard = call.shard
    assert shard is not None
    local, mine = own_columns(call, targets, logits.shape[1])
    raw = logits.gather(1, local[:, None])[:, 0].to(acc_dtype(logits.dtype))
    exact = target_logits(call, x, weight, bias, local)
    if exact is not None:  # the first column stands for a target of another rank: as it is
        raw = torch.where(mine, exact, raw)
    _, own, _ = call.kernels.logp(
        logits, local, target_logits=None if exact is None else raw, options=call.logits
    )
    top = shard.max_(own.clone())
    total, raw = shard.sum_(torch.stack([torch.exp(own - top), torch.where(mine, raw, 0.0)]))
    log_total = torch.log(total)
    logp = ((call.logits.transform(raw) - top) - log_total).clamp_max(0)
    lse, exact = top + log_total, None if exact is None else raw
    if write:
        call.kernels.logits_grad(
            logits, lse, targets, None,
            target_logits=exact, first_column=shard.first, options=call.logits, out=logits,
        )  # fmt: skip
    return logp, lse, exact


def own_columns(call: Call, targets: Tensor, count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Targets among the ``count`` columns from ``first`` on of this rank's, 0 for those elsewhere.

    And whether they are among them.
    """
    local = targets - first - (call.shard.first if call.shard else 0)
    here = (local >= 0) & (local < count)
    return torch.where(here, local, 0), here


def clear_targets(call: Call, dz: Tensor, targets: Tensor, first: int = 0) -> None:
    """Zeros at the targets, of columns from ``first`` on (``target_columns.py``)."""
    columns, here = own_columns(call, targets, dz.shape[1], first)
    at = torch.arange(dz.shape[0], device=dz.device), columns
    dz[at] = torch.where(here, 0.0, dz[at])  # scatter_ copies all of a 16-bit dz on a CPU


def _top(
    call: Call, logits: Tensor, targets: Tensor, exact: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Raw logits of the k most likely tokens of each row and their ids, (k, N).

    They are chosen by the logits as these are held, all rounded alike, or a target would win what
    rounds to a tie. The target's is exact then, as it is in the log-sum-exp.
    """
    largest = call.logits.logit_scale > 0
    if call.top == 1:  # the first of the largest, as of argmax, which is slow in 16 bits on a CPU
        raw, ids = (torch.max if largest else torch.min)(logits, 1, keepdim=True)
    else:
        raw, ids = logits.topk(call.top, 1, largest)
    raw, ids = raw.t().to(call.acc_dtype), ids.t()
    return raw if exact is None else torch.where(ids == targets, exact, raw), ids


def _extra(
    call: Call, logits: Tensor, targets: Tensor, exact: Tensor | None, lse: Tensor
) -> Tensor:
    """``log sum_v p_v^2`` and mean z, (2, N)."""
    out = lse.new_empty((2, logits.shape[0]))
    step = max(1, matmul.workspace(logits.device.type) // (4 * logits.shape[1]))
    for i in range(0, logits.shape[0], step):
        at = slice(i, i + step)
        z = logits[at].to(lse.dtype)
        if exact is not None:
            z.scatter_(1, targets[at, None], exact[at, None].to(z.dtype))
        z = call.logits.transform(z)
        out[0, at] = torch.logsumexp(2 * z, 1) - 2 * lse[at]
        out[1, at] = z.mean(1)
    return out


def chunks_of(n: int, chunk: int, retained: int) -> list[tuple[int, int]]:
    """Row ranges of at most ``chunk`` rows, with a border where retention ends."""
    starts = [*range(0, retained, chunk), *range(retained, n, chunk)]
    return list(zip(starts, [*starts[1:], n], strict=False)) if n else []


def _part(x: Tensor, at: slice) -> Tensor:
    """``x[at]``; itself where that is all of it, as a single chunk has it."""
    return x if at.stop - at.start == x.shape[0] else x[at]
