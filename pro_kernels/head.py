"""The chunk loops around the head matmuls: what runs inside the ops.

For scored row r with upstream weight w_r (any sign), target t and ``dZ0 = onehot - softmax``:

    logp_r   = z_t - lse
    dHidden  = w * (dZ0 W)        dW = dZ0^T (w * X)        dbias = dZ0^T w

dZ0 stays unweighted, in the logits' own memory and dtype; the signed scalar goes into the thin
(N, H) sides, so one dZ0 serves every upstream gradient and loses nothing to rounding w into it.
``dZ0 W`` is made in the forward, with W at hand: a backward with dZ0 retained needs X, not W.

Legend: ``N`` scored rows, ``R`` rows of the hidden states, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from pro_kernels import column_filter, matmul
from pro_kernels.options import LogitOptions, RankingOptions
from pro_kernels.shards import Shard


@dataclass(frozen=True)
class Head:
    """One call's head: what the logits are made from, and by which backend they are read."""

    hidden: Tensor  # (R, H)
    weight: Tensor  # (V, H) in compute_dtype; (0, H) where all of dZ0 is at hand
    bias: Tensor | None  # (V,) in compute_dtype
    backend: ModuleType
    options: LogitOptions
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    shard: Shard | None = None  # the weight is this rank's part

    @property
    def operand_dtype(self) -> torch.dtype:
        """Dtype in which the matmuls really run."""
        upcasts = matmul.upcasts(self.compute_dtype, self.hidden.device.type)
        return torch.float32 if upcasts else self.compute_dtype

    @property
    def side_dtype(self) -> torch.dtype:
        """Dtype of dZ0 W: fp32 where the matmul can leave its sums so, rounded with w once."""
        return matmul.sums_dtype(self.compute_dtype, self.hidden.device.type)

    def rows_of(self, rows: Tensor) -> Tensor:
        """The hidden states of these rows, in the dtype of the matmuls."""
        if gather := getattr(self.backend, "gather_rows", None):
            return gather(self.hidden, rows, None, self.compute_dtype)
        return self.hidden.index_select(0, rows).to(self.compute_dtype)

    def weighted_rows(self, rows: Tensor, row_weights: Tensor) -> Tensor:
        """``w * X`` for the dW matmul, rounded only as far as that matmul reads it."""
        if gather := getattr(self.backend, "gather_rows", None):
            if self.hidden.dtype == self.compute_dtype:  # else the cast rounds first, as X did
                return gather(self.hidden, rows, row_weights, self.operand_dtype)
        x = self.rows_of(rows).to(row_weights.dtype)
        return x.mul_(row_weights[:, None]).to(self.operand_dtype)

    def target_logits(self, x: Tensor, targets: Tensor) -> Tensor | None:
        """Raw target logits as fp32 dot products, where the logits themselves are rounded."""
        if self.logits_dtype.itemsize >= 4:
            return None
        if own := getattr(self.backend, "target_logits", None):
            return own(x, self.weight, self.bias, targets)
        exact = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        for i in range(0, x.shape[0], 1024):
            at = slice(i, i + 1024)
            w = self.weight.index_select(0, targets[at]).float()
            torch.sum(w.mul_(x[at]), 1, out=exact[at])
        return exact if self.bias is None else exact + self.bias[targets].float()

    def scores_fused(self, rows: int) -> bool:
        """Whether the backend's matmul with a log-sum-exp behind it serves, and is the faster."""
        measured = getattr(self.backend, "scores_fused", None)
        shape = rows, self.hidden.shape[1], self.weight.shape[0]
        return measured is not None and measured(*shape, self.compute_dtype, self.hidden.device)

    def score(
        self, rows: Tensor, targets: Tensor, chunk: int, logps: Tensor, stats: Tensor
    ) -> None:
        """Log-probs and log-sum-exps straight from hidden states: no logit is ever written."""
        for i in range(0, rows.shape[0], chunk):
            at = slice(i, i + chunk)
            x = self.rows_of(rows[at])
            logps[at], stats[0, at] = self.backend.score(
                x, self.weight, self.bias, targets[at], options=self.options
            )


def empty_rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised ``(rows, columns)``, the rows 16 bytes apart or a multiple of it.

    What cuBLAS and vector loads are fast with, and what makes the CUDA kernels split every row
    alike: a row's bits must not depend on where it stands.
    """
    step = max(1, 16 // dtype.itemsize)
    return like.new_empty((rows, -(-columns // step) * step), dtype=dtype)[:, :columns]


@dataclass(frozen=True)
class Kept:
    """Which columns stay in the gradient matmuls of each chunk; filled by ``forward``."""

    tau: float
    columns: Tensor  # (chunks, V) int32; row c holds counts[c] columns
    counts: Tensor  # (chunks,) int64, on the CPU: they size the matmuls
    # (3, N) fp32: dropped mass, norm, bound of the error of dZ0 W (column_filter.py)
    dropped: Tensor

    @classmethod
    def empty(cls, tau: float | None, chunks: int, vocab: int, n: int, like: Tensor) -> Kept:
        """Room for ``chunks`` chunks of ``n`` rows in all; no room without a filter."""
        if tau is None:
            return cls(
                0.0,
                like.new_empty((0, vocab), dtype=torch.int32),
                # On the call's device: a CPU tensor would cost Inductor its graphs.
                like.new_empty(0, dtype=torch.int64),
                like.new_empty((3, 0), dtype=torch.float32),
            )
        return cls(
            tau,
            like.new_zeros((chunks, vocab), dtype=torch.int32),
            torch.zeros(chunks, dtype=torch.int64, device="cpu"),
            like.new_zeros((3, n), dtype=torch.float32),
        )

    def choose(
        self, chunk: int, residual: Tensor, targets: Tensor, head: Head, at: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Choose a chunk's columns; its dZ0, compacted in place with the stand-in behind, and u."""
        scale = head.options.logit_scale  # of dZ0 over minus the probabilities, off the target
        chosen = column_filter.select(residual, targets, self.tau * abs(scale))
        if chosen is None:
            self.counts[chunk] = residual.shape[1]
            return residual, None
        count = chosen.columns.shape[0]
        self.columns[chunk, :count] = chosen.columns
        self.counts[chunk] = count
        u, radius = column_filter.center(head.weight, chosen)
        parts = column_filter.split(chosen.total, head.compute_dtype)
        reach = column_filter.reach(chosen, parts, u, radius)
        self.dropped[:, at] = torch.stack([chosen.mass / abs(scale), chosen.norm, reach])
        parts = -parts if scale > 0 else parts
        return column_filter.compact_(residual, chosen.columns, parts), u

    def spread_dropped(self, live: Tensor) -> None:
        """Move ``dropped`` from compact order to the positions ``live``."""
        if self.dropped.shape[1]:
            values = self.dropped[:, : live.shape[0]].clone()
            self.dropped.zero_().index_copy_(1, live, values)

    def part(self, chunk: int, at: slice) -> Kept:
        """The same for one chunk and its rows."""
        one = slice(chunk, chunk + 1)
        return Kept(self.tau, self.columns[one], self.counts[one], self.dropped[:, at])

    def count(self, chunk: int) -> int:
        """How many columns of a chunk stay."""
        return int(self.counts[chunk])

    def of(self, chunk: int) -> Tensor | None:
        """The columns of a chunk, (kept,); None where all stay."""
        count = self.count(chunk)
        return None if count == self.columns.shape[1] else self.columns[chunk, :count]


@dataclass(frozen=True)
class RankingArgs:
    """The arguments of a backend's ``ranking`` beside the log-probs."""

    offsets: Tensor  # (S + 1,)
    lengths: Tensor  # (S,)
    order: Tensor  # (B, n)
    rewards: Tensor | None  # (B, n)
    sft_rank: Tensor  # (B,)
    prompt_weights: Tensor  # (B,)
    options: RankingOptions

    def run(self, backend: ModuleType, logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``terms, sums, row_weights``."""
        return backend.ranking(
            logps,
            self.offsets,
            self.lengths,
            self.order,
            self.rewards,
            self.sft_rank,
            self.prompt_weights,
            options=self.options,
        )

    def part(self, prompts: slice) -> RankingArgs:
        """The same for these prompts."""
        return replace(
            self,
            order=self.order[prompts],
            rewards=None if self.rewards is None else self.rewards[prompts],
            sft_rank=self.sft_rank[prompts],
            prompt_weights=self.prompt_weights[prompts],
        )


def forward(
    head: Head,
    rows: Tensor,  # (N,)
    targets: Tensor,  # (N,)
    *,
    chunk: int,
    need_hidden: bool,
    residual: Tensor,  # (retained, V) to fill; retained may be 0
    side: Tensor,  # (N, H) to fill with dZ0 W where need_hidden
    logps: Tensor,  # (N,) fp32 to fill
    stats: Tensor,  # (1 or 2, N) fp32 to fill: log-sum-exp; raw target logit if rounded
    kept: Kept | None = None,  # to fill; None: every column stays
    score_only: bool = False,  # no backward will come
) -> None:
    """Log-probs of all rows, chunk by chunk, and what the backward will need."""
    n, vocab = rows.shape[0], head.weight.shape[0]
    if score_only and head.shard is None and head.scores_fused(n):
        head.score(rows, targets, chunk, logps, stats)
        return
    retained = min(residual.shape[0], n)
    wide = head.logits_dtype != head.compute_dtype
    scratch = None
    for i, (start, stop) in enumerate(chunks_of(n, chunk, retained)):
        keep = start < retained
        at = slice(start, stop)
        x, t = head.rows_of(_part(rows, at)), _part(targets, at)
        exact = None if head.shard is not None else head.target_logits(x, t)
        if keep and not wide:
            logits = _part(residual, at)
        else:
            if scratch is None:
                scratch = empty_rows(residual, min(chunk, n), vocab, head.logits_dtype)
            logits = scratch[: stop - start]
        matmul.logits_into(logits, x, head.weight, head.bias)
        if head.shard is not None:
            logp, lse, exact = _across_ranks(head, head.shard, x, t, logits)
            if need_hidden or keep:
                head.backend.logits_grad(
                    logits,
                    lse,
                    t,
                    None,
                    target_logits=exact,
                    first_column=head.shard.first,
                    options=head.options,
                    out=logits,
                )
        elif need_hidden or keep or kept is not None:
            logp, lse = head.backend.residual_(logits, t, target_logits=exact, options=head.options)
        else:
            logp, lse, _ = head.backend.logp(logits, t, target_logits=exact, options=head.options)
        logps[start:stop], stats[0, start:stop] = logp, lse
        if exact is not None:
            stats[1, start:stop] = exact
        dz, weight = logits, head.weight
        if kept is not None:
            dz, u = kept.choose(i, logits, t, head, slice(start, stop))
            if u is not None and need_hidden:
                weight = _with_stand_in(weight, kept.columns[i, : kept.count(i)], u)
        if keep and wide:
            dz = residual[start:stop, : dz.shape[1]].copy_(dz)
        if need_hidden:
            matmul.hidden_grad(dz.to(head.compute_dtype), weight, _part(side, at))


def _across_ranks(
    head: Head, shard: Shard, x: Tensor, targets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob and log-sum-exp of each row over the columns of all ranks.

    Then the raw logits of the targets where logits are rounded, exact as ``Head.target_logits``.
    """
    local = targets - shard.first
    mine = (local >= 0) & (local < logits.shape[1])
    local = torch.where(mine, local, 0)
    raw = logits.gather(1, local[:, None])[:, 0].to(acc_dtype(logits.dtype))
    exact = head.target_logits(x, local)
    if exact is not None:  # the first column stands for a target of another rank: as it is
        raw = torch.where(mine, exact, raw)
    _, lse, _ = head.backend.logp(
        logits, local, target_logits=None if exact is None else raw, options=head.options
    )
    top = shard.max_(lse.clone())
    total, raw = shard.sum_(torch.stack([torch.exp(lse - top), torch.where(mine, raw, 0.0)]))
    z = raw * head.options.logit_scale
    if head.options.softcap is not None:
        z = head.options.softcap * torch.tanh(z / head.options.softcap)
    log_total = torch.log(total)
    logp = ((z - top) - log_total).clamp_max(0)
    return logp, top + log_total, None if exact is None else raw


def weight_backward(
    head: Head,
    rows: Tensor,
    targets: Tensor,
    row_weights: Tensor,  # (N,) upstream gradient of each log-prob
    *,
    chunk: int,
    residual: Tensor,  # (retained, V)
    stats: Tensor,  # (1 or 2, N)
    out: Tensor | None,  # (V, H)
    bias_out: Tensor | None,  # (V,)
    kept: Kept | None = None,
) -> None:
    """DW and dbias. Rows whose dZ0 was not retained are computed again, a block of columns a time.

    By columns, because then each dW block is one matmul over all rows: the fp32 sum over rows stays
    inside the matmul and no fp32 copy of dW is needed.
    """
    n, retained = rows.shape[0], min(residual.shape[0], rows.shape[0])
    xw = head.weighted_rows(rows, row_weights)
    if kept is not None:
        several = len(chunks_of(n, chunk, retained)) > 1  # their sum is fp32
        sums = [_zeros_for(x, several) for x in (out, bias_out)]
        for at, columns, dz in _kept_chunks(
            head, rows, targets, retained, chunk, residual, stats, kept
        ):
            add_kept(columns, dz, xw[at], row_weights[at], *sums)
        for x, total in zip((out, bias_out), sums, strict=True):
            if x is not None and total is not None and total is not x:
                x.copy_(total)
        return
    blocks = (
        [(slice(None), residual[:n])]
        if retained == n
        else _recomputed(head, rows, targets, retained, chunk, residual, stats)
    )
    for cols, dz in blocks:
        if out is not None:
            matmul.weight_grad(dz, xw, out[cols], accumulate=False)
        if bias_out is not None:
            bias_out[cols] = bias_grad(dz, row_weights)


def _zeros_for(out: Tensor | None, several: bool) -> Tensor | None:
    """``out`` itself, cleared; where several 16-bit terms are to be added, an fp32 one."""
    if out is None or not several or out.dtype == acc_dtype(out.dtype):
        return None if out is None else out.zero_()
    return torch.zeros_like(out, dtype=acc_dtype(out.dtype))


def _kept_chunks(
    head: Head,
    rows: Tensor,
    targets: Tensor,
    retained: int,
    chunk: int,
    residual: Tensor,
    stats: Tensor,
    kept: Kept,
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """The rows, kept columns and compact dZ0 of each chunk, computed again where not retained."""
    for i, (start, stop) in enumerate(chunks_of(rows.shape[0], chunk, retained)):
        at, columns, count = slice(start, stop), kept.of(i), kept.count(i)
        if start < retained:
            yield at, columns, residual[at, :count]
            continue
        dz = empty_rows(residual, stop - start, count, head.logits_dtype)
        bias = None if head.bias is None else _take(head.bias, columns)
        matmul.logits_into(dz, head.rows_of(rows[at]), _take(head.weight, columns), bias)
        t = targets[at]
        if columns is not None:
            t = torch.searchsorted(columns, t.to(columns.dtype))
        head.backend.logits_grad(
            dz,
            stats[0, at],
            t,
            None,
            target_logits=stats[1, at] if head.logits_dtype.itemsize < 4 else None,
            options=head.options,
            out=dz,
        )
        yield at, columns, dz.to(head.compute_dtype)


def _take(x: Tensor, columns: Tensor | None) -> Tensor:
    """The rows ``columns`` of ``x (V, ...)``; None: all."""
    return x if columns is None else x.index_select(0, columns)


def _with_stand_in(weight: Tensor, columns: Tensor, u: Tensor) -> Tensor:
    """The rows ``columns`` of the weight, and u for each column of the stand-in."""
    kept = columns.shape[0]
    rows = weight.new_empty(kept + column_filter.STAND_INS, weight.shape[1])
    torch.index_select(weight, 0, columns, out=rows[:kept])
    rows[kept:] = u
    return rows


def add_kept(
    columns: Tensor | None,  # (kept,); None: all
    dz: Tensor,  # (rows, kept)
    xw: Tensor,  # (rows, H)
    row_weights: Tensor,  # (rows,)
    out: Tensor | None,  # (V, H)
    bias_out: Tensor | None,  # (V,)
) -> None:
    """Add a chunk's dW and dbias to the columns it kept, in the dtype of ``out``.

    A 16-bit ``out`` is for a single chunk, and all zeros.
    """
    if columns is None:
        if out is not None:
            matmul.weight_grad(dz, xw, out, accumulate=out.itemsize >= 4)
        if bias_out is not None:
            bias_out += bias_grad(dz, row_weights).to(bias_out.dtype)
        return
    if out is not None:
        part = out.new_empty(columns.shape[0], xw.shape[1])
        out.index_add_(0, columns, matmul.weight_grad(dz, xw, part, accumulate=False))
    if bias_out is not None:
        bias_out.index_add_(0, columns, bias_grad(dz, row_weights).to(bias_out.dtype))


def _recomputed(
    head: Head,
    rows: Tensor,
    targets: Tensor,
    retained: int,
    chunk: int,
    residual: Tensor,
    stats: Tensor,
) -> Iterator[tuple[slice, Tensor]]:
    """dZ0 of all rows by blocks of columns: retained rows copied, the others computed again."""
    n, vocab = rows.shape[0], head.weight.shape[0]
    x, t = head.rows_of(rows[retained:]).to(head.operand_dtype), targets[retained:]
    exact = stats[1, retained:] if head.logits_dtype.itemsize < 4 else None
    # In the dtype they had in the forward: a logit rounded differently would no longer fit its lse.
    dtype = head.logits_dtype
    block = max(64, chunk * vocab // n * head.compute_dtype.itemsize // dtype.itemsize)
    buffer = empty_rows(x, n, min(block, vocab), dtype)
    for first in range(0, vocab, block):
        cols = slice(first, min(first + block, vocab))
        dz = buffer[:, : cols.stop - first]
        dz[:retained] = residual[:retained, cols]
        bias = None if head.bias is None else head.bias[cols]
        logits = matmul.logits_into(dz[retained:], x, head.weight[cols], bias)
        head.backend.logits_grad(
            logits,
            stats[0, retained:],
            t,
            None,
            target_logits=exact,
            first_column=first + (0 if head.shard is None else head.shard.first),
            options=head.options,
            out=logits,
        )
        yield cols, dz


def scatter_rows(
    side: Tensor,  # (N, H): dZ0 W
    row_weights: Tensor,  # (N,)
    rows: Tensor,  # (N,)
    out: Tensor,  # (R, H), zeros on entry
    shared: bool,
    backend: ModuleType,
) -> None:
    """``out[rows] += row_weights * side``; in fp32, in a fixed order, where rows are shared."""
    if own := getattr(backend, "scatter_rows", None):
        own(side, row_weights, rows, out, shared)
        return
    acc = out.float() if shared and out.itemsize < 4 else out
    for i in range(0, rows.shape[0], 4096):
        at = slice(i, i + 4096)
        part = (side[at].to(row_weights.dtype) * row_weights[at, None]).to(acc.dtype)
        if shared and acc.is_cuda:  # sorted, so in a fixed order; index_add_ would be atomic there
            acc.index_put_((rows[at],), part, accumulate=True)
        elif shared:  # row after row; index_put_ is atomic here
            acc.index_add_(0, rows[at], part)
        else:
            acc.index_copy_(0, rows[at], part)
    if acc is not out:
        out.copy_(acc)


def bias_grad(dz: Tensor, row_weights: Tensor) -> Tensor:
    """``dz^T w`` summed in fp32."""
    out = row_weights.new_empty(dz.shape[1])
    step = max(64, matmul.workspace(dz.device.type) // (4 * max(1, dz.shape[0])))
    for i in range(0, dz.shape[1], step):
        torch.mv(dz[:, i : i + step].to(row_weights.dtype).t(), row_weights, out=out[i : i + step])
    return out


def pro_forward(
    head: Head,
    rows: Tensor,
    targets: Tensor,
    ranking_args: RankingArgs,
    *,
    prompt_tokens: Sequence[int],
    prompt_chunks: Sequence[int],
    shared: bool,
    d_hidden: Tensor | None,  # (R, H), zeros
    d_weight: Tensor,  # (V, H) zeros, fp32 or wider
    d_bias: Tensor | None,  # (V,) zeros, fp32 or wider
    kept: Kept | None = None,  # to fill, a chunk each; None: every column stays
) -> tuple[Tensor, Tensor, Tensor]:
    """Tier T2: loss terms and all gradients in one pass over prompt-aligned chunks.

    Returns ``terms`` (B, n), ``sums`` (S,) as the backends' ``ranking`` does, and the row weights
    (N,).
    """
    vocab, width = head.weight.shape
    sizes = _chunk_tokens(prompt_tokens, prompt_chunks)
    buffer = empty_rows(head.weight, max(sizes, default=0), vocab, head.weight.dtype)
    logps = torch.zeros(rows.shape[0], dtype=acc_dtype(head.logits_dtype), device=rows.device)
    stats = logps.new_empty(2, max(sizes, default=0))
    terms, sums = [], logps.new_zeros(ranking_args.lengths.shape)
    prompt = start = 0
    weights = torch.zeros_like(logps)
    for i, (count, tokens) in enumerate(zip(prompt_chunks, sizes, strict=True)):
        at = slice(start, start + tokens)
        residual = buffer[:tokens]
        side = residual.new_empty(
            tokens if d_hidden is not None else 0, width, dtype=head.side_dtype
        )
        forward(
            head,
            rows[at],
            targets[at],
            chunk=max(1, tokens),
            need_hidden=d_hidden is not None,
            residual=residual,
            side=side,
            logps=logps[at],
            stats=stats[:, :tokens],
            kept=None if kept is None else kept.part(i, at),
        )
        # Later log-probs are still 0: after the last chunk the sums are whole.
        prompts = slice(prompt, prompt + count)
        part, sums, row_weights = ranking_args.part(prompts).run(head.backend, logps)
        terms.append(part)
        if tokens:
            w = weights[at] = row_weights[at]
            xw = head.weighted_rows(rows[at], w)
            if kept is not None:
                dz = residual[:, : kept.count(i)]
                add_kept(kept.of(i), dz, xw, w, d_weight, d_bias)
            else:
                matmul.weight_grad(residual, xw, d_weight, accumulate=True)
                if d_bias is not None:
                    d_bias += bias_grad(residual, w)
            if d_hidden is not None:
                scatter_rows(side, w, rows[at], d_hidden, shared, head.backend)
        prompt, start = prompt + count, start + tokens
    return torch.cat(terms), sums, weights


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of log-probs and statistics: fp32, or fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _part(x: Tensor, at: slice) -> Tensor:
    """``x[at]``; itself where that is all of it, as a single chunk has it."""
    return x if at.stop - at.start == x.shape[0] else x[at]


def chunks_of(n: int, chunk: int, retained: int) -> list[tuple[int, int]]:
    """Row ranges of at most ``chunk`` rows, with a border where retention ends."""
    starts = [*range(0, retained, chunk), *range(retained, n, chunk)]
    return list(zip(starts, [*starts[1:], n], strict=False)) if n else []


def _chunk_tokens(prompt_tokens: Sequence[int], prompt_chunks: Sequence[int]) -> list[int]:
    sizes, prompt = [], 0
    for count in prompt_chunks:
        sizes.append(sum(prompt_tokens[prompt : prompt + count]))
        prompt += count
    return sizes
