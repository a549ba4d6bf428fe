"""A head split over 2 and 4 gloo ranks, through torchrun: as on one rank, and cheap on the wire."""

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
SCRIPT = Path(__file__).with_name("tensor_parallel.py")


def test_loss_log_probs_and_gradients_are_those_of_one_rank(ranks):
    """Ten cases, two dtypes, two functions, four frozen sets, three budgets; every backend."""
    assert [rank["compared"] for rank in ranks] == [10 * 2 * 2 * 4 * 3] * len(ranks)
    for rank in ranks:
        assert rank["plans"] == ranks[0]["plans"]
        met = {tuple(plan) for plan in rank["plans"]}
        assert met >= {("T1", "all", False), ("T3", "some", True), ("T3", "none", True)}
        assert met >= {("T1f", "none", True), ("T0", "none", True)}
    assert all(rank["backends"] == usable_backends() for rank in ranks)


def test_nothing_on_the_wire_grows_with_the_vocabulary(ranks):
    for rank in ranks:
        assert [call["V"] for call in rank["bytes"][:2]] == [67, 1009]
        for call in rank["bytes"][:2]:
            sizes = [size for kind, _, size in call["sent"] if kind == "all_reduce"]
            # A maximum, a sum and a target logit of 4 bytes; dHidden in bf16.
            assert sum(sizes[:-1]) == 12 * call["N"] and sizes[-1] == call["R"] * 16 * 2


def test_the_scaling_model_knows_every_byte(ranks):
    """Five calls: several chunks, frozen sides, two dtypes."""
    assert [call["chunks"] > 1 for call in ranks[0]["bytes"]] == [False, False, True, True, False]
    for call in (call for rank in ranks for call in rank["bytes"]):
        shape = {k: call[k] for k in ("N", "R", "H", "b", "chunks", "need_hidden")}
        predicted = wire.tensor_parallel(len(ranks), **shape)
        sent = call["sent"]
        named = {"agreement": sent[:1]}
        if call["need_hidden"]:
            sent, named["dHidden"] = sent[:-1], sent[-1:]
        named["maxima"] = [x for x in sent[1:] if x[1] == "max"]
        named["sums and target logits"] = [x for x in sent[1:] if x[1] == "sum"]
        assert sum(map(len, named.values())) == len(call["sent"])
        assert {c.name: (c.kind, c.calls, c.size) for c in predicted} == {
            name: (x[0][0], len(x), sum(size for *_, size in x)) for name, x in named.items()
        }


def test_ranks_that_disagree_all_raise(ranks):
    expected = [
        "disagree on softcap",
        "in process_group, rank 0: ValueError: weight must not be empty",
        "disagree on dtypes",
        "disagree on (B, n)",
        "disagree on loss",
        "grad_filter cannot be had with a process_group",
        "return_entropy cannot be had with a process_group",
        "",  # the range of targets: in words of its own
        "ProcessGroup or a DeviceMesh of one dimension, got str",
        "in process_group, rank 0: ValueError: weight must not be empty",
        "in process_group, rank 1: ValueError: bias must",
        "in process_group, rank 0: ValueError: weight must",
        "in process_group, rank 1: ",
        "process_group does not contain this process",
        "disagree on targets (checksum)",
        "disagree on scored tokens",
    ]
    for rank in ranks:
        assert len(rank["messages"]) == len(expected)
        for message, part in zip(rank["messages"], expected, strict=True):
            assert message and part in message


def test_dtensor_heads_are_gathered_or_split_as_on_one_rank(ranks):
    """Each: two dtypes, two functions (gathered, the entropy too), three frozen sets, two budgets.

    Two ranks gather Shard(0) and Replicate, four an HSDP mesh; the group is a mesh, or its group,
    and on four ranks one of two dimensions, the other being FSDP's.
    """
    of_four = len(ranks) == 4
    for rank in ranks:
        found = rank["dtensors"]
        assert found["gathered"] == (1 if of_four else 2) * 2 * 3 * 3 * 2
        assert found["split"] == (3 if of_four else 2) * 2 * 2 * 3 * 2
        # The whole weight waits for the backward only where rows are computed again there.
        assert found["held"] == {"all": False, "some": True}
        expected = [
            "weight must be sharded or replicated, got a DTensor placed (Partial(",
            "got a DTensor placed (Replicate(),)",
            "got a DTensor placed (Shard(dim=1),)",
            "got a mesh of 2 with names ('dp', 'tp')",
            "weight must be split over process_group",  # ranks in another order
            "rank 0: ValueError: bias must have shape",
            "ProcessGroup or a DeviceMesh of one dimension, got str",
            "hidden must be a plain tensor, got a DTensor",
        ]
        for message, part in zip(found["messages"], expected, strict=True):
            assert part in message


def test_without_a_process_group_there_is_none():
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match="needs torch.distributed.init_process_group"):
        pk.linear_token_logps(hidden, weight, torch.tensor([1, 2]), process_group=object())
