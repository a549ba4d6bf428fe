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
from pro_kernels.fused.gather_scatter import Inputs, clear_behind, empty_rows


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


def forward(given: Inputs, values: Tensor, saved: Saved) -> None:
    """Log-probs of all tokens, chunk by chunk, into values (outputs, N); and what ``saved`` has."""
    call, n = given.call, given.tokens
    plan, out = call.plan, call.named(values)
    if plan.tier == "T0" and _score(given, out, saved):
        return
    retained, filtered = min(saved.kept.shape[0], n), call.grad_filter is not None
    scratch = None
    if filtered and saved.filter.centre is None:
        saved.filter.centre = Centre.of(call, given.weight)
    for i, at in enumerate(chunks_of(n, plan.chunk, retained)):
        keep, here = at.start < retained, given.part(at)
        x = here.x()
        if keep and saved.kept.dtype == call.logits_dtype:
            logits = _part(saved.kept, at)
        else:
            if scratch is None:
                shape = min(plan.chunk, n), call.vocab
                scratch = empty_rows(saved.kept, *shape, call.logits_dtype)
            logits = scratch[: at.stop - at.start]
        into = matmul.logits_by_tiles if call.batch_invariant else matmul.logits_into
        into(logits, x, here.weight, here.bias, here.late)
        write = plan.need_hidden or keep or filtered
        _statistics(here, x, logits, at, out, saved, write)
        if call.entropy:
            continue
        if call.lse:
            clear_targets(call, logits, here.targets)
        dz, groups, stand_ins = logits, None, None
        if filtered:
            stand_ins = saved.filter.choose(i, logits, x, here, at)
            groups = saved.filter.of(i, at)
        if keep and saved.kept.dtype != call.logits_dtype:
            width = call.vocab if groups is None else groups.widest
            clear_behind(saved.kept[at], width)
            dz = saved.kept[at]
            dz[:, :width] = logits[:, :width]
        if plan.need_hidden and groups is not None and stand_ins is not None:
            side = _part(saved.side, at)
            saved.filter.hidden_grad(call, groups, dz, here.weight, stand_ins, side)
        elif plan.need_hidden:
            matmul.hidden_grad(dz.to(call.compute_dtype), here.weight, _part(saved.side, at))


def _statistics(
    here: Inputs, x: Tensor, logits: Tensor, at: slice, out: dict[str, Tensor], saved: Saved,
    write: bool,
) -> None:  # fmt: skip
    """What ``out`` and ``saved`` are to know of a chunk; ``write``: dZ0 goes over the logits."""
    call, t = here.call, here.targets
    exact = None if call.shard else here.target_logits(x, t)
    top = _top(call, logits, t, exact) if "top_ids" in out else None
    if call.shard:
        logp, lse, exact = _across_ranks(here, x, logits, write)
    elif write and not call.entropy:
        logp, lse = call.kernels.residual_(call.rows(logits, t, exact))
    else:
        logp, lse, entropy = call.kernels.logp(call.rows(logits, t, exact), call.entropy)
        if entropy is not None:
            out["entropy"][at] = saved.stats[1, at] = entropy
        if "mean_logits" in out:
            extra = _extra(call, logits, t, exact, lse)
            out["log_sum_sq_probs"][at], out["mean_logits"][at] = extra
    out["logps"][at], saved.stats[0, at] = logp, lse
    if top is not None:  # plus 1, so that 0 is nobody's
        out["top_ids"][:, at] = top[1] + 1
        if "top_logps" in out:
            out["top_logps"][:, at] = (call.logits.transform(top[0]) - lse).clamp_max(0)
    if call.lse:
        out["lse"][at], saved.logp(call)[at] = lse, logp
    if exact is not None:
        saved.stats[-1, at] = exact


def _score(given: Inputs, out: dict[str, Tensor], saved: Saved) -> bool:
    """``forward`` without a backward by the backend's fused kernel; False where that is slower."""
    call, hidden = given.call, given.hidden
    fused, sizes = call.kernels.scores_fused, (given.tokens, hidden.shape[1], call.vocab)
    if not fused or call.shard or not {"logps", "lse"}.issuperset(out):
        return False
    if call.batch_invariant or given.late is not None:
        return False
    if not fused(*sizes, call.compute_dtype, hidden.device):
        return False
    score = call.kernels.score
    assert score is not None
    for at in chunks_of(given.tokens, call.plan.chunk, 0):
        here = given.part(at)
        out["logps"][at], out.get("lse", saved.stats[0])[at] = score(
            here.x(), here.weight, here.bias, here.targets, options=call.logits
        )
    return True


def _across_ranks(
    here: Inputs, x: Tensor, logits: Tensor, write: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob and log-sum-exp of each row over the columns of all ranks.

    Then the raw logits of the targets where logits are rounded, exact as of ``target_logits``.
    """
    call, shard = here.call, here.call.shard
    assert shard is not None
    local, mine = own_columns(call, here.targets, logits.shape[1])
    raw = logits.gather(1, local[:, None])[:, 0].to(acc_dtype(logits.dtype))
    exact = here.target_logits(x, local)
    if exact is not None:  # the first column stands for a target of another rank: as it is
        raw = torch.where(mine, exact, raw)
    _, own, _ = call.kernels.logp(call.rows(logits, local, None if exact is None else raw))
    top = shard.max_(own.clone())
    total, raw = shard.sum_(torch.stack([torch.exp(own - top), torch.where(mine, raw, 0.0)]))
    log_total = torch.log(total)
    logp = ((call.logits.transform(raw) - top) - log_total).clamp_max(0)
    lse, exact = top + log_total, None if exact is None else raw
    if write:
        rows = call.rows(logits, here.targets, exact)
        call.kernels.logits_grad(rows, lse, None, first_column=shard.first, out=logits)
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


def chunks_of(n: int, chunk: int, retained: int) -> list[slice]:
    """Rows of at most ``chunk`` at a time, with a border where retention ends."""
    starts = [*range(0, retained, chunk), *range(retained, n, chunk)]
    return list(map(slice, starts, [*starts[1:], n])) if n else []


def _part(x: Tensor, at: slice) -> Tensor:
    """``x[at]``; itself where that is all of it, as a single chunk has it."""
    return x if at.stop - at.start == x.shape[0] else x[at]
