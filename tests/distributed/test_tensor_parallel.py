"""A head split over 2 and 4 gloo ranks, through torchrun: as on one rank, and cheap on the wire."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrun import launched

import pro_kernels as pk
from cases import usable_backends

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
SCRIPT = Path(__file__).with_name("tensor_parallel.py")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each rank found."""
    return launched(SCRIPT, request.param, tmp_path_factory.mktemp("ranks"))


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
        assert rank["bytes"]["67"] == rank["bytes"]["1009"]
        found = rank["bytes"]["67"]
        # A maximum, a sum and a target logit of 4 bytes; dHidden in bf16.
        assert found["statistics"] == 12 and found["hidden"] == 16 * 2


def test_ranks_that_disagree_all_raise(ranks):
    expected = [
        "disagree on softcap",
        "in process_group, rank 0: ValueError: weight must not be empty",
        "disagree on dtypes",
        "disagree on the shape of hidden",
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
