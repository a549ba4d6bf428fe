"""What the public functions share: layout, tier and backend of a call, and the ranking step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pro_kernels import autograd, checks, ops, shards
from pro_kernels.backends import resolve
from pro_kernels.layout import Layout, check_targets, shift_targets
from pro_kernels.options import LogitOptions, PROOptions
from pro_kernels.output import PROOutput
from pro_kernels.planner import check_budget, default_budget, make_plan
from pro_kernels.pro import RankedCandidates, check_arguments, make_output, rank_candidates
from pro_kernels.shards import Shard


def rank(
    logps: Tensor,
    layout: Layout,
    ranked: RankedCandidates,
    backend: str,
    final_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, its terms ``(n,)`` over prompts, sequence sums ``(S,)`` and row weights ``(N,)``."""
    backend = resolve(backend, logps.device, logps.dtype, layout.shape[1])
    return autograd.Ranking.apply(
        logps,
        layout.offsets,
        layout.lengths,
        *ranked.tensors,
        ranked.options,
        final_dtype,
        backend,
    )


def head_call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    compute: torch.dtype,
    logits_dtype: torch.dtype,
    options: LogitOptions,
    backend: str,
    budget: int | None,
    *,
    scalar_loss: bool,
    grad_filter: float | None,
    entropy: bool = False,
    shard: Shard | None = None,
) -> autograd.HeadCall:
    """Choose backend and tier, and bundle all that is not a tensor."""
    checks.check_device("layout", layout.targets, "hidden", hidden)
    grads = torch.is_grad_enabled()
    wide = logits_dtype != compute
    may_chunk = scalar_loss and not wide and weight.requires_grad and shard is None
    vocab = weight.shape[0] if shard is None else shard.most  # all ranks take the same chunks
    fixed = vocab * weight.shape[1] * compute.itemsize if weight.dtype != compute else 0
    if layout.shared_rows and hidden.requires_grad and hidden.itemsize < 4:
        fixed += 4 * hidden.numel()  # dHidden is summed in fp32
    plan = make_plan(
        layout.num_tokens,
        weight.shape[1],
        vocab,
        compute,
        hidden.device,
        need_hidden=grads and hidden.requires_grad,
        need_weight=grads and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        budget=budget if shard is None else shard.budget,
        prompt_tokens=layout.prompt_tokens if may_chunk else None,
        fixed=fixed,
        hidden_rows=layout.num_rows,
        wide_logits=wide,
        filtered=grad_filter is not None,
        grad_size=weight.itemsize if weight.requires_grad else 0,
        entropy=entropy,
    )
    candidates = layout.shape[1] if scalar_loss else None
    backend = resolve(backend, hidden.device, logits_dtype, candidates)
    filtered = grad_filter if plan.need_hidden or plan.need_weight else None
    return autograd.HeadCall(
        compute, logits_dtype, options, backend, plan, layout.shared_rows, filtered, shard
    )


def head_here(
    weight: Tensor, bias: Tensor | None, group: Any
) -> tuple[Tensor, Tensor | None, dist.ProcessGroup | None]:
    """What this rank needs of the head, as plain tensors, and the process group of ``group``.

    Before anything else is checked, so that no rank raises while others wait to gather.
    """
    group = shards.group_of("process_group", group)
    weight = shards.part_here("weight", weight, group)
    return weight, shards.part_here("bias", bias, group), group


@dataclass(frozen=True)
class Checked:
    """What checking the arguments of a call finds."""

    compute: torch.dtype
    logits_dtype: torch.dtype
    layout: Layout
    loss: Any = None  # PROOptions of a loss


def agreed(
    check: Callable[[], Checked],
    groups: dict[str, Any],
    hidden: Tensor,  # or logits, without a weight
    weight: Tensor | None,
    bias: Tensor | None,
    backend: str,
    budget: int | None,
    by_candidate: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Checked, Shard | None]:
    """What ``check`` returns, and this rank's part of a head that is split over ranks.

    With groups all their ranks must come here, and agree; what is wrong on one is raised by all, so
    that none waits for another. The ranks of ``process_group`` are asked first, for all that those
    of ``sequence_group`` are asked for and more: in a mesh of both no rank goes on alone.

    Args:
        check: checks the arguments of this rank.
        groups: ``process_group`` and ``sequence_group`` by name, None for none.
        hidden: hidden states, or logits where there is no weight.
        weight: the head's.
        bias: the head's.
        backend: as the caller named it.
        budget: as the caller named it.
        by_candidate: what a loss takes of each candidate or prompt, by name; None without one.
        options: what else must be the same on all ranks.
    """
    groups = {name: group for name, group in groups.items() if group is not None}
    if not groups:
        return check(), None
    checked, shard = None, None
    error: Exception | None = None
    shared: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    rows, limit = 0, 0
    try:
        if "process_group" in groups and options.get("grad_filter"):
            raise ValueError(
                f"grad_filter cannot be had with a process_group, got {options['grad_filter']}"
            )
        checked = check()
        candidates = None if by_candidate is None else checked.layout.shape[1]
        checks.check_device("layout", checked.layout.targets, "hidden", hidden)
        resolve(backend, hidden.device, checked.logits_dtype, candidates)
        limit = default_budget(hidden.device) if budget is None else check_budget(budget)
        shared = _shared_facts(checked, hidden, weight, bias, by_candidate, options)
        whole = _whole_facts(checked.layout, hidden, weight, bias)
        rows = 0 if weight is None else weight.shape[0]
    except Exception as wrong:  # whatever it is, the others wait to hear of it
        error = wrong
    device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
    if "process_group" in groups:
        group, facts = groups["process_group"], shared | whole
        try:
            shard = shards.agree("process_group", group, rows, limit, facts, error, device)
        except ValueError as wrong:
            error = wrong
    if "sequence_group" in groups:
        if checked is not None and error is None:
            vocab = shard.vocab if shard else rows or hidden.shape[-1]
            shared["the shape of the head"] = vocab, hidden.shape[-1]
            try:  # targets differ by rank: none may find a wrong one later, alone
                ops.check_range(checked.layout.targets, vocab)
            except ValueError as wrong:
                error = wrong
        shards.agree("sequence_group", groups["sequence_group"], rows, limit, shared, error, device)
    if error is not None:
        raise error
    assert checked is not None
    return checked, shard


def _shared_facts(
    checked: Checked,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    by_candidate: dict[str, Any] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What must be the same on all ranks of either group, by name; checked first."""
    LogitOptions(options["softcap"], options["logit_scale"])
    facts: dict[str, Any] = {name: repr(value) for name, value in options.items()}
    facts["dtypes"] = f"{hidden.dtype}, {getattr(weight, 'dtype', None)}, {checked.compute}"
    facts["the kind of device"] = hidden.device.type
    facts["bias"] = bias is not None
    if by_candidate is None:
        return facts
    shape = checked.layout.shape
    check_arguments(shape, **by_score(by_candidate), options=checked.loss)
    facts |= {name: shards.described(x) for name, x in by_candidate.items()}
    return {**facts, "loss": repr(checked.loss), "(B, n)": shape}


def _whole_facts(
    layout: Layout, hidden: Tensor, weight: Tensor | None, bias: Tensor | None
) -> dict[str, Any]:
    """What must be the same where the ranks hold the same tokens, by name."""
    grads = torch.is_grad_enabled()
    return {
        "the shape of hidden": tuple(hidden.shape),
        # Ranks with other numbers would take other chunks, and wait for one another.
        "scored tokens": layout.num_tokens,
        "shared rows": layout.shared_rows,
        "targets (checksum)": _checksum(layout.targets),
        "what needs a gradient": tuple(
            grads and x is not None and x.requires_grad for x in (hidden, weight, bias)
        ),
    }


def _checksum(x: Tensor) -> int | None:
    """A number made of integers and their places; None of a GPU's, which would wait."""
    if x.device.type != "cpu":
        return None
    return int((x * torch.arange(1, x.shape[0] + 1, device=x.device)).sum())


def pro_across_ranks(
    logps: Tensor,  # (N,), of this rank's tokens
    layout: Layout,  # of this rank's tokens
    sequence_group: Any,
    by_candidate: dict[str, Any],  # as of ``rank_candidates``
    options: PROOptions,
    backend: str,
) -> tuple[PROOutput, Tensor]:
    """The loss of the candidates as all ranks hold them, and the weight of each, (B n,)."""
    sums, lengths = autograd.SequenceSums.apply(
        logps,
        layout.offsets,
        layout.lengths,
        layout.sequences,
        sequence_group,
        resolve(backend, logps.device, logps.dtype),
    )
    whole = Layout.of_sums(lengths.view(layout.shape))
    ranked = rank_candidates(whole, **by_score(by_candidate), options=options, dtype=logps.dtype)
    loss, per_rank, sums, weights = rank(sums, whole, ranked, backend, options.final_dtype)
    return make_output(loss, per_rank, sums, whole, options), weights


def by_score(by_candidate: dict[str, Any]) -> dict[str, Any]:
    """What the loss of scores takes: all but the mask, of which the layout knows."""
    return {name: x for name, x in by_candidate.items() if name != "candidate_mask"}


def layout_of(targets: Tensor, ignore_index: int, vocab: int | None) -> Layout:
    """Compact, or of fixed sizes while compiling (nothing may depend on data then)."""
    if torch.compiler.is_compiling():
        return Layout.dense(targets, ignore_index)
    return Layout.from_padded(targets, ignore_index=ignore_index, vocab_size=vocab)


def pro_layout(
    hidden: Tensor,
    targets: Tensor | None,
    layout: Layout | None,
    ignore_index: int,
    shift: bool,
    vocab: int | None,
    candidate_mask: Tensor | None,
) -> Layout:
    """The layout given, or one made from targets, both checked, less what the mask leaves out."""
    if layout is not None:
        if not isinstance(layout, Layout):
            raise TypeError(f"layout must be a Layout or None, got {type(layout).__name__}")
        if targets is not None:
            raise ValueError("targets must be None when layout is given (it holds them)")
        if shift:
            raise ValueError("shift must be False when layout is given (shift when making it)")
        rows = hidden.numel() // hidden.shape[-1]
        if rows != layout.num_rows:
            raise ValueError(
                f"hidden must have {layout.num_rows} rows as the layout says, got {rows} in shape "
                f"{tuple(hidden.shape)}"
            )
        return _without_absent(layout, candidate_mask)
    if targets is None:
        raise TypeError("targets must be an integer tensor when no layout is given, got None")
    check_targets(targets)
    if hidden.dim() != 4 or hidden.shape[1] == 0:
        raise ValueError(
            f"hidden must have shape (B, n, T, H) without a layout, got {tuple(hidden.shape)}"
        )
    checks.check_same_shape("targets", targets, tuple(hidden.shape[:-1]), "(B, n, T)")
    checks.check_device("targets", targets, "hidden", hidden)
    if shift:
        targets = shift_targets(targets, ignore_index)
    return layout_of(of_present(targets, candidate_mask, ignore_index), ignore_index, vocab)


def of_present(targets: Tensor, candidate_mask: Tensor | None, ignore_index: int) -> Tensor:
    """Targets (B, n, T), nothing scored of candidates outside the mask."""
    if candidate_mask is None:
        return targets
    _check_mask(candidate_mask, tuple(targets.shape[:2]))
    there = candidate_mask.to(targets.device, non_blocking=True)[..., None]
    return torch.where(there, targets, ignore_index)


def _without_absent(layout: Layout, candidate_mask: Tensor | None) -> Layout:
    """Less the tokens of candidates outside the mask.

    Where the host does not know which these are, they stay as tokens of no candidate, and
    ``rows_of_present`` blanks their hidden states.
    """
    if candidate_mask is None:
        return layout
    _check_mask(candidate_mask, layout.shape)
    tokens = layout.candidate_tokens
    if tokens is None or candidate_mask.device.type != "cpu" or torch.compiler.is_compiling():
        absent = ~candidate_mask.to(layout.device, non_blocking=True)
        sequences = layout.sequences.masked_fill(absent, -1)
        return dataclasses.replace(layout, sequences=sequences, candidate_tokens=None)
    mask = zip(tokens, candidate_mask.tolist(), strict=True)
    there = [x for prompt, row in mask for x in row[: len(prompt)]]
    before = list(itertools.chain(*tokens))
    lengths = [m * x for m, x in zip(before, there, strict=True)]
    if lengths == before:
        return layout
    ends = [0, *itertools.accumulate(lengths)]
    made = [torch.tensor(x, device="cpu") for x in (there, before, ends, lengths)]
    made[1] = torch.repeat_interleave(made[0], made[1]).nonzero()[:, 0]
    kept, offsets, counts = (x.to(layout.device, non_blocking=True) for x in made[1:])
    firsts = [0, *itertools.accumulate(map(len, tokens))]
    per_prompt = tuple(tuple(lengths[a:b]) for a, b in itertools.pairwise(firsts))
    return dataclasses.replace(
        layout,
        rows=kept if layout.rows is None else layout.rows[kept],
        targets=layout.targets[kept],
        offsets=offsets,
        lengths=counts,
        prompt_tokens=tuple(map(sum, per_prompt)),
        candidate_tokens=per_prompt,
    )


def rows_of_present(hidden: Tensor, layout: Layout) -> Tensor:
    """Hidden states (R, H), 0 where no candidate has a token, which NaN times 0 would not be."""
    there = hidden.new_ones(layout.sequences.numel())
    there = autograd.by_token(there, layout.offsets, layout.sequences, layout.num_tokens)
    if layout.rows is not None:
        read = there.new_zeros(layout.num_rows)
        there = read.scatter_reduce(0, layout.rows, there, "amax")
    return torch.where(there[:, None] > 0, hidden, 0)


def _check_mask(candidate_mask: Tensor, shape: tuple[int, ...]) -> None:
    checks.check_tensor("candidate_mask", candidate_mask)
    if candidate_mask.dtype != torch.bool:
        raise TypeError(f"candidate_mask must be a bool tensor, got {candidate_mask.dtype}")
    checks.check_same_shape("candidate_mask", candidate_mask, shape, "(B, n)")
