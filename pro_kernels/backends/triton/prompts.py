"""The ranking kernel: the loss terms and the gradient for every token, in one launch.

Legend: ``N`` tokens, ``S`` sequences, ``B`` prompts, ``n`` candidates, ``k`` a rank term, ``i`` the
candidate at rank i. With scores ``s_i`` (sums of log-probs, over ``norm_i`` when normalised):

    z_ki = s_i tau_ki      sum_k = eps + sum_{i >= k} exp z_ki      p_ki = exp(z_ki) / sum_k
    L_k = log sum_k - z_kk
    dL/ds_j = sum_{k < j} tau_kj p_kj - tau_jj (1 - p_jj)       (k, j over terms that are live)

Bytes moved: 8 N read (twice: a prompt's sums, and every sequence's sum) and 4 N written.

Programs 0 ... B-1 take a prompt each; those behind take BLOCK_N sequences each and store their
sums, so that ``sums`` holds the sequences outside ``order`` too. Both read BLOCK_T tokens of all
their sequences at a time, and go on until the longest ends. A prompt's own sums stay in registers:
nothing is handed between programs, no order of execution is assumed, nothing is added atomically.

The plane ``(k, i)`` is done in tiles of BLOCK_K x BLOCK_N, one tile up to 32 candidates. Equal
temperatures take the same tiles: the O(n) form (a reverse cumulative log-sum-exp, then a prefix one
of its negative) is two dependent scans against two independent reductions, so it saves nothing at
the n of practice, and its exponent ``s_j + LSE(-A_k)`` is a difference of numbers as large as the
scores: 1e-3 relative in the gradient at 1e4, where ``exp(z_ki - max_i z_ki)`` stays exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One binary per power of two of n, with and without rewards: everything else is a run-time number,
# the option too, so that a schedule of one compiles nothing.
_UNALIGNED = ["logps_ptr", "offsets_ptr", "lengths_ptr", "order_ptr", "rewards_ptr", "sft_rank_ptr"]
_UNALIGNED += ["prompt_weights_ptr", "sums_ptr"]


@triton.jit(do_not_specialize=["S", "n"], do_not_specialize_on_alignment=_UNALIGNED)
def ranking_kernel(
    logps_ptr,  # (N,) fp32
    offsets_ptr,  # (S + 1,) int64
    lengths_ptr,  # (S,) int64
    order_ptr,  # (B, n) int64
    rewards_ptr,  # (B, n) fp32 or None
    sft_rank_ptr,  # (B,) int64
    prompt_weights_ptr,  # (B,) fp32
    sums_ptr,  # (S,) fp32
    outputs,  # pointers to terms (B, n) and row weights (N,), zeros on entry: fp32
    S,
    n,
    option,  # RankingOptions as fp32 numbers, with log_eps
    CONFIG: tl.constexpr,  # configs.RankingConfig
):
    """Write terms, sums and the row weights of the sequences in ``order``."""
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_T: tl.constexpr = CONFIG.block_t
    terms_ptr, row_weights_ptr = outputs
    program = tl.program_id(0)
    B = tl.num_programs(0) - tl.cdiv(S, BLOCK_N)
    if program < B:
        rewards_of_prompt = rewards_ptr
        if rewards_ptr is not None:
            rewards_of_prompt = rewards_ptr + program.to(tl.int64) * n
        _prompt(
            logps_ptr, offsets_ptr, lengths_ptr, order_ptr + program.to(tl.int64) * n,
            rewards_of_prompt, tl.load(sft_rank_ptr + program),
            tl.load(prompt_weights_ptr + program), terms_ptr + program.to(tl.int64) * n,
            row_weights_ptr, n, option, CONFIG,
        )  # fmt: skip
    else:
        sequence = (program - B).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        start, end = _segments(offsets_ptr, sequence, sequence < S)
        sums = _segment_sums(logps_ptr, start, end, BLOCK_T)
        tl.store(sums_ptr + sequence, sums, sequence < S)


@triton.jit
def _prompt(
    logps_ptr, offsets_ptr, lengths_ptr, order_ptr, rewards_ptr, sft_rank, prompt_weight,
    terms_ptr, row_weights_ptr, n, option, CONFIG: tl.constexpr,
):  # fmt: skip
    """One prompt; order, rewards and terms point at its own rows."""
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_T: tl.constexpr = CONFIG.block_t
    i = tl.arange(0, BLOCK_N)
    candidate = tl.load(order_ptr + i, mask=i < n, other=-1)
    valid = candidate >= 0
    count = tl.sum(valid.to(tl.int32), axis=0)
    start, end = _segments(offsets_ptr, candidate, valid)
    total = _segment_sums(logps_ptr, start, end, BLOCK_T)
    length = tl.load(lengths_ptr + candidate, mask=valid, other=1)
    norm = tl.maximum(length.to(tl.float32), 1.0)
    score_norm = tl.where(option.length_normalize != 0, norm, 1.0)

    score = total / score_norm
    d_score = _rank_terms(score, rewards_ptr, terms_ptr, n, count, option, CONFIG)
    pairs = (count - 1).to(tl.float32)
    factor = option.sft_weight * pairs * pairs
    single = tl.where(option.single_sft != 0, option.sft_weight, 0.0)
    factor = tl.where(count == 1, single, factor)
    is_sft = (i == sft_rank) & valid
    sft_scale = tl.where(is_sft, factor / tl.where(option.sft_mean != 0, norm, 1.0), 0.0)
    sft_term = -tl.sum(tl.where(is_sft, sft_scale * total, 0.0), axis=0)
    tl.store(terms_ptr + n - 1, sft_term)

    weight = (d_score / score_norm - sft_scale) * prompt_weight
    weights = weight[:, None] + tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for first in range(0, tl.max(end - start, axis=0), BLOCK_T):
        token = start[:, None] + first + tl.arange(0, BLOCK_T)[None, :]
        tl.store(row_weights_ptr + token, weights, mask=token < end[:, None])


@triton.jit
def _rank_terms(score, rewards_ptr, terms_ptr, n, count, option, CONFIG: tl.constexpr):
    """Store the rank terms (0 where not live) and return ``d sum_k L_k / d score``."""
    BLOCK_K: tl.constexpr = CONFIG.block_k
    BLOCK_N: tl.constexpr = CONFIG.block_n
    i = tl.arange(0, BLOCK_N)[None, :]
    live_terms = tl.minimum(count - 1, option.top_k).to(tl.int32)
    reward = 0.0
    if rewards_ptr is not None:
        reward = tl.load(rewards_ptr + i, mask=i < count, other=0.0)
    d_score = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, n - 1, BLOCK_K):
        rank = first + tl.arange(0, BLOCK_K)
        k = rank[:, None]
        live = k < live_terms
        later = (i > k) & (i < count) & live
        own = (i == k) & live
        keep = own | later
        if rewards_ptr is not None:
            reward_k = tl.load(rewards_ptr + k, mask=k < count, other=0.0)
            tau = tl.where(later, reward_k - reward, 0.0)
            # The largest of term k's inverse temperatures is its own.
            tau_own = tl.max(tl.where(later, tau, -float("inf")), axis=1)
            keep = keep & ~((option.skip_ties != 0) & later & (tau == 0.0))
            tau = tl.where(own, tau_own[:, None], tau)
        else:
            tau = tl.zeros((BLOCK_K, BLOCK_N), tl.float32) + option.tau
        z = tl.where(keep, score[None, :] * tau, -float("inf"))
        z_own = tl.sum(tl.where(own, z, 0.0), axis=1)
        top = tl.maximum(tl.max(z, axis=1), option.log_eps)
        top = tl.where(top == -float("inf"), 0.0, top)  # no entry, or a score of -inf
        # A score of -inf at a negative temperature is +inf: all others are 0 beside it.
        top = tl.where(top == float("inf"), 3.4028234663852886e38, top)
        e = tl.where(keep, tl.exp(z - top[:, None]), 0.0)
        # 1 - p_kk = others / sum: no cancellation where p_kk is close to 1.
        others = tl.sum(tl.where(own, 0.0, e), axis=1) + tl.exp(option.log_eps - top)
        own_e = tl.sum(tl.where(own, e, 0.0), axis=1)
        total = tl.where(rank < live_terms, others + own_e, 1.0)
        own_slope = tl.where((own_e == 0.0) & (others > 0.0), -1.0, -others / total)
        slope = tl.where(own, own_slope[:, None], e / total[:, None])
        d_score += tl.sum(tl.where(keep, tau * slope, 0.0), axis=0)
        term = tl.where(rank < live_terms, (top - z_own) + tl.log(total), 0.0)
        tl.store(terms_ptr + rank, term, mask=rank < n - 1)
    return d_score


@triton.jit
def _segments(offsets_ptr, sequence, valid):
    """First token of each sequence and the one behind its last; an empty one where not valid."""
    start = tl.load(offsets_ptr + sequence, mask=valid, other=0)
    return start, tl.load(offsets_ptr + sequence + 1, mask=valid, other=0)


@triton.jit
def _segment_sums(values_ptr, start, end, BLOCK_T: tl.constexpr):
    """Sums of ``values[start:end]``, each in an order that depends on its length only."""
    lanes = tl.zeros((start.shape[0], BLOCK_T), tl.float32)
    for first in range(0, tl.max(end - start, axis=0), BLOCK_T):
        token = start[:, None] + first + tl.arange(0, BLOCK_T)[None, :]
        lanes += tl.load(values_ptr + token, mask=token < end[:, None], other=0.0)
    return tl.sum(lanes, axis=1)
