"""From layout and rewards to what the ranking kernel takes, and from its outputs to ``PROOutput``.

Legend: ``B`` prompts, ``n`` candidates, ``S`` sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pro_kernels import ranking, validate
from pro_kernels.backends.protocol import Candidates
from pro_kernels.layout import Layout
from pro_kernels.option_types import SIZES
from pro_kernels.options import PROOptions
from pro_kernels.output import PROOutput

# So many candidates, of all prompts, Python ranks faster than some thirty small operations do.
_HOST_CANDIDATES = 256


def rank_candidates(
    layout: Layout,
    rewards: Tensor | None,  # (B, n), on the layout's device or on the CPU
    options: PROOptions,
    prompt_weights: Tensor | None,  # (B,)
    sft_index: Tensor | None,  # (B,)
    dtype: torch.dtype,
) -> Candidates:
    """Check the per-candidate inputs and put the candidates of each prompt in rank order."""
    shape, device = layout.shape, layout.device
    check_arguments(shape, rewards, prompt_weights, sft_index, options)
    plain = prompt_weights is None and sft_index is None and not options.official
    if plain and _known_on_host(layout, rewards):
        if ranked := _rank_on_host(layout, rewards, options, dtype):
            return ranked
    valid = None  # all of them: a third of the launches
    if not (plain and _all_scored(layout)):
        valid = (layout.sequences >= 0) & (layout.lengths[layout.sequences.clamp_min(0)] > 0)
    here = scaled = None
    if rewards is not None:
        here = rewards.to(device, non_blocking=True)
        of = rewards if valid is None else here
        scaled = ranking.scaled_rewards(of, valid, options.reward_scale, dtype)
    if not torch.compiler.is_compiling():
        given = scaled if rewards is not None and rewards.device.type != "cpu" else rewards
        _check_values(layout, given, valid, prompt_weights, sft_index, options, dtype)

    rank_of = None  # as they stand
    if options.official:
        rank_of = torch.arange(shape[1], device=device).expand(shape)
    elif valid is not None or here is not None:
        rank_of = ranking.rank_of(valid, here)

    def at_rank(values: Tensor, absent: int) -> Tensor:
        if valid is not None:
            values = values.masked_fill(~valid, absent)
        return (values if rank_of is None else values.gather(1, rank_of)).contiguous()

    order = at_rank(layout.sequences, -1)
    if scaled is not None:
        by_gaps = isinstance(options.temperature, str)
        scaled = at_rank(scaled.to(device, non_blocking=True), 0) if by_gaps else None
    if valid is None:
        first = torch.zeros(shape[0], dtype=torch.int64, device=device)
        equal = torch.full(shape[:1], 1 / max(1, shape[0]), dtype=dtype, device=device)
        return Candidates(layout.offsets, layout.lengths, order, scaled, first, equal)
    assert rank_of is not None
    sft_rank = _sft_rank(order, rank_of, sft_index)
    weights = ranking.mean_weights(valid.any(1), prompt_weights, dtype).detach()
    return Candidates(layout.offsets, layout.lengths, order, scaled, sft_rank, weights)


def _known_on_host(layout: Layout, rewards: Tensor | None) -> bool:
    """Whether the host can rank these candidates without waiting, and is fast at it."""
    if torch.compiler.is_compiling() or layout.candidate_tokens is None:
        return False
    if layout.sequences.numel() > _HOST_CANDIDATES:
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False  # a graph would replay the copy from memory that is gone
    return rewards is None or rewards.device.type == "cpu"


def _rank_on_host(
    layout: Layout, rewards: Tensor | None, options: PROOptions, dtype: torch.dtype
) -> Candidates | None:
    """``rank_candidates`` in Python; None for rewards that the checks must see, or may refuse."""
    n, tokens = layout.shape[1], layout.candidate_tokens or ()
    columns = [[i for i, scored in enumerate(x) if scored] for x in tokens]
    at_rank = None
    if rewards is not None:
        ranked = _sort_by_rewards(columns, rewards, options)
        if ranked is None:
            return None
        if isinstance(options.temperature, str):
            values = [x for row in ranked for x in [*row, *[0.0] * (n - len(row))]]
            dtype_of = torch.float32 if ranking.as_given(rewards, options.reward_scale) else dtype
            at_rank = _from_host(values, dtype_of, layout).view(-1, n)
    order: list[int] = []
    first = 0
    for row, x in zip(columns, tokens, strict=True):
        order += [*[first + i for i in row], *[-1] * (n - len(row))]
        first += len(x)
    best = [0 if row else -1 for row in columns]
    share = 1 / max(1, best.count(0))
    indices = _from_host(order + best, torch.int64, layout)  # together: one copy to a device
    ranks, sft_rank = indices[: len(order)].view(-1, n), indices[len(order) :]
    weights = _from_host([share if row else 0.0 for row in columns], dtype, layout)
    return Candidates(layout.offsets, layout.lengths, ranks, at_rank, sft_rank, weights)


def _sort_by_rewards(
    columns: list[list[int]], rewards: Tensor, options: PROOptions
) -> list[list[float]] | None:
    """Sort each prompt's columns in place, best first; what ``scaled_rewards`` makes of them.

    None unless they are what nearly every batch has: finite, apart, and nowhere near inf.
    """
    (smallest, largest), scale = SIZES, options.reward_scale
    by_gaps = isinstance(options.temperature, str)
    as_given = ranking.as_given(rewards, scale)
    ranked = []
    for row, of_column in zip(columns, rewards.tolist(), strict=True):
        row.sort(key=of_column.__getitem__, reverse=True)  # stable
        best_first = [of_column[i] for i in row]
        if not math.isfinite(sum(best_first)):  # NaN and inf stay in a sum
            return None
        if by_gaps and len(row) > 1:
            if not smallest <= (best_first[0] - best_first[-1]) * scale <= largest:
                return None
        ranked.append(best_first if as_given else [(x - best_first[0]) * scale for x in best_first])
    return ranked


def _from_host(values: list, dtype: torch.dtype, layout: Layout) -> Tensor:
    """A tensor of these numbers on the layout's device; nothing waits."""
    made = torch.tensor(values, dtype=dtype, device="cpu")
    return made if layout.device.type == "cpu" else made.to(layout.device, non_blocking=True)


def make_output(
    loss: Tensor, per_rank: Tensor, sums: Tensor, layout: Layout, options: PROOptions
) -> PROOutput:
    """Per-candidate outputs back in the caller's columns."""
    if _rectangular(layout):
        logps, lengths = sums.view(layout.shape), layout.lengths.clone().view(layout.shape)
    else:
        seq, exists = layout.sequences.clamp_min(0), layout.sequences >= 0
        logps = torch.where(exists, sums[seq], 0.0)
        lengths = torch.where(exists, layout.lengths[seq], 0)
    scores = logps / lengths.clamp_min(1) if options.length_normalize else logps
    return PROOutput(loss, per_rank[:-1], per_rank[-1], scores, logps, lengths)


def _all_scored(layout: Layout) -> bool:
    """Whether the host knows that every candidate is there and has a scored token."""
    return _rectangular(layout) and all(map(all, layout.candidate_tokens or ()))


def _rectangular(layout: Layout) -> bool:
    """Whether the host knows that every candidate is there: sequences are 0, 1, 2, ..."""
    tokens, n = layout.candidate_tokens, layout.shape[1]
    if tokens is None or torch.compiler.is_compiling():  # there it would guard on every length
        return False
    return all(len(lengths) == n for lengths in tokens)


def _sft_rank(order: Tensor, rank_of: Tensor, sft_index: Tensor | None) -> Tensor:
    """Rank that carries the SFT term: the best, or that of column ``sft_index``; -1 if unscored."""
    if sft_index is None:
        rank = torch.zeros(order.shape[0], dtype=torch.int64, device=order.device)
    else:
        column = sft_index.to(order.device, torch.int64, non_blocking=True)
        is_column = rank_of == column[:, None]
        rank = torch.where(is_column.any(1), is_column.to(torch.int8).argmax(1), -1)
    found = order.gather(1, rank.clamp_min(0)[:, None])[:, 0]
    return torch.where(found >= 0, rank, -1)


def check_arguments(
    shape: tuple[int, int],
    rewards: Tensor | None,
    prompt_weights: Tensor | None,
    sft_index: Tensor | None,
    options: PROOptions,
) -> None:
    """Types and shapes: these cost nothing, on any device and while compiling too."""
    validate.check_candidates(shape, rewards, prompt_weights, sft_index)
    if options.official and rewards is None:
        raise ValueError('rewards must be given with compat="official", got None')


def _check_values(
    layout: Layout,
    rewards: Tensor | None,
    valid: Tensor | None,
    prompt_weights: Tensor | None,
    sft_index: Tensor | None,
    options: PROOptions,
    dtype: torch.dtype,
) -> None:
    """Values: looked at on the CPU, queued as asynchronous assertions on a GPU."""
    known = _valid_on_host(layout, valid)
    if rewards is not None:
        on_cpu = rewards.device.type == "cpu"
        if on_cpu and known is not None and isinstance(options.temperature, str):
            scale = options.reward_scale
            validate.check_gaps(rewards, known, scale, may_be_equal=options.official)
        else:
            validate.check_finite("rewards", rewards, known if on_cpu else valid)
    present = None if known is None or prompt_weights is None else known.any(1)
    validate.check_of_prompts(prompt_weights, sft_index, layout.shape[1], dtype, present)
    if options.official:
        assert valid is not None
        validate.check_all(
            'compat="official" needs a scored token in every candidate',
            valid,
            lambda b, i: f"; prompt {b} candidate {i} has none (the official code would give NaN)",
        )


def _valid_on_host(layout: Layout, valid: Tensor | None) -> Tensor | None:
    """Which candidates take part, if that can be told without waiting for a device."""
    if valid is None:
        return torch.ones(layout.shape, dtype=torch.bool, device="cpu")
    if valid.device.type == "cpu":
        return valid
    tokens = layout.candidate_tokens
    if tokens is None:
        return None
    rows = [[m > 0 for m in x] + [False] * (layout.shape[1] - len(x)) for x in tokens]
    return torch.tensor(rows, dtype=torch.bool, device="cpu").view(layout.shape)
