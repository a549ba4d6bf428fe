"""Tokens split over 2 and 4 gloo ranks, through torchrun: as on one rank, 8 bytes a candidate."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pro_kernels as pk

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed
from bench.suites.ranks import wire
from cases import usable_backends

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
SCRIPT = Path(__file__).with_name("sequence_parallel.py")


def test_outputs_and_gradients_are_those_of_one_rank(ranks):
    """Eleven cases and five splits in two dtypes; four frozen sets and three budgets of one."""
    assert [rank["compared"] for rank in ranks] == [11 * 2 * 5 + 2 * 4 * 3] * len(ranks)
    met = {tuple(plan) for rank in ranks for plan in rank["plans"]}
    assert met >= {("T1", "all", False), ("T3", "some", True), ("T3", "none", True)}
    assert met >= {("T1f", "none", True), ("T0", "none", True)}
    assert all(rank["backends"] == usable_backends() for rank in ranks)


def test_scores_travel_and_nothing_else(ranks):
    """As bench.suites.ranks says: the agreement, 8 bytes a candidate; the backward asks nobody."""
    for rank in ranks:
        found = rank["traffic"]
        model = wire.split_tokens(len(ranks), found["candidates"])
        assert [(kind, size) for kind, _, size in found["forward"]] == [
            (c.kind, c.size) for c in model
        ]
        assert found["backward"] == []


def test_ranks_that_disagree_all_raise(ranks):
    expected = [
        "ValueError: the ranks of sequence_group disagree on (B, n)",
        "ValueError: the ranks of sequence_group disagree on loss",
        "ValueError: the ranks of sequence_group disagree on rewards",
        "ValueError: in sequence_group, rank 1: TypeError: sft_weight must be a number",
        "ValueError: in sequence_group, rank 1: ValueError: targets must lie in [0, 37)",
        "ValueError: in sequence_group, rank 1: ValueError: targets must be None when layout",
        "ValueError: the ranks of sequence_group disagree on dtypes",
        "ValueError: the ranks of sequence_group disagree on the shape of the head: [(37, 16), (36",
        "ValueError: in sequence_group, rank 1: ValueError: budget must be > 0 bytes, got -1",
        "ValueError: in sequence_group, rank 1: ValueError: backend='cuda' cannot serve this call",
        "ValueError: in sequence_group, rank 1: TypeError: candidate_mask must be a bool tensor",
        "ValueError: rewards are all equal in prompts [0, 1]",
        "ValueError: rewards must be finite, got nan for prompt 0 candidate 0",
        "ValueError: in sequence_group, rank 1: TypeError: hidden must be a tensor, got NoneType",
        "ValueError: in sequence_group, rank 1: TypeError: layout must be a Layout",
        "TypeError: sequence_group must be a torch.distributed.ProcessGroup or a DeviceMesh of one",
        "ValueError: sequence_group does not contain this process",
        "ValueError: the ranks of sequence_group disagree on the shape of the head",
        "ValueError: in sequence_group, rank 1: ValueError: targets must lie in [0, 37)",
        "ValueError: in sequence_group, rank 1: TypeError: targets must be an integer tensor",
        "ValueError: the ranks of sequence_group disagree on loss",
        "ValueError: in sequence_group, rank 1: ValueError: targets must be on the device of logit",
    ]
    for rank in ranks:
        assert len(rank["messages"]) == len(expected)
        for message, start in zip(rank["messages"], expected, strict=True):
            assert message.startswith(start), message


def test_in_a_mesh_of_both_groups_all_raise(ranks):
    """The fault of one rank, or of one row of the mesh, reaches all four."""
    expected = [
        "softcap must be > 0, got -1.0",
        "the ranks of process_group disagree on softcap",
        "the ranks of sequence_group disagree on softcap",
        "the ranks of process_group disagree on rewards",
        "budget must be > 0 bytes, got 0",
        "sft_weight must be a number, got 'much'",
        "grad_filter cannot be had with a process_group",
    ]
    for rank in ranks:
        if len(ranks) == 2:  # too few for a mesh
            assert "mesh" not in rank
            continue
        for message, part in zip(rank["mesh"], expected, strict=True):
            assert part in message


@pytest.mark.parametrize("compiling", [False, True])
def test_without_a_process_group_there_is_none(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    logits, targets = torch.randn(1, 2, 3, 5), torch.ones(1, 2, 3, dtype=torch.int64)
    reason = "cannot be compiled" if compiling else "needs torch.distributed.init_process_group"
    with pytest.raises(ValueError, match=f"sequence_group {reason}"):
        pk.pro_loss(logits, targets, None, sequence_group=object())
    with pytest.raises(ValueError, match=f"sequence_group {reason}"):
        pk.linear_pro_loss(logits, torch.randn(7, 5), targets, None, sequence_group=object())
