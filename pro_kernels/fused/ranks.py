"""Calls that several ranks make together: what they must agree on, and a loss of all their tokens.

``shards.py`` has what is said between ranks; here is what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pro_kernels import validate
from pro_kernels.backends.protocol import Candidates
from pro_kernels.fused import autograd, ops, shards
from pro_kernels.fused.call import Call
from pro_kernels.fused.planner import default_budget
from pro_kernels.fused.rank_order import check_arguments
from pro_kernels.layout import Layout, by_token
from pro_kernels.options import CallOptions

# What checking a call's arguments finds: the call but for its plan, its layout, how it runs, and
# the options of a loss: ``PROOptions`` of one of candidates.
Door = tuple[Call, Layout, CallOptions, Any]
# Hidden (or logits), weight, bias, and a logit_scale of each row.
Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
# Of ``CallOptions``, what may differ between ranks.
_OWN = ("backend", "budget", "process_group", "sequence_group", "inplace_backward")


def agreed(
    check: Callable[[], Door],  # of the arguments of this rank
    groups: Sequence[Any],  # ``process_group`` and ``sequence_group``, None for none
    tensors: Tensors,  # as the caller gave them
    by_candidate: dict[str, Any] | None = None,  # what a loss takes of each candidate or prompt
) -> Door:
    """What ``check`` returns, its call with this rank's part of a head that is split over ranks.

    With groups all their ranks must come here, and agree; what is wrong on one is raised by all, so
    that none waits for another. The ranks of ``process_group`` are asked first, for all that those
    of ``sequence_group`` are asked for and more: in a mesh of both no rank goes on alone.
    """
    process_group, sequence_group = groups
    if process_group is None and sequence_group is None:
        return check()
    hidden, weight = tensors[:2]
    found, shard = None, None
    error: Exception | None = None
    shared: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    rows, limit = 0, 0
    try:
        found = check()
        call, layout, how, loss = found
        if process_group is not None and how.grad_filter:
            raise ValueError(
                f"grad_filter cannot be had with a process_group, got {how.grad_filter}"
            )
        own = default_budget(hidden.device) if how.budget is None else how.budget
        limit = validate.check_budget(own)
        shared = _shared_facts(found, tensors, by_candidate)
        whole = _whole_facts(layout, tensors)
        rows = 0 if weight is None else weight.shape[0]
    except Exception as wrong:  # whatever it is, the others wait to hear of it
        error = wrong
    device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
    if process_group is not None:
        facts = shared | whole
        try:
            shard = shards.agree("process_group", process_group, rows, limit, facts, error, device)
        except ValueError as wrong:
            error = wrong
    if sequence_group is not None:
        if found is not None and error is None:
            vocab = shard.vocab if shard else rows or hidden.shape[-1]
            shared["the shape of the head"] = vocab, hidden.shape[-1]
            try:  # targets differ by rank: none may find a wrong one later, alone
                ops.check_range(found[1].targets, vocab)
            except ValueError as wrong:
                error = wrong
        shards.agree("sequence_group", sequence_group, rows, limit, shared, error, device)
    if error is not None:
        raise error
    assert found is not None
    return found[0].but(shard=shard), *found[1:]


def _shared_facts(
    found: Door, tensors: Tensors, by_candidate: dict[str, Any] | None
) -> dict[str, Any]:
    """What must be the same on all ranks of either group, by name; checked first."""
    (call, layout, how, loss), (hidden, weight, bias, scale) = found, tensors
    facts: dict[str, Any] = {
        f.name: repr(getattr(x, f.name))
        for x in (call.logits, how)
        for f in fields(x)
        if f.name not in _OWN
    }
    facts["dtypes"] = f"{hidden.dtype}, {getattr(weight, 'dtype', None)}, {call.compute_dtype}"
    facts["the kind of device"] = hidden.device.type
    facts |= {"bias": bias is not None, "loss": repr(loss)}
    facts["a logit_scale of each row"] = scale is not None
    if by_candidate is None:
        return facts
    check_arguments(layout.shape, **by_score(by_candidate), options=loss)
    facts |= {name: shards.described(x) for name, x in by_candidate.items()}
    return {**facts, "(B, n)": layout.shape}


def _whole_facts(layout: Layout, tensors: Tensors) -> dict[str, Any]:
    """What must be the same where the ranks hold the same tokens, by name."""
    grads, scale = torch.is_grad_enabled(), tensors[3]
    return {
        "the shape of hidden": tuple(tensors[0].shape),
        "the sum of logit_scale": None if scale is None else shards.described(scale.sum()),
        # Ranks with other numbers would take other chunks, and wait for one another.
        "scored tokens": layout.num_tokens,
        "shared rows": layout.shared_rows,
        "targets (checksum)": _checksum(layout.targets),
        "what needs a gradient": tuple(
            grads and x is not None and x.requires_grad for x in tensors
        ),
    }


def _checksum(x: Tensor) -> int | None:
    """A number made of integers and their places; None of a GPU's, which would wait."""
    if x.device.type != "cpu":
        return None
    return int((x * torch.arange(1, x.shape[0] + 1, device=x.device)).sum())


def by_score(by_candidate: dict[str, Any]) -> dict[str, Any]:
    """What the loss of scores takes: all but the mask, of which the layout knows."""
    return {name: x for name, x in by_candidate.items() if name != "candidate_mask"}


# Log-probs (N,) of this rank's tokens, and what a filter dropped.
Logps = Callable[[], tuple[Tensor, Tensor | None]]
# Of candidates: loss, its terms, sequence sums and row weights, and what a filter dropped.
Loss = Callable[[Candidates], tuple[Any, ...]]
# The call with its plan, and the functions of it; asked with whether the result is one loss.
Source = Callable[[Call, Layout, CallOptions, bool], tuple[Call, Logps, Loss]]


def across(group: Any, layout: Layout, call: Call, logps: Logps) -> tuple[Layout, Loss]:
    """The candidates as all ranks of ``group`` hold them, and the loss of these.

    ``layout`` is of this rank's tokens.
    """
    own, dropped = logps()
    sums, lengths = autograd.SequenceSums.apply(
        own, layout.offsets, layout.lengths, layout.sequences, group, call
    )

    def loss(candidates: Candidates) -> tuple[Any, ...]:
        *found, weights = autograd.Ranking.apply(sums, *candidates, call)
        row_weights = by_token(weights, layout.offsets, layout.sequences, layout.num_tokens)
        return *found, row_weights, dropped

    return Layout.of_sums(lengths.view(layout.shape)), loss
