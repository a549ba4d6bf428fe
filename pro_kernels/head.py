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
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pro_kernels import matmul
from pro_kernels.options import LogitOptions, RankingOptions


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

    @property
    def side_dtype(self) -> torch.dtype:
        """Dtype of the thin (N, H) sides: that in which the matmuls really run."""
        upcasts = matmul.upcasts(self.compute_dtype, self.hidden.device.type)
        return torch.float32 if upcasts else self.compute_dtype

    def rows_of(self, rows: Tensor) -> Tensor:
        """The hidden states of these rows, in the dtype of the matmuls."""
        return self.hidden.index_select(0, rows).to(self.compute_dtype)

    def weighted_rows(self, rows: Tensor, row_weights: Tensor) -> Tensor:
        """``w * X`` for the dW matmul, rounded only as far as that matmul reads it."""
        x = self.rows_of(rows).to(row_weights.dtype)
        return x.mul_(row_weights[:, None]).to(self.side_dtype)

    def target_logits(self, x: Tensor, targets: Tensor) -> Tensor | None:
        """Raw target logits as fp32 dot products, where the logits themselves are rounded."""
        if self.logits_dtype.itemsize >= 4:
            return None
        exact = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        for i in range(0, x.shape[0], 1024):
            at = slice(i, i + 1024)
            w = self.weight.index_select(0, targets[at]).float()
            torch.sum(w.mul_(x[at]), 1, out=exact[at])
        return exact if self.bias is None else exact + self.bias[targets].float()


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

    def run(
        self, backend: ModuleType, logps: Tensor, prompts: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``terms, sums, row_weights`` of these prompts."""
        return backend.ranking(
            logps,
            self.offsets,
            self.lengths,
            self.order[prompts],
            None if self.rewards is None else self.rewards[prompts],
            self.sft_rank[prompts],
            self.prompt_weights[prompts],
            options=self.options,
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
) -> None:
    """Log-probs of all rows, chunk by chunk, and what the backward will need."""
    n, vocab = rows.shape[0], head.weight.shape[0]
    retained = min(residual.shape[0], n)
    wide = head.logits_dtype != head.compute_dtype
    scratch = None
    for start, stop in _chunks(n, chunk, retained):
        keep = start < retained
        x, t = head.rows_of(rows[start:stop]), targets[start:stop]
        exact = head.target_logits(x, t)
        if keep and not wide:
            logits = residual[start:stop]
        else:
            if scratch is None:
                scratch = residual.new_empty(min(chunk, n), vocab, dtype=head.logits_dtype)
            logits = scratch[: stop - start]
        matmul.logits_into(logits, x, head.weight, head.bias)
        if need_hidden or keep:
            logp, lse = head.backend.residual_(logits, t, target_logits=exact, options=head.options)
        else:
            logp, lse, _ = head.backend.logp(logits, t, target_logits=exact, options=head.options)
        logps[start:stop], stats[0, start:stop] = logp, lse
        if exact is not None:
            stats[1, start:stop] = exact
        if keep and wide:
            residual[start:stop] = logits
        if need_hidden:
            dz = residual[start:stop] if keep else logits.to(head.compute_dtype)
            side[start:stop] = matmul.hidden_grad(dz, head.weight)


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
) -> None:
    """DW and dbias. Rows whose dZ0 was not retained are computed again, a block of columns a time.

    By columns, because then each dW block is one matmul over all rows: the fp32 sum over rows stays
    inside the matmul and no fp32 copy of dW is needed.
    """
    n, retained = rows.shape[0], min(residual.shape[0], rows.shape[0])
    xw = head.weighted_rows(rows, row_weights)
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
    x, t = head.rows_of(rows[retained:]).to(head.side_dtype), targets[retained:]
    exact = stats[1, retained:] if head.logits_dtype.itemsize < 4 else None
    # In the dtype they had in the forward: a logit rounded differently would no longer fit its lse.
    dtype = head.logits_dtype
    block = max(64, chunk * vocab // n * head.compute_dtype.itemsize // dtype.itemsize)
    buffer = torch.empty(n * min(block, vocab), dtype=dtype, device=x.device)
    for first in range(0, vocab, block):
        cols = slice(first, min(first + block, vocab))
        dz = buffer[: n * (cols.stop - first)].view(n, -1)
        dz[:retained] = residual[:retained, cols]
        bias = None if head.bias is None else head.bias[cols]
        logits = matmul.logits_into(dz[retained:], x, head.weight[cols], bias)
        head.backend.logits_grad(
            logits,
            stats[0, retained:],
            t,
            None,
            target_logits=exact,
            first_column=first,
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
) -> None:
    """``out[rows] += row_weights * side``; in fp32, in a fixed order, where rows are shared."""
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
    step = max(64, matmul.WORKSPACE // (4 * max(1, dz.shape[0])))
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
) -> tuple[Tensor, Tensor]:
    """Tier T2: loss terms and all gradients in one pass over prompt-aligned chunks.

    Returns ``terms`` (B, n) and ``sums`` (S,) as the backends' ``ranking`` does.
    """
    vocab, width = head.weight.shape
    sizes = _chunk_tokens(prompt_tokens, prompt_chunks)
    buffer = head.weight.new_empty(max(sizes, default=0), vocab)
    logps = torch.zeros(rows.shape[0], dtype=acc_dtype(head.logits_dtype), device=rows.device)
    stats = logps.new_empty(2, max(sizes, default=0))
    terms, sums = [], logps.new_zeros(ranking_args.lengths.shape)
    prompt = start = 0
    for count, tokens in zip(prompt_chunks, sizes, strict=True):
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
        )
        # Later log-probs are still 0: after the last chunk the sums are whole.
        part, sums, row_weights = ranking_args.run(
            head.backend, logps, slice(prompt, prompt + count)
        )
        terms.append(part)
        if tokens:
            w = row_weights[at]
            matmul.weight_grad(residual, head.weighted_rows(rows[at], w), d_weight, accumulate=True)
            if d_bias is not None:
                d_bias += bias_grad(residual, w)
            if d_hidden is not None:
                scatter_rows(side, w, rows[at], d_hidden, shared)
        prompt, start = prompt + count, start + tokens
    return torch.cat(terms), sums


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of log-probs and statistics: fp32, or fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(n: int, chunk: int, retained: int) -> list[tuple[int, int]]:
    """Row ranges of at most ``chunk`` rows, with a border where retention ends."""
    starts = [*range(0, retained, chunk), *range(retained, n, chunk)]
    return list(zip(starts, [*starts[1:], n], strict=False)) if n else []


def _chunk_tokens(prompt_tokens: Sequence[int], prompt_chunks: Sequence[int]) -> list[int]:
    sizes, prompt = [], 0
    for count in prompt_chunks:
        sizes.append(sum(prompt_tokens[prompt : prompt + count]))
        prompt += count
    return sizes
