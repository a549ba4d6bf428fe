"""Tier T2: a scalar loss over prompts, whose gradients are made in the forward.

Legend: ``N`` scored rows, ``H`` hidden, ``V`` vocabulary, ``S`` sequences, ``B`` prompts, ``n``
candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pro_kernels.backends.protocol import Candidates
from pro_kernels.fused import matmul
from pro_kernels.fused.backward import Gradients, add_columns
from pro_kernels.fused.call import Call
from pro_kernels.fused.columns import Centre, Kept
from pro_kernels.fused.gather_scatter import Inputs, empty_rows
from pro_kernels.fused.head import Saved, forward


def pro_forward(
    given: Inputs,
    candidates: Candidates,
    tokens: Sequence[int],  # of each chunk
    out: Gradients,  # zeros; those of the head fp32 or wider
    kept: Kept,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tier T2: loss terms and all gradients in one pass over prompt-aligned chunks.

    Returns ``terms`` (B, n), ``sums`` (S,) as the backends' ``ranking`` does, and the row weights
    (N,).
    """
    call, hidden, weight = given[:3]
    d_hidden, d_weight, d_bias = out
    most = max(tokens, default=0)
    buffer = empty_rows(weight, most, call.vocab, weight.dtype)
    values = weight.new_zeros((1, given.tokens), dtype=call.acc_dtype)
    stats = values.new_empty(2, most)
    terms, sums = [], values.new_zeros(candidates.lengths.shape)
    weights = values.new_zeros(given.tokens)
    if kept.tau is not None:
        kept.centre = Centre.of(call, weight)
    side_dtype = matmul.sums_dtype(call.compute_dtype, hidden.device.type)
    prompt = start = 0
    for i, (count, size) in enumerate(zip(call.plan.prompt_chunks, tokens, strict=True)):
        at = slice(start, start + size)
        wide = 0 if d_hidden is None else size
        side = buffer.new_empty(wide, hidden.shape[1], dtype=side_dtype)
        own = kept if kept.tau is None else kept.part(i, at)
        saved = Saved(stats[:, :size], buffer[:size], side, own)
        one = call.but(plan=replace(call.plan, chunk=max(1, size)))
        here = given._replace(call=one).part(at)
        forward(here, values[:, at], saved)
        # Later log-probs are still 0: after the last chunk the sums are whole.
        prompts = slice(prompt, prompt + count)
        part, sums, row_weights = call.rank(values[0], candidates.part(prompts))
        terms.append(part)
        if size:
            w = weights[at] = row_weights[at]
            groups = own.of(0, slice(0, size))
            xw, sums_of = here.weighted(w), (d_weight, d_bias)
            add_columns(call, groups, buffer[:size], xw, w, sums_of, accumulate=True)
            if d_hidden is not None:
                here.scatter(side, w, d_hidden)
        prompt, start = prompt + count, start + size
    return torch.cat(terms), sums, weights


def chunk_tokens(call: Call) -> list[int]:
    """Tokens of each chunk of tier T2."""
    sizes, prompt = [], 0
    for count in call.plan.prompt_chunks:
        sizes.append(sum(call.prompt_tokens[prompt : prompt + count]))
        prompt += count
    return sizes
