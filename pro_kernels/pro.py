"""From layout and rewards to what the ranking kernel takes, and from its outputs to ``PROOutput``.

Legend: ``B`` prompts, ``n`` candidates, ``S`` sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pro_kernels import checks
from pro_kernels.layout import Layout, check_targets
from pro_kernels.options import SIZES, PROOptions, RankingOptions, check_total, gap_fault
from pro_kernels.output import PROOutput

# So many candidates, of all prompts, Python ranks faster than some thirty small operations do.
_HOST_CANDIDATES = 256


@dataclass(frozen=True)
class RankedCandidates:
    """Candidates in rank order, as the backends' ``ranking`` takes them."""

    order: Tensor  # (B, n) int64
    rewards: Tensor | None  # (B, n) at those ranks, scaled
    sft_rank: Tensor  # (B,) int64
    weights: Tensor  # (B,) summing to 1, or all 0 where nothing is scored
    options: RankingOptions

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """In the order of the ops' schemas."""
        return self.order, self.rewards, self.sft_rank, self.weights


def rank_candidates(
    layout: Layout,
    rewards: Tensor | None,  # (B, n), on the layout's device or on the CPU
    options: PROOptions,
    prompt_weights: Tensor | None,  # (B,)
    sft_index: Tensor | None,  # (B,)
    dtype: torch.dtype,
) -> RankedCandidates:
    """Check the per-candidate inputs and put the candidates of each prompt in rank order."""
    shape, device = layout.shape, layout.device
    check_arguments(shape, rewards, prompt_weights, sft_index, options)
    plain = prompt_weights is None and sft_index is None
    if plain and _known_on_host(layout, rewards, options):
        ranked = _rank_on_host(layout, rewards, options, dtype)
        if ranked is not None:
            return ranked
    if plain and _all_scored(layout) and not options.official:
        return _rank_full_prompts(layout, rewards, options, dtype)
    valid = (layout.sequences >= 0) & (layout.lengths[layout.sequences.clamp_min(0)] > 0)
    scaled = None
    if rewards is not None:
        here = rewards.to(device, non_blocking=True)
        scaled = _scaled(here, valid, options, dtype)
    if not torch.compiler.is_compiling():
        given = scaled if rewards is not None and rewards.device.type != "cpu" else rewards
        _check_values(layout, given, valid, prompt_weights, sft_index, options, dtype)

    if options.official:
        rank_of = torch.arange(shape[1], device=device).expand(shape)
    elif rewards is None:
        rank_of = (~valid).to(torch.int8).argsort(dim=1, stable=True)
    else:
        rank_of = _last_where_not(valid, here).argsort(dim=1, descending=True, stable=True)
    sequences = layout.sequences.masked_fill(~valid, -1)
    order = sequences.gather(1, rank_of)
    at_rank = None
    if scaled is not None and isinstance(options.temperature, str):
        at_rank = scaled.masked_fill(~valid, 0).gather(1, rank_of).contiguous()
    return RankedCandidates(
        order.contiguous(),
        at_rank,
        _sft_rank(order, rank_of, sft_index),
        _mean_weights(valid.any(1), prompt_weights, dtype),
        options.ranking(),
    )


def _all_scored(layout: Layout) -> bool:
    """Whether the host knows that every candidate is there and has a scored token."""
    return _rectangular(layout) and all(map(all, layout.candidate_tokens or ()))


def _rank_full_prompts(
    layout: Layout, rewards: Tensor | None, options: PROOptions, dtype: torch.dtype
) -> RankedCandidates:
    """``rank_candidates`` where every candidate takes part: a third of the launches."""
    (B, _), device = layout.shape, layout.device
    order, at_rank = layout.sequences, None
    if rewards is not None:
        scaled = _scaled(rewards, None, options, dtype)
        if rewards.device.type == "cpu" and isinstance(options.temperature, str):
            _check_gaps(rewards, torch.ones(layout.shape, dtype=torch.bool), options)
        else:
            on_cpu = rewards.device.type == "cpu"
            checks.check_finite("rewards", rewards if on_cpu else scaled, None)
        key = rewards.to(device, non_blocking=True)
        rank_of = key.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, rank_of)
        if isinstance(options.temperature, str):
            at_rank = scaled.to(device, non_blocking=True).gather(1, rank_of)
    sft_rank = torch.zeros(B, dtype=torch.int64, device=device)
    weights = torch.full((B,), 1 / max(1, B), dtype=dtype, device=device)
    return RankedCandidates(order.contiguous(), at_rank, sft_rank, weights, options.ranking())


def _known_on_host(layout: Layout, rewards: Tensor | None, options: PROOptions) -> bool:
    """Whether the host can rank these candidates without waiting, and is fast at it."""
    if torch.compiler.is_compiling() or options.official or layout.candidate_tokens is None:
        return False
    if layout.sequences.numel() > _HOST_CANDIDATES:
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False  # a graph would replay the copy from memory that is gone
    return rewards is None or rewards.device.type == "cpu"


def _rank_on_host(
    layout: Layout, rewards: Tensor | None, options: PROOptions, dtype: torch.dtype
) -> RankedCandidates | None:
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
            dtype_of = torch.float32 if _as_given(rewards, options) else dtype
            at_rank = _from_host(values, dtype_of, layout).view(-1, n)
    order: list[int] = []
    first = 0
    for row, x in zip(columns, tokens, strict=True):
        order += [*[first + i for i in row], *[-1] * (n - len(row))]
        first += len(x)
    best = [0 if row else -1 for row in columns]
    share = 1 / max(1, best.count(0))
    indices = _from_host(order + best, torch.int64, layout)  # together: one copy to a device
    return RankedCandidates(
        indices[: len(order)].view(-1, n),
        at_rank,
        indices[len(order) :],
        _from_host([share if row else 0.0 for row in columns], dtype, layout),
        options.ranking(),
    )


def _sort_by_rewards(
    columns: list[list[int]], rewards: Tensor, options: PROOptions
) -> list[list[float]] | None:
    """Sort each prompt's columns in place, best first; what ``_scaled`` makes of their rewards.

    None unless they are what nearly every batch has: finite, apart, and nowhere near inf.
    """
    by_gaps, as_given = isinstance(options.temperature, str), _as_given(rewards, options)
    (smallest, largest), scale = SIZES, options.reward_scale
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
    device = layout.device
    return made if device.type == "cpu" else made.to(device, non_blocking=True)


def make_output(
    loss: Tensor, per_rank: Tensor, sums: Tensor, layout: Layout, options: PROOptions
) -> PROOutput:
    """Per-candidate outputs back in the caller's columns."""
    if _rectangular(layout):
        logps, lengths = sums.view(layout.shape), layout.lengths.clone().view(layout.shape)
        scores = logps / lengths.clamp_min(1) if options.length_normalize else logps
        return PROOutput(loss, per_rank[:-1], per_rank[-1], scores, logps, lengths)
    seq = layout.sequences.clamp_min(0)
    exists = layout.sequences >= 0
    logps = torch.where(exists, sums[seq], 0.0)
    lengths = torch.where(exists, layout.lengths[seq], 0)
    scores = logps / lengths.clamp_min(1) if options.length_normalize else logps
    return PROOutput(loss, per_rank[:-1], per_rank[-1], scores, logps, lengths)


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


def _mean_weights(counts: Tensor, prompt_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    weights = counts.to(dtype)
    if prompt_weights is not None:
        weights = weights * prompt_weights.to(weights.device, dtype, non_blocking=True)
    total = weights.sum()
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(dtype).tiny), 0.0)


def _as_given(rewards: Tensor, options: PROOptions) -> bool:
    """Whether the kernels may take the gaps of these rewards themselves."""
    return rewards.dtype == torch.float32 and options.reward_scale == 1


def _scaled(
    rewards: Tensor, valid: Tensor | None, options: PROOptions, dtype: torch.dtype
) -> Tensor:
    """Rewards of which the kernels take gaps: less their prompt's largest, before they are rounded.

    ``valid``: which of them count; None: all.
    """
    if _as_given(rewards, options):
        return rewards
    exact = _exact(rewards)
    best = exact if valid is None else _last_where_not(valid, exact)
    return ((exact - best.amax(1, keepdim=True)).double() * options.reward_scale).to(dtype)


def _exact(rewards: Tensor) -> Tensor:
    """In a dtype that holds them and their gaps."""
    return rewards.double() if rewards.is_floating_point() else rewards.long()


def _last_where_not(valid: Tensor, rewards: Tensor) -> Tensor:
    """``_exact`` rewards, the lowest there is where they do not count."""
    exact = _exact(rewards)
    lowest = -torch.inf if exact.is_floating_point() else torch.iinfo(exact.dtype).min
    return exact.masked_fill(~valid, lowest)


def _check_gaps(rewards: Tensor, valid: Tensor, options: PROOptions) -> None:
    """Rewards (B, n) are finite, and the largest gap of two or more is one to rank by (CPU)."""
    exact = _exact(rewards)
    low, high = -_last_where_not(valid, -exact).amax(1), _last_where_not(valid, exact).amax(1)
    gap = (high - low).double()
    smallest, largest = SIZES
    scaled = gap * options.reward_scale
    if ((scaled >= smallest) & (scaled <= largest)).all():  # what nearly every batch is
        return
    checks.check_finite("rewards", rewards, valid)
    several = valid.sum(1) > 1
    for b in several.nonzero()[:, 0].tolist():
        if fault := gap_fault(gap[b].item(), options.reward_scale):
            raise ValueError(f"rewards of prompt {b} are {fault}")
    equal = several & (gap == 0)
    if equal.any() and not options.official:
        raise ValueError(
            f"rewards are all equal in prompts {equal.nonzero()[:, 0].tolist()}: their order says "
            "nothing; drop them, or rank them by column with rewards=None or temperature=1.0"
        )


def check_arguments(
    shape: tuple[int, int],
    rewards: Tensor | None,
    prompt_weights: Tensor | None,
    sft_index: Tensor | None,
    options: PROOptions,
) -> None:
    """Types and shapes: these cost nothing, on any device and while compiling too."""
    if rewards is not None:
        checks.check_tensor("rewards", rewards)
        if rewards.is_complex():
            raise TypeError(f"rewards must be real numbers, got {rewards.dtype}")
        checks.check_same_shape("rewards", rewards, shape, "(B, n)")
    elif options.official:
        raise ValueError('rewards must be given with compat="official", got None')
    if prompt_weights is not None:
        checks.check_float("prompt_weights", prompt_weights)
        checks.check_same_shape("prompt_weights", prompt_weights, shape[:1], "(B,)")
    if sft_index is not None:
        check_targets(sft_index, "sft_index")
        checks.check_same_shape("sft_index", sft_index, shape[:1], "(B,)")


def _check_values(
    layout: Layout,
    rewards: Tensor | None,
    valid: Tensor,
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
            _check_gaps(rewards, known, options)
        else:
            checks.check_finite("rewards", rewards, known if on_cpu else valid)
    if prompt_weights is not None:
        good = prompt_weights.isfinite() & (prompt_weights >= 0)
        checks.check_all("prompt_weights must be finite and >= 0", good, prompt_weights)
        if known is not None and prompt_weights.device.type == "cpu":
            given = prompt_weights * known.any(1)
            check_total(given, given.to(dtype))
    if sft_index is not None:
        n = layout.shape[1]
        checks.check_all(
            f"sft_index must lie in [0, {n})", (sft_index >= 0) & (sft_index < n), sft_index
        )
    if options.official:
        _check_official(valid)


def _valid_on_host(layout: Layout, valid: Tensor) -> Tensor | None:
    """Which candidates take part, if that can be told without waiting for a device."""
    if valid.device.type == "cpu":
        return valid
    if layout.candidate_tokens is None:
        return None
    known = torch.zeros(layout.shape, dtype=torch.bool, device="cpu")
    for prompt, tokens in enumerate(layout.candidate_tokens):
        known[prompt, : len(tokens)] = torch.tensor(tokens, device="cpu") > 0
    return known


def _check_official(valid: Tensor) -> None:
    text = 'compat="official" needs a scored token in every candidate'
    if valid.device.type != "cpu":
        torch._assert_async(valid.all(), text)
    elif not valid.all():
        b, i = (~valid).nonzero()[0].tolist()
        raise ValueError(
            f"{text}; prompt {b} candidate {i} has none (the official code would give NaN)"
        )
